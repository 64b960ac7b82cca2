package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/userns"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

type importOptions struct {
	oneFileSystem bool
	skipWhiteouts bool
	labels        map[string]string
}

func (a *app) importCommand() *cobra.Command {
	o := &a.importOptions
	c := inNamespaces(nsFeed, &cobra.Command{
		Use: "import {DIR|TAR|-} NAME", Short: "Make a committed snapshot of a directory or a tar",
		Long: `Make a committed snapshot without a parent from a directory, whose tree is copied
exactly, or from a tar in a file or on standard input, plain or compressed with
gzip or zstd. Sockets are left out and counted. A store inside the directory is
left out. The name is printed.

An ordinary user's directory is read as that user, outside the user namespace,
so that owners are the real ones. Those that the namespace does not map are kept
in the xattr user.containers.override_stat, and diff, export and save give them
back.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			a.mayMake = true
			return verbError(a.runImport(cmd.Context(), args[0], args[1], *o), "import", args[1])
		},
	})
	c.Flags().BoolVarP(&o.oneFileSystem, "one-file-system", "x", false, "leave out what is mounted below the directory")
	c.Flags().BoolVar(&o.skipWhiteouts, "skip-whiteout-names", false, "leave out names beginning with .wh. instead of refusing them")
	c.Flags().StringToStringVar(&o.labels, "label", nil, "labels of the snapshot")
	return a.limited(c)
}

func (a *app) runImport(ctx context.Context, src, name string, o importOptions) error {
	if err := needSource(src); err != nil {
		return err
	}
	v, err := a.openSwept(ctx)
	if err != nil {
		return err
	}
	if err := free(ctx, v, name); err != nil {
		return err
	}
	a.sayVolatile()
	left := &leftOut{}
	s, err := a.openSource(src, o, left)
	if err != nil {
		return err
	}
	defer s.Close()
	start := time.Now()
	p := a.startProgress("import", s.total)
	defer p.Stop()
	s.progress = p
	if err := a.newLayer(ctx, v, name, "", o.labels, s, left); err != nil {
		return err
	}
	p.Stop()
	a.sayMade(ctx, v, name, start, left)
	return nil
}

// needSource refuses a source that is not there before a store is made for it.
func needSource(src string) error {
	if src == "-" {
		return nil
	}
	_, err := os.Stat(src)
	return err
}

// leftOut counts what a layer could not take.
type leftOut struct {
	n     int
	first []string
}

func (l *leftOut) add(path, reason string) {
	l.n++
	if len(l.first) < 10 {
		l.first = append(l.first, fmt.Sprintf("%q: %s", path, reason))
	}
}

// say tells the user how many entries were left out, and the first of them.
func (l *leftOut) say(a *app) {
	if l.n == 0 {
		return
	}
	a.note("%s left out", counted(l.n, "entry", "entries"))
	for _, f := range l.first {
		a.note("left out %s", f)
	}
	if l.n > len(l.first) {
		a.note("left out %d more", l.n-len(l.first))
	}
}

// sayMade prints the new name, and what it holds on standard error.
func (a *app) sayMade(ctx context.Context, v *snapshot.View, name string, start time.Time, left *leftOut) {
	fmt.Fprintln(a.out, name)
	left.say(a)
	if a.quiet {
		return
	}
	if u, err := v.UsageKnown(ctx, name); err == nil {
		a.note("%s: %s, %s inodes, in %s", name, humanBytes(u.Bytes), humanCount(u.Inodes), seconds(time.Since(start).Seconds()))
	}
}

// newLayer makes the committed snapshot name on parent ("" for none) from a
// layer tar. What it makes on the way has a name of its own, which is removed
// whatever happens, an interrupt too.
func (a *app) newLayer(ctx context.Context, v *snapshot.View, name, parent string, labels map[string]string, s *source, left *leftOut) (err error) {
	l, err := a.lockMaking(ctx)
	if err != nil {
		return err
	}
	defer l.Close()
	key := madeName("new")
	if err := v.Create(ctx, key, parent, snapshot.CreateOptions{Labels: map[string]string{labelNew: name}}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, discard(ctx, v, key))
		}
	}()
	if err := a.applySource(ctx, v, key, s, left); err != nil {
		return err
	}
	return v.CommitWith(ctx, name, key, snapshot.CommitOptions{Labels: labels})
}

// discard removes a snapshot and its bytes, though ctx may have ended.
func discard(ctx context.Context, v *snapshot.View, key string) error {
	ctx = context.WithoutCancel(ctx)
	if err := v.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return v.Cleanup(ctx)
}

// applySource unpacks a source onto a writable snapshot. The source is read by a
// goroutine that may stay in its read when all is over: nothing interrupts a
// read of a pipe that somebody keeps open.
func (a *app) applySource(ctx context.Context, v *snapshot.View, key string, s *source, left *leftOut) error {
	r, w := io.Pipe()
	stop := context.AfterFunc(ctx, func() { w.CloseWithError(context.Cause(ctx)) })
	defer stop()
	go func() { w.CloseWithError(s.write(ctx, w)) }()
	err := v.Apply(ctx, key, r, layer.ApplyOptions{Volatile: a.volatile, Limits: a.limits, Skipped: left.add})
	if err == nil {
		// What comes after the tar's end is read as well: a compressor's checksum,
		// and a writer at the other end of a pipe that must not die of us.
		_, err = io.Copy(io.Discard, r)
	}
	r.CloseWithError(err)
	if cause := context.Cause(ctx); cause != nil && err != nil {
		return cause
	}
	if err != nil && s.name != "" {
		err = fmt.Errorf("%s: %w", s.name, err)
	}
	return err
}

// source is where a layer tar comes from.
type source struct {
	name     string                                       // what an error calls it; "" for a directory, whose files have names
	write    func(ctx context.Context, w io.Writer) error // the uncompressed tar
	close    func() error
	total    int64     // bytes to read; 0 where not known
	progress *progress // nil for none
}

// Close closes what the source reads.
func (s *source) Close() error {
	if s.close == nil {
		return nil
	}
	return s.close()
}

// envFed says that the directory to import comes as a tar on standard input.
const envFed = "_LAYERCTL_FED"

// feed has a directory read outside of the namespaces: inside, owners that are
// not mapped cannot be told apart.
func (a *app) feed(ctx context.Context, c *userns.Command, args []string) {
	st, err := os.Stat(args[0])
	if args[0] == "-" || err != nil || !st.IsDir() {
		return
	}
	c.Env = append(c.Env, envFed+"=1")
	c.Feed = func(w io.Writer) error {
		left := &leftOut{}
		s, err := a.treeSource(args[0], a.importOptions, left)
		if err == nil {
			p := a.startProgress("import", 0)
			s.progress = p
			err = s.write(ctx, w)
			p.Stop()
			left.say(a)
		}
		return verbError(err, "import", args[1])
	}
}

// openSource opens a directory, a tar file or "-".
func (a *app) openSource(src string, o importOptions, left *leftOut) (*source, error) {
	if os.Getenv(envFed) != "" {
		a.progress = "none" // the feeder shows it
		return a.tarSource(io.NopCloser(a.in), 0), nil
	}
	if st, err := os.Stat(src); src != "-" && err == nil && st.IsDir() {
		return a.treeSource(src, o, left)
	}
	return a.openTar(src)
}

// openTar opens a tar file or "-".
func (a *app) openTar(src string) (*source, error) {
	if src == "-" {
		if isTerminal(a.in) {
			return nil, hintf(fmt.Errorf("standard input is a terminal: %w", errdefs.ErrInvalidArgument), "pipe a tar in")
		}
		s := a.tarSource(io.NopCloser(a.in), 0)
		s.name = "standard input"
		return s, nil
	}
	f, err := os.Open(src)
	if err != nil {
		return nil, err
	}
	total := int64(0)
	if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
		total = st.Size()
	}
	s := a.tarSource(f, total)
	s.name = src
	return s, nil
}

// tarSource reads a tar, compressed or not.
func (a *app) tarSource(f io.ReadCloser, total int64) *source {
	s := &source{total: total, close: f.Close}
	s.write = func(ctx context.Context, w io.Writer) error {
		r, _, err := layer.Decompress(s.progress.Reader(f), a.limits)
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = io.Copy(w, r)
		return err
	}
	return s
}

// treeSource reads a directory tree, as the layer that makes it from nothing.
func (a *app) treeSource(dir string, o importOptions, left *leftOut) (*source, error) {
	parts, err := a.partsOf(dir, o)
	if err != nil {
		return nil, err
	}
	s := &source{}
	s.write = func(ctx context.Context, w io.Writer) error {
		go s.measure(ctx, dir)
		changes := layer.DiffTrees(ctx, "", dir, layer.DiffOptions{
			SkipWhiteoutNames: o.skipWhiteouts, Skipped: left.add, Parts: parts,
		})
		_, err := layer.WriteTar(ctx, w, changes, layer.TarOptions{
			SkipWhiteoutNames: o.skipWhiteouts, Skipped: left.add, Progress: s.progress.Set,
		})
		return err
	}
	return s, nil
}

// partsOf says what of a tree is imported: never the store's own root, and with
// --one-file-system the mountpoints as empty directories.
func (a *app) partsOf(dir string, o importOptions) (func(string, *sys.Stat) layer.Part, error) {
	store, err := sys.StatPath(a.root) // all zero where there is none yet
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	top, err := sys.StatPath(dir)
	if err != nil {
		return nil, err
	}
	if sameInode(&store, &top) {
		return nil, fmt.Errorf("%s is the store itself: %w", dir, errdefs.ErrInvalidArgument)
	}
	return func(_ string, st *sys.Stat) layer.Part {
		switch {
		case st.IsDir() && sameInode(st, &store):
			return layer.PartNone
		case o.oneFileSystem && st.Dev != top.Dev:
			if st.IsDir() {
				return layer.PartItself
			}
			return layer.PartNone
		}
		return layer.PartWhole
	}, nil
}

func sameInode(a, b *sys.Stat) bool { return a.Dev == b.Dev && a.Ino == b.Ino }

// measure finds out how much there is to read, for the progress alone.
func (s *source) measure(ctx context.Context, dir string) {
	if s.progress == nil {
		return
	}
	var total int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		total += 512
		if i, err := d.Info(); err == nil && i.Mode().IsRegular() {
			total += (i.Size() + 511) &^ 511
		}
		return nil
	})
	if err == nil {
		s.progress.SetTotal(total)
	}
}
