package union

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Config.Permissions keeps owner and mode of regular files and directories in an
// xattr, for processes that may not set them, as fuse-overlayfs does (its option
// xattr_permissions): "UID:GID:MODE", MODE in octal. What it is shown as counts, the
// file itself belongs to the process. A fourth field says which other type a regular
// file stands for. Which xattr a layer has its root says; one whose root has none
// shows its files as they are.
const (
	storedPrivileged = "security.fuseoverlayfs.override_stat"
	storedContainers = "user.containers.override_stat"
	storedUser       = "user.fuseoverlayfs.override_stat"
)

var storedNames = []string{storedPrivileged, storedContainers, storedUser}

// storedTypes are the words of the fourth field; the first is read and not written.
var storedTypes = map[string]uint32{"file": sys.S_IFREG, "dir": sys.S_IFDIR, "pipe": sys.S_IFIFO, "socket": sys.S_IFSOCK,
	"block": sys.S_IFBLK, "char": sys.S_IFCHR}

// stores tells whether what the upper shows is kept in an xattr.
func (fs *FS) stores() bool { return fs.config.Permissions != PermissionsInode }

// refuseStored refuses what owners and modes in xattrs do not go together with.
func refuseStored(c *Config) error {
	if c.Permissions == PermissionsInode {
		return nil
	}
	for _, o := range []struct {
		what string
		on   bool
	}{{"index=on", c.Index}, {"nfs_export=on", c.NFSExport}, {"metacopy=on", c.Metacopy}} {
		if o.on {
			return fmt.Errorf("xattr_permissions=%d with %s: %w", c.Permissions, o.what, syscall.EOPNOTSUPP)
		}
	}
	return nil
}

// findStored finds which xattr each layer has, and gives an upper one that has none:
// what the nearest lower's root says, else 0:0:555, as fuse-overlayfs does.
func (fs *FS) findStored() error {
	if !fs.stores() {
		return nil
	}
	root := "0:0:555"
	for i := len(fs.layers) - 1; i >= 0; i-- {
		l := fs.layers[i]
		for _, name := range storedNames {
			var b [storedMax]byte
			n, err := sys.GetxattrBare(l.fd.Int(), "", name, b[:])
			if err == nil {
				l.stored = name
				if !l.upper {
					root = string(b[:n])
				}
				break
			}
		}
	}
	if fs.upper == nil || fs.config.ReadOnly {
		return nil
	}
	u := fs.layers[0]
	own := storedContainers
	if fs.config.Permissions == PermissionsPrivileged {
		own = storedPrivileged
	} else if u.stored == storedUser {
		own = storedUser
	}
	if u.stored != own {
		if err := sys.SetxattrBare(u.fd.Int(), "", own, []byte(root), 0); err != nil {
			return fmt.Errorf("upper %s: xattr %s: %w", u.path, own, err)
		}
	}
	u.stored, fs.upper.stored = own, own
	return nil
}

const storedMax = 128

// stat describes name below dir, which is in the layer, as the layer shows it.
func (l *layer) stat(dir int, name string, st *sys.Stat) error {
	if err := sys.StatBare(dir, name, st); err != nil {
		return err
	}
	return l.show(dir, name, st)
}

// show puts what the xattr of name below dir says into st, which is of that file.
func (l *layer) show(dir int, name string, st *sys.Stat) error {
	if l.stored == "" || !st.IsReg() && !st.IsDir() {
		return nil
	}
	var b [storedMax]byte
	n, err := sys.GetxattrBare(dir, name, l.stored, b[:])
	switch err {
	case nil:
	case syscall.ENODATA, syscall.EOPNOTSUPP:
		return nil
	default:
		return err
	}
	if !parseStored(string(bytes.TrimRight(b[:n], "\x00")), st) {
		return syscall.EINVAL
	}
	return nil
}

// parseStored reads the value into st; false if it is not valid.
func parseStored(v string, st *sys.Stat) bool {
	f := strings.SplitN(v, ":", 4)
	if len(f) < 3 {
		return false
	}
	uid, err1 := strconv.ParseUint(f[0], 10, 32)
	gid, err2 := strconv.ParseUint(f[1], 10, 32)
	mode, err3 := strconv.ParseUint(f[2], 8, 32)
	if err1 != nil || err2 != nil || err3 != nil {
		return false
	}
	if len(f) == 4 && !parseStoredType(f[3], st) {
		return false
	}
	st.UID, st.GID, st.Mode = uint32(uid), uint32(gid), st.Mode&sys.S_IFMT|uint32(mode)&0o7777
	return true
}

func parseStoredType(v string, st *sys.Stat) bool {
	word, device, isDevice := strings.Cut(v, "-")
	typ, ok := storedTypes[word]
	switch {
	case !ok || isDevice != (typ == sys.S_IFBLK || typ == sys.S_IFCHR):
		return false
	case typ == st.Type():
		return true
	case !st.IsReg() || typ == sys.S_IFDIR:
		return false
	}
	if isDevice {
		major, minor, _ := strings.Cut(device, "-")
		a, err1 := strconv.ParseUint(major, 10, 32)
		b, err2 := strconv.ParseUint(minor, 10, 32)
		if err1 != nil || err2 != nil || a == 0 && b == 0 {
			return false
		}
		st.RdevMajor, st.RdevMinor = uint32(a), uint32(b)
	}
	st.Mode, st.Size, st.Blocks = st.Mode&^uint32(sys.S_IFMT)|typ, 0, 0
	return true
}

// appendStored writes the value; real is the type of the file itself.
func appendStored(st *sys.Stat, real uint32) []byte {
	v := fmt.Appendf(nil, "%d:%d:%o", st.UID, st.GID, st.Mode&0o7777)
	if st.Type() == real {
		return v
	}
	for word, typ := range storedTypes {
		if typ != st.Type() {
			continue
		}
		v = append(append(v, ':'), word...)
		if typ == sys.S_IFBLK || typ == sys.S_IFCHR {
			v = fmt.Appendf(v, "-%d-%d", st.RdevMajor, st.RdevMinor)
		}
	}
	return v
}

// hiddenMode is what the file itself gets: its owner can work with it, and no bit
// gives anybody else that owner's rights.
func hiddenMode(mode uint32, dir bool) uint32 {
	if dir {
		return mode&0o777 | 0o700
	}
	return mode&0o777 | 0o600
}

// storeStat gives name below dir, in the upper, owner and mode: in the xattr where it
// is a regular file or a directory, which are all that may have one, else really,
// as far as the process may.
func (u *upper) storeStat(dir int, name string, st *sys.Stat) error {
	var is sys.Stat
	if err := sys.StatBare(dir, name, &is); err != nil {
		return err
	}
	if is.IsReg() || is.IsDir() {
		if err := sys.SetxattrBare(dir, name, u.stored, appendStored(st, is.Type()), 0); err != nil {
			return err
		}
		if want := hiddenMode(st.Mode, is.IsDir()); is.Mode&0o7777 != want {
			return sys.ChmodBare(dir, name, want)
		}
		return nil
	}
	if is.UID != st.UID || is.GID != st.GID {
		if err := sys.ChownBare(dir, name, st.UID, st.GID); err != nil && err != syscall.EPERM && err != syscall.EINVAL {
			return err
		}
	}
	if is.Type() == sys.S_IFLNK || is.Mode == st.Mode {
		return nil
	}
	return sys.ChmodBare(dir, name, st.Mode&0o7777)
}

// setStored applies what of s is about owner and mode; n.change is held.
func (fs *FS) setStored(p *place, s *SetAttr) error {
	if s.Valid&(SetUID|SetGID|SetMode) == 0 {
		return nil
	}
	var st sys.Stat
	if err := fs.layers[0].stat(p.fd, p.name, &st); err != nil {
		return err
	}
	if s.Valid&SetUID != 0 {
		st.UID = s.UID
	}
	if s.Valid&SetGID != 0 {
		st.GID = s.GID
	}
	if s.Valid&SetMode != 0 {
		if st.Type() == sys.S_IFLNK {
			return syscall.EOPNOTSUPP
		}
		st.Mode = st.Type() | s.Mode&0o7777
	}
	if st.IsReg() && s.Valid&(SetUID|SetGID) != 0 {
		// A chown of the file itself would take it away.
		if err := sys.RemovexattrBare(p.fd, p.name, xattrCapability); err != nil && err != syscall.ENODATA && err != syscall.EOPNOTSUPP {
			return err
		}
	}
	return fs.upper.storeStat(p.fd, p.name, &st)
}

// hides tells whether an xattr is one that keeps owner and mode.
func (fs *FS) hides(attr string) bool {
	if !fs.stores() {
		return false
	}
	for _, name := range storedNames {
		if attr == name {
			return true
		}
	}
	return false
}
