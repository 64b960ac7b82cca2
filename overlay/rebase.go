package overlay

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

// A layer that was applied without parents may get them at Commit (several
// layers of an image are unpacked at once). What Apply could not know is put
// right then:
//
//   - A directory that the archive only passes through was made up. It takes the
//     metadata of the parents' directory, as it would have with parents.
//   - The archive passes through a name that the parents have as a symlink to a
//     directory: what was put below the made-up directory moves to where the link
//     leads.
//   - Whiteouts and opaque markers are right as they are; with no parents at all
//     the whiteouts are deleted, because such a layer is mounted as it stands.

// rebase fits the layer to the parents of r. Repeatable: applied.json stays until
// the layer is committed.
func (d *Driver) rebase(ctx context.Context, s *state, r drivers.Ref) error {
	dir, err := d.openLayer(s.id)
	if err != nil {
		return err
	}
	defer dir.Close()
	var a applied
	if err := readJSON(dir, appliedFile, &a); err != nil {
		return err
	}
	upper, err := dir.Openat(fsDir, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer upper.Close()
	if len(r.Parents) == 0 {
		return d.rebaseOnNothing(ctx, s.id, upper, a)
	}
	if len(a.Implied) == 0 {
		return nil
	}
	tree, err := d.chainTree(ctx, r.Parents)
	if err != nil {
		return err
	}
	defer tree.Close()
	lower, err := sys.OpenDir(tree.Path())
	if err != nil {
		return err
	}
	defer lower.Close()
	b := rebaser{w: d.whiteouts(), dir: dir, upper: upper, lower: lower, implied: a.Implied, named: map[string]bool{}}
	return b.directories(ctx)
}

// rebaseOnNothing deletes the whiteouts of a layer that hides nothing, and the
// directories that were made for them.
func (d *Driver) rebaseOnNothing(ctx context.Context, id drivers.ID, upper *sys.Fd, a applied) error {
	found, err := d.survey(ctx, id, surveyOptions{whiteouts: true})
	if err != nil || len(found.whiteouts) == 0 {
		return err
	}
	for _, p := range found.whiteouts {
		if err := unlinkKeepingTime(upper, p); err != nil {
			return err
		}
	}
	deepestFirst(a.Implied)
	for _, p := range a.Implied {
		if err := dropHollow(upper, d.whiteouts(), string(p)); err != nil {
			return err
		}
	}
	return nil
}

// unlinkKeepingTime deletes a file and puts its directory's times back: a
// whiteout's going changes nothing that can be seen.
func unlinkKeepingTime(fs *sys.Fd, p string) error {
	parent, err := openBeneath(fs, path.Dir(p))
	if err != nil {
		return err
	}
	defer parent.Close()
	return keepTimes(parent, func() error { return ignore(parent.Unlink(path.Base(p), 0), syscall.ENOENT) })
}

// keepTimes changes the content of a directory and puts its times back.
func keepTimes(dir *sys.Fd, change func() error) error {
	s, err := dir.Stat("")
	if err != nil {
		return err
	}
	if err := change(); err != nil {
		return err
	}
	return dir.Utimes("", s.Atime, s.Mtime)
}

// openBeneath opens a directory below fs through no symlink.
func openBeneath(fs *sys.Fd, p string) (*sys.Fd, error) {
	return fs.Openat2(p, sys.O_RDONLY|sys.O_DIRECTORY, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
}

// rebaser fits one upper to one lower tree.
type rebaser struct {
	w            layer.Whiteouts
	dir          *sys.Fd // the layer's directory, for applied.json
	upper, lower *sys.Fd
	implied      [][]byte
	named        map[string]bool // of implied: has got the metadata of one that the archive names
}

// directories puts the made-up directories right: conflicts with symlinks first,
// because they take directories away; then the metadata.
func (b *rebaser) directories(ctx context.Context) error {
	for i := 0; i < len(b.implied); i++ { // relocate appends
		p := string(b.implied[i])
		if err := b.relocate(p); err != nil {
			return fmt.Errorf("rebase %q: %w", p, err)
		}
	}
	deepestFirst(b.implied)
	for _, p := range b.implied {
		if err := ctx.Err(); err != nil {
			return err
		}
		if b.named[string(p)] {
			continue
		}
		if err := b.dress(string(p)); err != nil {
			return fmt.Errorf("rebase %q: %w", p, err)
		}
	}
	return nil
}

// isImplied reports whether a directory is made up.
func (b *rebaser) isImplied(p string) bool {
	return !b.named[p] && slices.ContainsFunc(b.implied, func(q []byte) bool { return string(q) == p })
}

// willMove adds where the made-up directories below from will be. Written before
// anything moves, so that a second attempt after a crash knows both places.
func (b *rebaser) willMove(from, to string) error {
	for _, p := range slices.Clone(b.implied) {
		if rest, ok := strings.CutPrefix(string(p), from+"/"); ok {
			b.implied = append(b.implied, []byte(path.Join(to, rest)))
		}
	}
	return writeJSON(b.dir, appliedFile, applied{b.implied}, true)
}

// dress gives a made-up directory the metadata of the parents' directory.
func (b *rebaser) dress(p string) error {
	to, err := openBeneath(b.upper, p)
	if errors.Is(err, syscall.ENOENT) {
		return nil // moved to where a link leads
	}
	if err != nil {
		return err
	}
	defer to.Close()
	from, err := b.below(p)
	if err != nil {
		return err
	}
	defer from.Close() // nil where the parents have none
	if p != "." {
		if made, err := madeUp(to, from); err != nil || !made {
			return err
		}
	}
	if from == nil {
		return dropHollow(b.upper, b.w, p)
	}
	return copyMetadata(to, from, drivers.IDMap{})
}

// below opens the parents' directory that shows through at p; nil where there is
// none, or an opaque directory of the layer above p hides it.
func (b *rebaser) below(p string) (*sys.Fd, error) {
	if hidden, err := b.hidden(p); err != nil || hidden {
		return nil, err
	}
	from, err := openBeneath(b.lower, p)
	return from, absent(err)
}

// hidden reports whether a directory above p is opaque in the layer. What is p's
// own opaque mark hides its content, and not its metadata.
func (b *rebaser) hidden(p string) (bool, error) {
	for dir := path.Dir(p); p != "." && dir != "."; dir = path.Dir(dir) {
		f, err := openBeneath(b.upper, dir)
		if err != nil {
			return false, absent(err)
		}
		opaque, err := b.w.IsOpaque(f)
		f.Close()
		if err != nil || opaque {
			return opaque, err
		}
	}
	return false, nil
}

// deepestFirst orders directories so that each comes after those in it.
func deepestFirst(paths [][]byte) {
	slices.SortFunc(paths, func(a, b []byte) int { return layer.ComparePaths(string(b), string(a)) })
}

// dropHollow deletes a made-up directory that holds nothing but whiteouts, if the
// parents have no such directory: it was made for the whiteouts only.
func dropHollow(fs *sys.Fd, w layer.Whiteouts, p string) error {
	if p == "." {
		return nil
	}
	dir, err := openBeneath(fs, p)
	if err != nil {
		return ignore(err, syscall.ENOENT)
	}
	defer dir.Close()
	ents, err := dir.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range ents {
		st, err := dir.Stat(e.Name)
		if err != nil {
			return err
		}
		if white, err := w.IsWhiteout(dir, e.Name, &st); err != nil || !white {
			return err
		}
	}
	for _, e := range ents {
		if err := dir.Unlink(e.Name, 0); err != nil {
			return err
		}
	}
	parent, err := openBeneath(fs, path.Dir(p))
	if err != nil {
		return err
	}
	defer parent.Close()
	return keepTimes(parent, func() error { return parent.Unlink(path.Base(p), sys.AT_REMOVEDIR) })
}

// madeUp reports whether a directory has still what Apply gives to one that it
// knows nothing of: a later archive may have named it, or somebody changed it.
// The mode may be that of from, the parents' directory, already: a commit that was
// killed had not come to the times, which are set last.
func madeUp(dir, from *sys.Fd) (bool, error) {
	s, err := dir.Stat("")
	if err != nil || s.Mtime != (sys.Time{}) {
		return false, err
	}
	if s.Mode&0o7777 == 0o755 || from == nil {
		return s.Mode&0o7777 == 0o755, nil
	}
	f, err := from.Stat("")
	return s.Mode&0o7777 == f.Mode&0o7777, err
}

// relocate moves what is below a made-up directory to where the parents' symlink
// of that name leads, and deletes the directory.
func (b *rebaser) relocate(p string) error {
	if p == "." {
		return nil
	}
	own, err := openBeneath(b.upper, p)
	if err != nil {
		return ignore(err, syscall.ENOENT) // moved already
	}
	own.Close()
	if hidden, err := b.hidden(p); err != nil || hidden {
		return err
	}
	st, err := b.lowerStat(p)
	if err != nil || st.IsDir() {
		return absent(err)
	}
	if st.Type() != sys.S_IFLNK {
		return fmt.Errorf("the archive has files below it and the parents have a file there: %w", errdefs.ErrFailedPrecondition)
	}
	target, err := b.resolve(p)
	if err != nil {
		return err
	}
	if err := b.willMove(p, target); err != nil {
		return err
	}
	return b.move(p, target)
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
	f, err := b.lower.Openat2(p, sys.O_PATH|sys.O_NOFOLLOW, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return sys.Stat{}, err
	}
	defer f.Close()
	return f.Stat("")
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

// move merges upper/from into upper/to, which it makes on the way, and deletes
// upper/from. A file at both places means that the order of the archive decides,
// which is not known any more.
func (b *rebaser) move(from, to string) error {
	dst, err := b.makeBelow(to)
	if err != nil {
		return err
	}
	defer dst.Close()
	src, err := openBeneath(b.upper, from)
	if err != nil {
		return err
	}
	defer src.Close()
	if err := b.merge(src, dst, from, to); err != nil {
		return err
	}
	parent, err := openBeneath(b.upper, path.Dir(from))
	if err != nil {
		return err
	}
	defer parent.Close()
	return keepTimes(parent, func() error { return parent.Unlink(path.Base(from), sys.AT_REMOVEDIR) })
}

// makeBelow opens a directory of the upper, and makes those that are missing,
// like the parents'.
func (b *rebaser) makeBelow(p string) (*sys.Fd, error) {
	cur, err := b.upper.Dup()
	if err != nil || p == "." {
		return cur, err
	}
	done := ""
	for _, n := range strings.Split(p, "/") {
		done = path.Join(done, n)
		next, err := b.makeOne(cur, n, done)
		cur.Close()
		if err != nil {
			return nil, err
		}
		cur = next
	}
	return cur, nil
}

func (b *rebaser) makeOne(cur *sys.Fd, n, full string) (*sys.Fd, error) {
	next, err := cur.Openat(n, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if !errors.Is(err, syscall.ENOENT) {
		return next, err
	}
	if err := keepTimes(cur, func() error { return cur.Mkdir(n, 0o700) }); err != nil {
		return nil, err
	}
	if next, err = cur.Openat(n, sys.O_RDONLY|sys.O_DIRECTORY, 0); err != nil {
		return nil, err
	}
	from, err := openBeneath(b.lower, full)
	if err == nil {
		err = copyMetadata(next, from, drivers.IDMap{})
		from.Close()
	}
	if err != nil {
		next.Close()
		return nil, err
	}
	return next, nil
}

// merge moves every name of src, the layer's directory from, into dst, its
// directory to.
func (b *rebaser) merge(src, dst *sys.Fd, from, to string) error {
	opaque, err := b.w.IsOpaque(src)
	if err != nil {
		return err
	}
	if opaque {
		if err := b.w.SetOpaque(dst); err != nil {
			return err
		}
	}
	ents, err := src.ReadDir()
	if err != nil {
		return err
	}
	move := func() error {
		for _, e := range ents {
			err := src.Rename(e.Name, dst, e.Name, sys.RENAME_NOREPLACE)
			if errors.Is(err, syscall.EEXIST) {
				err = b.mergeDirs(src, dst, path.Join(from, e.Name), path.Join(to, e.Name))
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	return keepTimes(src, func() error { return keepTimes(dst, move) })
}

// mergeDirs merges two directories of one name. Of two that the archive names
// the later one's metadata counts, and which that is nobody knows any more.
func (b *rebaser) mergeDirs(src, dst *sys.Fd, from, to string) error {
	n := path.Base(from)
	a, err := src.Openat(n, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return b.twice(to, err)
	}
	defer a.Close()
	c, err := dst.Openat(n, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return b.twice(to, err)
	}
	defer c.Close()
	fromMade, toMade := b.isImplied(from), b.isImplied(to)
	if !fromMade && !toMade {
		return b.twice(to, nil)
	}
	if err := b.merge(a, c, from, to); err != nil {
		return err
	}
	if !fromMade {
		if err := copyMetadata(c, a, drivers.IDMap{}); err != nil {
			return err
		}
		b.named[to] = true
	}
	return src.Unlink(n, sys.AT_REMOVEDIR)
}

func (b *rebaser) twice(p string, err error) error {
	twice := fmt.Errorf("%s is in the layer twice, once through a symlink of the parents, and nobody knows which is later: "+
		"apply the layer again, onto its parents: %w", p, errdefs.ErrFailedPrecondition)
	return errors.Join(twice, err)
}
