package overlay

import (
	"context"
	"errors"
	"iter"
	"slices"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
	lmount "github.com/layerctl/layerctl/mount"
)

// Diff compares the two trees as the kernel shows them, so that redirects, files
// without data and whiteouts of any encoding are what the kernel takes them for.
// Where to look is taken from the uppers of the layers by which the two chains
// differ: O(changes).
func (d *Driver) Diff(ctx context.Context, from, to drivers.Ref) iter.Seq2[layer.Change, error] {
	return func(yield func(layer.Change, error) bool) {
		err := d.diff(ctx, from, to, yield)
		if err != nil && !errors.Is(err, errStopped) {
			yield(layer.Change{}, drivers.Wrap(driverName, "diff", to.ID, err))
		}
	}
}

// errStopped says that the consumer of a sequence has enough.
var errStopped = errors.New("stopped")

func (d *Driver) diff(ctx context.Context, from, to drivers.Ref, yield func(layer.Change, error) bool) error {
	toTree, err := d.tree(ctx, to)
	if err != nil {
		return err
	}
	defer toTree.Close()
	fromTree, err := d.tree(ctx, from)
	if err != nil {
		return err
	}
	defer fromTree.Close()
	o := layer.DiffOptions{SameFile: sameInode, OverrideStat: d.keepsStat()}
	if from.ID != 0 {
		c := candidates{d: d}
		defer c.close()
		if err := c.open(differing(from, to)); err != nil {
			return err
		}
		o.Candidates = c.names
	}
	for ch, err := range layer.DiffTrees(ctx, fromTree.Path(), toTree.Path(), o) {
		if err != nil {
			return err
		}
		if !yield(ch, nil) {
			return errStopped
		}
	}
	return nil
}

// sameInode: all layers lie on one file system, and a mount of lowers only
// shows the number of the file that is seen (fs/overlayfs/inode.c:ovl_getattr,
// 6.18: that of the origin is shown for an upper alone). So one number is one
// file: there is no subvolume in a layer (refuseNested).
func sameInode(from, to *sys.Stat) bool { return from.Ino == to.Ino }

// tree is a layer's merged tree, read-only and attached nowhere.
type tree struct {
	path string
	held []*lmount.Tree // the first made first
}

// Path returns a path of the tree's root; "" is the empty tree.
func (t *tree) Path() string { return t.path }

// Close drops the mounts.
func (t *tree) Close() {
	for _, h := range slices.Backward(t.held) {
		_ = h.Close()
	}
}

// tree makes the merged tree of a layer as it is stored; the zero Ref is empty.
func (d *Driver) tree(ctx context.Context, r drivers.Ref) (*tree, error) {
	if r.ID == 0 {
		return &tree{}, nil
	}
	s, err := d.loadRef(r)
	if err != nil {
		return nil, err
	}
	if err := d.refuseNested(ctx, s); err != nil {
		return nil, err
	}
	t := &tree{}
	p, err := d.storedPlan(ctx, s, r, t)
	if err == nil {
		err = d.show(ctx, t, p)
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// storedPlan lists the lowers that show a layer as it is stored: an id-mapped
// one's upper with container ids.
func (d *Driver) storedPlan(ctx context.Context, s *state, r drivers.Ref, t *tree) (plan, error) {
	p := plan{metacopy: !d.opts.userxattr}
	switch {
	case s.about.View && len(r.Parents) > 0:
		// its own directory is empty
	case s.writable() && !s.about.IDMap.IsZero():
		m, err := d.unshifted(ctx, s)
		if err != nil {
			return p, err
		}
		t.held = append(t.held, m)
		p.lowers = append(p.lowers, m.Path())
	default:
		p.lowers = append(p.lowers, d.fs(r.ID))
	}
	for _, id := range r.Parents {
		p.lowers = append(p.lowers, d.fs(id))
	}
	if s.applied {
		p.lowers = append(p.lowers, d.path(emptyDir))
	}
	return p, nil
}

// chainTree makes the merged tree of a chain of committed layers.
func (d *Driver) chainTree(ctx context.Context, ids []drivers.ID) (*tree, error) {
	if len(ids) == 0 {
		return &tree{path: d.path(emptyDir)}, nil
	}
	return d.tree(ctx, drivers.Ref{ID: ids[0], Parents: ids[1:]})
}

// show mounts a plan of lowers; one directory is shown as it is.
func (d *Driver) show(ctx context.Context, t *tree, p plan) error {
	if len(p.lowers) == 1 {
		t.path = p.lowers[0]
		return nil
	}
	if n := len(p.lowers) - maxLowers; n > 0 {
		// One more than fits, a writable layer on 500: what is at the bottom is
		// merged by an overlay of its own.
		below := p
		below.lowers = p.lowers[maxLowers-2:]
		if err := d.show(ctx, t, below); err != nil {
			return err
		}
		p.lowers = append(slices.Clone(p.lowers[:maxLowers-2]), t.path)
	}
	m, err := lmount.Detached(ctx, []lmount.Mount{d.opts.mount(p)})
	if err != nil {
		return err
	}
	t.held = append(t.held, m)
	t.path = m.Path()
	return nil
}

// differing returns the layers by which two chains differ: all above the longest
// common chain at their bottom.
func differing(from, to drivers.Ref) []drivers.ID {
	a := append([]drivers.ID{from.ID}, from.Parents...)
	b := append([]drivers.ID{to.ID}, to.Parents...)
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	return append(a, b...)
}

// candidates names what may differ in a directory: what any of some layers has
// there.
type candidates struct {
	d   *Driver
	fds []*sys.Fd // the layers' fs directories
}

func (c *candidates) open(ids []drivers.ID) error {
	for _, id := range ids {
		fd, err := sys.OpenDir(c.d.fs(id))
		if err != nil {
			return err
		}
		c.fds = append(c.fds, fd)
	}
	return nil
}

func (c *candidates) close() {
	for _, fd := range c.fds {
		fd.Close()
	}
}

// names is layer.DiffOptions.Candidates. A layer that hides what is below the
// directory, or takes it from another place, makes every name a candidate.
func (c *candidates) names(dir string) (names []string, all bool, err error) {
	for _, fd := range c.fds {
		more, all, err := c.of(fd, dir)
		if err != nil || all {
			return nil, all, err
		}
		names = append(names, more...)
	}
	return names, false, nil
}

func (c *candidates) of(layer *sys.Fd, dir string) (names []string, all bool, err error) {
	f, err := openBeneath(layer, dir)
	switch {
	case errors.Is(err, syscall.ENOENT):
		return nil, false, nil
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENAMETOOLONG):
		return nil, true, nil // a whiteout or a file; or too long for one call
	case err != nil:
		return nil, false, err
	}
	defer f.Close()
	if all, err := c.hides(f); err != nil || all {
		return nil, all, err
	}
	ents, err := f.ReadDir()
	for _, e := range ents {
		names = append(names, e.Name)
	}
	return names, false, err
}

// hides reports whether a directory of a layer does not simply merge with what
// the same path has below.
func (c *candidates) hides(f *sys.Fd) (bool, error) {
	if opaque, err := c.d.isOpaque(f); opaque || err != nil {
		return opaque, err
	}
	redirect, err := optionalXattr(f, "", c.d.xattr("redirect"))
	return redirect != "", err
}
