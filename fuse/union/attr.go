package union

import (
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Getattr describes a node; f, when not nil, is an open file of it.
func (fs *FS) Getattr(n *Node, f *File) (a Attr, err error) {
	var st sys.Stat
	if n.has(isDead) && (f == nil || !n.has(inUpper)) {
		n.mu.Lock()
		gone := n.more != nil && n.more.fd < 0 && n.has(inUpper)
		if gone {
			a = n.more.last
		}
		n.mu.Unlock()
		if gone {
			return a, nil
		}
	}
	if f != nil && n.has(inUpper) {
		err = f.stat(&st)
	} else {
		err = fs.stat(n, &st)
	}
	if err != nil {
		return Attr{}, err
	}
	fs.show(n, &st, &a)
	return a, nil
}

// show turns what the real object's attributes are into what is shown.
func (fs *FS) show(n *Node, st *sys.Stat, a *Attr) {
	*a = Attr{
		Ino: n.ino.Load(), Size: st.Size, Blocks: st.Blocks, Mode: st.Mode, Nlink: st.Nlink,
		RdevMajor: st.RdevMajor, RdevMinor: st.RdevMinor, Blksize: st.Blksize,
		Atime: st.Atime, Mtime: st.Mtime, Ctime: st.Ctime, Btime: st.Btime, Flags: st.Attributes & shownFlags,
	}
	a.UID, a.GID = fs.owners.shown(st.UID, st.GID)
	switch {
	case n.isDir() && (fs.config.StaticNlink || n.merged()):
		a.Nlink = 1
	case n.has(isDead) && !n.has(inUpper):
		a.Nlink = 0
	case n.has(isMetacopy):
		n.mu.Lock()
		a.Blocks = n.more.dataSt.blocks
		n.mu.Unlock()
	}
	if n.has(isIndexed) && !n.isDir() {
		a.Nlink = n.shownLinks(st.Nlink)
	}
}

// shownFlags are the attributes of statx(2) that say something of the file and
// not of where it is mounted.
const shownFlags = sys.STATX_ATTR_COMPRESSED | sys.STATX_ATTR_IMMUTABLE | sys.STATX_ATTR_APPEND | sys.STATX_ATTR_NODUMP

// Readlink returns a symlink's target.
func (fs *FS) Readlink(n *Node) (string, error) {
	if n.typ != sys.S_IFLNK {
		return "", syscall.EINVAL
	}
	n.change.Lock()
	defer n.change.Unlock()
	var p place
	if err := fs.locate(n, &p); err != nil {
		return "", err
	}
	defer fs.leave(&p)
	var b [4096]byte
	size, err := sys.ReadlinkBare(p.fd, p.name, b[:])
	if err != nil {
		return "", err
	}
	return string(b[:size]), nil
}

// Setattr changes attributes, copying the node up.
func (fs *FS) Setattr(c Caller, n *Node, f *File, s SetAttr) (Attr, error) {
	if err := fs.writable(); err != nil {
		return Attr{}, err
	}
	if err := fs.maySetattr(n, f, &s); err != nil {
		return Attr{}, err
	}
	if err := fs.storedOwner(&s); err != nil {
		return Attr{}, err
	}
	what := copyMeta
	if s.Valid&SetSize != 0 {
		if n.typ == sys.S_IFDIR {
			return Attr{}, syscall.EISDIR
		}
		what = copyAll
		if s.Size == 0 {
			what = copyNoData
		}
	}
	if err := fs.copyUp(c.PID, n, what); err != nil {
		return Attr{}, err
	}
	n.change.Lock()
	err := fs.setattr(n, f, &s)
	n.change.Unlock()
	if err != nil {
		return Attr{}, err
	}
	return fs.Getattr(n, f)
}

// storedOwner turns the owner in s into what the upper stores.
func (fs *FS) storedOwner(s *SetAttr) error {
	if s.Valid&(SetUID|SetGID) == 0 || fs.owners.plain {
		return nil
	}
	uid, gid := s.UID, s.GID
	if s.Valid&SetUID == 0 {
		uid, _ = fs.owners.shown(0, 0) // not used, but it has to have a place
	}
	if s.Valid&SetGID == 0 {
		_, gid = fs.owners.shown(0, 0)
	}
	c, err := fs.owners.host(Caller{UID: uid, GID: gid})
	s.UID, s.GID = c.UID, c.GID
	return err
}

// setattr applies s to the upper; n.change is held.
func (fs *FS) setattr(n *Node, f *File, s *SetAttr) error {
	var p place
	if err := fs.locateOpen(n, f, &p); err != nil {
		return err
	}
	defer fs.leave(&p)
	if s.Valid&SetSize != 0 {
		if err := fs.truncate(&p, f, s.Size); err != nil {
			return err
		}
	}
	if fs.stores() {
		if err := fs.setStored(&p, s); err != nil {
			return err
		}
		if s.Valid&SetMode == 0 && s.KillPriv {
			if err := fs.killPriv(&p); err != nil {
				return err
			}
		}
		return setTimes(&p, s)
	}
	if s.Valid&(SetUID|SetGID) != 0 {
		uid, gid := ^uint32(0), ^uint32(0)
		if s.Valid&SetUID != 0 {
			uid = s.UID
		}
		if s.Valid&SetGID != 0 {
			gid = s.GID
		}
		if err := sys.ChownBare(p.fd, p.name, uid, gid); err != nil {
			return err
		}
	}
	if s.Valid&SetMode != 0 {
		if n.typ == sys.S_IFLNK {
			return syscall.EOPNOTSUPP
		}
		if err := sys.ChmodBare(p.fd, p.name, s.Mode&0o7777); err != nil {
			return err
		}
	} else if s.KillPriv {
		if err := fs.killPriv(&p); err != nil {
			return err
		}
	}
	return setTimes(&p, s)
}

func setTimes(p *place, s *SetAttr) error {
	if s.Valid&(SetAtime|SetMtime) != 0 {
		atime, mtime := sys.TimeOmit, sys.TimeOmit
		if s.Valid&SetAtime != 0 {
			atime = s.Atime
		}
		if s.Valid&SetMtime != 0 {
			mtime = s.Mtime
		}
		return sys.UtimesBare(p.fd, p.name, atime, mtime)
	}
	return nil
}

// locateOpen is locate, or the open file f where that is the upper's.
func (fs *FS) locateOpen(n *Node, f *File, p *place) error {
	err := fs.locate(n, p)
	if err == syscall.ESTALE && f != nil {
		if fd, upper := f.Fd(); upper {
			*p = place{fd: fd, upper: true}
			return nil
		}
	}
	return err
}

func (fs *FS) truncate(p *place, f *File, size int64) error {
	if f != nil {
		if fd, upper := f.Fd(); upper && f.writes() {
			return sys.FtruncateBare(fd, size)
		}
	}
	var fd int
	var err error
	if p.name == "" {
		fd, err = sys.ReopenBare(p.fd, sys.O_WRONLY|sys.O_NONBLOCK)
	} else {
		fd, err = sys.OpenBare(p.fd, p.name, sys.O_WRONLY|sys.O_NONBLOCK, 0)
	}
	if err != nil {
		return err
	}
	defer sys.CloseBare(fd)
	return sys.FtruncateBare(fd, size)
}

// killPriv drops setuid and setgid as a write by somebody without CAP_FSETID
// does: setgid only where it means that (group execution). Capabilities go by
// themselves in the file system below, whoever writes.
func (fs *FS) killPriv(p *place) error {
	var st sys.Stat
	if err := sys.StatBare(p.fd, p.name, &st); err != nil {
		return err
	}
	if !st.IsReg() {
		return nil
	}
	if err := fs.layers[0].show(p.fd, p.name, &st); err != nil {
		return err
	}
	mode := st.Mode &^ 0o4000
	if mode&0o010 != 0 {
		mode &^= 0o2000
	}
	if mode == st.Mode {
		return nil
	}
	if fs.stores() {
		st.Mode = mode
		return fs.upper.storeStat(p.fd, p.name, &st)
	}
	return sys.ChmodBare(p.fd, p.name, mode&0o7777)
}

// Statfs describes the file system below.
func (fs *FS) Statfs() (s Statfs, err error) {
	err = sys.StatfsBare(fs.layers[0].fd.Int(), &s)
	return s, err
}

// writable is nil where changes may be made.
func (fs *FS) writable() error {
	if fs.upper == nil || fs.config.ReadOnly {
		return syscall.EROFS
	}
	return nil
}
