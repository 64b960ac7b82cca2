package metadata

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// A space map counts references to blocks (drivers/md/persistent-data/dm-space-map-common.h):
// bitmaps have two bits a block, behind a header of 16 bytes; 3 means that the number is in
// a tree. What finds the bitmaps is a tree for data, and one block for metadata.
const (
	indexSize  = 16 // struct disk_index_entry
	countSize  = 4  // __le32
	bitmapXor  = 240779
	indexXor   = 160478
	spaceHead  = 16
	perBitmap  = (BlockSize - spaceHead) * 4
	mostIndex  = 255
	manyInTree = 3
)

// The names of the two.
const (
	dataSpace     = "data"
	metadataSpace = "metadata"
)

// account compares the space maps with what was counted.
func (c *checker) account() {
	c.blocks.add(0)
	if held := c.p.sb.HeldRoot; held != 0 {
		c.blocks.add(held)
		s, err := c.p.Snapshot()
		if err != nil {
			c.problem("metadata snapshot: %w", err)
			return
		}
		before := c.report.Devices // the snapshot's are others
		c.devices(s)
		c.report.Devices = before
	}
	data := c.spaceMap(dataSpace, c.p.sb.DataSpace, c.dataBitmaps)
	metadata := c.spaceMap(metadataSpace, c.p.sb.MetadataSpace, c.metadataBitmaps)
	if len(c.report.Problems) > 0 || c.ctx.Err() != nil {
		return
	}
	c.report.Accounted = true
	c.compare(dataSpace, c.p.sb.DataSpace, data, c.data)
	c.compare(metadataSpace, c.p.sb.MetadataSpace, metadata, c.blocks)
}

// space is a space map, as it was read.
type space struct {
	bitmaps map[uint64]uint64 // where they are, by number
	many    map[uint64]uint32 // counts of 3 and more
}

func (c *checker) spaceMap(name string, m SpaceMap, bitmaps func(m SpaceMap, add func(i, block uint64)) error) space {
	s := space{map[uint64]uint64{}, map[uint64]uint32{}}
	err := bitmaps(m, func(i, block uint64) { s.bitmaps[i] = block })
	if err == nil {
		err = c.tree(ofCounts, m.Counts, func(key uint64, value []byte) error {
			s.many[key] = le.Uint32(value)
			return nil
		}).err
	}
	if err != nil {
		c.problem("space map of %s: %w", name, err)
	}
	for _, block := range s.bitmaps {
		c.blocks.add(block)
	}
	return s
}

func (c *checker) dataBitmaps(m SpaceMap, add func(i, block uint64)) error {
	return c.tree(ofBitmaps, m.Bitmaps, func(key uint64, value []byte) error {
		add(key, le.Uint64(value))
		return nil
	}).err
}

func (c *checker) metadataBitmaps(m SpaceMap, add func(i, block uint64)) error {
	c.blocks.add(m.Bitmaps)
	b, err := c.p.blocks.read(m.Bitmaps, indexXor)
	if err != nil {
		return err
	}
	for i := range min((m.Blocks+perBitmap-1)/perBitmap, mostIndex) {
		add(i, le.Uint64(b[spaceHead+i*indexSize:]))
	}
	return nil
}

// compare reports which blocks a space map counts otherwise than the trees have them.
func (c *checker) compare(name string, m SpaceMap, s space, want counts) {
	var leaked, missed blockList
	used := uint64(0)
	for at := uint64(0); at < m.Blocks; at += perBitmap {
		if c.ctx.Err() != nil {
			return
		}
		block, ok := s.bitmaps[at/perBitmap]
		if !ok {
			c.problem("space map of %s has no bitmap for block %d: %w", name, at, errdefs.ErrDataLoss)
			return
		}
		b, err := c.p.blocks.read(block, bitmapXor)
		if err != nil {
			c.problem("space map of %s: %w", name, err)
			return
		}
		for i := range min(perBitmap, m.Blocks-at) {
			have := s.count(b, i, at+i)
			if have > 0 {
				used++
			}
			if n := want.of(at + i); have > n {
				leaked.add(at + i)
			} else if have < n {
				missed.add(at + i)
			}
		}
	}
	if leaked.n > 0 {
		c.report.Leaks = append(c.report.Leaks, fmt.Errorf("thin metadata: %s: the space map counts more users than there are, so that they stay in use for nobody", leaked.of(name)))
	}
	if missed.n > 0 {
		c.problem("%s: the space map counts fewer users than there are, so that they may be given out twice: %w", missed.of(name), errdefs.ErrDataLoss)
	}
	if used != m.Allocated && name == dataSpace { // of metadata the tools count one more
		c.problem("the superblock counts %d blocks of %s in use, the space map %d: %w", m.Allocated, name, used, errdefs.ErrDataLoss)
	}
}

// count is what the space map says of a block, which is the i'th of a bitmap.
func (s space) count(bitmap []byte, i, block uint64) uint32 {
	two := bitmap[spaceHead+i/4] >> (i % 4 * 2) & 3 // the high bit comes first
	n := uint32(two&1)<<1 | uint32(two>>1)
	if n == manyInTree {
		return max(s.many[block], manyInTree)
	}
	return n
}

// blockList is a number of blocks, and the first of them.
type blockList struct{ n, first uint64 }

func (l *blockList) add(block uint64) {
	if l.n == 0 {
		l.first = block
	}
	l.n++
}

func (l blockList) of(name string) string {
	return fmt.Sprintf("%d blocks of %s, the first is %d", l.n, name, l.first)
}
