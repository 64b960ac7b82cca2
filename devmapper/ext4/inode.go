package ext4

// Types of inodes, and flags.
const (
	typeMask    = 0xF000
	typeDir     = 0x4000
	typeRegular = 0x8000
	typeSymlink = 0xA000

	flagExtents = 0x80000
	flagIndex   = 0x1000
	// flagsUnknown: encrypted, an EA inode, inline data, casefold, verity.
	flagsUnknown = 0x800 | 0x200000 | 0x10000000 | 0x40000000 | 0x100000
)

// inode is what matters of an inode's record.
type inode struct {
	ino   uint32
	used  bool // the bitmap has it
	mode  uint16
	links uint16
	flags uint32
	size  uint64
	acl   uint64 // the block of its xattrs, or 0
	tree  [60]byte
	seed  uint32
}

func (n *inode) isDir() bool { return n.used && n.mode&typeMask == typeDir }

// place is where the record of an inode is.
func (g *geometry) place(ino uint32) (groupNo uint64, index uint32) {
	return uint64(ino-1) / uint64(g.inodesPerGroup), (ino - 1) % g.inodesPerGroup
}

// inode reads an inode that is in use.
func (v *volume) inode(ino uint32) (*inode, error) {
	if ino == 0 || ino > v.inodes {
		return nil, v.cannot("inode %d of %d", ino, v.inodes)
	}
	b, err := v.inodeRecord(ino)
	if err != nil {
		return nil, err
	}
	return v.parse(ino, b)
}

// inodeRecord reads the record of an inode that there is.
func (v *volume) inodeRecord(ino uint32) ([]byte, error) {
	g, i := v.place(ino)
	off := uint64(i) * uint64(v.inodeSize)
	b, err := v.block(v.groups[g].inodeTable + off/uint64(v.blockSize))
	if err != nil {
		return nil, err
	}
	at := int(off % uint64(v.blockSize))
	return b[at : at+v.inodeSize], nil
}

// mostInUse is the place behind the last inode of a group that may be in use.
func (v *volume) mostInUse(n uint64) uint32 {
	g := &v.groups[n]
	if g.flags&groupInodeUninit != 0 {
		return 0
	}
	return v.inodesPerGroup - g.unused
}

// parse takes a record apart; one that is not in use is zero.
func (v *volume) parse(ino uint32, b []byte) (*inode, error) {
	n := &inode{ino: ino}
	used, err := v.used(ino)
	if err != nil || !used || le.Uint16(b) == 0 { // the reserved ones that nobody needs are zero
		return n, err
	}
	if err := v.checkInode(ino, b); err != nil {
		return nil, err
	}
	n.used, n.mode, n.links, n.flags = true, le.Uint16(b), le.Uint16(b[0x1A:]), le.Uint32(b[0x20:])
	n.size = uint64(le.Uint32(b[0x4:])) | uint64(le.Uint32(b[0x6C:]))<<32
	n.acl = uint64(le.Uint32(b[0x68:])) | uint64(le.Uint16(b[0x76:]))<<32
	copy(n.tree[:], b[0x28:])
	n.seed = v.inodeSeed(ino, b)
	if x := n.flags & flagsUnknown; x != 0 {
		return nil, v.cannot("inode %d has flags %#x, which are not understood", ino, x)
	}
	return n, nil
}

// inodeIfAny is inode, and one that is not in use where the file system is too small to have it.
func (v *volume) inodeIfAny(ino uint32) (*inode, error) {
	if ino > v.inodes {
		return &inode{ino: ino}, nil
	}
	return v.inode(ino)
}

// used reports whether the inode bitmap has an inode.
func (v *volume) used(ino uint32) (bool, error) {
	if ino > v.inodes {
		return false, nil
	}
	n, i := v.place(ino)
	g := &v.groups[n]
	if g.flags&groupInodeUninit != 0 || i >= v.inodesPerGroup-g.unused {
		return false, nil
	}
	b, err := v.bitmap("inode bitmap", n, g.inodeBitmap, uint64(v.inodesPerGroup), g.inodeCsum)
	return err == nil && b[i/8]&(1<<(i%8)) != 0, err
}

// allocated reports whether the block bitmap has a block.
func (v *volume) allocated(block uint64) (bool, error) {
	if block >= v.blocks {
		return false, nil
	}
	n := (block - v.firstData) / v.blocksPerGroup
	i := (block - v.firstData) % v.blocksPerGroup
	g := &v.groups[n]
	if g.flags&groupBlockUninit != 0 {
		return false, nil // nothing but the fixed blocks
	}
	b, err := v.bitmap("block bitmap", n, g.blockBitmap, v.blocksPerGroup, g.blockCsum)
	return err == nil && b[i/8]&(1<<(i%8)) != 0, err
}

// bitmap reads a bitmap, whose checksum is looked at when it is not in the cache.
func (v *volume) bitmap(what string, n, at, bits uint64, csum uint32) ([]byte, error) {
	if c := &v.cache[at%cacheSlots]; c.data != nil && c.block == at {
		return c.data, nil
	}
	b, err := v.block(at)
	if err != nil {
		return nil, err
	}
	return b, v.checkBitmap(what, n, b, bits, csum)
}
