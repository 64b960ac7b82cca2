package layer

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/internal/sys"
)

// link makes a hard link. Its target is resolved as every path is; one that is
// only below is copied up first, as overlayfs does.
func (u *unpacker) link(it *item) error {
	from, err := u.linkTarget(it.e.Linkname)
	if err != nil {
		return fmt.Errorf("hard link to %s: %w", quoteName(it.e.Linkname), err)
	}
	from.d.pins++
	defer func() { from.d.pins-- }()
	to, err := u.find(it.name, true)
	if err != nil {
		return err
	}
	if to.name == "" || isBelow(from.path, to.path) {
		return fmt.Errorf("hard link to %s in the place of a directory above it: %w", quoteName(from.path), errdefs.ErrInvalidArgument)
	}
	if from.path != to.path {
		if err := u.linkTo(from, to); err != nil {
			return fmt.Errorf("hard link to %s: %w", quoteName(from.path), err)
		}
	}
	return u.linkDone(from, to)
}

// linkTarget finds the file that a link names, in the target.
func (u *unpacker) linkTarget(name string) (spot, error) {
	s, err := u.find(name, false)
	if err != nil {
		return s, missingTarget(err)
	}
	if s.name == "" {
		return s, fmt.Errorf("it is a directory: %w", errdefs.ErrInvalidArgument)
	}
	if s.d.up != nil {
		st, err := s.d.up.Stat(s.name)
		if err == nil {
			return s, u.checkTarget(s, &st)
		}
		if !notThere(err) {
			return s, err
		}
	}
	if s.d.below != merged {
		return s, missingTarget(syscall.ENOENT)
	}
	return u.copyUpFile(s)
}

// missingTarget: the archive is to blame.
func missingTarget(err error) error {
	if notThere(err) || errors.Is(err, syscall.ENOTDIR) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

func (u *unpacker) checkTarget(s spot, st *sys.Stat) error {
	if st.IsDir() {
		return fmt.Errorf("it is a directory: %w", errdefs.ErrInvalidArgument)
	}
	white, err := u.o.Whiteouts.IsWhiteout(s.d.up, s.name, st)
	if err != nil {
		return err
	}
	if white {
		return missingTarget(syscall.ENOENT)
	}
	if s.d.below == nothing || s.d.own || !st.IsReg() {
		return nil
	}
	_, err = s.d.up.Getxattr(s.name, u.o.Whiteouts.overlayXattr("metacopy"))
	if err == nil {
		return fmt.Errorf("it has its data elsewhere (metacopy): %w", errdefs.ErrFailedPrecondition)
	}
	return noXattr(err)
}

func (u *unpacker) linkTo(from, to spot) error {
	same, err := sameFile(from, to)
	if same || err != nil {
		return err
	}
	return u.place(to, func() error { return from.d.up.Link(from.name, to.d.up, to.name) })
}

// sameFile reports whether two names are of one file already.
func sameFile(a, b spot) (bool, error) {
	sb, err := b.d.up.Stat(b.name)
	if notThere(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	sa, err := a.d.up.Stat(a.name)
	return err == nil && inodeOf(&sa) == inodeOf(&sb), err
}

// linkDone takes a link into the marks and the listing. The listing must have
// the target, too: a link changes its group, and a record needs what it names.
func (u *unpacker) linkDone(from, to spot) error {
	if err := u.listTarget(from); err != nil {
		return err
	}
	u.noteMine(to.path, to.d.own, false)
	if u.o.Listing == nil || from.path == to.path {
		return nil
	}
	st, err := to.d.up.Stat(to.name)
	if err != nil {
		return err
	}
	return u.o.Listing.Add(Entry{Path: to.path, Hardlink: from.path, Type: FileType(st.Type())}, "")
}

// listTarget adds a link's target that was there before this layer.
func (u *unpacker) listTarget(s spot) error {
	if u.o.Listing == nil || u.isMine(s.path, s.d.own) || u.markOf(s.path)&markListed != 0 {
		return nil
	}
	e, err := ReadEntryOptions(s.d.up, s.name, ReadOptions{OverrideStat: u.o.OverrideStat})
	if err != nil {
		return err
	}
	e.Path = s.path
	var sum digest.Digest
	if e.Type == TypeReg {
		if sum, err = digestOf(s.d.up, s.name); err != nil {
			return err
		}
	}
	u.setMark(s.path, u.markOf(s.path)|markListed)
	return u.o.Listing.Add(e, sum)
}

func digestOf(in *sys.Fd, name string) (digest.Digest, error) {
	fd, err := in.Openat(name, sys.O_RDONLY, 0)
	if err != nil {
		return "", err
	}
	defer fd.Close()
	h := sha256.New()
	if _, err := io.Copy(h, fd); err != nil {
		return "", err
	}
	return digest.NewDigest(digest.SHA256, h), nil
}

// copyUpDir makes d, a directory that is only below, in the target, with the
// lower one's metadata. cur is its parent, which is in the target.
func (u *unpacker) copyUpDir(cur *dir, name string, d *dir) error {
	e, err := ReadEntryOptions(d.low, "", ReadOptions{})
	if err != nil {
		return err
	}
	it := itemOf(e)
	if err := cur.up.Mkdir(name, u.birthMode(&it.e)); err != nil {
		return err
	}
	cur.dirty = true
	u.dirs.lowOnly--
	if d.up, err = cur.up.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0); err != nil {
		return err
	}
	if err := u.stamp(spot{cur, name, d.path}, d.up, it); err != nil {
		return err
	}
	if err := u.inherit(d, it); err != nil {
		return err
	}
	d.own = true
	if cur.own {
		u.setMark(d.path, markPassed)
	} else {
		u.setMark(d.path, markOwn)
	}
	return nil
}

// itemOf is the item that makes an entry again. What overlayfs keeps for itself
// is not in an entry.
func itemOf(e Entry) *item {
	it := &item{e: e}
	for n, v := range e.Xattrs {
		it.xattrs = append(it.xattrs, xattr{n, v})
	}
	it.e.Xattrs = nil
	return it
}

// copyUpFile copies a file that is only below into the target, all of it.
func (u *unpacker) copyUpFile(s spot) (spot, error) {
	e, err := ReadEntryOptions(s.d.low, s.name, ReadOptions{})
	if err != nil {
		return s, missingTarget(err)
	}
	if e.IsDir() {
		return s, fmt.Errorf("it is a directory: %w", errdefs.ErrInvalidArgument)
	}
	if e.Type == TypeChar && e.Major == 0 && e.Minor == 0 {
		return s, missingTarget(syscall.ENOENT) // a whiteout
	}
	if s.d, err = u.inTarget(s.d); err != nil {
		return s, err
	}
	s.d.pins++
	defer func() { s.d.pins-- }()
	if err := u.copyUp(s, itemOf(e)); err != nil {
		return s, err
	}
	s.d.dirty = true
	if s.d.own {
		u.setMark(s.path, markPassed)
	}
	return s, nil
}

func (u *unpacker) copyUp(s spot, it *item) error {
	switch it.e.Type {
	case TypeReg:
		return u.copyUpData(s, it)
	case TypeSymlink:
		if err := s.d.up.Symlink(it.e.Linkname, s.name); err != nil {
			return err
		}
	default:
		mode := uint32(it.e.Type) | u.birthMode(&it.e)
		if err := s.d.up.Mknod(s.name, mode, it.e.Major, it.e.Minor); err != nil {
			return err
		}
	}
	return u.stamp(s, nil, it)
}

func (u *unpacker) copyUpData(s spot, it *item) error {
	src, err := s.d.low.Openat(s.name, sys.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	fd, err := s.d.up.Openat(s.name, sys.O_WRONLY|sys.O_CREAT|sys.O_EXCL, u.birthMode(&it.e))
	if err != nil {
		return err
	}
	defer fd.Close()
	f := &file{s: s, it: it, fd: fd}
	if err := f.copy(src); err != nil {
		return err
	}
	return u.stamp(s, fd, it)
}

// copy writes all of src, zeros as holes.
func (f *file) copy(src *sys.Fd) error {
	buf := make([]byte, 256<<10)
	for {
		n, err := io.ReadFull(src, buf)
		if werr := f.write(buf[:n]); werr != nil {
			return werr
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if f.tail {
		return f.fd.Truncate(f.off)
	}
	return nil
}

// isBelow reports whether p is strictly inside the directory path dir.
func isBelow(p, dir string) bool {
	return len(p) > len(dir) && p[:len(dir)] == dir && p[len(dir)] == '/'
}
