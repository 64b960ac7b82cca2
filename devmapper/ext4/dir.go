package ext4

import "bytes"

// entry is a name in a directory.
type entry struct {
	ino  uint32
	kind byte
	name []byte // only as long as the call that it is given to
}

// special reports whether it is . or ..
func (e *entry) special() bool {
	return len(e.name) <= 2 && e.name[0] == '.' && (len(e.name) == 1 || e.name[1] == '.')
}

// Kinds of entries: a directory, and what is no entry but a checksum.
const (
	kindDir  = 2
	tailKind = 0xDE
)

// blockOf returns the block that holds a logical block, 0 for none.
func blockOf(extents []extent, i *int, logical uint64) uint64 {
	for *i < len(extents) && extents[*i].logical+extents[*i].count <= logical {
		*i++
	}
	if *i == len(extents) || extents[*i].logical > logical {
		return 0
	}
	return extents[*i].physical + logical - extents[*i].logical
}

// dirExtents maps a directory, whose size says how many blocks it has.
func (v *volume) dirExtents(n *inode) (extents []extent, blocks uint64, err error) {
	bs := uint64(v.blockSize)
	if n.size%bs != 0 || n.size/bs > v.blocks {
		return nil, 0, v.cannot("directory %d has %d bytes", n.ino, n.size)
	}
	extents, _, err = v.mapped(n)
	return extents, n.size / bs, err
}

// eachEntry calls do for the names in a directory, . and .. included, until it
// returns false.
func (v *volume) eachEntry(n *inode, do func(entry) bool) error {
	extents, blocks, err := v.dirExtents(n)
	if err != nil {
		return err
	}
	for i, l := 0, uint64(0); l < blocks; l++ {
		at := blockOf(extents, &i, l)
		if at == 0 {
			return v.cannot("directory %d has a hole at block %d", n.ino, l)
		}
		more, err := v.entries(n, l, at, do)
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// entries takes one block of a directory apart. The blocks of an index look like
// empty entries of their whole length, the checksum at the end like one of twelve
// bytes.
func (v *volume) entries(n *inode, logical, at uint64, do func(entry) bool) (more bool, err error) {
	b, err := v.block(at)
	if err != nil {
		return false, err
	}
	if err := v.checkDir(n, logical, at, b); err != nil {
		return false, err
	}
	for off := 0; off < len(b); {
		if len(b)-off < 8 {
			return false, v.cannot("directory %d: block %d is damaged", n.ino, at)
		}
		ino, length, nameLen := le.Uint32(b[off:]), recordLength(b[off:], len(b)), int(b[off+6])
		if length < 8 || length%4 != 0 || length > len(b)-off || ino != 0 && (nameLen == 0 || nameLen+8 > length) || ino > v.inodes {
			return false, v.cannot("directory %d: block %d is damaged", n.ino, at)
		}
		if ino != 0 {
			e := entry{ino: ino, kind: b[off+7], name: b[off+8 : off+8+nameLen]}
			if bytes.IndexByte(e.name, '/') >= 0 || bytes.IndexByte(e.name, 0) >= 0 {
				return false, v.cannot("directory %d has the name %q", n.ino, e.name)
			}
			if !do(e) {
				return false, nil
			}
		}
		off += length
	}
	return true, nil
}

// recordLength of an entry: in blocks of 64 KiB what does not fit is written otherwise.
func recordLength(b []byte, blockSize int) int {
	n := int(le.Uint16(b[4:]))
	if blockSize == 1<<16 && (n == 0 || n == 1<<16-1) {
		return blockSize
	}
	return n
}

// checkDir checks the checksum that is at the end of a block with names. An index
// has another, and is not needed.
func (v *volume) checkDir(n *inode, logical, at uint64, b []byte) error {
	index := n.flags&flagIndex != 0 && (logical == 0 || le.Uint32(b) == 0 && recordLength(b, len(b)) == len(b))
	if !v.hasCsum() || index {
		return nil
	}
	t := b[len(b)-12:]
	if le.Uint32(t) != 0 || le.Uint16(t[4:]) != 12 || t[6] != 0 || t[7] != tailKind || le.Uint32(t[8:]) != crc(n.seed, b[:len(b)-12]) {
		return v.cannot("directory %d: block %d has a wrong checksum", n.ino, at)
	}
	return nil
}
