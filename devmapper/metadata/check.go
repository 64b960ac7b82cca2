package metadata

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"
)

// Report is what Check found.
type Report struct {
	// Devices are those that the pool has, in the order of their IDs.
	Devices []Checked
	// Problems are damage and what does not agree; each wraps ErrDataLoss, or is an error
	// of a read.
	Problems []error
	// Leaks are blocks that a space map counts too often: nobody gets them again. The kernel
	// leaves some where the power goes while it hands a discard on: it counts each block once
	// more for that time, and may commit in between.
	Leaks []error
	// Accounted: the space maps were compared with what the trees refer to. They are
	// not in a metadata snapshot, nor where a tree is damaged.
	Accounted bool
}

// Checked is a device as its tree has it.
type Checked struct {
	Device
	End   uint64 // the block after the last virtual block that is mapped
	Whole bool   // its tree was read to the end
}

// Check reads every node once and compares what the parts of the metadata say of
// each other: devices and their trees, the blocks that they have and the space maps.
// It is O(the metadata). What it reads must hold still, see the package comment. The
// error is that of the check itself.
func (p *Pool) Check(ctx context.Context) (Report, error) {
	c := &checker{ctx: ctx, p: p, parts: map[uint64]*part{}, data: counts{}, blocks: counts{}}
	c.devices(p)
	if ctx.Err() == nil && p.sb.Block == 0 && len(c.report.Problems) == 0 {
		c.account()
	}
	return c.report, ctx.Err()
}

// checker counts who refers to which block.
type checker struct {
	ctx    context.Context
	p      *Pool
	parts  map[uint64]*part // that were read, by the block of their top node
	data   counts           // references to data blocks
	blocks counts           // and to blocks of metadata
	report Report
}

func (c *checker) problem(format string, args ...any) {
	c.report.Problems = append(c.report.Problems, fmt.Errorf("thin metadata: "+format, args...))
}

// part is a subtree, which is read once however many trees have it.
type part struct {
	kind      kind
	low, high uint64 // its first and last key
	entries   uint64
	height    int
	open      bool  // it is being read: whoever meets it is in it
	err       error // what is wrong in it
}

// kind is what a tree is of.
type kind struct {
	name  string
	value int // bytes of a leaf's value
}

var (
	ofDetails  = kind{"details", detailsSize}
	ofRoots    = kind{"devices' roots", rootSize}
	ofMappings = kind{"mappings", mappingSize}
	ofBitmaps  = kind{"bitmaps", indexSize}
	ofCounts   = kind{"reference counts", countSize}
)

// tree reads a subtree that somebody refers to, and calls leaf with each of its entries if it is
// met for the first time.
func (c *checker) tree(k kind, block uint64, leaf func(key uint64, value []byte) error) *part {
	c.blocks.add(block)
	pt := c.parts[block]
	if pt == nil {
		pt = &part{kind: k, open: true}
		c.parts[block] = pt
		pt.err = c.read(pt, block, leaf)
		pt.open = false
		return pt
	}
	switch {
	case pt.open:
		return &part{err: corrupt(block, "is a part of a loop")}
	case pt.kind != k:
		return &part{err: corrupt(block, "is in a tree of %s and in one of %s", pt.kind.name, k.name)}
	}
	return pt
}

func (c *checker) read(pt *part, block uint64, leaf func(key uint64, value []byte) error) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	n, err := c.p.blocks.readNode(block, pt.kind.value)
	if err != nil {
		return err
	}
	for i := range n.n {
		k := n.key(i)
		if i > 0 && k <= n.key(i-1) {
			return corrupt(block, "has key %d (number %d) out of order", k, i)
		}
	}
	if n.leaf {
		return pt.readLeaf(n, leaf)
	}
	if n.n == 0 {
		return corrupt(block, "is an internal node without children")
	}
	var bad error
	for i := range n.n {
		child := c.tree(pt.kind, n.child(i), leaf)
		err := child.err
		if err == nil {
			err = pt.join(block, n, i, child)
		}
		if bad == nil {
			bad = err
		}
	}
	return bad
}

func (pt *part) readLeaf(n *node, leaf func(key uint64, value []byte) error) (bad error) {
	for i := range n.n {
		if err := leaf(n.key(i), n.value(i)); bad == nil {
			bad = err
		}
	}
	pt.entries = uint64(n.n)
	if n.n > 0 {
		pt.low, pt.high = n.key(0), n.key(n.n-1)
	}
	return bad
}

// join adds a child.
func (pt *part) join(block uint64, n *node, i int, child *part) error {
	switch {
	case child.entries == 0:
		return corrupt(n.child(i), "is an empty node below the root")
	case child.low < n.key(i) || i+1 < n.n && child.high >= n.key(i+1):
		return corrupt(n.child(i), "has keys %d to %d, out of what block %d says", child.low, child.high, block)
	case i > 0 && child.height+1 != pt.height:
		return corrupt(n.child(i), "is at another depth than the first leaf")
	}
	if i == 0 {
		pt.low, pt.height = child.low, child.height+1
	}
	pt.high, pt.entries = child.high, pt.entries+child.entries
	return nil
}

// devices reads the trees that a superblock leads to, and compares the records of devices
// with their trees.
func (c *checker) devices(p *Pool) {
	devices, roots := map[ID]Device{}, map[ID]uint64{}
	details := c.tree(ofDetails, p.sb.DetailsRoot, func(key uint64, value []byte) error {
		if key > uint64(MaxID) {
			return corrupt(p.sb.DetailsRoot, "is the root of details of a device %d", key)
		}
		devices[ID(key)] = device(ID(key), value)
		return nil
	})
	if details.err != nil {
		c.problem("records of devices: %w", details.err)
	}
	top := c.tree(ofRoots, p.sb.MappingRoot, func(key uint64, value []byte) error {
		if key > uint64(MaxID) {
			return corrupt(p.sb.MappingRoot, "is the root of mappings of a device %d", key)
		}
		roots[ID(key)] = le.Uint64(value)
		return nil
	})
	if top.err != nil {
		c.problem("trees of devices: %w", top.err)
	}
	for _, id := range slices.Sorted(maps.Keys(roots)) {
		m := c.tree(ofMappings, roots[id], c.mapping)
		d, ok := devices[id]
		whole := m.err == nil
		switch {
		case !whole:
			c.problem("device %d: %w", id, m.err)
		case !ok && details.err == nil:
			c.problem("device %d has a tree and no record: %w", id, errdefs.ErrDataLoss)
		case ok && d.Mapped != m.entries:
			c.problem("device %d has %d blocks by its record and %d by its tree: %w", id, d.Mapped, m.entries, errdefs.ErrDataLoss)
		}
		end := uint64(0)
		if m.entries > 0 {
			end = m.high + 1
		}
		d.ID = id
		c.report.Devices = append(c.report.Devices, Checked{d, end, whole})
	}
	for _, id := range slices.Sorted(maps.Keys(devices)) {
		if _, ok := roots[id]; !ok && top.err == nil {
			c.problem("device %d has a record and no tree: %w", id, errdefs.ErrDataLoss)
		}
	}
}

func (c *checker) mapping(_ uint64, value []byte) error {
	data, _, err := c.p.mapping(value)
	if err == nil {
		c.data.add(data)
	}
	return err
}

// counts are numbers of references to blocks.
type counts map[uint64]*[countsPage]uint32

const countsPage = 1024

func (c counts) add(block uint64) {
	page := c[block/countsPage]
	if page == nil {
		page = new([countsPage]uint32)
		c[block/countsPage] = page
	}
	page[block%countsPage]++
}

func (c counts) of(block uint64) uint32 {
	if page := c[block/countsPage]; page != nil {
		return page[block%countsPage]
	}
	return 0
}
