package union

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

// copyWhat says how much of a regular file is copied up.
type copyWhat int

const (
	copyAll    copyWhat = iota
	copyMeta            // owner, mode, times, xattrs; data stay below (metacopy)
	copyNoData          // the same, and the file is empty: it was opened with O_TRUNC
)

// copySource is the object below that is copied up.
type copySource struct {
	fd   int // O_PATH or better, of the object itself; the caller's
	stat sys.Stat
	data int     // regular files: O_PATH or better of the file with the data, where that is another one (metacopy); else -1
	id   *fileID // becomes xattr origin; nil: that it is unknown is written
}

// copyRequest is one copy-up. The parent is in upper already, and nobody else
// changes names in it meanwhile.
type copyRequest struct {
	src      copySource
	what     copyWhat
	dir      int    // the directory in upper, O_PATH or better
	name     string // EEXIST if it is there
	impure   bool   // dir is marked impure already
	redirect string // becomes xattr redirect (a metacopy file that was moved); "": none
	shared   bool   // goes by way of index (see index.go): Config.Index and the source has several links, or exportAll
	nlink    uint32 // shared: how many links the union shows
	waiter   uint32 // a thread: when it is killed the copying of data ends with EINTR; 0: none
	made     *spot  // built already (see make); used up by the copy-up that comes so far
	noOrigin bool   // neither xattr origin nor an impure parent: for what is in no directory any more

	// setStat replaces chown and chmod, where owner and mode are kept in another
	// way; nil: the plain way.
	setStat func(dir int, name string, st *sys.Stat) error
}

// spot is a name below a directory, or with name "" an open file.
type spot struct {
	dir  int
	name string
}

// copyUp copies one object up: it is there whole afterwards, or not at all. The
// times of dir are as before. A directory is made without its children.
//
// The steps: the object is built where nobody sees it, data first, since writing
// takes capabilities away; then owner (chown takes them away, too), xattrs, mode,
// times; then it gets its name, and dir its times back. Without volatile, copied
// data are flushed before the name is given, so that a crash of the machine leaves
// no empty file there; cloned ones are ordered by the file system itself. What is
// an error after the name is given is logged.
func (u *upper) copyUp(ctx context.Context, r *copyRequest) error {
	var parent sys.Stat
	if err := sys.StatBare(r.dir, "", &parent); err != nil {
		return err
	}
	if !r.impure && !r.noOrigin {
		if err := u.setImpure(r.dir); err != nil {
			return err
		}
	}
	var err error
	if r.shared {
		err = u.copyUpIndexed(ctx, r)
	} else {
		err = u.build(ctx, r, spot{r.dir, r.name}, nil)
	}
	if err != nil {
		return err
	}
	_ = u.step("copy-up: in place")
	if err := sys.UtimesBare(r.dir, "", parent.Atime, parent.Mtime); err != nil {
		u.log("copy-up of %q: times of its directory: %v", r.name, err)
	}
	_ = u.step("copy-up: done")
	return nil
}

// setImpure marks a directory in upper as one that has copied-up objects in it.
func (u *upper) setImpure(dir int) error {
	if !u.can.xattrs {
		return nil
	}
	return sys.SetxattrBare(dir, "", u.xattrs.impure, []byte("y"), 0)
}

// make builds the copy where nobody sees it. Nothing of it depends on where it will
// be, so that no lock is needed.
func (u *upper) make(ctx context.Context, r *copyRequest) error {
	at, err := u.newObject(r)
	if err != nil {
		return err
	}
	r.made = &at
	if err = u.fill(ctx, r, at); err != nil {
		u.unmake(r)
	}
	return err
}

// unmake removes what was built and not used.
func (u *upper) unmake(r *copyRequest) {
	at := r.made
	r.made = nil
	switch {
	case at == nil:
	case at.name == "":
		sys.CloseBare(at.dir)
	default:
		u.discard(at.name)
	}
}

// build makes the copy, unless it is made already, and moves it to its place. ready,
// when not nil, is called with where it is before that.
func (u *upper) build(ctx context.Context, r *copyRequest, to spot, ready func(spot) error) (err error) {
	if r.made == nil {
		if err := u.make(ctx, r); err != nil {
			return err
		}
	}
	at := *r.made
	r.made = nil
	if ready != nil {
		err = ready(at)
	}
	if err == nil {
		err = u.step("copy-up: built")
	}
	if err == nil {
		if at.name != "" {
			err = u.moveNew(at.name, to.dir, to.name)
		} else {
			err = sys.LinkBare(at.dir, "", to.dir, to.name)
		}
	}
	if at.name == "" {
		sys.CloseBare(at.dir)
	} else if err != nil {
		u.discard(at.name)
	}
	return err
}

// newObject makes an empty object of the source's type in work: a file without a
// name where that is possible.
func (u *upper) newObject(r *copyRequest) (spot, error) {
	w, st := u.work.Int(), &r.src.stat
	if st.IsReg() && u.can.tmpfile == kprobe.Yes {
		n, err := sys.TmpfileBare(w, sys.O_RDWR, 0o600)
		return spot{n, ""}, err
	}
	temp := u.tempName()
	var err error
	switch st.Type() {
	case sys.S_IFREG:
		err = sys.MknodBare(w, temp, sys.S_IFREG|0o600, 0, 0)
	case sys.S_IFDIR:
		err = sys.MkdirBare(w, temp, 0o700)
	case sys.S_IFLNK:
		var target string
		if target, err = readlink(r.src.fd, ""); err == nil {
			err = sys.SymlinkBare(target, w, temp)
		}
	default:
		if r.setStat != nil && isRegular(r.src.fd) { // it stands for what it is shown as
			err = sys.MknodBare(w, temp, sys.S_IFREG|0o600, 0, 0)
			break
		}
		err = sys.MknodBare(w, temp, st.Type()|0o600, st.RdevMajor, st.RdevMinor)
	}
	return spot{w, temp}, err
}

func isRegular(fd int) bool {
	var st sys.Stat
	return sys.StatBare(fd, "", &st) == nil && st.IsReg()
}

func readlink(dir int, name string) (string, error) {
	var b [4097]byte // PATH_MAX and one more
	n, err := sys.ReadlinkBare(dir, name, b[:])
	if err == nil && n == len(b) {
		err = syscall.ENAMETOOLONG
	}
	return string(b[:n]), err
}

// fill gives the new object everything that the source has.
func (u *upper) fill(ctx context.Context, r *copyRequest, at spot) error {
	if r.src.stat.IsReg() {
		if err := u.fillFile(ctx, r, at); err != nil {
			return err
		}
	}
	st := &r.src.stat
	if r.setStat == nil {
		if err := sys.ChownBare(at.dir, at.name, st.UID, st.GID); err != nil {
			if err == syscall.EINVAL { // an id that this user namespace does not map
				err = syscall.EOVERFLOW
			}
			return err
		}
	}
	if err := u.copyXattrs(r.src.fd, at.dir, at.name); err != nil {
		return err
	}
	if err := u.ownXattrs(r, at); err != nil {
		return err
	}
	if r.setStat != nil {
		if err := r.setStat(at.dir, at.name, st); err != nil {
			return err
		}
	} else if st.Type() != sys.S_IFLNK {
		if err := sys.ChmodBare(at.dir, at.name, st.Mode&0o7777); err != nil {
			return err
		}
	}
	if st.IsReg() || st.IsDir() {
		if err := u.copyFlags(r.src.fd, st, at); err != nil {
			return err
		}
	}
	if err := sys.UtimesBare(at.dir, at.name, st.Atime, st.Mtime); err != nil {
		return err
	}
	return u.step("copy-up: metadata")
}

// fillFile gives a regular file its data, or only its size.
func (u *upper) fillFile(ctx context.Context, r *copyRequest, at spot) error {
	n := at.dir
	if at.name != "" {
		var err error
		if n, err = sys.OpenBare(at.dir, at.name, sys.O_RDWR, 0); err != nil {
			return err
		}
		defer sys.CloseBare(n)
	}
	size := r.src.stat.Size
	switch {
	case r.what == copyNoData || size == 0:
		return u.step("copy-up: data")
	case r.what == copyMeta:
		return sys.FtruncateBare(n, size)
	}
	from := r.src.data
	if from < 0 {
		from = r.src.fd
	}
	if err := u.copyData(ctx, n, from, size, dataOptions{waiter: r.waiter}); err != nil {
		return err
	}
	return u.step("copy-up: data")
}

// ownXattrs writes overlayfs's own: where the object comes from, and what of it is
// still there.
func (u *upper) ownXattrs(r *copyRequest, at spot) error {
	if !u.can.xattrs {
		return nil
	}
	set := func(attr string, value []byte) error {
		err := sys.SetxattrBare(at.dir, at.name, attr, value, 0)
		if err != nil {
			return fmt.Errorf("%s: %w", attr, err)
		}
		return nil
	}
	st := &r.src.stat
	if !r.noOrigin && (st.IsDir() || st.Nlink == 1 || r.shared) { // else the copy is no longer the file that other names have
		var b [fbHeader + sys.MaxHandle]byte
		value := b[:0]
		if r.src.id != nil {
			value = r.src.id.appendTo(value)
		}
		err := set(u.xattrs.origin, value)
		if err != nil && !(st.Type() != sys.S_IFREG && !st.IsDir() && u.xattrs == userNames) {
			return err // user.* is not for symlinks, devices, fifos, sockets
		}
	}
	if !st.IsReg() || r.what != copyMeta {
		return nil
	}
	if err := set(u.xattrs.metacopy, nil); err != nil {
		return err
	}
	if r.redirect == "" {
		return nil
	}
	return set(u.xattrs.redirect, []byte(r.redirect))
}

// copyXattrs copies all xattrs of from (O_PATH or better) but those that are this
// overlay's own. One that the upper's file system does not know is left out, as
// the kernel does, unless access depends on it.
func (u *upper) copyXattrs(from, dir int, name string) error {
	var small [512]byte
	list := small[:]
	n, err := sys.ListxattrBare(from, "", list)
	if err == syscall.ERANGE {
		list = make([]byte, xattrSizeMax)
		n, err = sys.ListxattrBare(from, "", list)
	}
	if err == syscall.EOPNOTSUPP {
		return nil
	}
	if err != nil {
		return err
	}
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if attr == "" || u.xattrs.private(attr) || attr == xattrEVM { // a signature of the other inode
			continue
		}
		if u.stored != "" && attr != u.stored && slices.Contains(storedNames, attr) {
			continue // another layer's way of it
		}
		if err := u.copyXattr(from, dir, name, attr); err != nil {
			return fmt.Errorf("xattr %s: %w", attr, err)
		}
	}
	return nil
}

func (u *upper) copyXattr(from, dir int, name, attr string) error {
	var small [256]byte
	value, put, err := getValue(from, "", attr, small[:])
	if err == syscall.ENODATA || err == syscall.EINVAL && attr == xattrCapability { // gone, or one that grants nothing
		return nil
	}
	if err != nil {
		return err
	}
	defer put()
	err = sys.SetxattrBare(dir, name, attr, value, 0)
	must := attr == xattrACLAccess || attr == xattrACLDefault || strings.HasPrefix(attr, "security.")
	if err == syscall.EOPNOTSUPP && !must {
		return nil
	}
	if attr == xattrSELinux && (err == syscall.EPERM || err == syscall.EACCES || err == syscall.EOPNOTSUPP) {
		return nil // the policy labels it
	}
	return err
}

// copyFlags copies inode flags: sync and noatime themselves, immutable and append
// as xattr protattr: an upper that had these could be neither renamed nor marked.
func (u *upper) copyFlags(from int, st *sys.Stat, at spot) error {
	flags := inodeFlags(from, st)
	var prot []byte
	if flags&sys.FS_APPEND_FL != 0 {
		prot = append(prot, 'a')
	}
	if flags&sys.FS_IMMUTABLE_FL != 0 {
		prot = append(prot, 'i')
	}
	if len(prot) > 0 && u.can.xattrs {
		if err := sys.SetxattrBare(at.dir, at.name, u.xattrs.protattr, prot, 0); err != nil {
			return fmt.Errorf("%s: %w", u.xattrs.protattr, err)
		}
	}
	copied := flags & (sys.FS_SYNC_FL | sys.FS_NOATIME_FL)
	if copied == 0 {
		return nil
	}
	n := at.dir
	if at.name != "" {
		var err error
		if n, err = sys.OpenBare(at.dir, at.name, sys.O_RDONLY, 0); err != nil {
			return err
		}
		defer sys.CloseBare(n)
	}
	now, err := sys.FlagsBare(n)
	if err == nil {
		err = sys.SetFlagsBare(n, now|copied)
	}
	if err == syscall.ENOTTY || err == syscall.EINVAL || err == syscall.EOPNOTSUPP {
		return nil
	}
	return err
}

// inodeFlags reads the inode flags of from; 0 where there are none to read. statx
// tells two of them, and the others need a descriptor that is not O_PATH.
func inodeFlags(from int, st *sys.Stat) uint32 {
	n, err := openData(from)
	if err != nil {
		return 0
	}
	defer sys.CloseBare(n)
	flags, err := sys.FlagsBare(n)
	if err != nil {
		return 0
	}
	return flags
}

// openData opens for reading, without changing its atime, the file that n is open
// on.
func openData(n int) (int, error) {
	fd, err := sys.ReopenBare(n, sys.O_RDONLY|sys.O_NOATIME)
	if err == syscall.EPERM { // not the owner
		fd, err = sys.ReopenBare(n, sys.O_RDONLY)
	}
	return fd, err
}

// copyUpData fills in the data of a metacopy file in upper: fd is O_PATH or better
// of it, data of the file with the data; -1: it is emptied. waiter is as in copyRequest. Mode, capabilities and
// times stay. Killed anywhere, it is a metacopy file still; but writing to a file
// takes its capabilities away, so that one that is killed before they are put back
// leaves it without, as the kernel's overlayfs does.
func (u *upper) copyUpData(ctx context.Context, fd, data int, waiter uint32) error {
	var st sys.Stat
	if err := sys.StatBare(fd, "", &st); err != nil {
		return err
	}
	var small [256]byte
	capability, put, err := getValue(fd, "", xattrCapability, small[:])
	if err != nil {
		capability, put = nil, func() {}
	}
	defer put()
	n, err := sys.ReopenBare(fd, sys.O_RDWR)
	if err != nil {
		return err
	}
	defer sys.CloseBare(n)
	if data < 0 {
		err = sys.FtruncateBare(n, 0)
	} else if st.Size > 0 {
		err = u.copyData(ctx, n, data, st.Size, dataOptions{used: st.Blocks > 0, waiter: waiter})
	}
	if err == nil {
		err = u.step("copy-up: data")
	}
	if kept := keepStat(n, &st, capability); err == nil {
		err = kept
	}
	if err == nil {
		err = u.step("copy-up: data kept")
	}
	if err != nil {
		return err
	}
	err = sys.RemovexattrBare(n, "", u.xattrs.metacopy)
	if err == syscall.ENODATA {
		return nil
	}
	return err
}

// keepStat gives back to a file what writing to it took.
func keepStat(n int, st *sys.Stat, capability []byte) error {
	if len(capability) > 0 {
		if err := sys.SetxattrBare(n, "", xattrCapability, capability, 0); err != nil {
			return fmt.Errorf("xattr %s: %w", xattrCapability, err)
		}
	}
	if err := sys.ChmodBare(n, "", st.Mode&0o7777); err != nil {
		return err
	}
	return sys.UtimesBare(n, "", st.Atime, st.Mtime)
}
