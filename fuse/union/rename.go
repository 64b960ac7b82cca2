package union

import (
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

// move is one rename under way. Both directories are in the upper and locked.
type move struct {
	fs               *FS
	olddir, newdir   *Node
	oldname, newname string
	exchange         bool
	noreplace        bool
	oldup, newup     int
	src, dst         victim
	locked           bool // olddir and newdir are
	covered          bool // a whiteout in the upper is where the new name is to be
}

// Rename is renameat2(2) with its flags. EXDEV where a directory that a lower
// has a part of would need a redirect that may not be made.
func (fs *FS) Rename(c Caller, olddir *Node, oldname string, newdir *Node, newname string, flags uint32) error {
	if flags&^(sys.RENAME_NOREPLACE|sys.RENAME_EXCHANGE) != 0 ||
		flags == sys.RENAME_NOREPLACE|sys.RENAME_EXCHANGE {
		return syscall.EINVAL // RENAME_WHITEOUT too, as the kernel's
	}
	if olddir == newdir && oldname == newname && olddir.isDir() {
		var f found
		if err := fs.find(olddir, oldname, &f, -1); err != nil || flags&sys.RENAME_NOREPLACE == 0 {
			return err
		}
		return syscall.EEXIST
	}
	if err := fs.mayChange(olddir, oldname); err != nil {
		return err
	}
	if err := fs.mayChange(newdir, newname); err != nil {
		return err
	}
	if fs.aufsName(newname) {
		return syscall.EINVAL
	}
	if err := fs.unguarded(olddir, isAppend); err != nil {
		return err
	}
	defer fs.takesNames()()
	m := &move{fs: fs, olddir: olddir, oldname: oldname, newdir: newdir, newname: newname,
		exchange: flags&sys.RENAME_EXCHANGE != 0, noreplace: flags&sys.RENAME_NOREPLACE != 0}
	if !olddir.has(inUpper) || !newdir.has(inUpper) {
		if err := m.prepare(); err != nil {
			return err
		}
	}
	for {
		n, err := m.try()
		if n == nil {
			return err
		}
		err = fs.copyUp(c.PID, n, copyMeta)
		fs.release(n)
		if err != nil {
			return err
		}
	}
}

// prepare copies the directories up, unless the rename cannot be.
func (m *move) prepare() error {
	err := m.look()
	m.fs.release(m.src.node)
	m.fs.release(m.dst.node)
	if err == nil {
		err = m.fs.copyUp(0, m.olddir, copyMeta)
	}
	if err == nil {
		err = m.fs.copyUp(0, m.newdir, copyMeta)
	}
	return err
}

// try renames. What it returns must be copied up first, without the locks; it
// is held.
func (m *move) try() (up *Node, err error) {
	unlock := m.fs.lockDirs(m.olddir, m.newdir)
	defer unlock()
	m.locked = true
	defer func() { m.locked = false }()
	if m.olddir.has(isDead) || m.newdir.has(isDead) {
		return nil, syscall.ENOENT
	}
	oldup, err := m.fs.upperDir(m.olddir)
	if err != nil {
		return nil, err
	}
	defer m.fs.dirs.done(oldup)
	newup, err := m.fs.upperDir(m.newdir)
	if err != nil {
		return nil, err
	}
	defer m.fs.dirs.done(newup)
	m.oldup, m.newup = oldup.fd, newup.fd
	m.src, m.dst, m.covered = victim{}, victim{}, false
	defer func() { m.fs.release(m.src.node); m.fs.release(m.dst.node) }()
	if err := m.look(); err != nil {
		return nil, err
	}
	if n := m.notUp(); n != nil {
		m.fs.hold(n)
		return n, nil
	}
	unlockNodes := lockNodes(m.src.node, m.dst.node)
	defer unlockNodes()
	err = m.do()
	m.olddir.dir.changed.Add(1)
	m.newdir.dir.changed.Add(1)
	return nil, err
}

// look finds what is at both names.
func (m *move) look() error {
	if err := m.fs.findVictim(m.olddir, m.oldname, &m.src); err != nil {
		return err
	}
	if err := m.needNode(m.olddir, m.oldname, &m.src); err != nil {
		return err
	}
	err := m.fs.findVictim(m.newdir, m.newname, &m.dst)
	if err == syscall.ENOENT && !m.exchange {
		m.covered = m.dst.f.covered && !m.dst.f.beside
		if err := m.notInItself(); err != nil {
			return err
		}
		if err := m.fs.mayGo(m.olddir, m.oldname, &m.src); err != nil {
			return err
		}
		return m.mayMove()
	}
	if err != nil {
		return err
	}
	if m.noreplace {
		return syscall.EEXIST
	}
	if err := m.notInItself(); err != nil {
		return err
	}
	srcDir, dstDir := m.src.f.st.IsDir(), m.dst.f.st.IsDir()
	switch {
	case m.exchange:
	case srcDir && !dstDir:
		return syscall.ENOTDIR
	case !srcDir && dstDir:
		return syscall.EISDIR
	}
	if err := m.needNode(m.newdir, m.newname, &m.dst); err != nil {
		return err
	}
	if err := m.bothMayGo(); err != nil {
		return err
	}
	if err := m.mayMove(); err != nil || m.exchange || !dstDir {
		return err
	}
	return m.fs.mustBeEmpty(m.dst.node)
}

// bothMayGo is EPERM where an inode flag forbids that the names change. Neither may
// be a directory of this rename, whose lock is held: see notInItself.
func (m *move) bothMayGo() error {
	if m.newdir.has(isAppend) { // known since mayChange
		return syscall.EPERM
	}
	if err := m.fs.mayGo(m.olddir, m.oldname, &m.src); err != nil {
		return err
	}
	return m.fs.mayGo(m.newdir, m.newname, &m.dst)
}

// needNode makes the node of what was found, if there is none and it is one that
// is worked with: a directory, or something to copy up.
func (m *move) needNode(dir *Node, name string, v *victim) error {
	if v.node != nil || v.upper && !v.f.st.IsDir() && !v.f.metacopy && v.f.indexed == "" {
		return nil
	}
	return m.fs.needNode(dir, name, v, m.locked)
}

// mayMove refuses what would need a redirect that may not be made.
func (m *move) mayMove() error {
	for _, v := range []*victim{&m.src, &m.dst} {
		n := v.node
		if n == nil || !n.isDir() || v == &m.dst && !m.exchange {
			continue
		}
		if len(n.dir.lowers) > 0 && m.fs.config.Redirect != RedirectOn {
			return syscall.EXDEV
		}
	}
	return nil
}

// notInItself refuses what would put a directory into itself. A directory that is
// above another one that is in use is in memory.
func (m *move) notInItself() error {
	if m.olddir == m.newdir {
		return nil
	}
	m.fs.tree.RLock()
	defer m.fs.tree.RUnlock()
	switch {
	case m.src.node != nil && within(m.newdir, m.src.node):
		return syscall.EINVAL
	case m.dst.node != nil && within(m.olddir, m.dst.node):
		if m.exchange {
			return syscall.EINVAL
		}
		return syscall.ENOTEMPTY
	}
	return nil
}

// within tells whether n is dir or below it. fs.tree is held.
func within(n, dir *Node) bool {
	for ; n != nil; n = n.parent {
		if n == dir {
			return true
		}
	}
	return false
}

// notUp is what must be copied up before the rename.
func (m *move) notUp() *Node {
	if n := m.src.node; n != nil && !n.has(inUpper) {
		return n
	}
	if n := m.dst.node; m.exchange && n != nil && !n.has(inUpper) {
		return n
	}
	return nil
}

// do renames; everything is in the upper and locked.
func (m *move) do() error {
	if m.src.node != nil && m.src.node == m.dst.node && m.src.f.st.Ino == m.dst.f.st.Ino {
		return nil // two names of one file
	}
	if !m.exchange && m.dst.node != nil && m.dst.node.isDir() {
		if err := m.fs.mustBeEmpty(m.dst.node); err != nil {
			return err
		}
	}
	for _, v := range []struct {
		dir  *Node
		name string
		v    *victim
	}{{m.olddir, m.oldname, &m.src}, {m.newdir, m.newname, &m.dst}} {
		if err := m.fs.linkName(v.dir, v.name, v.v); err != nil {
			return err
		}
	}
	if err := m.mark(); err != nil {
		return err
	}
	if m.exchange {
		return m.swap()
	}
	return m.replace()
}

// mark writes what the moved things need to be found from their new places:
// redirects of what goes on below, opaque for a directory that must not merge
// there, impure for the new parent.
func (m *move) mark() error {
	same := m.olddir == m.newdir
	if err := m.markOne(&m.src, m.olddir, m.oldname, m.oldup, m.newdir, m.newup, same); err != nil {
		return err
	}
	if m.exchange {
		return m.markOne(&m.dst, m.newdir, m.newname, m.newup, m.olddir, m.oldup, same)
	}
	return nil
}

func (m *move) markOne(v *victim, from *Node, name string, fromUp int, to *Node, toUp int, same bool) error {
	fs := m.fs
	n := v.node
	isDir := v.f.st.IsDir()
	goesOn := n != nil && (isDir && len(n.dir.lowers) > 0 || n.has(isMetacopy))
	switch {
	case goesOn:
		if err := fs.setRedirect(n, fromUp, name, same); err != nil {
			return err
		}
	case isDir && !n.has(isOpaque) && len(to.dir.lowers) > 0:
		if err := fs.setOpaque(n, fromUp, name); err != nil {
			return err
		}
	}
	comesFromBelow := n != nil && (n.lowIno != 0 || n.has(isMetacopy)) || n == nil && v.f.hasLow
	if !same && comesFromBelow {
		if err := fs.markImpure(to, toUp); err != nil {
			return err
		}
	}
	return fs.step("union: rename: marked")
}

// markImpure marks a directory in the upper as one that has copied-up objects.
func (fs *FS) markImpure(dir *Node, up int) error {
	if dir.has(isImpure) {
		return nil
	}
	err := fs.upper.setImpure(up)
	if err == nil {
		dir.set(isImpure)
	}
	return err
}

// setOpaque makes a directory in the upper one that nothing merges into.
func (fs *FS) setOpaque(n *Node, up int, name string) error {
	fd, err := sys.OpenBare(up, name, openDirFlags, 0)
	if err != nil {
		return err
	}
	defer sys.CloseBare(fd)
	if err := fs.upper.makeOpaque(fd); err != nil {
		return syscall.EXDEV
	}
	n.set(isOpaque)
	return nil
}

// redirectMax is the longest redirect that is written, as the kernel's
// redirect_max.
const redirectMax = 256

// setRedirect says in the upper where a node goes on in the lowers, wherever it
// moves: by its present name if it stays in its directory, else by its path.
func (fs *FS) setRedirect(n *Node, up int, name string, same bool) error {
	absolute := !same || !n.isDir() && n.has(lowLinked|isIndexed)
	old := n.redirect()
	if old != "" && (!absolute || old[0] == '/') {
		return nil
	}
	to := name
	if absolute {
		if n.has(isIndexed) {
			to = fs.originPath(n)
		} else {
			to = fs.lowerPath(n, name)
		}
		if len(to) > redirectMax {
			return syscall.EXDEV
		}
	} else if old != "" {
		return nil
	}
	if err := sys.SetxattrBare(up, name, fs.names.redirect, []byte(to), 0); err != nil {
		fs.say("redirect of %q: %v", name, err)
		return syscall.EXDEV
	}
	n.setRedirect(to)
	return nil
}

func (n *Node) redirect() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dir != nil {
		return n.dir.redirect
	}
	if n.more != nil {
		return n.more.redirect
	}
	return ""
}

func (n *Node) setRedirect(to string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dir != nil {
		n.dir.redirect = to
		return
	}
	n.extra().redirect = to
}

// lowerPath is the absolute path at which n, which is at name in its parent now,
// goes on in the lowers: redirects of its parents count.
func (fs *FS) lowerPath(n *Node, name string) string {
	if r := n.redirect(); r != "" {
		name = r
	}
	parts := []string{name}
	n.mu.Lock()
	p := n.parent
	n.mu.Unlock()
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	for ; p != nil && p != fs.root; p = p.parent {
		part := p.name
		if p.dir.redirect != "" {
			part = p.dir.redirect
		}
		parts = append(parts, part)
		if part[0] == '/' {
			break
		}
	}
	var b strings.Builder
	for i := len(parts) - 1; i >= 0; i-- {
		if parts[i][0] != '/' {
			b.WriteByte('/')
		}
		b.WriteString(parts[i])
	}
	return b.String()
}

// swap exchanges both names.
func (m *move) swap() error {
	fs := m.fs
	isDir := m.src.f.st.IsDir() || m.dst.f.st.IsDir()
	if isDir {
		fs.tree.Lock()
		defer fs.tree.Unlock()
	}
	if err := sys.RenameBare(m.oldup, m.oldname, m.newup, m.newname, sys.RENAME_EXCHANGE); err != nil {
		return err
	}
	fs.moved(m.src.node, m.olddir, m.oldname, m.newdir, m.newname)
	fs.moved(m.dst.node, m.newdir, m.newname, m.olddir, m.oldname)
	return nil
}

// replace moves the source to the new name, over what is there.
func (m *move) replace() error {
	fs := m.fs
	exists := m.dst.f.upper || m.dst.f.hasLow || len(m.dst.f.lowers) > 0
	if exists && m.dst.upper && m.dst.f.st.IsDir() {
		// Whiteouts may be in it, which would keep the rename from replacing it.
		if err := fs.upper.emptyDir(m.newup, m.newname); err != nil {
			return err
		}
		fs.dirs.drop(&m.dst.node.dir.up)
		if err := fs.step("union: rename: target emptied"); err != nil {
			return err
		}
	}
	undo := func() {}
	if exists {
		err := fs.countLinks(m.dst.node)
		if err != nil {
			return err
		}
		if undo, err = fs.losing(m.newdir, m.newname, &m.dst); err != nil {
			return err
		}
	}
	isDir := m.src.f.st.IsDir()
	if isDir {
		fs.tree.Lock()
		defer fs.tree.Unlock()
	}
	if err := m.rename(); err != nil {
		undo()
		return err
	}
	if exists {
		fs.lost(m.newdir, m.newname, &m.dst)
	}
	fs.moved(m.src.node, m.olddir, m.oldname, m.newdir, m.newname)
	return nil
}

// rename makes the rename in the upper, with a whiteout left where a lower has
// the old name.
func (m *move) rename() error {
	u := m.fs.upper
	isDir := m.src.f.st.IsDir()
	switch {
	case m.src.below && m.covered:
		if !m.dst.f.st.IsWhiteout() {
			if err := u.allowXWhiteouts(m.oldup); err != nil {
				return err
			}
			m.olddir.set(xWhiteouts)
		}
		return sys.RenameBare(m.oldup, m.oldname, m.newup, m.newname, sys.RENAME_EXCHANGE)
	case m.src.below:
		return u.renameCovered(m.oldup, m.oldname, m.newup, m.newname)
	case isDir && m.covered:
		if err := sys.RenameBare(m.oldup, m.oldname, m.newup, m.newname, sys.RENAME_EXCHANGE); err != nil {
			return err
		}
		// It is done; the whiteout that is at the old name now hides nothing.
		_ = m.fs.step("union: rename: exchanged with the whiteout")
		if err := sys.UnlinkBare(m.oldup, m.oldname, 0); err != nil {
			m.fs.say("whiteout %q: %v", m.oldname, err)
		}
		return nil
	}
	return sys.RenameBare(m.oldup, m.oldname, m.newup, m.newname, 0)
}

// moved tells a node that one of its names is another now.
func (fs *FS) moved(n, olddir *Node, oldname string, newdir *Node, newname string) {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	t := fs.table
	t.mu.Lock()
	defer t.mu.Unlock()
	if n.parent == olddir && n.name == oldname {
		byName := n.key == keyName
		t.unkey(n)
		fs.moveLocked(n, newdir, newname)
		t.link(n, byName)
		return
	}
	if n.more == nil {
		return
	}
	for i := range n.more.alts {
		if a := &n.more.alts[i]; a.parent == olddir && a.name == oldname {
			newdir.holds++
			t.unhold(a.parent)
			a.parent, a.name = newdir, newname
		}
	}
}

// lockDirs locks the directories of a rename, an ancestor first.
func (fs *FS) lockDirs(a, b *Node) (unlock func()) {
	if a == b {
		fs.lockNames(a)
		return func() { fs.unlockNames(a) }
	}
	fs.renames.Lock()
	fs.tree.RLock()
	first, second := a, b
	if within(a, b) || !within(b, a) && b.id < a.id {
		first, second = b, a
	}
	fs.tree.RUnlock()
	fs.lockNames(first)
	fs.lockNames(second)
	return func() {
		fs.unlockNames(second)
		fs.unlockNames(first)
		fs.renames.Unlock()
	}
}

// lockNodes locks what is renamed and what is replaced.
func lockNodes(a, b *Node) (unlock func()) {
	if a == nil || a == b {
		a, b = b, nil
	}
	switch {
	case a == nil:
		return func() {}
	case b == nil:
		a.change.Lock()
		return a.change.Unlock
	}
	if b.id < a.id {
		a, b = b, a
	}
	a.change.Lock()
	b.change.Lock()
	return func() { b.change.Unlock(); a.change.Unlock() }
}

// renameCovered renames to a place where no whiteout is, and leaves a whiteout
// at the old name.
func (u *upper) renameCovered(olddir int, oldname string, newdir int, newname string) error {
	err := sys.RenameBare(olddir, oldname, newdir, newname, sys.RENAME_WHITEOUT)
	if err != syscall.EINVAL && !(err == syscall.EPERM && u.can.renameWhiteout == kprobe.No) {
		return err
	}
	// The file system has no RENAME_WHITEOUT, or the process may not (before Linux 5.8). Until the whiteout is there both
	// names show the file: a crash in between leaves it so, and loses nothing.
	if err := sys.RenameBare(olddir, oldname, newdir, newname, 0); err != nil {
		return err
	}
	if err := u.step("union: rename: renamed, no whiteout yet"); err != nil {
		return err
	}
	return u.whiteout(olddir, oldname)
}
