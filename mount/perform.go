package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// All performs the mounts at target, which must exist, in order. A mount whose
// Target is not empty is made there, resolved inside what is mounted already.
// After an error, or once ctx is done, nothing of it stays mounted.
//
// Errors wrap ErrInvalidArgument (options), ErrNotFound (a path that is not
// there), ErrFailedPrecondition (an upper in use, too many lowers for mount(2)),
// ErrNotImplemented (the kernel lacks it), ErrPermissionDenied, and the errno.
func All(ctx context.Context, ms []Mount, target string) (err error) {
	plans, err := parseAll(ms)
	if err != nil {
		return err
	}
	var done []*sys.Fd
	defer func() { release(done, err != nil) }()
	for _, p := range plans {
		if err := ctx.Err(); err != nil {
			return err
		}
		made, err := p.attachAt(ctx, target)
		if err != nil {
			return p.wrap(err)
		}
		if made != nil {
			done = append(done, made)
		}
	}
	return nil
}

// release closes the roots of the mounts that All made, last first, after
// unmounting them if it failed.
func release(done []*sys.Fd, undo bool) {
	for i := len(done) - 1; i >= 0; i-- {
		if undo {
			_ = sys.Umount(done[i].ProcPath(), sys.MNT_DETACH)
		}
		done[i].Close()
	}
}

func parseAll(ms []Mount) ([]*plan, error) {
	if len(ms) == 0 {
		return nil, fmt.Errorf("mount: nothing to mount: %w", errdefs.ErrInvalidArgument)
	}
	var plans []*plan
	for _, m := range ms {
		p, err := parse(m)
		if err != nil {
			return nil, err
		}
		plans = append(plans, p)
	}
	return plans, nil
}

// attachAt performs p below the directory called root and returns the root of
// the new mount, by which it can be undone; nil where there is nothing to undo.
func (p *plan) attachAt(ctx context.Context, root string) (*sys.Fd, error) {
	at, err := sys.Open(root, sys.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	if p.target != "" && p.target != "/" {
		below, err := at.Openat2(strings.TrimLeft(p.target, "/"), sys.O_PATH, 0, sys.RESOLVE_IN_ROOT)
		if err != nil {
			return nil, err
		}
		defer below.Close()
		at = below
	}
	return p.attach(ctx, at)
}

// attach performs p at the directory or file at.
func (p *plan) attach(ctx context.Context, at *sys.Fd) (*sys.Fd, error) {
	switch p.kind {
	case remount:
		return nil, sys.Mount(p.source, at.ProcPath(), p.fstype, p.flags, p.data())
	case helper:
		return byPath(at, func(target string) error { return p.runHelper(ctx, target) })
	}
	m, err := p.detached(ctx)
	if errors.Is(err, errOldKernel) {
		return p.attachOld(ctx, at)
	}
	if err != nil {
		return nil, err
	}
	if err := m.MoveTo(at); err != nil {
		m.Close()
		return nil, err
	}
	if p.propagation != 0 {
		if err := m.SetMountAttr(sys.MountAttr{Propagation: p.propagation}, p.propagateTo); err != nil {
			release([]*sys.Fd{m}, true)
			return nil, err
		}
	}
	return m, nil
}

// byPath performs a mount that only takes a path, and returns its root: one
// more lookup of the path finds what is now mounted there.
func byPath(at *sys.Fd, perform func(target string) error) (*sys.Fd, error) {
	target, err := os.Readlink(at.ProcPath()) // no symlink left in it
	if err != nil {
		return nil, err
	}
	if err := perform(target); err != nil {
		undoByPath(at, target)
		return nil, err
	}
	m, err := sys.Open(target, sys.O_PATH, 0)
	if err != nil {
		undoByPath(at, target)
	}
	return m, err
}

// undoByPath unmounts what is mounted at target on top of at: of a helper that
// mounted and then failed, or was killed. mountinfo tells, since the server of a
// FUSE mount may be dead.
func undoByPath(at *sys.Fd, target string) {
	s, err := at.Stat("")
	if err != nil {
		return
	}
	infos, err := List()
	if err != nil {
		return
	}
	if slices.ContainsFunc(infos, func(i Info) bool { return i.Target == target && uint64(i.Parent) == s.MountID }) {
		_ = Unmount(target, UnmountOptions{Lazy: true})
	}
}

// Tree is a mounted tree that is attached nowhere: only this process reaches
// it, and it vanishes with the Tree or the process.
type Tree struct {
	root     *sys.Fd
	server   *served // of a FUSE file system, else nil
	attached bool
}

// Path returns a path by which this process reaches the tree, valid until
// Close: /proc/self/fd/N.
func (t *Tree) Path() string { return t.root.ProcPath() }

// Fd returns the tree's root (O_PATH), which the Tree owns.
func (t *Tree) Fd() *sys.Fd { return t.root }

// Attach makes the tree visible at target. Closing the Tree then leaves it.
func (t *Tree) Attach(target string) error {
	at, err := sys.Open(target, sys.O_PATH, 0)
	if err != nil {
		return fmt.Errorf("mount: attach: %w", err)
	}
	defer at.Close()
	if err := t.root.MoveTo(at); err != nil {
		return fmt.Errorf("mount: attach: %w", err)
	}
	t.attached = true
	return nil
}

// Close drops the tree unless it was attached. A second Close, or one of a nil
// Tree, does nothing.
func (t *Tree) Close() error {
	if t == nil {
		return nil
	}
	err := t.root.Close()
	if t.server != nil && !t.attached {
		t.server.wait()
	}
	return err
}

// Detached performs the mounts as All does, attached nowhere. Mounts below the
// first one need kernel 6.15. A FUSE file system can only be the first one, without
// its mount helper: its server (found in PATH or beside this program) must take a
// mountpoint /dev/fd/N, and ends with the Tree, or else with its mount.
func Detached(ctx context.Context, ms []Mount) (*Tree, error) {
	plans, err := parseAll(ms)
	if err != nil {
		return nil, err
	}
	for i, p := range plans {
		if p.kind == helper && i > 0 || p.kind == remount || (i == 0) != (p.target == "" || p.target == "/") {
			return nil, p.wrap(fmt.Errorf("a %s mount at %q cannot be made unattached: %w", p.kind, p.target, errdefs.ErrNotImplemented))
		}
	}
	t, err := plans[0].tree(ctx)
	if err != nil {
		return nil, plans[0].wrap(oldKernel(err))
	}
	for _, p := range plans[1:] {
		if err := p.attachDetached(ctx, t.root); err != nil {
			t.Close()
			return nil, p.wrap(err)
		}
	}
	return t, nil
}

// tree performs the first of several mounts.
func (p *plan) tree(ctx context.Context) (*Tree, error) {
	if p.kind == helper {
		root, s, err := p.serve(ctx)
		if err != nil {
			return nil, err
		}
		return &Tree{root: root, server: s}, nil
	}
	root, err := p.detached(ctx)
	if err != nil {
		return nil, err
	}
	return &Tree{root: root}, nil
}

// attachDetached performs p below root, a mount that is attached nowhere.
func (p *plan) attachDetached(ctx context.Context, root *sys.Fd) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	at, err := root.Openat2(strings.TrimLeft(p.target, "/"), sys.O_PATH, 0, sys.RESOLVE_IN_ROOT)
	if err != nil {
		return err
	}
	defer at.Close()
	m, err := p.detached(ctx)
	if err != nil {
		return oldKernel(err)
	}
	defer m.Close()
	err = m.MoveTo(at)
	if errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("a mount below an unattached one needs kernel 6.15: %w: %w", errdefs.ErrNotImplemented, err)
	}
	return err
}

// errOldKernel: the kernel, or a filter in front of it, lacks the new calls.
var errOldKernel = errors.New("no fsopen")

// isOld reports whether err means that the kernel lacks a system call.
func isOld(err error) bool { return errors.Is(err, syscall.ENOSYS) }

func oldKernel(err error) error {
	if errors.Is(err, errOldKernel) {
		return fmt.Errorf("an unattached mount needs fsopen, fsmount and open_tree (kernel 5.2), mount_setattr (5.12), for overlay lowerdir+ (6.8): %w: %w",
			errdefs.ErrNotImplemented, err)
	}
	return err
}

// wrap says which mount failed and adds the sentinel that the errno stands for.
func (p *plan) wrap(err error) error {
	what := p.fstype
	if p.kind == bind {
		what = "bind of " + p.source
	}
	return withSentinel("mount: "+what, err)
}

// withSentinel wraps err once, with the sentinel of its errno if it has none.
func withSentinel(what string, err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) || hasSentinel(err) {
		return fmt.Errorf("%s: %w", what, err)
	}
	var sentinel error = errdefs.ErrUnknown
	switch errno {
	case syscall.ENOENT, syscall.ENOTDIR:
		sentinel = errdefs.ErrNotFound
	case syscall.EPERM, syscall.EACCES:
		sentinel = errdefs.ErrPermissionDenied
	case syscall.ENODEV, syscall.ENOSYS, syscall.EOPNOTSUPP:
		sentinel = errdefs.ErrNotImplemented
	case syscall.EBUSY, syscall.EROFS, syscall.ELOOP:
		sentinel = errdefs.ErrFailedPrecondition
	case syscall.EINVAL:
		sentinel = errdefs.ErrInvalidArgument
	case syscall.ENOSPC, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE:
		sentinel = errdefs.ErrResourceExhausted
	}
	return fmt.Errorf("%s: %w: %w", what, sentinel, err)
}

func hasSentinel(err error) bool {
	for _, is := range []func(error) bool{
		errdefs.IsInvalidArgument, errdefs.IsNotFound, errdefs.IsFailedPrecondition, errdefs.IsNotImplemented,
		errdefs.IsPermissionDenied, errdefs.IsResourceExhausted, errdefs.IsUnavailable,
	} {
		if is(err) {
			return true
		}
	}
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// runHelper performs a FUSE mount by mount.fuse or mount.fuse3, which finds the
// file system's server by its name: mount.fuse3 SOURCE TARGET -o OPTS -t NAME.
func (p *plan) runHelper(ctx context.Context, target string) error {
	args := []string{p.source, target}
	for _, o := range p.params {
		args = append(args, "-o", o.key)
	}
	args = append(args, "-t", p.fstype)
	program, err := exec.LookPath(p.helper)
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/" + p.helper); err != nil {
			return fmt.Errorf("%w: no %s (Debian: fuse3): %w", errdefs.ErrNotImplemented, p.helper, err)
		}
	}
	out, err := helperOutput(ctx, program, args, helperEnv(p.fstype))
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", p.helper, strings.Join(args, " "), err, strings.TrimSpace(out))
	}
	return nil
}

// helperOutput runs the helper with its output in a file: the server that it
// leaves behind may keep the descriptor, and a pipe would never end.
func helperOutput(ctx context.Context, program string, args, env []string) (string, error) {
	f, err := os.CreateTemp("", "mount-helper")
	if err != nil {
		return "", err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdout, cmd.Stderr, cmd.Env = f, f, env
	if err := cmd.Run(); err != nil {
		out, _ := os.ReadFile(f.Name())
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return string(out), err
	}
	return "", nil
}
