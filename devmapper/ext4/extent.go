package ext4

import "math"

// extent maps logical blocks of an inode.
type extent struct {
	logical, count uint64
	physical       uint64
}

const (
	extentMagic    = 0xF30A
	maxExtentDepth = 5
	unwritten      = 1 << 15 // a length above says that the extent reads as zeros
)

// mapped lists the extents of an inode in the order of logical blocks, and the
// blocks of the tree that holds them.
func (v *volume) mapped(n *inode) (extents []extent, nodes []uint64, err error) {
	if n.flags&flagExtents == 0 {
		return nil, nil, v.unmapped(n)
	}
	w := extentWalk{v: v, n: n}
	if err := w.node(n.tree[:], -1, 0, math.MaxUint32+1); err != nil {
		return nil, nil, err
	}
	return w.extents, w.nodes, nil
}

// unmapped: an inode without extents has its content in itself, or none, or the
// block map of ext3.
func (v *volume) unmapped(n *inode) error {
	switch n.mode & typeMask {
	case typeSymlink:
		if n.size < uint64(len(n.tree)) {
			return nil
		}
	case typeRegular, typeDir:
		if n.tree == [60]byte{} {
			return nil
		}
	default:
		return nil
	}
	return v.cannot("inode %d has a block map, not extents", n.ino)
}

type extentWalk struct {
	v       *volume
	n       *inode
	extents []extent
	nodes   []uint64
}

// node reads a node whose logical blocks are from low to below high. As they
// ascend, and a node is not empty, none is met twice.
func (w *extentWalk) node(b []byte, depth int, low, high uint64) error {
	entries, most, level := int(le.Uint16(b[2:])), int(le.Uint16(b[4:])), int(le.Uint16(b[6:]))
	root := depth < 0
	if root {
		depth = level
	}
	if le.Uint16(b) != extentMagic || level != depth || depth > maxExtentDepth || entries > most || 12+12*entries > len(b) || entries == 0 && (!root || depth > 0) {
		return w.bad()
	}
	for i := range entries {
		e := b[12+12*i : 24+12*i]
		first := uint64(le.Uint32(e))
		if first < low || first >= high {
			return w.bad()
		}
		end := high
		if i+1 < entries {
			if end = uint64(le.Uint32(b[24+12*i:])); end <= first || end > high {
				return w.bad()
			}
		}
		var err error
		if low, err = w.entry(e, depth, first, end); err != nil {
			return err
		}
	}
	return nil
}

// entry returns the first logical block that may follow.
func (w *extentWalk) entry(e []byte, depth int, first, end uint64) (uint64, error) {
	if depth > 0 {
		at := uint64(le.Uint32(e[4:])) | uint64(le.Uint16(e[8:]))<<32
		b, err := w.v.block(at)
		if err != nil {
			return 0, err
		}
		if err := w.v.checkTail(w.n, at, b, 12+12*int(le.Uint16(b[4:]))); err != nil {
			return 0, err
		}
		w.nodes = append(w.nodes, at)
		return end, w.node(b, depth-1, first, end)
	}
	count := uint64(le.Uint16(e[4:]))
	if count > unwritten {
		count -= unwritten
	}
	at := uint64(le.Uint32(e[8:])) | uint64(le.Uint16(e[6:]))<<32
	if count == 0 || first+count > end || at >= w.v.blocks || count > w.v.blocks-at {
		return 0, w.bad()
	}
	w.extents = append(w.extents, extent{logical: first, count: count, physical: at})
	return first + count, nil
}

func (w *extentWalk) bad() error { return w.v.cannot("the extents of inode %d are damaged", w.n.ino) }
