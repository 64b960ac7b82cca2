package upper

import (
	"context"
	"errors"
	"iter"
	"slices"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// Diff compares the two trees as the union shows them, so that redirects, files
// without data and whiteouts of any encoding are what it takes them for.
// Where to look is taken from the uppers of the layers by which the two chains
// differ: O(changes).
func (l *Layers) Diff(ctx context.Context, from, to drivers.Ref) iter.Seq2[layer.Change, error] {
	return func(yield func(layer.Change, error) bool) {
		err := l.diff(ctx, from, to, yield)
		if err != nil && !errors.Is(err, errStopped) {
			yield(layer.Change{}, l.wrap("diff", to.ID, err))
		}
	}
}

// errStopped says that the consumer of a sequence has enough.
var errStopped = errors.New("stopped")

func (l *Layers) diff(ctx context.Context, from, to drivers.Ref, yield func(layer.Change, error) bool) error {
	toTree, err := l.tree(ctx, to)
	if err != nil {
		return err
	}
	defer toTree.Close()
	fromTree, err := l.tree(ctx, from)
	if err != nil {
		return err
	}
	defer fromTree.Close()
	o := layer.DiffOptions{OverrideStat: l.keepsStat()}
	if l.cfg.RealInodes {
		o.SameFile = sameInode
	}
	if from.ID != 0 {
		c := candidates{l: l}
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

// sameInode: all layers lie on one file system, and a merged tree shows the number
// of the file that is seen (Config.RealInodes). So one number is one file: there
// is no subvolume in a layer (refuseNested).
func sameInode(from, to *sys.Stat) bool { return from.Ino == to.Ino }

// tree is a layer's merged tree, read-only.
type tree struct {
	path string
	held []Tree // the first made first
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
func (l *Layers) tree(ctx context.Context, r drivers.Ref) (*tree, error) {
	if r.ID == 0 {
		return &tree{}, nil
	}
	s, err := l.loadRef(r)
	if err != nil {
		return nil, err
	}
	if err := l.refuseNested(ctx, s); err != nil {
		return nil, err
	}
	t := &tree{}
	lowers, err := l.stored(ctx, s, r, t)
	if err == nil {
		err = l.show(ctx, t, lowers)
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// stored lists the lowers that show a layer as it is stored: one whose upper has
// host ids with container ids.
func (l *Layers) stored(ctx context.Context, s *state, r drivers.Ref, t *tree) (lowers []string, err error) {
	switch {
	case s.about.View && len(r.Parents) > 0:
		// its own directory is empty
	case s.writable() && s.hostIDs():
		m, err := l.unshifted(ctx, s)
		if err != nil {
			return nil, err
		}
		t.held = append(t.held, m)
		lowers = append(lowers, m.Path())
	default:
		lowers = append(lowers, l.Dir(r.ID))
	}
	for _, id := range r.Parents {
		lowers = append(lowers, l.Dir(id))
	}
	if s.applied {
		lowers = append(lowers, l.path(emptyDir))
	}
	return lowers, nil
}

// chainTree makes the merged tree of a chain of committed layers.
func (l *Layers) chainTree(ctx context.Context, ids []drivers.ID) (*tree, error) {
	if len(ids) == 0 {
		return &tree{path: l.path(emptyDir)}, nil
	}
	return l.tree(ctx, drivers.Ref{ID: ids[0], Parents: ids[1:]})
}

// show opens the merged tree of lowers; one directory is shown as it is.
func (l *Layers) show(ctx context.Context, t *tree, lowers []string) error {
	if len(lowers) == 1 {
		t.path = lowers[0]
		return nil
	}
	if len(lowers) > MaxLowers {
		// One more than fits, a writable layer on 500: what is at the bottom is
		// merged by a mount of its own.
		if err := l.show(ctx, t, lowers[MaxLowers-2:]); err != nil {
			return err
		}
		lowers = append(slices.Clone(lowers[:MaxLowers-2]), t.path)
	}
	m, err := l.cfg.Union.Merge(ctx, lowers)
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
	l   *Layers
	fds []*sys.Fd // the layers' fs directories
}

func (c *candidates) open(ids []drivers.ID) error {
	for _, id := range ids {
		fd, err := sys.OpenDir(c.l.Dir(id))
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
	if opaque, err := c.l.isOpaque(f); opaque || err != nil {
		return opaque, err
	}
	redirect, err := optionalXattr(f, "", c.l.xattr("redirect"))
	return redirect != "", err
}
