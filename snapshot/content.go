package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

// Diff yields what turns the tree of from into the tree of to, exactly, in path
// order. from "" is the parent of to, or the empty tree if it has none. The
// snapshots may be of different drivers and of any kind. Both stay locked until
// the sequence ends; an error ends it.
func (v *View) Diff(ctx context.Context, from, to string) iter.Seq2[layer.Change, error] {
	return v.failing("diff", to, func(yield func(layer.Change, error) bool) error {
		t, release, err := v.pin(ctx, to)
		if err != nil {
			return err
		}
		defer release()
		if from == "" {
			from = t.name.Parent
		}
		var f *node
		if from != "" {
			var releaseFrom func()
			if f, releaseFrom, err = v.pin(ctx, from); err != nil {
				return err
			}
			defer releaseFrom()
		}
		return v.s.diff(ctx, f, t, yield)
	})
}

// Contents yields the whole tree of a snapshot, as the difference from the empty
// tree.
func (v *View) Contents(ctx context.Context, key string) iter.Seq2[layer.Change, error] {
	return v.failing("contents", key, func(yield func(layer.Change, error) bool) error {
		n, release, err := v.pin(ctx, key)
		if err != nil {
			return err
		}
		defer release()
		return v.s.diff(ctx, nil, n, yield)
	})
}

// errStop says that the consumer of a sequence left its loop.
var errStop = errors.New("stopped")

// failing makes a sequence of a function whose error ends it.
func (v *View) failing(op, key string, f func(yield func(layer.Change, error) bool) error) iter.Seq2[layer.Change, error] {
	return failing(fmt.Sprintf("%s %q", op, key), f)
}

func failing(what string, f func(yield func(layer.Change, error) bool) error) iter.Seq2[layer.Change, error] {
	return func(yield func(layer.Change, error) bool) {
		if err := f(yield); err != nil && !errors.Is(err, errStop) {
			yield(layer.Change{}, fmt.Errorf("snapshot: %s: %w", what, err))
		}
	}
}

// diff yields the changes by the driver where one driver keeps both layers and
// can, else by walking detached mounts of both. from nil is the empty tree.
func (s *Store) diff(ctx context.Context, from, to *node, yield func(layer.Change, error) bool) error {
	changes, done, err := s.changes(ctx, from, to)
	if err != nil {
		return err
	}
	defer done()
	for c, err := range changes {
		if err != nil {
			return err
		}
		if !yield(c, nil) {
			return errStop
		}
	}
	return nil
}

func (s *Store) changes(ctx context.Context, from, to *node) (seq iter.Seq2[layer.Change, error], done func(), err error) {
	d, err := s.driverOf(ctx, to)
	if err != nil {
		return nil, nil, err
	}
	differ, ok := d.(drivers.Differ)
	if ok && d.Capabilities().Diff && (from == nil || from.layer.Driver == to.layer.Driver) {
		var ref drivers.Ref
		if from != nil {
			ref = from.ref
		}
		return differ.Diff(ctx, ref, to.ref), func() {}, nil
	}
	var a tree
	if from != nil {
		if a, err = s.tree(ctx, from); err != nil {
			return nil, nil, err
		}
	}
	b, err := s.tree(ctx, to)
	if err != nil {
		return nil, nil, errors.Join(err, a.close())
	}
	o := layer.DiffOptions{OverrideStat: s.overrides(ctx, to)}
	return layer.DiffTrees(ctx, a.path, b.path, o), func() { s.warn(errors.Join(a.close(), b.close())) }, nil
}

// tree is a layer mounted where no name leads to it, or (t nil) where it lies.
type tree struct {
	path string
	t    *mount.Tree
}

func (t tree) close() error {
	if t.t == nil {
		return nil
	}
	return t.t.Close()
}

func (s *Store) tree(ctx context.Context, n *node) (tree, error) {
	return s.detached(ctx, n, drivers.MountOptions{ReadOnly: true})
}

func (s *Store) detached(ctx context.Context, n *node, o drivers.MountOptions) (tree, error) {
	d, err := s.driverOf(ctx, n)
	if err != nil {
		return tree{}, err
	}
	ms, err := d.Mounts(ctx, n.ref, o)
	if err != nil {
		return tree{}, err
	}
	if plainBind(ms) { // what is shown is what lies there: no mount, and no privilege
		return tree{path: ms[0].Source}, nil
	}
	t, err := mount.Detached(ctx, ms)
	if err != nil {
		return tree{}, err
	}
	return tree{t.Path(), t}, nil
}

// plainBind reports whether mounts do no more than show a directory elsewhere.
func plainBind(ms []mount.Mount) bool {
	return len(ms) == 1 && ms[0].Type == "bind" && ms[0].Target == "" && !slices.ContainsFunc(ms[0].Options, func(o string) bool {
		return !slices.Contains([]string{"bind", "rbind", "ro", "rw"}, o)
	})
}

func (s *Store) warn(err error) {
	if err != nil {
		s.o.Log(err.Error())
	}
}

// Apply unpacks a layer tar, uncompressed, onto an active snapshot, and takes
// the listing in the same pass. The listing counts if nothing else had a way to
// write: no mounts were handed out before Commit, it was the only Apply, and the
// archive named every directory that it made.
// After an error the snapshot is active with a part of the layer in it.
func (v *View) Apply(ctx context.Context, key string, tar io.Reader, o layer.ApplyOptions) error {
	return v.fail("apply", key, v.apply(ctx, key, tar, o))
}

func (v *View) apply(ctx context.Context, key string, tar io.Reader, o layer.ApplyOptions) error {
	if v.s.o.ReadOnly {
		return errReadOnly
	}
	n, release, err := v.lockLayer(ctx, key, v.s.locks.exclusive)
	if err != nil {
		return err
	}
	defer release()
	return v.s.applyTo(ctx, n, tar, o)
}

// applyTo unpacks onto a layer that is locked exclusively.
func (s *Store) applyTo(ctx context.Context, n *node, tar io.Reader, o layer.ApplyOptions) error {
	if n.name.Kind != snapshots.KindActive {
		return fmt.Errorf("snapshot %q is not active but %s: %w", n.key, n.name.Kind, errdefs.ErrFailedPrecondition)
	}
	a := &application{s: s, n: n, alone: !n.layer.wasWritten() && o.Listing == nil}
	if err := a.begin(ctx); err != nil {
		return err
	}
	if err := faults.Point(ctx, "store: apply: begun"); err != nil {
		return err
	}
	if !a.alone {
		return a.unpack(ctx, tar, o)
	}
	return a.withListing(ctx, tar, o)
}

// application is an Apply in progress.
type application struct {
	s     *Store
	n     *node
	alone bool // nothing else wrote to the layer
}

// begin records that the layer is not what any listing says, which holds if
// this Apply does not come to its end.
func (a *application) begin(ctx context.Context) error {
	if a.n.layer.Exposed {
		return nil
	}
	return a.update(ctx, func(l *layerRecord) { l.Exposed, l.Applied, l.Digest = true, false, "" })
}

func (a *application) update(ctx context.Context, change func(*layerRecord)) error {
	id := a.n.ref.ID
	return a.s.db.update(ctx, func(t *txn) error {
		l, err := t.layer(id)
		if err != nil {
			return err
		}
		if l == nil || t.get(bucketDebts, idKey(id)) != nil {
			return fmt.Errorf("removed meanwhile: %w", errdefs.ErrNotFound)
		}
		change(l)
		return t.putLayer(id, l)
	})
}

func (a *application) withListing(ctx context.Context, tar io.Reader, o layer.ApplyOptions) error {
	made, tell := false, o.Implied
	o.Implied = func(p string) {
		made = made || p != "."
		if tell != nil {
			tell(p)
		}
	}
	d, err := a.s.writeListing(a.n.ref.ID, o.Volatile, func(w *layer.ListingWriter) error {
		o.Listing = w
		return a.unpack(ctx, tar, o)
	})
	if err != nil {
		return err
	}
	if err := faults.Point(ctx, "store: apply: listed"); err != nil {
		return err
	}
	if made {
		return nil // what these directories are is known when the parents are: Commit has the listing made anew
	}
	return a.update(ctx, func(l *layerRecord) { l.Exposed, l.Applied, l.Digest = false, true, d })
}

// unpack has the driver apply the tar, or does it in a detached mount.
func (a *application) unpack(ctx context.Context, tar io.Reader, o layer.ApplyOptions) error {
	o.Volatile = o.Volatile || a.s.o.Volatile
	d, err := a.s.driverOf(ctx, a.n)
	if err != nil {
		return err
	}
	if applier, ok := d.(drivers.Applier); ok && d.Capabilities().Apply {
		return applier.Apply(ctx, a.n.ref, tar, o)
	}
	t, err := a.s.detached(ctx, a.n, drivers.MountOptions{})
	if err != nil {
		return err
	}
	err = layer.Apply(ctx, t.path, tar, o)
	return errors.Join(err, t.close())
}

// Tree is a snapshot mounted read-only where no name leads to it: it goes with
// Close, at the latest with the process.
type Tree struct {
	tree
	release func()
}

// Path is a path to the tree's root for this process.
func (t *Tree) Path() string { return t.path }

// Close drops the mount. A second Close does nothing.
func (t *Tree) Close() error {
	t.release()
	err := t.close()
	t.t = nil
	return err
}

// Tree mounts a snapshot of any kind for reading. The snapshot's layer stays
// until Close.
func (v *View) Tree(ctx context.Context, key string) (*Tree, error) {
	n, release, err := v.pin(ctx, key)
	if err != nil {
		return nil, v.fail("tree", key, err)
	}
	t, err := v.s.tree(ctx, n)
	if err != nil {
		release()
		return nil, v.fail("tree", key, err)
	}
	return &Tree{t, release}, nil
}

// Listing opens the listing of a committed snapshot (layer.ReadListing) and
// returns its tree digest; ErrNotFound for as long as it is being made.
func (v *View) Listing(ctx context.Context, key string) (io.ReadCloser, digest.Digest, error) {
	n, err := v.resolve(ctx, key)
	if err == nil && (!n.layer.Committed || n.layer.Digest == "") {
		err = fmt.Errorf("has no listing yet: %w", errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, "", v.fail("listing", key, err)
	}
	f, err := os.Open(v.s.listingPath(n.ref.ID))
	if err != nil {
		return nil, "", v.fail("listing", key, rootError(err))
	}
	return f, n.layer.Digest, nil
}
