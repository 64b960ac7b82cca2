package union

import "sync"

// table has the nodes in memory.
type table struct {
	mu     sync.Mutex
	last   uint64
	byID   map[uint64]*Node
	byReal map[realKey]*Node
	byName map[nameKey]*Node
	gone   []*Node // collected while a lock was held, to be let go
}

// nameKey is a name of a node that its real inode does not tell from others.
type nameKey struct {
	dir  uint64
	name string
}

func newTable() *table {
	return &table{byID: map[uint64]*Node{}, byReal: map[realKey]*Node{}, byName: map[nameKey]*Node{}}
}

// Node returns a node that the caller has a reference to; nil for an unknown id.
func (fs *FS) Node(id uint64) *Node {
	if id == 1 {
		return fs.root
	}
	fs.table.mu.Lock()
	n := fs.table.byID[id]
	fs.table.mu.Unlock()
	return n
}

// Forget gives back count references.
func (fs *FS) Forget(id, count uint64) {
	if id == 1 {
		return
	}
	t := fs.table
	t.mu.Lock()
	if n := t.byID[id]; n != nil {
		n.refs -= min(count, n.refs)
		t.collect(n)
	}
	gone := t.take()
	t.mu.Unlock()
	fs.free(gone)
}

// hold keeps a node in memory until release.
func (fs *FS) hold(n *Node) {
	fs.table.mu.Lock()
	n.holds++
	fs.table.mu.Unlock()
}

func (fs *FS) release(n *Node) {
	if n == nil {
		return
	}
	t := fs.table
	t.mu.Lock()
	t.unhold(n)
	gone := t.take()
	t.mu.Unlock()
	fs.free(gone)
}

// unhold ends one hold; t.mu is held.
func (t *table) unhold(n *Node) {
	n.holds--
	t.collect(n)
}

// take is what was collected.
func (t *table) take() []*Node {
	gone := t.gone
	t.gone = nil
	return gone
}

// collect takes a node that nobody needs out, and the parents that were there
// for it alone. t.mu is held.
func (t *table) collect(n *Node) {
	for n != nil && n.id != 1 && n.refs == 0 && n.holds == 0 && t.byID[n.id] == n {
		delete(t.byID, n.id)
		t.unkey(n)
		if n.dir != nil || n.more != nil {
			t.gone = append(t.gone, n)
		}
		if m := n.more; m != nil {
			for _, a := range m.alts {
				t.unhold(a.parent)
			}
			m.alts = nil
		}
		n = n.parent
		if n != nil {
			n.holds--
		}
	}
}

// unkey makes a node one that its name or inode does not lead to.
func (t *table) unkey(n *Node) {
	switch n.key {
	case keyReal:
		if k := n.realKey(); t.byReal[k] == n {
			delete(t.byReal, k)
		}
	case keyName:
		if k := (nameKey{n.parent.id, n.name}); t.byName[k] == n {
			delete(t.byName, k)
		}
	}
	n.key = keyNone
}

// realKey is the identity under which a node is found.
func (n *Node) realKey() realKey {
	if n.upIno != 0 {
		return realKey{n.upIno, 0}
	}
	return realKey{n.lowIno, n.lowFS}
}

// free lets go what nodes had that are in no table any more.
func (fs *FS) free(gone []*Node) {
	for _, n := range gone {
		if fs.handleTable != nil && n.has(isDead) {
			fs.handleTable.drop(n.id)
		}
		if n.dir != nil {
			fs.dirs.drop(&n.dir.up)
			for _, r := range n.dir.lowers {
				fs.dirs.drop(&r.fd)
			}
			fs.dropIndex(n)
		}
		if n.more != nil && n.more.fd >= 0 {
			closeFd(n.more.fd)
			n.more.fd = -1
			if n.has(isSpare) {
				fs.spares.Add(-1)
			}
		}
	}
}
