package metadata

// The layout of struct btree_node (drivers/md/persistent-data/dm-btree-internal.h):
// a header, the keys, and after the room for all keys the values.
const (
	nodeHeader   = 32
	internalFlag = 1 << 0
	leafFlag     = 1 << 1
	childSize    = 8 // the value of an internal node
)

// node is a node of a tree; its keys are in order.
type node struct {
	raw  []byte
	leaf bool
	n    int // entries
	max  int // that it has room for
	size int // of a value
}

// readNode reads a node. valueSize is what a leaf of this tree must have.
func (s *store) readNode(block uint64, valueSize int) (*node, error) {
	b, err := s.read(block, nodeXor)
	if err != nil {
		return nil, err
	}
	n, most, size := le.Uint32(b[16:]), le.Uint32(b[20:]), le.Uint32(b[24:])
	nd := &node{raw: b}
	want := childSize
	switch flags := le.Uint32(b[4:]); flags & (internalFlag | leafFlag) {
	case leafFlag:
		nd.leaf, want = true, valueSize
	case internalFlag:
	default:
		return nil, corrupt(block, "is neither a leaf nor an internal node: flags %#x", flags)
	}
	switch {
	case int64(size) != int64(want):
		return nil, corrupt(block, "has values of %d bytes, should be %d", size, want)
	case int64(most) > int64((BlockSize-nodeHeader)/(8+want)):
		return nil, corrupt(block, "has room for %d entries, which do not fit", most)
	case n > most:
		return nil, corrupt(block, "has %d entries and room for %d", n, most)
	}
	nd.n, nd.max, nd.size = int(n), int(most), int(size)
	return nd, nil
}

func (n *node) key(i int) uint64 { return le.Uint64(n.raw[nodeHeader+8*i:]) }

func (n *node) value(i int) []byte {
	at := nodeHeader + 8*n.max + n.size*i
	return n.raw[at : at+n.size]
}

func (n *node) child(i int) uint64 { return le.Uint64(n.value(i)) }
