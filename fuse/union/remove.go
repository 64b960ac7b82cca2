package union

import (
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// victim is a name that is to go.
type victim struct {
	f     found
	upper bool // there is something in the upper
	below bool // a lower shows the name: a whiteout must stay
	node  *Node
}

// Unlink removes a name of anything but a directory. Nothing is copied up.
func (fs *FS) Unlink(dir *Node, name string) error { return fs.removeName(dir, name, false) }

// Rmdir removes a directory that shows no names.
func (fs *FS) Rmdir(dir *Node, name string) error { return fs.removeName(dir, name, true) }

func (fs *FS) removeName(dir *Node, name string, wantDir bool) error {
	if err := fs.mayChange(dir, name); err != nil {
		return err
	}
	if err := fs.unguarded(dir, isAppend); err != nil {
		return err
	}
	defer fs.takesNames()()
	if !dir.has(inUpper) {
		// Nothing is copied up for what is not there or cannot go.
		var v victim
		err := fs.findRemovable(dir, name, &v, wantDir, false)
		if err == nil && wantDir {
			err = fs.mustBeEmpty(v.node)
		}
		fs.release(v.node)
		if err == nil {
			err = fs.copyUp(0, dir, copyMeta)
		}
		if err != nil {
			return err
		}
	}
	fs.lockNames(dir)
	defer fs.unlockNames(dir)
	var v victim
	defer func() { fs.release(v.node) }()
	if err := fs.findRemovable(dir, name, &v, wantDir, true); err != nil {
		return err
	}
	if n := v.node; n != nil {
		n.change.Lock()
		defer n.change.Unlock()
		v.upper = n.has(inUpper)
	}
	if wantDir {
		if err := fs.mustBeEmpty(v.node); err != nil {
			return err
		}
	}
	return fs.removeVictim(dir, name, &v)
}

// findRemovable finds what unlink or rmdir is about. A directory has a node then.
func (fs *FS) findRemovable(dir *Node, name string, v *victim, wantDir, locked bool) error {
	if err := fs.findVictim(dir, name, v); err != nil {
		return err
	}
	switch isDir := v.f.st.IsDir(); {
	case isDir && !wantDir:
		return syscall.EISDIR
	case !isDir && wantDir:
		return syscall.ENOTDIR
	}
	if wantDir || fs.goesByIndex(&v.f) {
		if err := fs.needNode(dir, name, v, locked); err != nil {
			return err
		}
	}
	return fs.mayGo(dir, name, v)
}

// mayGo is EPERM where what was found is immutable or append-only. No node is locked
// for that: who changes these flags at the same time may come before or after.
func (fs *FS) mayGo(dir *Node, name string, v *victim) error {
	guards := ownGuards(&v.f.st)
	n := v.node
	switch {
	case guards != 0 || !v.f.upper:
	case n != nil && n.has(guardsKnown):
		guards = n.guards()
	case v.f.unlinked: // not at this name yet
		guards = fs.keptGuards(fs.upper.index.Int(), v.f.indexed, v.f.st.Type())
	default:
		up, err := fs.upperDir(dir)
		if err != nil {
			return err
		}
		guards = fs.keptGuards(up.fd, name, v.f.st.Type())
		fs.dirs.done(up)
	}
	if guards != 0 {
		return syscall.EPERM
	}
	return nil
}

// needNode makes the node of what was found, if there is none; locked: the caller
// has locked dir.
func (fs *FS) needNode(dir *Node, name string, v *victim, locked bool) error {
	if v.node != nil {
		return nil
	}
	e, err := fs.lookup(dir, name, -1, locked)
	if err != nil {
		return err
	}
	v.node = e.Node
	fs.hold(e.Node)
	fs.Forget(e.Node.id, 1)
	return nil
}

// mayChange checks what must be so for a name of dir to change.
func (fs *FS) mayChange(dir *Node, name string) error {
	switch {
	case !dir.isDir():
		return syscall.ENOTDIR
	case len(name) > nameMax:
		return syscall.ENAMETOOLONG
	}
	if err := fs.writable(); err != nil {
		return err
	}
	return fs.unguarded(dir, isImmutable)
}

// findVictim finds what is at a name, and its node if it is in memory. dir is
// locked.
func (fs *FS) findVictim(dir *Node, name string, v *victim) error {
	if dir.has(isDead) {
		return syscall.ENOENT
	}
	if err := fs.find(dir, name, &v.f, -1); err != nil {
		return err
	}
	v.upper = v.f.upper
	if !v.f.upper {
		v.below = true
	} else {
		var err error
		if v.below, err = fs.lowerHas(dir, name); err != nil {
			return err
		}
	}
	v.node = fs.nodeOf(dir, name, &v.f)
	return nil
}

// removeVictim takes the name away; dir and the node are locked.
func (fs *FS) removeVictim(dir *Node, name string, v *victim) error {
	up, err := fs.upperDir(dir)
	if err != nil {
		return err
	}
	defer fs.dirs.done(up)
	if err := fs.linkName(dir, name, v); err != nil {
		return err
	}
	if err := fs.countLinks(v.node); err != nil {
		return err
	}
	undo, err := fs.losing(dir, name, v)
	if err != nil {
		return err
	}
	switch isDir := v.f.st.IsDir(); {
	case !v.upper:
		err = fs.upper.whiteout(up.fd, name)
	case v.below:
		err = fs.upper.removeCovered(up.fd, name)
	case isDir:
		err = fs.upper.removePure(up.fd, name, true)
	default:
		err = sys.UnlinkBare(up.fd, name, 0)
	}
	dir.dir.changed.Add(1)
	if err != nil {
		undo()
		return err
	}
	fs.lost(dir, name, v)
	return nil
}

// losing prepares a node for the loss of a name: whoever has it open goes on
// with a descriptor, and a new file with the same inode number is another one.
func (fs *FS) losing(dir *Node, name string, v *victim) (undo func(), err error) {
	n := v.node
	if n == nil {
		return func() {}, nil
	}
	last := fs.lastName(v)
	if v.upper && !n.isDir() {
		if err := fs.keepOpen(n, dir, name, last); err != nil {
			return nil, err
		}
	}
	if !last {
		return func() {}, nil
	}
	fs.table.mu.Lock()
	key := n.key
	fs.table.unkey(n)
	fs.table.mu.Unlock()
	return func() {
		fs.table.mu.Lock()
		defer fs.table.mu.Unlock()
		if key != keyNone {
			fs.table.link(n, key == keyName)
		}
	}, nil
}

// maxSpare is how many files without a known name and without an open may be kept for
// who has found them already and opens them next. Of what is gone the kernel forgets
// them soon; of what has other names it does not, and whoever asks for one more is told
// ESTALE, for which the kernel looks up the name that it has.
const maxSpare = 1024

// keepOpen opens a file in the upper that is about to lose the name that it is
// known by, if somebody has it open, may be opening it, or other names may be left.
func (fs *FS) keepOpen(n, dir *Node, name string, last bool) error {
	n.mu.Lock()
	known := n.parent == dir && n.name == name && !n.has(noName) || n.has(isIndexed|byHandle) && last
	others := n.more != nil && len(n.more.alts) > 0
	have := n.more != nil && n.more.fd >= 0
	n.mu.Unlock()
	if have || !known || others && !last {
		return nil
	}
	spare := n.opens.Load() == 0
	if spare && fs.spares.Load() >= maxSpare {
		return nil
	}
	fd, err := fs.openUpper(n, sys.O_PATH)
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.extra().fd = fd
	n.mu.Unlock()
	if spare {
		fs.spares.Add(1)
		n.set(isSpare)
	}
	return nil
}

// lost tells a node that a name is gone.
func (fs *FS) lost(dir *Node, name string, v *victim) {
	n := v.node
	if n == nil {
		return
	}
	if fs.lastName(v) {
		var a Attr
		fs.show(n, &v.f.st, &a)
		a.Nlink = 0
		n.set(isDead)
		if v.upper {
			n.mu.Lock()
			n.extra().last = a
			n.mu.Unlock()
		}
		if n.isDir() {
			fs.dirs.drop(&n.dir.up)
		}
		fs.leaveIndex(n)
		return
	}
	if n.has(isIndexed) && v.upper {
		n.keepCount(v.f.st.Nlink - 1)
	}
	if n.has(isIndexed | byHandle) {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	fs.table.mu.Lock()
	defer fs.table.mu.Unlock()
	fs.loseName(n, dir, name)
}

// loseName forgets one of several names; n.mu and table.mu are held.
func (fs *FS) loseName(n, dir *Node, name string) {
	m := n.extra()
	for i, a := range m.alts {
		if a.parent == dir && a.name == name {
			m.alts = append(m.alts[:i], m.alts[i+1:]...)
			fs.table.unhold(dir)
			return
		}
	}
	if n.parent != dir || n.name != name {
		return
	}
	if len(m.alts) == 0 {
		n.set(noName)
		return
	}
	a := m.alts[len(m.alts)-1]
	m.alts = m.alts[:len(m.alts)-1]
	fs.moveLocked(n, a.parent, a.name)
	fs.table.unhold(a.parent)
}

// moveLocked says that n is at name in dir now; n.mu and table.mu are held.
func (fs *FS) moveLocked(n, dir *Node, name string) {
	dir.holds++
	old := n.parent
	n.parent, n.name = dir, name
	fs.table.unhold(old)
	n.clear(noName)
}
