package metadata

import (
	"io"
	"sort"
	"testing"
)

// image is metadata in memory that a test writes as the kernel does: nodes that
// only one tree has are changed in place, others copied.
type image struct {
	b     []byte
	next  uint64        // the first block that nothing uses
	own   map[uint64]ID // nodes that one device alone has
	cur   ID            // that is written to
	roots map[ID]uint64
	max   int // entries of a node; few make high trees
	reads int
}

func (m *image) ReadAt(p []byte, off int64) (int, error) {
	m.reads++
	if off >= int64(len(m.b)) {
		return 0, io.EOF
	}
	n := copy(p, m.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *image) block(n uint64) []byte { return m.b[n*BlockSize : (n+1)*BlockSize] }

// seal gives a block its number and checksum.
func (m *image) seal(n uint64, xor uint32) {
	b := m.block(n)
	le.PutUint64(b[8:], n)
	le.PutUint32(b, checksum(b, xor))
}

// mem is a node out of its block.
type mem struct {
	leaf bool
	keys []uint64
	vals []uint64
}

func (m *image) load(n uint64) *mem {
	b := m.block(n)
	nd := &mem{leaf: le.Uint32(b[4:])&leafFlag != 0}
	count, most := int(le.Uint32(b[16:])), int(le.Uint32(b[20:]))
	for i := range count {
		nd.keys = append(nd.keys, le.Uint64(b[nodeHeader+8*i:]))
		nd.vals = append(nd.vals, le.Uint64(b[nodeHeader+8*most+8*i:]))
	}
	return nd
}

// put writes a node over the block old if that is our own, else to a new one.
func (m *image) put(old uint64, nd *mem) uint64 {
	n := old
	if id, ok := m.own[old]; !ok || id != m.cur {
		n = m.next
		m.next++
		m.own[n] = m.cur
	}
	b := m.block(n)
	clear(b)
	le.PutUint32(b[4:], internalFlag)
	if nd.leaf {
		le.PutUint32(b[4:], leafFlag)
	}
	le.PutUint32(b[16:], uint32(len(nd.keys)))
	le.PutUint32(b[20:], uint32(m.max))
	le.PutUint32(b[24:], 8)
	for i, k := range nd.keys {
		le.PutUint64(b[nodeHeader+8*i:], k)
		le.PutUint64(b[nodeHeader+8*m.max+8*i:], nd.vals[i])
	}
	m.seal(n, nodeXor)
	return n
}

// at is the place of the last key that is not higher.
func (nd *mem) at(key uint64) int {
	return sort.Search(len(nd.keys), func(i int) bool { return nd.keys[i] > key }) - 1
}

func (nd *mem) add(i int, key, val uint64) {
	nd.keys = append(nd.keys[:i], append([]uint64{key}, nd.keys[i:]...)...)
	nd.vals = append(nd.vals[:i], append([]uint64{val}, nd.vals[i:]...)...)
}

func (nd *mem) drop(i int) {
	nd.keys = append(nd.keys[:i], nd.keys[i+1:]...)
	nd.vals = append(nd.vals[:i], nd.vals[i+1:]...)
}

// insert sets a key and returns the new root.
func (m *image) insert(root, key, val uint64) uint64 {
	n, right, split := m.insertInto(root, key, val)
	if split {
		l, r := m.load(n), m.load(right)
		n = m.put(0, &mem{keys: []uint64{l.keys[0], r.keys[0]}, vals: []uint64{n, right}})
	}
	return n
}

func (m *image) insertInto(block, key, val uint64) (n, right uint64, split bool) {
	nd := m.load(block)
	i := nd.at(key)
	switch {
	case nd.leaf && i >= 0 && nd.keys[i] == key:
		nd.vals[i] = val
	case nd.leaf:
		nd.add(i+1, key, val)
	default:
		if i < 0 {
			i, nd.keys[0] = 0, key
		}
		c, r, s := m.insertInto(nd.vals[i], key, val)
		nd.vals[i] = c
		if s {
			nd.add(i+1, m.load(r).keys[0], r)
		}
	}
	if len(nd.keys) > m.max {
		half := len(nd.keys) / 2
		rest := &mem{leaf: nd.leaf, keys: append([]uint64(nil), nd.keys[half:]...), vals: append([]uint64(nil), nd.vals[half:]...)}
		nd.keys, nd.vals = nd.keys[:half], nd.vals[:half]
		return m.put(block, nd), m.put(0, rest), true
	}
	return m.put(block, nd), 0, false
}

// remove takes a key out. A node keeps a third of its room filled, as the tools
// demand; a parent keeps the key that it had for the node.
func (m *image) remove(root, key uint64) uint64 {
	n := m.removeFrom(root, key)
	for nd := m.load(n); !nd.leaf && len(nd.keys) == 1; nd = m.load(n) {
		n = nd.vals[0]
	}
	return n
}

func (m *image) removeFrom(block, key uint64) uint64 {
	nd := m.load(block)
	i := nd.at(key)
	if i < 0 || nd.leaf && nd.keys[i] != key {
		return block
	}
	if nd.leaf {
		nd.drop(i)
		return m.put(block, nd)
	}
	c := m.removeFrom(nd.vals[i], key)
	if nd.vals[i] = c; len(m.load(c).keys) < m.max/3 && len(nd.keys) > 1 {
		m.balance(nd, max(i-1, 0))
	}
	return m.put(block, nd)
}

// balance makes one of the children i and i+1, or two of the same size.
func (m *image) balance(nd *mem, i int) {
	l, r := m.load(nd.vals[i]), m.load(nd.vals[i+1])
	if !l.leaf { // their first keys may be lower than what is in them
		l.keys[0], r.keys[0] = nd.keys[i], nd.keys[i+1]
	}
	l.keys, l.vals = append(l.keys, r.keys...), append(l.vals, r.vals...)
	if len(l.keys) <= m.max {
		nd.vals[i] = m.put(nd.vals[i], l)
		nd.drop(i + 1)
		return
	}
	half := len(l.keys) / 2
	r.keys, r.vals = l.keys[half:], l.vals[half:]
	l.keys, l.vals = l.keys[:half], l.vals[:half]
	nd.vals[i], nd.vals[i+1] = m.put(nd.vals[i], l), m.put(nd.vals[i+1], r)
	nd.keys[i+1] = r.keys[0]
}

// create makes a device without mappings.
func (m *image) create(id ID) {
	m.cur = id
	m.roots[id] = m.put(0, &mem{leaf: true})
}

// snapshot makes a device with the mappings of another.
func (m *image) snapshot(id, origin ID) {
	m.roots[id] = m.roots[origin]
	for n, owner := range m.own {
		if owner == origin {
			delete(m.own, n)
		}
	}
}

func (m *image) set(id ID, virtual, data uint64) {
	m.cur = id
	m.roots[id] = m.insert(m.roots[id], virtual, data<<24|1)
}

func (m *image) unset(id ID, virtual uint64) {
	m.cur = id
	m.roots[id] = m.remove(m.roots[id], virtual)
}

// commit writes the roots and the superblock.
func (m *image) commit() {
	m.cur = MaxID
	top := m.put(0, &mem{leaf: true})
	for id, root := range m.roots {
		top = m.insert(top, uint64(id), root)
	}
	le.PutUint64(m.block(0)[320:], top)
	m.seal(0, superblockXor)
}

// hold makes a metadata snapshot of the last commit.
func (m *image) hold() {
	n := m.next
	m.next++
	b := m.block(n)
	copy(b, m.block(0))
	clear(b[64:320])
	le.PutUint64(b[56:], 0)
	m.seal(n, superblockXor)
	le.PutUint64(m.block(0)[56:], n)
	m.seal(0, superblockXor)
	clear(m.own)
}

const dataBlocks = 1 << 20

// newImage is metadata without devices, as thin_restore makes it.
func newImage(t testing.TB, blocks, max int) *image {
	t.Helper()
	b := restore(t, "<superblock uuid=\"\" time=\"1\" transaction=\"1\" data_block_size=\"128\" nr_data_blocks=\"1048576\"></superblock>", int64(blocks)*BlockSize)
	return &image{b: b, next: 40, own: map[uint64]ID{}, roots: map[ID]uint64{}, max: max}
}
