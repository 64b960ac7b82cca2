// Package native keeps each layer as a plain directory tree, a full copy of its
// parent's: blocks shared by FICLONE where the file system has it, else copied by
// copy_file_range with the holes kept, by several workers. It works on every
// file system, needs no privilege, and as root loses nothing: the oracle for the
// other drivers.
//
// It is not cheap: Create, Commit, Usage, Diff and Remove cost O(files). They tell
// drivers.WithProgress how far they are.
//
// # On disk
//
//	ROOT/l/ID/fs      the tree
//	ROOT/l/ID/state   JSON: kind (writable, view, committed), parents, id map
//	ROOT/new/ID       a layer being made; renamed to l/ID when it is whole
//	ROOT/del/ID       a layer being deleted
//
// # Steps, and what a crash leaves
//
//	Create   new/ID made, tree copied, flushed, marker written | renamed to l/ID
//	Commit   tree flushed | marker replaced and flushed
//	Remove   l/ID renamed to del/ID and flushed | del/ID deleted
//
// Left of the bar the old state holds, right of it the new one. IDs lists all
// three directories and Remove empties all three; nothing else looks into new
// and del.
//
// # Locks
//
// None: the contract excludes calls of one ID, and calls of different IDs meet
// only in l, new and del, where the kernel orders them. Several processes share
// a root for the same reason.
//
// # Traps
//
// A process that keeps a file of a writable layer open over Commit goes on
// writing into it (Capabilities.SharedWriter). Commit is refused while our mount
// namespace shows the layer mounted for writing; what other namespaces hold
// cannot be seen.
package native

import (
	"context"
	"fmt"
	"io"
	"iter"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// Name is the driver's name in a registry.
const Name = "native"

// The directories of a layer, see the package doc.
const (
	treeDir  = "fs"
	linksDir = "links" // in new/ID while a tree is copied
)

// driver is one open root. Its fields are immutable.
type driver struct {
	root string // absolute, without symlinks: what mountinfo shows
	caps drivers.Capabilities
}

var (
	_ drivers.Driver  = (*driver)(nil)
	_ drivers.Differ  = (*driver)(nil)
	_ drivers.Applier = (*driver)(nil)
)

func (d *driver) Capabilities() drivers.Capabilities { return d.caps }

// Close has nothing to release: no descriptor outlives a call.
func (d *driver) Close() error { return nil }

func (d *driver) wrap(op string, id drivers.ID, err error) error {
	return drivers.Wrap(Name, op, id, err)
}

// open opens one of the root's directories.
func (d *driver) open(name string) (*sys.Fd, error) { return sys.OpenDir(d.root + "/" + name) }

// layer opens the directory of a layer and reads its marker.
func (d *driver) layer(id drivers.ID) (*sys.Fd, state, error) {
	all, err := d.open(roots.Layers)
	if err != nil {
		return nil, state{}, err
	}
	defer all.Close()
	l, err := all.Openat(id.String(), sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return nil, state{}, err
	}
	s, err := readState(l)
	if err != nil {
		l.Close()
		return nil, state{}, err
	}
	return l, s, nil
}

// check returns a layer's marker.
func (d *driver) check(id drivers.ID) (state, error) {
	l, s, err := d.layer(id)
	l.Close()
	return s, err
}

// treePath is where a layer's tree is.
func (d *driver) treePath(id drivers.ID) string {
	return d.root + "/" + roots.Layers + "/" + id.String() + "/" + treeDir
}

// Usage walks the tree: a full copy holds its parents' files, too
// (Capabilities.Copies).
func (d *driver) Usage(ctx context.Context, r drivers.Ref) (drivers.Usage, error) {
	u, err := d.usage(ctx, r.ID)
	return u, d.wrap("usage", r.ID, err)
}

func (d *driver) usage(ctx context.Context, id drivers.ID) (drivers.Usage, error) {
	l, _, err := d.layer(id)
	if err != nil {
		return drivers.Usage{}, err
	}
	defer l.Close()
	return measure(ctx, l)
}

// measure walks the tree of the layer directory l.
func measure(ctx context.Context, l *sys.Fd) (drivers.Usage, error) {
	tree, err := l.Openat(treeDir, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return drivers.Usage{}, err
	}
	defer tree.Close()
	m := &meter{crew: newCrew(ctx), seen: map[uint64]struct{}{}}
	defer m.close()
	if err := m.tree(tree); err != nil {
		return drivers.Usage{}, err
	}
	return m.usage, nil
}

// Diff walks both trees where they are: no mount is needed.
func (d *driver) Diff(ctx context.Context, from, to drivers.Ref) iter.Seq2[layer.Change, error] {
	return func(yield func(layer.Change, error) bool) {
		var below string
		if from.ID != 0 {
			if _, err := d.check(from.ID); err != nil {
				yield(layer.Change{}, d.wrap("diff from", from.ID, err))
				return
			}
			below = d.treePath(from.ID)
		}
		if _, err := d.check(to.ID); err != nil {
			yield(layer.Change{}, d.wrap("diff to", to.ID, err))
			return
		}
		o := layer.DiffOptions{OverrideStat: d.keepsStat()}
		for c, err := range layer.DiffTrees(ctx, below, d.treePath(to.ID), o) {
			if !yield(c, d.wrap("diff to", to.ID, err)) {
				return
			}
		}
	}
}

// keepsStat reports whether what this process may not set is kept in xattrs.
func (d *driver) keepsStat() bool { return len(d.caps.Lost) > 0 }

// Apply unpacks straight into the tree.
func (d *driver) Apply(ctx context.Context, r drivers.Ref, tar io.Reader, o layer.ApplyOptions) error {
	s, err := d.check(r.ID)
	if err == nil && s.Kind != writable {
		err = fmt.Errorf("is %s, not writable: %w", s.Kind, errdefs.ErrFailedPrecondition)
	}
	if err == nil {
		o.Whiteouts, o.Lower = layer.WhiteoutsNone, ""
		o.OverrideStat = o.OverrideStat || d.keepsStat()
		err = layer.Apply(ctx, d.treePath(r.ID), tar, o)
	}
	return d.wrap("apply", r.ID, err)
}

// IDs lists what stands in l, new and del.
func (d *driver) IDs(ctx context.Context) iter.Seq2[drivers.ID, error] {
	return roots.IDs(ctx, Name, d.root)
}
