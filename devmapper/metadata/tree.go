package metadata

import (
	"math"
	"sort"
)

// maxHeight is more levels than a tree of 64-bit keys can need with nodes that are
// a third full.
const maxHeight = 16

// tree is one B+tree. All its leaves are at the same depth.
type tree struct {
	*store
	root      uint64
	valueSize int
}

// item is where a cursor stands: at an entry, or at a subtree that it has not gone
// into.
type item struct {
	low, last uint64 // keys of a subtree are within; an entry's key is low
	entry     bool
	value     []byte // of an entry
	block     uint64 // of a subtree
	height    int    // of a subtree: levels below its top node; unknown for the root that is unread
	node      *node  // of a subtree, once it was read
}

// frame is a node on the path to where a cursor stands.
type frame struct {
	node   *node
	i      int
	last   uint64
	height int
}

// cursor goes through a tree in the order of its keys, into a subtree or past it as
// the caller likes.
type cursor struct {
	t    *tree
	path []frame
	item
	ok bool // false: past the end
}

// cursor returns one that stands at the whole tree.
func (t *tree) cursor() (*cursor, error) {
	c := &cursor{t: t, item: item{last: math.MaxUint64, block: t.root}, ok: true}
	height, err := t.measure()
	c.height = height
	return c, err
}

// measure counts the levels below the root, down the first child of each.
func (t *tree) measure() (int, error) {
	block := t.root
	for height := 0; height < maxHeight; height++ {
		n, err := t.readNode(block, t.valueSize)
		if err != nil {
			return 0, err
		}
		if n.leaf {
			return height, nil
		}
		if n.n == 0 {
			return 0, corrupt(block, "is an internal node without children")
		}
		block = n.child(0)
	}
	return 0, corrupt(t.root, "is the root of a tree of more than %d levels, or of a loop", maxHeight)
}

// read reads the top node of the subtree that the cursor stands at, which may
// narrow its keys. Since the keys of a node are within what its parent says, and
// only the root may be empty, no node is met twice in a tree.
func (c *cursor) read() error {
	n, err := c.t.readNode(c.block, c.t.valueSize)
	if err != nil {
		return err
	}
	switch {
	case n.leaf != (c.height == 0):
		return corrupt(c.block, "is at another depth than the first leaf")
	case n.n == 0 && (len(c.path) > 0 || !n.leaf):
		return corrupt(c.block, "is an empty node below the root")
	}
	for i := 0; i < n.n; i++ {
		k := n.key(i)
		if k < c.low || k > c.last || i > 0 && k <= n.key(i-1) {
			return corrupt(c.block, "has key %d (number %d) out of order, or out of %d to %d", k, i, c.low, c.last)
		}
	}
	if n.n > 0 {
		c.low = n.key(0)
	}
	c.node = n
	return nil
}

// enter goes to the first part of the subtree that the cursor stands at.
func (c *cursor) enter() error {
	if c.node == nil {
		if err := c.read(); err != nil {
			return err
		}
	}
	c.path = append(c.path, frame{node: c.node, i: -1, last: c.last, height: c.height})
	c.next()
	return nil
}

// next goes past where the cursor stands.
func (c *cursor) next() {
	for len(c.path) > 0 {
		f := &c.path[len(c.path)-1]
		if f.i++; f.i < f.node.n {
			c.item = f.item()
			return
		}
		c.path = c.path[:len(c.path)-1]
	}
	c.item, c.ok = item{}, false
}

func (f *frame) item() item {
	it := item{low: f.node.key(f.i), last: f.last}
	if f.node.leaf {
		it.entry, it.last, it.value = true, it.low, f.node.value(f.i)
		return it
	}
	if f.i+1 < f.node.n {
		it.last = f.node.key(f.i+1) - 1
	}
	it.block, it.height = f.node.child(f.i), f.height-1
	return it
}

// each calls do for every entry until it returns false.
func (t *tree) each(do func(key uint64, value []byte) (bool, error)) error {
	c, err := t.cursor()
	for err == nil && c.ok {
		if !c.entry {
			err = c.enter()
			continue
		}
		var more bool
		if more, err = do(c.low, c.value); !more {
			break
		}
		c.next()
	}
	return err
}

// lookup finds one key: nil if it is not there.
func (t *tree) lookup(key uint64) ([]byte, error) {
	block := t.root
	for range maxHeight {
		n, err := t.readNode(block, t.valueSize)
		if err != nil {
			return nil, err
		}
		i := sort.Search(n.n, func(i int) bool { return n.key(i) > key }) - 1
		if n.leaf {
			if i < 0 || n.key(i) != key {
				return nil, nil
			}
			return n.value(i), nil
		}
		if i < 0 {
			return nil, nil
		}
		block = n.child(i)
	}
	return nil, corrupt(t.root, "is the root of a tree of more than %d levels, or of a loop", maxHeight)
}
