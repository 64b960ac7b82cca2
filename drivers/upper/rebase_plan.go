package upper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// rebaser decides how one upper is fitted to one lower tree, on a picture of the
// upper (rebaseNode) of which it loads only what it needs.
type rebaser struct {
	w            layer.Whiteouts
	opaqueAttr   string
	upper, lower *sys.Fd // lower: nil where there are no parents
	root         *rebaseNode
	implied      map[string]bool
	made         []*rebaseNode // directories that Apply made up, parents first
	unlink       []string      // whiteouts to be deleted, by their path as it is
	gone         map[string]bool
}

func newRebaser(w layer.Whiteouts, opaqueAttr string, upper *sys.Fd, a applied) (*rebaser, error) {
	b := &rebaser{w: w, opaqueAttr: opaqueAttr, upper: upper, implied: map[string]bool{}, gone: map[string]bool{}}
	for _, p := range a.Implied {
		b.implied[string(p)] = true
	}
	st, err := upper.Stat("")
	b.root = &rebaseNode{b: b, name: ".", orig: ".", dir: true, implied: b.implied["."], mtime: st.Mtime, known: map[string]*rebaseNode{}}
	return b, err
}

// onNothing plans for a layer that hides nothing: its whiteouts go, and with them
// the directories that were made up for them.
func (b *rebaser) onNothing(ctx context.Context, whiteouts []string) (*rebasePlan, error) {
	if err := b.findMade(); err != nil {
		return nil, err
	}
	for _, p := range whiteouts {
		n, err := b.find(p)
		if err != nil {
			return nil, err
		}
		if n != nil {
			b.drop(n)
		}
	}
	if err := b.dressAll(ctx); err != nil {
		return nil, err
	}
	return b.plan(0)
}

// onParents plans for a layer on parents: conflicts with symlinks first, because
// they take directories away; then the metadata.
func (b *rebaser) onParents(ctx context.Context, parent drivers.ID) (*rebasePlan, error) {
	if err := b.findMade(); err != nil {
		return nil, err
	}
	for again := true; again; { // what has moved may stand at another symlink now
		again = false
		for _, n := range b.made {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			moved, err := b.relocate(n)
			if err != nil {
				return nil, fmt.Errorf("rebase %q: %w", n.path(), err)
			}
			again = again || moved
		}
	}
	if err := b.dressAll(ctx); err != nil {
		return nil, err
	}
	return b.plan(parent)
}

// findMade looks up the directories that Apply made up. One that is not as it was
// made is somebody's own: a later archive named it, or somebody changed it.
func (b *rebaser) findMade() error {
	paths := make([]string, 0, len(b.implied))
	for p := range b.implied {
		paths = append(paths, p)
	}
	slices.SortFunc(paths, layer.ComparePaths)
	for _, p := range paths {
		n, err := b.find(p)
		if err != nil {
			return fmt.Errorf("rebase %q: %w", p, err)
		}
		if n != nil && n.implied {
			b.made = append(b.made, n)
		}
	}
	return nil
}

// relocate moves what is below a made-up directory to where the parents' symlink
// of that name leads, and deletes the directory.
func (b *rebaser) relocate(n *rebaseNode) (bool, error) {
	if n == b.root || n.dropped || !n.implied {
		return false, nil
	}
	p := n.path()
	if p == n.checked {
		return false, nil
	}
	n.checked = p
	if hidden, err := n.hidden(); err != nil || hidden {
		return false, err
	}
	st, err := b.lowerStat(p)
	if err != nil || st.IsDir() {
		return false, absent(err)
	}
	if st.Type() != sys.S_IFLNK {
		return false, fmt.Errorf("the archive has files below it and the parents have a file there: %w", errdefs.ErrFailedPrecondition)
	}
	target, err := b.resolve(p)
	if err != nil {
		return false, err
	}
	dst, err := b.makeBelow(target)
	if err != nil {
		return false, err
	}
	b.drop(n)
	return true, b.merge(n, dst)
}

// absent is err, but nil where it says that the parents have nothing at a path:
// below a file or symlink of theirs too, which a named directory of the layer hides.
func absent(err error) error {
	return ignore(ignore(ignore(err, syscall.ENOENT), syscall.ENOTDIR), syscall.ELOOP)
}

func ignore(err error, errno syscall.Errno) error {
	if errors.Is(err, errno) {
		return nil
	}
	return err
}

// lowerStat describes a name of the parents' tree, its directories through no link.
func (b *rebaser) lowerStat(p string) (sys.Stat, error) {
	dir, err := openBeneath(b.lower, path.Dir(p))
	if err != nil {
		return sys.Stat{}, err
	}
	defer dir.Close()
	return dir.Stat(path.Base(p))
}

// resolve follows a symlink of the parents' tree as a chroot there would, and
// returns the path of the directory that it leads to.
func (b *rebaser) resolve(p string) (string, error) {
	f, err := b.lower.Openat2(p, sys.O_PATH|sys.O_DIRECTORY, 0, sys.RESOLVE_IN_ROOT|sys.RESOLVE_NO_MAGICLINKS)
	if err != nil {
		return "", fmt.Errorf("the parents have a symlink there that leads to no directory: %w: %w", errdefs.ErrFailedPrecondition, err)
	}
	defer f.Close()
	full, err := os.Readlink(f.ProcPath())
	if err != nil {
		return "", err
	}
	root, err := os.Readlink(b.lower.ProcPath())
	if err != nil {
		return "", err
	}
	rel := strings.Trim(strings.TrimPrefix(full, strings.TrimSuffix(root, "/")), "/")
	if rel == "" {
		rel = "."
	}
	return rel, nil
}

// makeBelow is the directory p of the upper, made like the parents' where it is
// missing.
func (b *rebaser) makeBelow(p string) (*rebaseNode, error) {
	cur := b.root
	if p == "." {
		return cur, nil
	}
	for _, name := range strings.Split(p, "/") {
		next, err := cur.kid(name)
		if err != nil {
			return nil, err
		}
		if next == nil {
			if next, err = b.makeOne(cur, name); err != nil {
				return nil, err
			}
		}
		if !next.dir {
			return nil, b.twice(next.path())
		}
		cur = next
	}
	return cur, nil
}

func (b *rebaser) makeOne(in *rebaseNode, name string) (*rebaseNode, error) {
	n := &rebaseNode{b: b, up: in, name: name, dir: true, known: map[string]*rebaseNode{}}
	from, err := openBeneath(b.lower, n.path())
	if err != nil {
		return nil, err
	}
	defer from.Close()
	m, err := readMetadata(from)
	if err != nil {
		return nil, err
	}
	n.meta = &m
	in.known[name], in.touched = n, true
	return n, nil
}

// drop takes a node out of its directory: what was there on disk goes, unless it
// is attached elsewhere.
func (b *rebaser) drop(n *rebaseNode) {
	n.dropped = true
	n.up.known[n.name], n.up.touched = nil, true
	switch {
	case n.dir:
		b.gone[n.orig] = true
	default:
		b.unlink = append(b.unlink, n.orig)
	}
}

// merge moves every name of src, which is dropped, into dst. A name at both
// places means that the order of the archive decides, which is not known any more.
func (b *rebaser) merge(src, dst *rebaseNode) error {
	if err := b.mergeOpaque(src, dst); err != nil {
		return err
	}
	kids, err := src.kids()
	if err != nil {
		return err
	}
	for _, k := range kids {
		there, err := dst.kid(k.name)
		if err != nil {
			return err
		}
		if there == nil {
			k.up, k.moved = dst, true
			dst.known[k.name], dst.touched = k, true
			continue
		}
		if err := b.mergeKid(k, there); err != nil {
			return err
		}
	}
	return nil
}

func (b *rebaser) mergeOpaque(src, dst *rebaseNode) error {
	from, err := src.opaqueMark()
	if err != nil || from == "" {
		return err
	}
	to, err := dst.opaqueMark()
	if err != nil || to == from || to == opaqueYes {
		return err
	}
	dst.opaque, dst.mark = &from, true
	return nil
}

// mergeKid merges a directory into one of the same name. Of two that the archive
// names the later one's metadata counts, and which that is nobody knows any more.
func (b *rebaser) mergeKid(k, there *rebaseNode) error {
	madeUp := func(n *rebaseNode) bool { return n.implied || n.orig == "" }
	if !k.dir || !there.dir || !madeUp(k) && !madeUp(there) {
		return b.twice(there.path())
	}
	if madeUp(k) != madeUp(there) {
		link, err := b.atLink(there)
		if err != nil {
			return err
		}
		if link {
			return b.twice(there.path())
		}
	}
	if !madeUp(k) {
		m, err := k.metadata()
		if err != nil {
			return err
		}
		there.meta, there.implied = &m, false
	}
	k.dropped = true
	if k.orig != "" {
		b.gone[k.orig] = true
	}
	return b.merge(k, there)
}

// atLink reports whether the parents have something else than a directory where a
// directory will be that one entry names and another passes through: the latter
// went through their symlink, or into the former.
func (b *rebaser) atLink(n *rebaseNode) (bool, error) {
	if hidden, err := n.hidden(); err != nil || hidden {
		return false, err
	}
	st, err := b.lowerStat(n.path())
	if err != nil {
		return false, absent(err)
	}
	return !st.IsDir(), nil
}

func (b *rebaser) twice(p string) error {
	return fmt.Errorf("%s is in the layer twice, once through a symlink of the parents, and nobody knows which is later: "+
		"apply the layer again, onto its parents: %w", p, errdefs.ErrFailedPrecondition)
}

// dressAll gives made-up directories the metadata of the parents' directories,
// or drops those that were made for whiteouts of nothing; the deepest first,
// because what holds only such directories is one.
func (b *rebaser) dressAll(ctx context.Context) error {
	paths := map[*rebaseNode]string{}
	for _, n := range b.made {
		if !n.dropped && n.implied {
			paths[n] = n.path()
		}
	}
	nodes := make([]*rebaseNode, 0, len(paths))
	for n := range paths {
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(x, y *rebaseNode) int { return layer.ComparePaths(paths[y], paths[x]) })
	for _, n := range nodes {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := b.dress(n, paths[n]); err != nil {
			return fmt.Errorf("rebase %q: %w", paths[n], err)
		}
	}
	return nil
}

func (b *rebaser) dress(n *rebaseNode, p string) error {
	from, err := b.below(n, p)
	if err != nil {
		return err
	}
	defer from.Close() // nil where the parents have none
	if from == nil {
		return b.dropHollow(n)
	}
	m, err := readMetadata(from)
	if err != nil {
		return err
	}
	// The mode may be the parents' already: an earlier version's commit was killed
	// before it came to the time.
	if n != b.root && n.mode != 0o755 && n.mode != m.Mode {
		return nil
	}
	n.meta = &m
	return nil
}

// below opens the parents' directory that shows through at p; nil where there is
// none, or an opaque directory of the layer above p hides it.
func (b *rebaser) below(n *rebaseNode, p string) (*sys.Fd, error) {
	if b.lower == nil {
		return nil, nil
	}
	if hidden, err := n.hidden(); err != nil || hidden {
		return nil, err
	}
	from, err := openBeneath(b.lower, p)
	return from, absent(err)
}

// dropHollow drops a made-up directory that holds nothing but whiteouts: it was
// made for them only.
func (b *rebaser) dropHollow(n *rebaseNode) error {
	if n == b.root || n.mode != 0o755 {
		return nil
	}
	kids, err := n.kids()
	if err != nil {
		return err
	}
	for _, k := range kids {
		if white, err := k.isWhiteout(); err != nil || !white {
			return err
		}
	}
	for _, k := range kids {
		b.drop(k)
	}
	b.drop(n)
	return nil
}

// openBeneath opens a directory below fs through no symlink, however deep.
func openBeneath(fs *sys.Fd, p string) (*sys.Fd, error) {
	const resolve = sys.RESOLVE_BENEATH | sys.RESOLVE_NO_SYMLINKS
	const some = 15 // * 256 < PATH_MAX
	names := strings.Split(p, "/")
	at := fs
	for {
		n := min(len(names), some)
		next, err := at.Openat2(strings.Join(names[:n], "/"), sys.O_RDONLY|sys.O_DIRECTORY, 0, resolve)
		if at != fs {
			at.Close()
		}
		if names = names[n:]; err != nil || len(names) == 0 {
			return next, err
		}
		at = next
	}
}
