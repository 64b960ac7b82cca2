package union

import (
	"runtime"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// newObject is what is to be made.
type newObject struct {
	mode         uint32 // with the type; umask not applied
	major, minor uint32
	target       string // of a symlink
	open         bool   // a regular file is opened, with flags
	flags        int
	link         *Node // another name of this one, which is in the upper
	tmp          bool  // a file without a name, open
}

// Mkdir makes a directory; mode is as the caller gave it, umask not applied.
func (fs *FS) Mkdir(c Caller, dir *Node, name string, mode uint32) (Entry, error) {
	e, _, err := fs.create(c, dir, name, &newObject{mode: mode&0o1777 | sys.S_IFDIR})
	return e, err
}

// Mknod makes a file of any type but a directory and a symlink.
func (fs *FS) Mknod(c Caller, dir *Node, name string, mode, major, minor uint32) (Entry, error) {
	switch mode & sys.S_IFMT {
	case 0:
		mode |= sys.S_IFREG
	case sys.S_IFCHR:
		if major == 0 && minor == 0 {
			return Entry{}, syscall.EPERM // it would be a whiteout
		}
	case sys.S_IFDIR, sys.S_IFLNK:
		return Entry{}, syscall.EPERM
	}
	e, _, err := fs.create(c, dir, name, &newObject{mode: mode, major: major, minor: minor})
	return e, err
}

// Symlink makes a symlink.
func (fs *FS) Symlink(c Caller, dir *Node, name, target string) (Entry, error) {
	e, _, err := fs.create(c, dir, name, &newObject{mode: 0o777 | sys.S_IFLNK, target: target})
	return e, err
}

// Create makes and opens a regular file; flags are open(2)'s.
func (fs *FS) Create(c Caller, dir *Node, name string, flags, mode uint32) (Entry, *File, error) {
	o := &newObject{mode: mode&0o7777 | sys.S_IFREG, open: true, flags: backing(flags)}
	e, fd, err := fs.create(c, dir, name, o)
	if err != nil {
		return Entry{}, nil, err
	}
	return e, fs.newFile(e.Node, fd, o.flags), nil
}

func (fs *FS) newFile(n *Node, fd, flags int) *File {
	f := &File{fs: fs, node: n, flags: flags}
	f.now.Store(&openFd{fd, true})
	f.keep()
	return f
}

// create makes something at name in dir.
func (fs *FS) create(c Caller, dir *Node, name string, o *newObject) (e Entry, fd int, err error) {
	if o.link == nil {
		if c, err = fs.owners.host(c); err != nil {
			return Entry{}, -1, err
		}
	}
	if err := fs.mayMake(dir, name); err != nil {
		return Entry{}, -1, err
	}
	fs.lockNames(dir)
	defer fs.unlockNames(dir)
	if dir.has(isDead) {
		return Entry{}, -1, syscall.ENOENT
	}
	up, err := fs.upperDir(dir)
	if err != nil {
		return Entry{}, -1, err
	}
	defer fs.dirs.done(up)
	if o.link != nil && o.link.lowIno != 0 {
		if err := fs.markImpure(dir, up.fd); err != nil {
			return Entry{}, -1, err
		}
	}
	m := maker{fs: fs, c: c, dir: dir, up: up.fd, name: name, o: o, fd: -1}
	err = m.make()
	dir.dir.changed.Add(1)
	if err != nil {
		return Entry{}, -1, err
	}
	if o.link != nil {
		fs.linked(o.link, dir, name)
	}
	e, fd, err = fs.made(dir, up.fd, name, m.fd)
	if err == nil && o.link == nil {
		e.Node.set(guardsKnown) // nothing is made with any
	}
	return e, fd, err
}

// mayMake checks what must be so for a new name in dir ("": for a file without
// one), and copies dir up.
func (fs *FS) mayMake(dir *Node, name string) error {
	switch {
	case !dir.isDir():
		return syscall.ENOTDIR
	case len(name) > nameMax:
		return syscall.ENAMETOOLONG
	case fs.aufsName(name):
		return syscall.EINVAL
	}
	if err := fs.writable(); err != nil {
		return err
	}
	if err := fs.unguarded(dir, isImmutable); err != nil || dir.has(inUpper) {
		return err
	}
	// Nothing is copied up for what cannot be.
	if dir.has(isDead) {
		return syscall.ENOENT
	}
	if name != "" { // O_TMPFILE: there is none
		if there, err := fs.lowerHas(dir, name); there || err != nil {
			return orExist(err)
		}
	}
	return fs.copyUp(0, dir, copyMeta)
}

// made gives the Entry of what was just made at name below up.
func (fs *FS) made(dir *Node, up int, name string, fd int) (Entry, int, error) {
	f := found{upper: true}
	at := spot{up, name}
	if fd >= 0 {
		at = spot{fd, ""}
	}
	if err := fs.layers[0].stat(at.dir, at.name, &f.st); err != nil {
		if fd >= 0 {
			sys.CloseBare(fd)
		}
		return Entry{}, -1, err
	}
	var n *Node
	for n == nil {
		n = fs.intern(dir, name, &f, fs.epoch(dir), true)
	}
	e := Entry{Node: n}
	fs.show(n, &f.st, &e.Attr)
	return e, fd, nil
}

// maker makes one object.
type maker struct {
	fs   *FS
	c    Caller
	dir  *Node
	up   int // dir in the upper
	name string
	o    *newObject
	fd   int // what was opened
}

// make makes the object where it is to be by one system call, where that can be
// done, else in work and moves it.
func (m *maker) make() error {
	below, err := m.fs.lowerHas(m.dir, m.name)
	if err != nil {
		return err
	}
	if below {
		// Only a whiteout in the upper lets a new thing be here.
		how, err := m.covered()
		if err != nil || how == notCovered {
			return orExist(err)
		}
		return m.overWhiteout(how)
	}
	mode := m.mode()
	if (mode&m.fs.umask != 0 || m.fs.stores()) && m.o.link == nil {
		err = syscall.EACCES // the umask would take bits away: not by one call
	} else {
		err = m.at(m.up, m.name, mode)
	}
	switch err {
	case nil:
		return m.finish()
	case syscall.EEXIST:
		how, err := m.covered()
		if err != nil || how != coveredThere {
			return orExist(err)
		}
		return m.overWhiteout(how)
	case syscall.EACCES, syscall.EPERM:
		return m.throughWork()
	}
	return err
}

func orExist(err error) error {
	if err != nil {
		return err
	}
	return syscall.EEXIST
}

// cover is how a name is covered in the upper.
type cover int

const (
	notCovered    cover = iota
	coveredThere        // a whiteout is at the name
	coveredBeside       // a file .wh.NAME is beside
)

// covered tells whether a whiteout covers the name.
func (m *maker) covered() (cover, error) {
	var st sys.Stat
	switch err := sys.StatBare(m.up, m.name, &st); {
	case err == syscall.ENOENT && m.fs.hiddenBeside(m.dir, m.up, m.name):
		return coveredBeside, nil
	case err == syscall.ENOENT:
		return notCovered, nil
	case err != nil:
		return notCovered, err
	case m.fs.whiteoutInUpper(m.dir, m.up, m.name, &st):
		return coveredThere, nil
	}
	return notCovered, nil
}

// finish does what may come after the object is there.
func (m *maker) finish() error {
	if m.o.mode&sys.S_IFMT != sys.S_IFDIR || len(m.dir.dir.lowers) == 0 || !m.fs.hidesNew {
		return nil
	}
	// Nothing is below now; this only keeps it so where layers change while the
	// union is not open, and spares a look (as the kernel does it).
	fd, err := sys.OpenBare(m.up, m.name, openDirFlags, 0)
	if err != nil {
		return err
	}
	defer sys.CloseBare(fd)
	if err := m.fs.upper.makeOpaque(fd); err != nil {
		m.fs.say("opaque: %v", err)
	}
	return nil
}

// mode is the permission bits to make the object with: an inherited ACL stands
// in for the umask.
func (m *maker) mode() uint32 {
	mode := m.o.mode & 0o7777
	if m.o.mode&sys.S_IFMT != sys.S_IFLNK && !m.fs.hasDefaultACL(m.dir, m.up) {
		mode &^= m.c.Umask
	}
	return mode
}

// at makes the object at name below dir, as the caller's.
func (m *maker) at(dir int, name string, mode uint32) error {
	if m.o.link != nil || m.c.UID == m.fs.uid && m.c.GID == m.fs.gid {
		return m.call(dir, name, mode)
	}
	if !m.fs.canSetID {
		return syscall.EPERM
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := sys.SetFsID(m.c.UID, m.c.GID); err != nil {
		m.back()
		return syscall.EPERM
	}
	defer m.back()
	return m.call(dir, name, mode)
}

func (m *maker) back() {
	if err := sys.SetFsID(m.fs.uid, m.fs.gid); err != nil {
		// The thread is not the process's any more: it must not do anything else.
		runtime.LockOSThread()
		m.fs.say("setfsuid back: %v", err)
	}
}

func (m *maker) call(dir int, name string, mode uint32) (err error) {
	o := m.o
	switch {
	case o.link != nil:
		return m.fs.linkTo(o.link, dir, name)
	case o.tmp:
		m.fd, err = sys.TmpfileBare(dir, o.flags, mode)
		return err
	case o.mode&sys.S_IFMT == sys.S_IFDIR:
		return sys.MkdirBare(dir, name, mode)
	case o.mode&sys.S_IFMT == sys.S_IFLNK:
		return sys.SymlinkBare(o.target, dir, name)
	case o.open:
		m.fd, err = sys.OpenBare(dir, name, o.flags|sys.O_CREAT|sys.O_EXCL, mode)
		return err
	}
	return sys.MknodBare(dir, name, mode|o.mode&sys.S_IFMT, o.major, o.minor)
}

// inWork makes the object in work, whole: owner, mode, inherited ACL.
func (m *maker) inWork() (temp string, err error) {
	u := m.fs.upper
	temp = u.tempName()
	work := u.work.Int()
	if m.o.link != nil {
		return temp, m.call(work, temp, 0)
	}
	if m.fs.stores() {
		return temp, m.inWorkStored(work, temp)
	}
	heir, err := m.heir()
	if err != nil {
		return "", err
	}
	if heir != nil {
		defer heir.close()
		work = heir.fd
	}
	mode := m.mode()
	if err := m.call(work, temp, mode); err != nil {
		return "", err
	}
	err = m.own(work, temp, mode, heir)
	if err == nil && heir != nil {
		err = sys.RenameBare(work, temp, u.work.Int(), temp, 0)
	}
	if err != nil {
		_ = removeTree(work, temp)
		m.drop()
		return "", err
	}
	return temp, nil
}

// inWorkStored makes the object there where owner and mode are kept in an xattr.
func (m *maker) inWorkStored(work int, temp string) error {
	isDir := m.isDir()
	if err := m.call(work, temp, hiddenMode(m.mode(), isDir)); err != nil {
		return err
	}
	err := m.ownStored(work, temp)
	if err != nil {
		_ = removeTree(work, temp)
		m.drop()
	}
	return err
}

// ownStored gives an object its owner and mode there; a setgid parent its group.
func (m *maker) ownStored(dir int, name string) error {
	var parent sys.Stat
	if err := m.fs.layers[0].stat(m.up, "", &parent); err != nil {
		return err
	}
	st := sys.Stat{UID: m.c.UID, GID: m.c.GID, Mode: m.o.mode&sys.S_IFMT | m.mode()}
	if parent.Mode&0o2000 != 0 {
		st.GID = parent.GID
		if m.isDir() {
			st.Mode |= 0o2000
		}
	}
	return m.fs.upper.storeStat(dir, name, &st)
}

func (m *maker) drop() {
	if m.fd >= 0 {
		sys.CloseBare(m.fd)
		m.fd = -1
	}
}

// own gives the object in work its owner and mode.
func (m *maker) own(work int, temp string, mode uint32, heir *heir) error {
	var st sys.Stat
	if err := sys.StatBare(work, temp, &st); err != nil {
		return err
	}
	gid := m.c.GID
	if heir != nil && heir.sgid {
		gid = st.GID
	}
	if st.UID != m.c.UID || st.GID != gid {
		if err := sys.ChownBare(work, temp, m.c.UID, gid); err != nil {
			return err
		}
	}
	if m.o.mode&sys.S_IFMT == sys.S_IFLNK {
		return nil
	}
	want := mode | st.Mode&0o2000 // a directory in a setgid one
	if heir != nil && heir.acl {
		want = want&0o7000 | st.Mode&0o777 // what the ACL made of it
	}
	return sys.ChmodBare(work, temp, want)
}

// heir is a directory in work that gives what is made in it what the real
// parent would: its default ACL, and its group where it is setgid.
type heir struct {
	fs        *FS
	name      string
	fd        int
	acl, sgid bool
}

// heir makes one where it is needed, else nil.
func (m *maker) heir() (*heir, error) {
	var st sys.Stat
	if err := sys.StatBare(m.up, "", &st); err != nil {
		return nil, err
	}
	h := &heir{fs: m.fs, sgid: st.Mode&0o2000 != 0, acl: m.fs.hasDefaultACL(m.dir, m.up)}
	if !h.sgid && !h.acl {
		return nil, nil
	}
	work := m.fs.upper.work.Int()
	h.name = m.fs.upper.tempName()
	if err := sys.MkdirBare(work, h.name, 0o700); err != nil {
		return nil, err
	}
	fd, err := sys.OpenBare(work, h.name, openDirFlags, 0)
	if err != nil {
		m.fs.upper.discard(h.name)
		return nil, err
	}
	h.fd = fd
	if err := h.dress(m.up, &st); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

// dress gives h what children inherit from the directory up.
func (h *heir) dress(up int, st *sys.Stat) error {
	if h.sgid {
		if err := sys.ChownBare(h.fd, "", ^uint32(0), st.GID); err != nil {
			return err
		}
		if err := sys.ChmodBare(h.fd, "", 0o2700); err != nil {
			return err
		}
	}
	if !h.acl {
		return nil
	}
	acl := make([]byte, 64<<10)
	n, err := sys.GetxattrBare(up, "", xattrACLDefault, acl)
	if err != nil {
		return err
	}
	return sys.SetxattrBare(h.fd, "", xattrACLDefault, acl[:n], 0)
}

func (h *heir) close() {
	sys.CloseBare(h.fd)
	h.fs.upper.discard(h.name)
}

// throughWork makes the object in work and moves it to where nothing is.
func (m *maker) throughWork() error {
	temp, err := m.inWork()
	if err != nil {
		return err
	}
	u := m.fs.upper
	if err = m.fs.step("union: create: made in work"); err == nil {
		err = sys.RenameBare(u.work.Int(), temp, m.up, m.name, sys.RENAME_NOREPLACE)
	}
	if err != nil {
		m.drop()
		u.discard(temp)
		return err
	}
	return m.finish()
}

// overWhiteout makes the object in work and puts it in a whiteout's place.
func (m *maker) overWhiteout(how cover) error {
	temp, err := m.inWork()
	if err != nil {
		return err
	}
	u := m.fs.upper
	if err = m.fs.step("union: create: made in work"); err == nil {
		if how == coveredBeside {
			err = u.overBeside(temp, m.up, m.name, m.isDir())
		} else {
			err = u.overWhiteout(temp, m.up, m.name, m.isDir())
		}
	}
	if err != nil {
		m.drop()
		u.discard(temp)
	}
	return err
}

func (m *maker) isDir() bool { return m.o.mode&sys.S_IFMT == sys.S_IFDIR }
