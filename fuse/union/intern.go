package union

import (
	"github.com/layerctl/layerctl/internal/sys"
)

// intern gives the node of what was found at name in dir, making it if there is
// none, with a reference for the caller. nil: something in dir has changed since
// the search began (epoch is from before), so that it must be done again. mine:
// the caller has locked dir.
func (fs *FS) intern(dir *Node, name string, f *found, epoch uint32, mine bool) *Node {
	if fs.handleTable != nil {
		fs.numbered(dir, name, f)
	}
	t := fs.table
	t.mu.Lock()
	defer t.mu.Unlock()
	if fs.epoch(dir) != epoch {
		return nil
	}
	if dir.dir.busy && !mine {
		// Somebody is taking names away, and has looked already which nodes have
		// them: no node may come to be in between.
		t.wait(dir)
		return nil
	}
	key, byName := fs.keyOf(f)
	var n *Node
	if byName {
		n = t.byName[nameKey{dir.id, name}]
		if n != nil && (n.lowIno != key.ino || n.lowFS != key.fsid) {
			n = nil
		}
	} else {
		n = t.byReal[key]
	}
	if n == nil && f.upper {
		// A copy-up that has linked the file and not told yet: wait for it.
		p := fs.copying(dir, name)
		if p == nil && f.indexed != "" {
			p = fs.copies[indexKey(f.indexed)]
		}
		if p != nil {
			t.wait(p)
			return nil
		}
	}
	if n != nil && !fs.same(n, dir, name, f) {
		if n.isDir() || n.typ != f.st.Type() {
			byName, n = true, t.byName[nameKey{dir.id, name}]
		}
	}
	if n == nil {
		if fs.handleTable != nil && !f.numbered {
			return nil // its node was there, and was forgotten just now
		}
		n = fs.newNode(dir, name, f)
		t.add(n, byName)
	}
	n.refs++
	return n
}

// wait waits until nobody changes n; t.mu is let go meanwhile.
func (t *table) wait(n *Node) {
	t.mu.Unlock()
	n.change.Lock()
	n.change.Unlock() //lint:ignore SA2001 waiting is all
	t.mu.Lock()
}

// lockNames locks a directory whose names are about to change.
func (fs *FS) lockNames(dir *Node) {
	dir.change.Lock()
	fs.table.mu.Lock()
	dir.dir.busy = true
	fs.table.mu.Unlock()
}

func (fs *FS) unlockNames(dir *Node) {
	fs.table.mu.Lock()
	dir.dir.busy = false
	fs.table.mu.Unlock()
	dir.change.Unlock()
}

// keyOf is the identity of what was found; byName: it does not tell the names of
// a file apart that a copy-up would part.
func (fs *FS) keyOf(f *found) (key realKey, byName bool) {
	switch {
	case f.upper:
		return realKey{f.st.Ino, 0}, false
	case len(f.lowers) > 0:
		return realKey{f.lowerIno, f.lowFS}, false
	}
	return realKey{f.lowSt.Ino, f.lowFS}, f.lowSt.Nlink > 1 && fs.upper != nil && !fs.config.Index
}

// same tells whether a node that is in memory is what was found: its type is,
// and a directory is at no other place.
func (fs *FS) same(n, dir *Node, name string, f *found) bool {
	if n.typ != f.st.Type() {
		return false
	}
	return !n.isDir() || n.parent == dir && n.name == name
}

// newNode makes a node; t.mu is held. dir is nil for one that is found by its number.
func (fs *FS) newNode(dir *Node, name string, f *found) *Node {
	n := &Node{typ: f.st.Type(), parent: dir, name: name, generation: fs.generation}
	if f.number != 0 && fs.table.byID[f.number] == nil {
		n.id, n.generation = f.number, f.generation
	}
	if dir != nil {
		dir.holds++
	}
	flags := ownGuards(&f.st)
	if f.upper {
		flags |= inUpper
		n.upIno = f.st.Ino
	} else {
		flags |= guardsKnown
	}
	if f.metacopy {
		flags |= isMetacopy
		n.more = &fileState{fd: -1, data: f.data, dataSt: f.dataSt, redirect: f.redirect}
	}
	if f.st.IsDir() {
		n.dir = &dirState{lowers: f.lowers, redirect: f.redirect}
		n.lowIno, n.lowFS = f.lowerIno, f.lowFS
		if f.impure {
			flags |= isImpure
		}
		if f.opaque {
			flags |= isOpaque
		}
		if f.xwhites {
			flags |= xWhiteouts
		}
	} else if f.hasLow {
		n.lowIno, n.lowFS = f.lowSt.Ino, f.lowFS
		n.low = f.low
		if f.lowSt.Nlink > 1 {
			flags |= lowLinked
		}
		if n.low.name == name {
			n.low.name = name // one string
		}
	}
	n.flags.Store(flags)
	if f.indexed != "" {
		n.becomeIndexed(f.indexed, f.nlink, &f.st)
	}
	n.ino.Store(fs.inoOf(f))
	return n
}

// inoOf is the number that something found is shown by: that of the lower that it
// comes from, where it is the only one that comes from there.
func (fs *FS) inoOf(f *found) uint64 {
	switch {
	case f.st.IsDir() && len(f.lowers) > 0:
		return fs.ino(f.lowFS, f.lowerIno)
	case f.hasLow && (!f.upper || f.lowSt.Nlink == 1 || f.indexed != ""):
		return fs.ino(f.lowFS, f.lowSt.Ino)
	}
	return fs.ino(0, f.st.Ino)
}

// shownIno is the number that a name is shown by: its node's, if that is in memory.
// What was copied up keeps its number there also where nothing on disk can say it,
// for lack of file handles.
func (fs *FS) shownIno(dir *Node, name string, f *found) uint64 {
	if f.upper && !f.hasLow {
		key, _ := fs.keyOf(f)
		t := fs.table
		t.mu.Lock()
		n := t.byReal[key]
		t.mu.Unlock()
		if n != nil && fs.same(n, dir, name, f) {
			return n.ino.Load()
		}
	}
	return fs.inoOf(f)
}

// renew tells a node where it was found, if it may have other names in the upper,
// and nothing has changed since.
func (fs *FS) renew(n, dir *Node, name string, f *found, epoch uint32, mine bool) {
	if !f.upper || f.st.Nlink < 2 || n.isDir() || n.has(isIndexed|byHandle) {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	t := fs.table
	t.mu.Lock()
	defer t.mu.Unlock()
	if n.upIno != f.st.Ino || fs.epoch(dir) != epoch || dir.dir.busy && !mine {
		return
	}
	if n.has(noName) && !n.has(isDead) {
		fs.moveLocked(n, dir, name)
	} else if n.parent != dir || n.name != name {
		fs.addName(n, dir, name)
	}
}

// maxAlts bounds the names of one file that are remembered beside the first.
const maxAlts = 8

// addName remembers one more name in the upper; n.mu and t.mu are held.
func (fs *FS) addName(n, dir *Node, name string) {
	m := n.extra()
	for _, a := range m.alts {
		if a.parent == dir && a.name == name {
			return
		}
	}
	if len(m.alts) == maxAlts {
		return
	}
	dir.holds++
	m.alts = append(m.alts, altName{dir, name})
}

// add makes a node findable; t.mu is held.
func (t *table) add(n *Node, byName bool) {
	t.identify(n)
	t.link(n, byName)
}

// identify gives a node an ID, if it has none yet; t.mu is held.
func (t *table) identify(n *Node) {
	if n.id == 0 {
		t.last++
		n.id = t.last
	}
	t.byID[n.id] = n
}

func (t *table) link(n *Node, byName bool) {
	if byName {
		n.key = keyName
		t.byName[nameKey{n.parent.id, n.name}] = n
		return
	}
	n.key = keyReal
	t.byReal[n.realKey()] = n
}

// copying is the node that is just being copied up to name in dir; t.mu is held.
func (fs *FS) copying(dir *Node, name string) *Node { return fs.copies[nameKey{dir.id, name}] }

// nodeOf is the node in memory of what was found at a name, held; nil if there
// is none.
func (fs *FS) nodeOf(dir *Node, name string, f *found) *Node {
	key, byName := fs.keyOf(f)
	t := fs.table
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.byReal[key]
	if byName {
		n = t.byName[nameKey{dir.id, name}]
	} else if n != nil && !fs.same(n, dir, name, f) {
		n = t.byName[nameKey{dir.id, name}]
	}
	if n != nil {
		n.holds++
	}
	return n
}

var _ = sys.S_IFMT
