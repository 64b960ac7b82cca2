package union

import (
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Link makes name in dir another name of n.
func (fs *FS) Link(c Caller, n, dir *Node, name string) (Entry, error) {
	if n.isDir() {
		return Entry{}, syscall.EPERM
	}
	if err := fs.unguarded(n, isImmutable|isAppend); err != nil {
		return Entry{}, err
	}
	if err := fs.mayMake(dir, name); err != nil {
		return Entry{}, err
	}
	if err := fs.copyUp(c.PID, n, copyMeta); err != nil {
		return Entry{}, err
	}
	e, _, err := fs.create(Caller{}, dir, name, &newObject{mode: n.typ, link: n})
	return e, err
}

// linkTo makes name below dir another name of n, which is in the upper.
func (fs *FS) linkTo(n *Node, dir int, name string) error {
	n.change.Lock()
	defer n.change.Unlock()
	var p place
	if err := fs.locate(n, &p); err != nil {
		if err == syscall.ESTALE && n.has(isDead) {
			err = syscall.ENOENT
		}
		return err
	}
	defer fs.leave(&p)
	if n.has(isMetacopy) && p.name != "" {
		// The new name may be in another directory, where the lower is not.
		if err := fs.setRedirect(n, p.fd, p.name, false); err != nil {
			return err
		}
	}
	if err := fs.countLinks(n); err != nil {
		return err
	}
	return sys.LinkBare(p.fd, p.name, dir, name)
}

// linked tells a node that it has a new name.
func (fs *FS) linked(n, dir *Node, name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	t := fs.table
	t.mu.Lock()
	defer t.mu.Unlock()
	if n.has(isIndexed | byHandle) {
		if n.has(isDead) {
			n.clear(isDead)
			t.link(n, false)
		}
		return
	}
	if n.has(isDead | noName) {
		fs.moveLocked(n, dir, name)
		if n.has(isDead) {
			n.clear(isDead)
			t.link(n, false)
		}
		return
	}
	fs.addName(n, dir, name)
}

// Tmpfile makes a file without a name in dir (O_TMPFILE).
func (fs *FS) Tmpfile(c Caller, dir *Node, flags, mode uint32) (Entry, *File, error) {
	c, err := fs.owners.host(c)
	if err != nil {
		return Entry{}, nil, err
	}
	if err := fs.mayMake(dir, ""); err != nil {
		return Entry{}, nil, err
	}
	dir.change.Lock()
	defer dir.change.Unlock()
	if dir.has(isDead) {
		return Entry{}, nil, syscall.ENOENT
	}
	up, err := fs.upperDir(dir)
	if err != nil {
		return Entry{}, nil, err
	}
	defer fs.dirs.done(up)
	o := &newObject{mode: mode&0o7777 | sys.S_IFREG, tmp: true, flags: backing(flags)}
	m := maker{fs: fs, c: c, dir: dir, up: up.fd, o: o, fd: -1}
	if err := m.makeTmp(); err != nil {
		return Entry{}, nil, err
	}
	e, err := fs.tmpEntry(dir, m.fd)
	if err != nil {
		m.drop()
		return Entry{}, nil, err
	}
	return e, fs.newFile(e.Node, m.fd, o.flags), nil
}

// makeTmp makes the file as the caller's, or as this process's and gives it away:
// it has no name, so that nobody sees what comes between.
func (m *maker) makeTmp() error {
	mode := m.mode()
	if m.fs.stores() {
		e := m.call(m.up, "", hiddenMode(mode, false))
		if e == nil {
			if e = m.ownStored(m.fd, ""); e != nil {
				m.drop()
			}
		}
		return e
	}
	if mode&m.fs.umask == 0 {
		if e := m.at(m.up, "", mode); e == nil {
			return nil
		} else if e != syscall.EACCES && e != syscall.EPERM {
			return e
		}
	}
	heir, e := m.heir()
	if e != nil {
		return e
	}
	dir := m.up
	if heir != nil {
		defer heir.close()
		dir = heir.fd
	}
	if e := m.call(dir, "", mode); e != nil {
		return e
	}
	if e := m.own(m.fd, "", mode, heir); e != nil {
		m.drop()
		return e
	}
	return nil
}

// tmpEntry makes the node of a file without a name.
func (fs *FS) tmpEntry(dir *Node, fd int) (Entry, error) {
	f := found{upper: true}
	if err := fs.layers[0].stat(fd, "", &f.st); err != nil {
		return Entry{}, err
	}
	own, err := sys.DupBare(fd)
	if err != nil {
		return Entry{}, err
	}
	if fs.handleTable != nil {
		fs.numberedOpen(fd, &f)
	}
	t := fs.table
	t.mu.Lock()
	n := fs.newNode(dir, "", &f)
	n.set(isDead)
	n.more = &fileState{fd: own}
	t.identify(n)
	n.refs++
	t.mu.Unlock()
	e := Entry{Node: n}
	fs.show(n, &f.st, &e.Attr)
	return e, nil
}
