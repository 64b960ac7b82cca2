package layer

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// removeTree removes the directory name in dir with all below it. Each level
// keeps a descriptor open.
func removeTree(dir *sys.Fd, name string) error {
	fd, err := dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if errors.Is(err, syscall.EACCES) {
		if err = dir.ChmodAt(name, 0o700); err == nil {
			fd, err = dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
		}
	}
	if err != nil {
		return err
	}
	defer fd.Close()
	names, err := fd.ReadDir()
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := removeAny(fd, n); err != nil {
			return err
		}
	}
	return dir.Unlink(name, sys.AT_REMOVEDIR)
}

func removeAny(in *sys.Fd, n sys.Dirent) error {
	if n.Type != sys.S_IFDIR {
		err := in.Unlink(n.Name, 0)
		if n.Type != 0 || !errors.Is(err, syscall.EISDIR) {
			return err
		}
	}
	return removeTree(in, n.Name)
}

// whiteout deletes what was at the victim before this layer, and keeps what the
// layer itself has there.
func (u *unpacker) whiteout(it *item) error {
	parent, _ := splitPath(fromRoot(it.name))
	d, err := u.resolveDoomed(parent)
	if notThere(err) || errors.Is(err, syscall.ENOTDIR) {
		return nil // nothing there to delete
	}
	if err != nil {
		return err
	}
	return u.hide(spot{d, it.victim, join(d.path, it.victim)})
}

// resolveDoomed finds the directory that a deletion is about. Over a lower that
// is not known one that is not in the target may be below: it is implied then,
// unless something on the way hides the lower.
func (u *unpacker) resolveDoomed(path string) (*dir, error) {
	d, err := u.resolve(path, false)
	if !notThere(err) || u.root.below != unknown {
		return d, err
	}
	for p := path; ; {
		var name string
		p, name = splitPath(p)
		above, aerr := u.resolve(p, false)
		if notThere(aerr) && p != "" {
			continue
		}
		if aerr != nil || above.below != unknown {
			return nil, err
		}
		if white, werr := u.isWhiteout(spot{above, name, ""}); werr != nil || white {
			return nil, err
		}
		return u.resolve(path, true)
	}
}

// hide deletes what was at s before this layer.
func (u *unpacker) hide(s spot) error {
	white, err := u.isWhiteout(s)
	if err != nil || white {
		return err
	}
	hidden, err := u.lowerHas(s)
	if err != nil {
		return err
	}
	if err := u.dirs.forget(s.path, true, true); err != nil {
		return err
	}
	gone, kept := false, false
	if s.d.up != nil {
		p := purge{u: u}
		if gone, kept, err = p.name(s.d.up, s.name, s.path, s.d.own); err != nil {
			return err
		}
		s.d.dirty = s.d.dirty || gone
	}
	switch {
	case kept:
		return u.hideBehind(s)
	case hidden:
		err = u.placeWhiteout(s)
	}
	if err == nil && (gone || hidden) && u.o.Listing != nil {
		err = u.o.Listing.Delete(s.path)
	}
	return err
}

func (u *unpacker) isWhiteout(s spot) (bool, error) {
	if s.d.up == nil {
		return false, nil
	}
	st, err := s.d.up.Stat(s.name)
	if notThere(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return u.o.Whiteouts.IsWhiteout(s.d.up, s.name, &st)
}

// lowerHas reports whether the lower tree has s.name, or may have it.
func (u *unpacker) lowerHas(s spot) (bool, error) {
	if s.d.below != merged {
		return s.d.below == unknown, nil
	}
	st, err := s.d.low.Stat(s.name)
	if notThere(err) {
		return false, nil
	}
	return err == nil && !st.IsWhiteout(), err
}

func (u *unpacker) placeWhiteout(s spot) error {
	d, err := u.inTarget(s.d)
	if err != nil {
		return err
	}
	d.dirty = true
	return u.o.Whiteouts.MakeWhiteout(d.up, s.name)
}

// inTarget copies d up if it is only below.
func (u *unpacker) inTarget(d *dir) (*dir, error) {
	if d.up != nil {
		return d, nil
	}
	return u.resolve(d.path, true)
}

// hideBehind makes the directory s, which has content of this layer, show
// nothing of the lower. A file does not anyway.
func (u *unpacker) hideBehind(s spot) error {
	if s.d.below == nothing || !isDirAt(s.d.up, s.name) {
		return nil
	}
	d, _, err := u.lookup(s.d, s.name, s.path)
	if err != nil || d == nil {
		return err
	}
	return u.makeOpaque(d)
}

// opaque deletes what was in the marker's directory before this layer.
func (u *unpacker) opaque(it *item) error {
	parent, _ := splitPath(fromRoot(it.name))
	d, err := u.resolveDoomed(parent)
	if notThere(err) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	if d == u.root && d.below != nothing {
		return u.emptyRoot()
	}
	if d, err = u.inTarget(d); err != nil {
		return err
	}
	if err := u.dirs.forget(d.path, false, true); err != nil {
		return err
	}
	if !d.own || u.passed && d.below != nothing { // else nothing of before is left, however often the archive says so
		p := purge{u: u}
		gone, _, err := p.content(d.up, d.path, d.own)
		if err != nil {
			return err
		}
		d.dirty = d.dirty || gone
	}
	if !d.own {
		d.own = true
		u.setMark(d.path, u.markOf(d.path)|markOwn)
	}
	return u.makeOpaque(d)
}

// emptyRoot: overlayfs does not look at the opaque xattr of its root
// (fs/overlayfs/super.c: ovl_get_root, 6.18), so each name is hidden.
func (u *unpacker) emptyRoot() error {
	if u.root.below == unknown {
		return fmt.Errorf("an opaque root over a lower that is not known: %w", errdefs.ErrFailedPrecondition)
	}
	for _, fd := range []*sys.Fd{u.root.low, u.root.up} {
		names, err := fd.ReadDir()
		if err != nil {
			return err
		}
		for _, n := range names {
			if err := u.hide(spot{u.root, n.Name, n.Name}); err != nil {
				return err
			}
		}
	}
	return nil
}

// makeOpaque hides all that is below d, which is in the target.
func (u *unpacker) makeOpaque(d *dir) error {
	if d.below == nothing {
		return nil
	}
	if err := u.listHidden(d.up, d.low, d.path); err != nil {
		return err
	}
	if err := u.dropWhiteouts(d); err != nil {
		return err
	}
	if err := u.o.Whiteouts.SetOpaque(d.up); err != nil {
		return err
	}
	if err := u.dirs.forget(d.path, false, true); err != nil { // some know the lower
		return err
	}
	d.low.Close()
	d.low, d.below, d.dirty = nil, nothing, true
	return nil
}

// dropWhiteouts removes whiteouts that an opaque directory does not need, and of
// which one that is an xattr would show as a file there.
func (u *unpacker) dropWhiteouts(d *dir) error {
	names, err := d.up.ReadDir()
	if err != nil {
		return err
	}
	for _, n := range names {
		s := spot{d, n.Name, ""}
		if white, err := u.isWhiteout(s); err != nil {
			return err
		} else if !white {
			continue
		}
		if err := d.up.Unlink(n.Name, 0); err != nil {
			return err
		}
	}
	return nil
}

// listHidden tells the listing what of the lower directory low an opaque
// directory up hides, which is all that up does not have itself.
func (u *unpacker) listHidden(up, low *sys.Fd, path string) error {
	if u.o.Listing == nil || low == nil {
		return nil
	}
	names, err := low.ReadDir()
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := u.listHiddenName(up, low, n.Name, join(path, n.Name)); err != nil {
			return err
		}
	}
	return nil
}

func (u *unpacker) listHiddenName(up, low *sys.Fd, name, path string) error {
	st, err := up.Stat(name)
	if notThere(err) {
		return u.o.Listing.Delete(path)
	}
	if err != nil || !st.IsDir() || !isDirAt(low, name) {
		return err // another file, or a whiteout that is listed
	}
	subUp, err := up.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer subUp.Close()
	if opaque, err := u.o.Whiteouts.IsOpaque(subUp); opaque || err != nil {
		return err
	}
	subLow, err := low.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer subLow.Close()
	return u.listHidden(subUp, subLow, path)
}

// purge removes from the target what was there before this layer. Nothing of
// what it goes through is in the cache.
type purge struct{ u *unpacker }

// name purges one name. gone: something was removed; kept: something is left,
// because this layer brought it, or something below it.
func (p *purge) name(in *sys.Fd, name, path string, own bool) (gone, kept bool, err error) {
	st, err := in.Stat(name)
	if notThere(err) {
		return false, false, nil
	}
	if err != nil {
		return false, false, err
	}
	if st.IsDir() {
		return p.dir(in, name, path, own, &st)
	}
	white, err := p.u.o.Whiteouts.IsWhiteout(in, name, &st)
	switch {
	case err != nil:
		return false, false, err
	case white: // nothing, and what it hides is about to be hidden otherwise
		return false, false, in.Unlink(name, 0)
	case p.u.isMine(path, own):
		return false, true, nil
	}
	return true, false, in.Unlink(name, 0)
}

func (p *purge) dir(in *sys.Fd, name, path string, own bool, st *sys.Stat) (gone, kept bool, err error) {
	mine, content := p.u.isMine(path, own), p.u.isOwn(path, own)
	if mine && content && !p.u.passed {
		return false, true, nil
	}
	fd, err := p.u.openDir(in, name)
	if err != nil {
		return false, false, err
	}
	defer fd.Close()
	gone, kept, err = p.content(fd, path, content)
	switch {
	case err != nil:
		return gone, kept, err
	case mine:
		p.nowOwn(path, own)
		return gone, true, fd.Utimes("", sys.TimeOmit, st.Mtime)
	case kept:
		return true, true, p.reset(fd, path, own)
	}
	p.u.implied.remove(path)
	return true, false, in.Unlink(name, sys.AT_REMOVEDIR)
}

// content purges all names of a directory.
func (p *purge) content(fd *sys.Fd, path string, own bool) (gone, kept bool, err error) {
	names, err := fd.ReadDir()
	if err != nil {
		return false, false, err
	}
	for _, n := range names {
		sub := join(path, n.Name)
		g, k, err := p.name(fd, n.Name, sub, own)
		if err == nil && g && !k && p.u.o.Listing != nil {
			err = p.u.o.Listing.Delete(sub)
		}
		if err != nil {
			return gone, kept, err
		}
		gone, kept = gone || g, kept || k
	}
	return gone, kept, nil
}

// nowOwn records that a directory holds only what this layer brought.
func (p *purge) nowOwn(path string, own bool) {
	if !own {
		p.u.setMark(path, p.u.markOf(path)|markOwn)
	}
}

// reset gives a directory that was deleted, and is there again only because the
// layer has something below it, what an implied directory gets.
func (p *purge) reset(fd *sys.Fd, path string, own bool) error {
	u := p.u
	it := impliedItem()
	d := &dir{path: path, up: fd}
	if err := u.restampDir(d, it); err != nil {
		return err
	}
	if err := fd.Utimes("", sys.TimeOmit, sys.Time{}); err != nil {
		return err
	}
	if own {
		u.setMark(path, 0)
	} else {
		u.setMark(path, markMine|markOwn)
	}
	u.implied.add(path)
	return u.list(spot{d: d, path: path}, it, "")
}
