package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/userns"
	"github.com/layerctl/layerctl/mount"
	"github.com/layerctl/layerctl/snapshot"
)

type mountOptions struct {
	rw     bool
	name   string
	labels map[string]string
	quota  size
}

// size is a flag of bytes, with a unit or not.
type size int64

func (s *size) String() string { return strconv.FormatInt(int64(*s), 10) }
func (s *size) Type() string   { return "SIZE" }

func (s *size) Set(text string) error {
	n, err := parseCount(text)
	if err == nil && n < 0 {
		err = fmt.Errorf("%q is no size", text)
	}
	*s = size(n)
	return err
}

func (a *app) mountCommand() *cobra.Command {
	var o mountOptions
	c := inNamespaces(nsKeep, &cobra.Command{
		Use: "mount [NAME [TARGET]]", Short: "Mount a snapshot, or list what is mounted",
		Long: `Mount a snapshot or an image and print where: at TARGET, which is made if it is
not there, or at ROOT/mnt/NAME. The mount outlives the command.

Read-only is the default. With --rw a writable snapshot is made on top of a
committed one, called --name or by a made name, and mounted; diff, commit and rm
take that name. A writable snapshot that exists is mounted by its own name, or by
the same command again.

Without arguments the mounts of this store are listed.

The mount of an ordinary user is seen in the namespaces that a keeper process
holds; "layerctl unshare COMMAND" runs a command there. Where user namespaces are
not to be had, fusermount3 mounts layers of the driver fuse for everybody to see.`,
		Args:              cobra.MaximumNArgs(2),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				if o.rw || o.name != "" {
					return usagef(cmd, "what is to be mounted is missing")
				}
				return verbError(a.listMounts(cmd.Context()), "mount")
			}
			if o.quota > 0 && !o.rw {
				return usagef(cmd, "--quota is for what --rw makes")
			}
			return verbError(a.mount(cmd.Context(), args, o), "mount", args[0])
		},
	})
	c.Flags().BoolVar(&o.rw, "rw", false, "mount writable")
	c.Flags().StringVar(&o.name, "name", "", "the name of the new writable snapshot or, read-only, of a view")
	c.Flags().StringToStringVar(&o.labels, "label", nil, "labels of the new snapshot")
	c.Flags().Var(&o.quota, "quota", "what may be written to the new snapshot: bytes, or with K, M, G or T")
	_ = c.RegisterFlagCompletionFunc("name", a.completeNames(0, snapshots.KindActive, snapshots.KindView))
	return c
}

// mountRow is a line of the list of mounts.
type mountRow struct {
	Name   string `json:"name"`
	Target string `json:"target"`
	Mode   string `json:"mode"` // "rw" or "ro"
	Driver string `json:"driver"`
}

func (a *app) listMounts(ctx context.Context) error {
	rows := []mountRow{}
	if a.storeThere() {
		s, err := a.openStore(ctx)
		if err != nil {
			return err
		}
		ms, err := s.Mounted(ctx)
		if err != nil {
			return err
		}
		for _, m := range ms {
			rows = append(rows, mountRow{m.Key, m.Target, mode(m.ReadOnly), m.Driver})
		}
	}
	return show(a, rows, table[mountRow]{
		head: []string{"NAME", "MODE", "DRIVER", "MOUNTED ON"},
		row:  func(r mountRow) []string { return []string{shortName(r.Name), r.Mode, r.Driver, r.Target} },
		name: func(r mountRow) string { return r.Target },
	})
}

func mode(readOnly bool) string {
	if readOnly {
		return "ro"
	}
	return "rw"
}

// mount mounts args[0] at args[1] or a place of its own and prints where.
func (a *app) mount(ctx context.Context, args []string, o mountOptions) (err error) {
	v, err := a.openView(ctx)
	if err != nil {
		return err
	}
	info, err := a.resolve(ctx, v, args[0])
	if err != nil {
		return err
	}
	m := &mounting{a: a, v: v, o: o, base: info, said: args[0]}
	if err := m.choose(ctx); err != nil {
		return err
	}
	target, err := a.mountpoint(m.label(), args[1:])
	if err != nil {
		return err
	}
	if done, err := m.already(ctx, target); done || err != nil {
		if err == nil {
			fmt.Fprintln(a.out, target)
		}
		return err
	}
	if err := m.make(ctx, target); err != nil {
		return err
	}
	if m.prepare && !a.quiet {
		a.note("%s: a %s snapshot of %s", m.key, kindWord(m.kind), shortName(info.Name))
	}
	a.sayVolatile()
	fmt.Fprintln(a.out, target)
	return nil
}

// mounting is one run of mount.
type mounting struct {
	a       *app
	v       *snapshot.View
	o       mountOptions
	base    snapshots.Info
	said    string         // what the user called it
	key     string         // what is mounted
	kind    snapshots.Kind // of key
	prepare bool           // key is to be made on base first
}

// choose decides what is mounted: the snapshot that was named, or a new one on
// top of it.
func (m *mounting) choose(ctx context.Context) error {
	m.key, m.kind = m.base.Name, m.base.Kind
	if m.kind != snapshots.KindCommitted {
		if m.o.name != "" && m.o.name != m.key {
			return hintf(fmt.Errorf("%s is no committed snapshot, so none can be made on it: %w", m.key, errdefs.ErrFailedPrecondition),
				"commit it first, or leave out --name")
		}
		if m.o.rw && m.kind == snapshots.KindView {
			return hintf(fmt.Errorf("%s is a read-only view: %w", m.key, errdefs.ErrFailedPrecondition), "leave out --rw")
		}
		return nil
	}
	if !m.o.rw && m.o.name == "" {
		return nil // a committed layer is mounted as it is
	}
	m.kind = snapshots.KindView
	if m.o.rw {
		m.kind = snapshots.KindActive
	}
	if m.key = m.o.name; m.key == "" {
		m.key = madeName(plainName(m.base.Name, m.said))
	}
	return m.chooseNamed(ctx)
}

// chooseNamed takes the snapshot called --name if it is what would be made: the
// command was given before, and what it mounted was unmounted.
func (m *mounting) chooseNamed(ctx context.Context) error {
	had, err := m.v.Stat(ctx, m.key)
	if errdefs.IsNotFound(err) {
		m.prepare = true
		return checkName(m.key)
	}
	if err != nil {
		return err
	}
	if had.Kind != m.kind || had.Parent != m.base.Name {
		return hintf(fmt.Errorf("%s is there already, as a %s snapshot of %q: %w", m.key, kindWord(had.Kind), had.Parent, errdefs.ErrAlreadyExists),
			"choose another --name, or mount it by its own name")
	}
	return nil
}

// label names the mountpoint: the key, but for a layer of an image the image's
// name and the beginning of the digest.
func (m *mounting) label() string {
	short := plainName(m.key, m.said)
	if hex := strings.TrimPrefix(m.key, "sha256:"); short != m.key && !strings.HasPrefix(hex, short) {
		short += "-" + hex[:12]
	}
	return short
}

// mountpoint is the place to mount at: the one that was given, or ROOT/mnt/NAME.
func (a *app) mountpoint(name string, args []string) (string, error) {
	if len(args) == 1 {
		return filepath.Abs(args[0])
	}
	file := strings.TrimPrefix(url.PathEscape("x"+name), "x")
	if len(file) > maxName {
		file = file[:maxName-17] + "-" + digest.FromString(name).Encoded()[:16]
	}
	return filepath.Join(a.root, "mnt", file), nil
}

// already finds out whether the snapshot is mounted there, and refuses a second
// mount of a writable one elsewhere.
func (m *mounting) already(ctx context.Context, target string) (bool, error) {
	all, err := m.v.Store().Mounted(ctx)
	if err != nil {
		return false, err
	}
	real := realPath(target)
	for _, at := range all {
		ours := at.View == m.v.Name() && at.Key == m.key
		switch {
		case at.Target == real && ours && at.ReadOnly == m.readOnly():
			return true, nil
		case at.Target == real:
			return false, hintf(fmt.Errorf("%s is mounted (%s) at %s: %w", at.Key, mode(at.ReadOnly), real, errdefs.ErrAlreadyExists),
				"`layerctl umount %s`, or another TARGET", real)
		case ours && !(at.ReadOnly && m.readOnly()):
			return false, hintf(fmt.Errorf("%s is mounted (%s) at %s: %w", m.key, mode(at.ReadOnly), at.Target, errdefs.ErrFailedPrecondition),
				"`layerctl umount %s` first", m.key)
		}
	}
	return false, nil
}

func (m *mounting) readOnly() bool { return m.kind != snapshots.KindActive || !m.o.rw }

// realPath resolves the symlinks of a path, as far as it is there.
func realPath(path string) string {
	if p, err := filepath.EvalSymlinks(path); err == nil {
		return p
	}
	if path == "/" {
		return path
	}
	return filepath.Join(realPath(filepath.Dir(path)), filepath.Base(path))
}

// make prepares the snapshot if need be, makes the mountpoint and mounts. After
// an error neither snapshot nor mountpoint is left of it.
func (m *mounting) make(ctx context.Context, target string) (err error) {
	undo := func(f func() error) {
		if err != nil {
			err = errors.Join(err, f())
		}
	}
	if m.prepare {
		o := snapshot.CreateOptions{ReadOnly: m.kind == snapshots.KindView, Labels: m.o.labels, Quota: int64(m.o.quota)}
		if err := m.v.Create(ctx, m.key, m.base.Name, o); err != nil {
			return err
		}
		defer undo(func() error { return discard(ctx, m.v, m.key) })
	}
	made, err := makeMountpoint(target)
	if err != nil {
		return err
	}
	if made {
		defer undo(func() error { return os.Remove(target) })
	}
	ms, err := m.v.MountsWith(ctx, m.key, drivers.MountOptions{ReadOnly: m.readOnly(), Volatile: m.a.volatile})
	if err != nil {
		return err
	}
	return bindHint(mount.All(ctx, ms, target), ms)
}

// bindHint says how a user who may bind nothing gets a layer that can be mounted.
func bindHint(err error, ms []mount.Mount) error {
	if errors.Is(err, syscall.EPERM) && userns.Needed() && ms[0].Type == "bind" {
		return hintf(err, "without user namespaces only layers of the driver fuse can be mounted: import with `--driver fuse`, or %s", allowNamespaces)
	}
	return err
}

// makeMountpoint makes the last component of target, and ROOT/mnt above it, if
// they are not there.
func makeMountpoint(target string) (made bool, err error) {
	st, err := os.Stat(target)
	switch {
	case err == nil && !st.IsDir():
		return false, fmt.Errorf("%s is not a directory: %w", target, errdefs.ErrFailedPrecondition)
	case err == nil || !os.IsNotExist(err):
		return false, err
	}
	if dir := filepath.Dir(target); filepath.Base(dir) == "mnt" {
		if err := os.Mkdir(dir, 0o711); err != nil && !os.IsExist(err) {
			return false, err
		}
	}
	if err := os.Mkdir(target, 0o755); err != nil {
		return false, err
	}
	return true, nil
}

func kindWord(k snapshots.Kind) string {
	switch k {
	case snapshots.KindActive:
		return "writable"
	case snapshots.KindView:
		return "read-only"
	}
	return "committed"
}

type umountOptions struct{ lazy, all bool }

func (a *app) umountCommand() *cobra.Command {
	var o umountOptions
	c := inNamespaces(nsDrop, &cobra.Command{
		Use: "umount {NAME|TARGET}...", Short: "Unmount snapshots",
		Long: `Unmount snapshots, by name or by where they are mounted. What is not mounted is
no error. A mount that is in use is not undone, and who uses it is said.`,
		ValidArgsFunction: a.completeNames(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.all == (len(args) > 0) {
				return usagef(cmd, "give names or targets, or --all")
			}
			return a.umount(cmd.Context(), args, o)
		},
	})
	c.Flags().BoolVar(&o.lazy, "lazy", false, "detach now, even if it is in use")
	c.Flags().BoolVar(&o.all, "all", false, "unmount every mount of this store")
	return c
}

// umount undoes the mounts that args name. It goes on after an error.
func (a *app) umount(ctx context.Context, args []string, o umountOptions) error {
	v, err := a.openView(ctx)
	if err != nil {
		return err
	}
	all, err := v.Store().Mounted(ctx)
	if err != nil {
		return verbError(err, "umount")
	}
	slices.Reverse(all) // the last first: a mount may be on top of another
	if o.all {
		return a.unmountAll(all, o.lazy)
	}
	var errs []error
	for _, arg := range args {
		some, err := a.mountsNamed(ctx, v, all, arg)
		if err == nil {
			err = a.unmountAll(some, o.lazy)
		}
		errs = append(errs, verbError(err, "umount", arg))
	}
	return errors.Join(errs...)
}

// mountsNamed finds the mounts of a name, or at a target. A snapshot or a place
// that is there without a mount has none.
func (a *app) mountsNamed(ctx context.Context, v *snapshot.View, all []snapshot.Mounted, arg string) ([]snapshot.Mounted, error) {
	at := func(f func(snapshot.Mounted) bool) (some []snapshot.Mounted) {
		for _, m := range all {
			if f(m) {
				some = append(some, m)
			}
		}
		return some
	}
	path, err := filepath.Abs(arg)
	if err != nil {
		return nil, err
	}
	path = realPath(path)
	byName := func(m snapshot.Mounted) bool { return m.View == v.Name() && m.Key == arg }
	byPath := func(m snapshot.Mounted) bool { return m.Target == path }
	for _, f := range []func(snapshot.Mounted) bool{byName, byPath} {
		if some := at(f); len(some) > 0 {
			return some, nil
		}
	}
	info, err := a.resolve(ctx, v, arg)
	if err == nil {
		arg = info.Name
		return at(byName), nil
	}
	if _, serr := os.Stat(path); serr == nil && errdefs.IsNotFound(err) {
		return nil, nil
	}
	return nil, err
}

// unmountAll unmounts, and removes the mountpoints that mount made under the
// root.
func (a *app) unmountAll(ms []snapshot.Mounted, lazy bool) error {
	var errs []error
	for _, m := range ms {
		if err := mount.Unmount(m.Target, mount.UnmountOptions{Lazy: lazy}); err != nil {
			errs = append(errs, busy(m.Target, err))
			continue
		}
		if filepath.Dir(m.Target) == realPath(filepath.Join(a.root, "mnt")) {
			_ = os.Remove(m.Target) // not empty or busy: not ours to force
		}
	}
	return errors.Join(errs...)
}

// busy says who uses a mount that could not be undone: each process once, and
// not this one, which holds nothing for longer than it runs.
func busy(target string, err error) error {
	if !errors.Is(err, syscall.EBUSY) {
		return err
	}
	all, herr := mount.Holders(target)
	var who []string
	for i := 0; i < len(all); {
		h, how := all[i], []string{all[i].What}
		for i++; i < len(all) && h.PID != 0 && all[i].PID == h.PID; i++ {
			how = append(how, all[i].What)
		}
		switch h.PID {
		case 0:
			who = append(who, "the mount "+h.Path)
		case os.Getpid():
		default:
			who = append(who, fmt.Sprintf("%s %d (%s)", h.Comm, h.PID, strings.Join(how, ", ")))
		}
	}
	if herr != nil || len(who) == 0 {
		return hintf(err, "end what uses it, or use --lazy")
	}
	return hintf(fmt.Errorf("%s is in use by %s: %w: %w", target, strings.Join(who, "; "), errdefs.ErrFailedPrecondition, syscall.EBUSY),
		"end that, or use --lazy")
}
