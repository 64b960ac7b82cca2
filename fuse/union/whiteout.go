package union

import (
	"sync"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Whiteouts are written as the file system below allows (abilities.whiteouts). A
// device, or a file with an xattr, stands where the name would, so that one rename
// changes one for the other. A file .wh.NAME stands beside it: where both are in
// one directory of the upper, NAME is what counts.

// whiteoutPrefix begins the names of whiteouts that are plain files, and
// opaqueFile is the one that makes its directory opaque.
const (
	whiteoutPrefix = ".wh."
	opaqueFile     = ".wh..wh..opq"
)

// sharedWhiteout is the whiteout in work that others are links of, so that a
// hundred thousand of them take one inode. The kernel does the same.
type sharedWhiteout struct {
	mu   sync.Mutex
	name string // in work; "": none now
	off  bool   // links do not work
}

// whiteout puts a whiteout at name below dir, where nothing is in upper.
func (u *upper) whiteout(dir int, name string) error {
	if u.can.whiteouts == whiteoutFile {
		return u.whiteoutFile(dir, name)
	}
	if u.can.whiteouts == whiteoutXattr {
		if err := u.allowXWhiteouts(dir); err != nil {
			return err
		}
	}
	if u.can.whiteouts == whiteoutDevice {
		if done, err := u.linkShared(dir, name); done {
			return err
		}
	}
	temp, err := u.newWhiteout()
	if err != nil {
		return err
	}
	if err := u.step("whiteout: made"); err != nil {
		u.discard(temp)
		return err
	}
	if err := u.moveNew(temp, dir, name); err != nil {
		u.discard(temp)
		return err
	}
	return nil
}

// linkShared makes name below dir a link of the shared whiteout; done is false
// where that is not possible, and something else has to be tried.
func (u *upper) linkShared(dir int, name string) (done bool, err error) {
	s := &u.shared
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.off {
		return false, nil
	}
	if s.name == "" {
		temp := u.tempName()
		if err := sys.MknodBare(u.work.Int(), temp, sys.S_IFCHR, 0, 0); err != nil {
			return true, err
		}
		s.name = temp
	}
	err = sys.LinkBare(u.work.Int(), s.name, dir, name)
	switch err {
	case nil, syscall.EEXIST, syscall.ENOENT, syscall.ENAMETOOLONG, syscall.ENOSPC, syscall.EDQUOT, syscall.EIO, syscall.EROFS:
		return true, err
	case syscall.EMLINK: // full: what is asked for is the last link of it
		last := s.name
		s.name = ""
		return true, u.moveNew(last, dir, name)
	}
	u.log("whiteouts are not shared: link: %v", err)
	s.off = true
	return false, nil
}

// newWhiteout makes a whiteout that is a device or has the xattr, in work.
func (u *upper) newWhiteout() (temp string, err error) {
	temp = u.tempName()
	if u.can.whiteouts == whiteoutXattr {
		if err := sys.MknodBare(u.work.Int(), temp, sys.S_IFREG, 0, 0); err != nil {
			return "", err
		}
		if err := sys.SetxattrBare(u.work.Int(), temp, u.xattrs.whiteout, nil, 0); err != nil {
			u.discard(temp)
			return "", err
		}
		return temp, nil
	}
	if done, err := u.linkShared(u.work.Int(), temp); done {
		return temp, err
	}
	return temp, sys.MknodBare(u.work.Int(), temp, sys.S_IFCHR, 0, 0)
}

// allowXWhiteouts marks dir as one in which files with the xattr are whiteouts.
func (u *upper) allowXWhiteouts(dir int) error {
	var v [2]byte
	n, err := sys.GetxattrBare(dir, "", u.xattrs.opaque, v[:])
	if err == nil && n == 1 {
		return nil // "x" already, or "y", which needs no whiteouts
	}
	return sys.SetxattrBare(dir, "", u.xattrs.opaque, []byte("x"), 0)
}

// whiteoutFile makes .wh.NAME.
func (u *upper) whiteoutFile(dir int, name string) error {
	err := sys.MknodBare(dir, whiteoutPrefix+name, sys.S_IFREG, 0, 0)
	if err == syscall.EEXIST {
		return nil
	}
	return err
}

// moveNew moves temp from work to name below dir, where nothing is.
func (u *upper) moveNew(temp string, dir int, name string) error {
	err := sys.RenameBare(u.work.Int(), temp, dir, name, sys.RENAME_NOREPLACE)
	if err != syscall.EINVAL {
		return err
	}
	var st sys.Stat
	if err := sys.StatBare(dir, name, &st); err != syscall.ENOENT {
		if err == nil {
			err = syscall.EEXIST
		}
		return err
	}
	return sys.RenameBare(u.work.Int(), temp, dir, name, 0)
}

// removeCovered removes name below dir, which a lower has too, and leaves a
// whiteout there in one step. A directory may hold whiteouts and nothing else.
func (u *upper) removeCovered(dir int, name string) error {
	if u.can.whiteouts == whiteoutFile {
		return u.removeBeside(dir, name)
	}
	if u.can.whiteouts == whiteoutXattr {
		if err := u.allowXWhiteouts(dir); err != nil {
			return err
		}
	}
	temp, err := u.newWhiteout()
	if err != nil {
		return err
	}
	isDir := false
	if err = u.step("whiteout: made"); err == nil {
		err = sys.RenameBare(u.work.Int(), temp, dir, name, 0)
		if isDir = err == syscall.EISDIR; isDir {
			err = u.exchange(temp, dir, name)
		}
	}
	if err != nil {
		u.discard(temp)
		return err
	}
	_ = u.step("whiteout: in place")
	if isDir {
		u.discard(temp) // the directory is there now
	}
	return nil
}

// removeBeside is removeCovered where whiteouts are plain files.
func (u *upper) removeBeside(dir int, name string) error {
	if err := u.whiteoutFile(dir, name); err != nil {
		return err
	}
	if err := u.step("whiteout: made"); err != nil {
		return err
	}
	err := sys.UnlinkBare(dir, name, 0)
	if err == syscall.EISDIR || err == syscall.EPERM {
		return u.removePure(dir, name, true)
	}
	return err
}

// exchange swaps temp, in work, with the directory name below dir in one step. A
// file system without RENAME_EXCHANGE needs more: killed between them, the name
// shows what lowers have.
func (u *upper) exchange(temp string, dir int, name string) error {
	w := u.work.Int()
	err := sys.RenameBare(w, temp, dir, name, sys.RENAME_EXCHANGE)
	if err != syscall.EINVAL && err != syscall.ENOSYS {
		return err
	}
	aside := u.tempName()
	if err := sys.RenameBare(dir, name, w, aside, 0); err != nil {
		return err
	}
	if err := sys.RenameBare(w, temp, dir, name, 0); err != nil {
		if back := sys.RenameBare(w, aside, dir, name, 0); back != nil {
			u.log("%s/%s cannot be moved back: %v", u.work.Name(), aside, back)
		}
		return err
	}
	return sys.RenameBare(w, aside, w, temp, 0)
}

// removePure removes name below dir, which no lower has. A directory may hold
// whiteouts and nothing else.
func (u *upper) removePure(dir int, name string, isDir bool) error {
	if !isDir {
		return sys.UnlinkBare(dir, name, 0)
	}
	err := sys.UnlinkBare(dir, name, sys.AT_REMOVEDIR)
	if err != syscall.ENOTEMPTY && err != syscall.EEXIST {
		return err
	}
	temp := u.tempName()
	if err := sys.RenameBare(dir, name, u.work.Int(), temp, 0); err != nil {
		return err
	}
	_ = u.step("whiteout: aside")
	u.discard(temp)
	return nil
}

// emptyDir replaces the directory name below dir, which shows nothing but may hold
// whiteouts, by an empty opaque one with the same metadata, so that it can be
// removed, or something renamed onto it.
func (u *upper) emptyDir(dir int, name string) error {
	var st sys.Stat
	if err := sys.StatBare(dir, name, &st); err != nil {
		return err
	}
	if !st.IsDir() {
		return syscall.ENOTDIR
	}
	old, err := sys.OpenBare(dir, name, sys.O_PATH|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sys.CloseBare(old)
	temp, w := u.tempName(), u.work.Int()
	if err := sys.MkdirBare(w, temp, 0o700); err != nil {
		return err
	}
	err = u.likeDir(old, &st, temp)
	if err == nil {
		err = u.step("empty: made")
	}
	if err == nil {
		err = u.exchange(temp, dir, name)
	}
	if err != nil {
		u.discard(temp)
		return err
	}
	_ = u.step("empty: in place")
	u.discard(temp)
	return nil
}

// likeDir gives the directory temp in work the metadata of old, and makes it opaque.
func (u *upper) likeDir(old int, st *sys.Stat, temp string) error {
	w := u.work.Int()
	if err := sys.ChownBare(w, temp, st.UID, st.GID); err != nil {
		return err
	}
	if err := u.copyXattrs(old, w, temp); err != nil {
		return err
	}
	if err := u.makeOpaqueAt(w, temp); err != nil {
		return err
	}
	if err := sys.ChmodBare(w, temp, st.Mode&0o7777); err != nil {
		return err
	}
	return sys.UtimesBare(w, temp, st.Atime, st.Mtime)
}

// overWhiteout moves temp, which is in work, to name below dir, where a whiteout
// stands, in one step, and removes the whiteout. A directory is made opaque first.
func (u *upper) overWhiteout(temp string, dir int, name string, isDir bool) error {
	if isDir {
		if err := u.makeOpaqueAt(u.work.Int(), temp); err != nil {
			return err
		}
	}
	if err := u.step("over whiteout: made"); err != nil {
		return err
	}
	if !isDir {
		return sys.RenameBare(u.work.Int(), temp, dir, name, 0)
	}
	if err := u.exchange(temp, dir, name); err != nil {
		return err
	}
	_ = u.step("over whiteout: in place")
	u.discard(temp) // the whiteout is there now
	return nil
}

// overBeside does the same where the whiteout is a file .wh.NAME.
func (u *upper) overBeside(temp string, dir int, name string, isDir bool) error {
	if isDir {
		if err := u.makeOpaqueAt(u.work.Int(), temp); err != nil {
			return err
		}
	}
	if err := u.step("over whiteout: made"); err != nil {
		return err
	}
	if err := u.moveNew(temp, dir, name); err != nil {
		return err
	}
	_ = u.step("over whiteout: in place")
	if err := sys.UnlinkBare(dir, whiteoutPrefix+name, 0); err != nil && err != syscall.ENOENT {
		u.log("%s%s: %v", whiteoutPrefix, name, err) // it hides nothing any more
	}
	return nil
}

// makeOpaque makes the directory fd, O_PATH or better, hide what lowers have below
// its path.
func (u *upper) makeOpaque(fd int) error { return u.makeOpaqueAt(fd, "") }

func (u *upper) makeOpaqueAt(dir int, name string) error {
	if u.can.xattrs {
		return sys.SetxattrBare(dir, name, u.xattrs.opaque, []byte("y"), 0)
	}
	n := dir
	if name != "" {
		var err error
		if n, err = sys.OpenBare(dir, name, sys.O_PATH|sys.O_DIRECTORY, 0); err != nil {
			return err
		}
		defer sys.CloseBare(n)
	}
	err := sys.MknodBare(n, opaqueFile, sys.S_IFREG, 0, 0)
	if err == syscall.EEXIST {
		return nil
	}
	return err
}

// hasXWhiteouts tells whether files in dir, in the upper, that have xattr whiteout are
// whiteouts. The kernel reads such whiteouts in lowers alone: it writes none.
func (fs *FS) hasXWhiteouts(dir *Node) bool {
	return dir.has(xWhiteouts) || fs.upper.can.whiteouts == whiteoutXattr
}

// whiteoutInUpper tells whether what is at name below up, which is dir in the upper,
// is a whiteout.
func (fs *FS) whiteoutInUpper(dir *Node, up int, name string, st *sys.Stat) bool {
	if st.IsWhiteout() {
		return true
	}
	if !isXWhiteout(st, fs.hasXWhiteouts(dir)) {
		return false
	}
	_, err := sys.GetxattrBare(up, name, fs.names.whiteout, nil)
	return err == nil
}

// nothingBeside is dirState.beside of a directory that this FS has made.
var nothingBeside map[string]struct{}

// hiddenBeside tells whether a file .wh.NAME in the upper hides name: fuse-overlayfs
// writes them where it may not make devices. An upper has them from before, and they
// are looked for once, or it is we who write them.
func (fs *FS) hiddenBeside(dir *Node, up int, name string) bool {
	if !fs.config.AUFSWhiteouts || len(dir.dir.lowers) == 0 || len(name) > nameMax-len(aufsPrefix) {
		return false
	}
	if fs.upper.can.whiteouts != whiteoutFile {
		names := dir.dir.beside.Load()
		if names == nil {
			names = fs.lookBeside(dir, up)
		}
		if names != nil {
			_, hidden := (*names)[name]
			return hidden
		}
	}
	var st sys.Stat
	return sys.StatBare(up, aufsPrefix+name, &st) == nil
}

// lookBeside reads dir in the upper; nil where it cannot be read.
func (fs *FS) lookBeside(dir *Node, up int) *map[string]struct{} {
	names := map[string]struct{}{}
	err := fs.eachName(up, func(_ int, e *sys.BareDirent) error {
		if hasPrefix(e.Name, aufsPrefix) {
			names[string(e.Name[len(aufsPrefix):])] = struct{}{}
		}
		return nil
	})
	if err != nil {
		return nil
	}
	if len(names) == 0 {
		names = nothingBeside
	}
	dir.dir.beside.Store(&names)
	return &names
}
