package layer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/internal/sys"
)

// write carries out the archive's steps in order until it is closed or one
// fails.
func (u *unpacker) write(ctx context.Context, a *archive) error {
	var it *item
	for b := range a.full {
		for _, o := range b.ops {
			if o.it != nil {
				it = o.it
			}
			err := ctx.Err()
			if err == nil {
				err = u.do(o)
			}
			if err != nil {
				close(a.failed)
				return located(it.name, it.offset, err)
			}
		}
		clear(b.ops)
		a.free <- b // has a place for every batch
	}
	return nil
}

func (u *unpacker) do(o op) error {
	if o.it == nil {
		return u.file.part(u, o)
	}
	switch o.it.kind {
	case itemWhiteout:
		return u.whiteout(o.it)
	case itemOpaque:
		return u.opaque(o.it)
	case itemAUFS:
		return u.skip(o.it.name, fmt.Errorf("metadata of aufs: %w", errdefs.ErrInvalidArgument))
	case itemLink:
		return u.link(o.it)
	}
	return u.entry(o)
}

// skip leaves out what cannot be stored if somebody is told; else err stands.
func (u *unpacker) skip(path string, err error) error {
	if u.o.Skipped == nil {
		return err
	}
	u.o.Skipped(path, err.Error())
	return nil
}

func (u *unpacker) entry(o op) error {
	s, err := u.find(o.it.name, true)
	if err != nil {
		return err
	}
	if o.it.e.Type == TypeDir {
		return u.dirEntry(s, o.it)
	}
	if s.name == "" {
		return fmt.Errorf("the path is a directory, the entry is not: %w", errdefs.ErrInvalidArgument)
	}
	switch o.it.e.Type {
	case TypeReg:
		return u.fileEntry(s, o)
	case TypeSymlink:
		return u.symlinkEntry(s, o.it)
	}
	return u.nodeEntry(s, o.it)
}

// tries bounds how often a name is cleared for an entry: more than twice means
// that somebody else is at work in the target.
const tries = 3

// place calls make, and where the name is taken clears it and calls again.
func (u *unpacker) place(s spot, make func() error) error {
	for n := 0; ; n++ {
		err := make()
		if n == tries || !errors.Is(err, syscall.EEXIST) {
			s.d.dirty = true
			return cmp.Or(err, u.dirs.forgetLow(s.path))
		}
		if err := u.clear(s); err != nil {
			return err
		}
	}
}

// clear removes what the target has at s.
func (u *unpacker) clear(s spot) error {
	st, err := s.d.up.Stat(s.name)
	if notThere(err) {
		return nil
	}
	if err != nil {
		return err
	}
	s.d.dirty = true
	if !st.IsDir() {
		return s.d.up.Unlink(s.name, 0)
	}
	if err := u.dirs.forget(s.path, true, false); err != nil {
		return err
	}
	u.implied.remove(s.path)
	return removeTree(s.d.up, s.name)
}

// file is a regular file being written.
type file struct {
	s    spot
	it   *item
	fd   *sys.Fd
	off  int64
	tail bool // the last bytes so far are a hole
}

func (u *unpacker) fileEntry(s spot, o op) error {
	f := &file{s: s, it: o.it}
	err := u.place(s, func() (err error) {
		f.fd, err = s.d.up.Openat(s.name, sys.O_WRONLY|sys.O_CREAT|sys.O_EXCL, u.birthMode(&o.it.e))
		return err
	})
	if err != nil {
		return err
	}
	u.file = f
	return f.part(u, o)
}

// part writes a part of the content, and after the last one all the rest.
func (f *file) part(u *unpacker, o op) error {
	if err := f.write(o.data); err != nil {
		return err
	}
	if o.more {
		return nil
	}
	u.file = nil
	defer f.fd.Close()
	if f.tail {
		if err := f.fd.Truncate(f.off); err != nil {
			return err
		}
	}
	if err := u.stamp(f.s, f.fd, f.it); err != nil {
		return err
	}
	if err := f.fd.Close(); err != nil {
		return err
	}
	return u.done(f.s, f.it, o.sum)
}

// done takes a new entry into the marks and the listing.
func (u *unpacker) done(s spot, it *item, sum digest.Digest) error {
	u.noteMine(s.path, s.d.own, false)
	return u.list(s, it, sum)
}

// list adds an entry to the listing. One with xattrs is read back, as the kernel
// may have changed them and the mode: an ACL that says no more than the mode
// vanishes.
func (u *unpacker) list(s spot, it *item, sum digest.Digest) error {
	if u.o.Listing == nil {
		return nil
	}
	e := it.e
	if len(it.xattrs) > 0 {
		in := s.d.up
		read, err := ReadEntryOptions(in, s.name, ReadOptions{OverrideStat: u.o.OverrideStat})
		if err != nil {
			return err
		}
		read.ModTime = e.ModTime // a directory's is written later
		e = read
	}
	e.Path = s.path
	return u.o.Listing.Add(e, sum)
}

func (u *unpacker) symlinkEntry(s spot, it *item) error {
	err := u.place(s, func() error { return s.d.up.Symlink(it.e.Linkname, s.name) })
	if err != nil {
		return err
	}
	if err := u.stamp(s, nil, it); err != nil {
		return err
	}
	return u.done(s, it, "")
}

// nodeEntry makes a fifo or device.
func (u *unpacker) nodeEntry(s spot, it *item) error {
	if err := u.refuseWhiteoutDevice(&it.e); err != nil {
		return u.skip(s.path, err)
	}
	mode := uint32(it.e.Type) | u.birthMode(&it.e)
	err := u.place(s, func() error { return s.d.up.Mknod(s.name, mode, it.e.Major, it.e.Minor) })
	denied := errors.Is(err, syscall.EPERM)
	if err == nil {
		err = u.stamp(s, nil, it)
		denied = errors.Is(err, errOwner)
	}
	switch {
	case denied:
		return u.standIn(s, it, err)
	case err != nil:
		return err
	}
	return u.done(s, it, "")
}

// refuseWhiteoutDevice: in an overlay upper a 0/0 character device would delete.
func (u *unpacker) refuseWhiteoutDevice(e *Entry) error {
	if u.o.Whiteouts == WhiteoutsNone || e.Type != TypeChar || e.Major != 0 || e.Minor != 0 {
		return nil
	}
	return fmt.Errorf("a 0/0 character device is what overlayfs deletes with: %w", errdefs.ErrInvalidArgument)
}

// standIn stores a device or fifo that may not be made, or not with its owner, as
// an empty file that says so.
func (u *unpacker) standIn(s spot, it *item, denied error) error {
	if !u.o.OverrideStat {
		return u.skip(s.path, denied)
	}
	var fd *sys.Fd
	err := u.place(s, func() (err error) {
		fd, err = s.d.up.Openat(s.name, sys.O_WRONLY|sys.O_CREAT|sys.O_EXCL, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	defer fd.Close()
	if err := u.stampOverridden(s, fd, it); err != nil {
		return err
	}
	return u.done(s, it, "")
}

// dirEntry makes a directory, or gives the one that is there the entry's state.
func (u *unpacker) dirEntry(s spot, it *item) error {
	d, made := s.d, false
	if s.name != "" {
		var err error
		if d, made, err = u.makeDir(s, it); err != nil {
			return err
		}
	}
	if !made {
		if err := u.restampDir(d, it); err != nil {
			return err
		}
	}
	in := s.d
	if s.name == "" { // the root, or a path that ends in ".."
		var err error
		if in, err = u.parent(d, true); err != nil {
			return err
		}
	}
	u.noteMine(d.path, in.own, made)
	return u.list(spot{d: d, path: d.path}, it, "")
}

// makeDir makes a directory with the item's state, or finds the one that is there.
func (u *unpacker) makeDir(s spot, it *item) (d *dir, made bool, err error) {
	if d := u.cached(s.path, true); d != nil {
		return d, false, nil
	}
	below := s.d.below
	for n := 0; ; n++ {
		err = s.d.up.Mkdir(s.name, u.birthMode(&it.e)|0o700)
		if err == nil {
			break
		}
		if n == tries || !errors.Is(err, syscall.EEXIST) {
			return nil, false, err
		}
		fd, err := u.openDir(s.d.up, s.name)
		if err == nil {
			d, err := u.openedDir(s.d, s.name, s.path, fd)
			return d, false, err
		}
		if !errors.Is(err, syscall.ENOTDIR) && !errors.Is(err, syscall.ELOOP) {
			return nil, false, err
		}
		// What is there instead has hidden the lower: a new directory is not merged.
		below = nothing
		if err := u.clear(s); err != nil {
			return nil, false, err
		}
	}
	s.d.dirty = true
	if err := u.dirs.forgetLow(s.path); err != nil {
		return nil, false, err
	}
	d, err = u.newDir(s, it, below)
	return d, true, err
}

// newDir opens a directory that was just made; below says what of the lower
// shall be seen through it.
func (u *unpacker) newDir(s spot, it *item, below below) (*dir, error) {
	fd, err := s.d.up.Openat(s.name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	d := &dir{path: s.path, up: fd, own: true, below: below}
	if err := u.finishDir(s, d, it); err != nil {
		fd.Close()
		d.low.Close()
		return nil, err
	}
	return d, u.dirs.add(d)
}

func (u *unpacker) finishDir(s spot, d *dir, it *item) error {
	if err := u.hideLower(s, d); err != nil {
		return err
	}
	if err := u.stamp(s, d.up, it); err != nil {
		return err
	}
	return u.inherit(d, it)
}

// hideLower opens the lower directory that the new directory d is merged with,
// or makes d opaque where it must not be.
func (u *unpacker) hideLower(s spot, d *dir) error {
	if s.d.below == nothing {
		return nil
	}
	if d.below == merged {
		return u.mergeLow(s.d, s.name, d)
	}
	if d.below == nothing && (s.d.below == unknown || isDirAt(s.d.low, s.name)) {
		return u.o.Whiteouts.SetOpaque(d.up)
	}
	return nil
}

func isDirAt(in *sys.Fd, name string) bool {
	st, err := in.Stat(name)
	return err == nil && st.IsDir()
}

// inherit takes into d what the item says that names in the directory inherit,
// and what settle will write.
func (u *unpacker) inherit(d *dir, it *item) error {
	d.gid, d.setgid = it.e.GID, it.e.Mode&0o2000 != 0
	d.mtime, d.dirty = sys.Time{Sec: it.e.ModTime.Sec, Nsec: it.e.ModTime.Nsec}, true
	d.defaultACL = false
	for _, x := range it.xattrs {
		d.defaultACL = d.defaultACL || x.name == "system.posix_acl_default"
	}
	if d.mode = it.e.Mode; u.o.OverrideStat {
		return nil // hidesMode has seen to it
	}
	return u.relax(d)
}

// restampDir gives a directory that was there the state that an entry says, and
// nothing else.
func (u *unpacker) restampDir(d *dir, it *item) error {
	if err := u.dropXattrs(d.up, it.xattrs); err != nil {
		return err
	}
	d.gid, d.defaultACL = ^uint32(0), true // whatever it was: set all
	if err := u.stamp(spot{d: d, path: d.path}, d.up, it); err != nil {
		return err
	}
	return u.inherit(d, it)
}

// implyDir makes a directory that the archive passes through and nobody
// described.
func (u *unpacker) implyDir(cur *dir, name string) (*dir, error) {
	it := impliedItem()
	s := spot{cur, name, join(cur.path, name)}
	d, made, err := u.makeDir(s, it)
	if err != nil || !made {
		return d, err
	}
	u.noteMine(s.path, cur.own, true)
	u.implied.add(s.path)
	if d.below == unknown { // what it is will be known when the lower is
		return d, nil
	}
	return d, u.list(spot{d: d, path: d.path}, it, "")
}

// impliedItem is what a directory gets of which nothing is known: the time is
// fixed, so that unpacking twice gives equal trees.
func impliedItem() *item { return &item{e: Entry{Type: TypeDir, Mode: 0o755}} }
