package ext4

import "hash/crc32"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc is the CRC-32C as the kernel chains it, without inversions.
func crc(seed uint32, b []byte) uint32 { return ^crc32.Update(^seed, castagnoli, b) }

func le32(n uint32) []byte { return le.AppendUint32(nil, n) }

func (v *volume) hasCsum() bool { return v.ro&roMetadataCsum != 0 }

// checkSuper takes the seed of all other checksums, and checks its own.
func (v *volume) checkSuper(b []byte) error {
	if !v.hasCsum() {
		return nil
	}
	if v.seed = crc(^uint32(0), v.uuid[:]); v.incompat&incompatCsumSeed != 0 {
		v.seed = le.Uint32(b[0x270:])
	}
	if b[0x175] != 1 || le.Uint32(b[0x3FC:]) != crc(^uint32(0), b[:0x3FC]) {
		return v.cannot("the superblock's checksum is wrong")
	}
	return nil
}

// checkDesc leaves CRC-16s (uninit_bg) alone.
func (v *volume) checkDesc(n uint32, d []byte) error {
	if !v.hasCsum() {
		return nil
	}
	c := crc(crc(v.seed, le32(n)), d[:0x1E])
	c = crc(c, []byte{0, 0})
	if c = crc(c, d[0x20:]); uint16(c) != le.Uint16(d[0x1E:]) {
		return v.cannot("the descriptor of group %d has a wrong checksum", n)
	}
	return nil
}

// checkBitmap checks bits of a bitmap; want has 16 bits in small descriptors.
func (v *volume) checkBitmap(what string, n uint64, b []byte, bits uint64, want uint32) error {
	if !v.hasCsum() {
		return nil
	}
	c := crc(v.seed, b[:bits/8])
	if v.descSize < 64 {
		c &= 0xFFFF
	}
	if c != want {
		return v.cannot("the %s of group %d has a wrong checksum", what, n)
	}
	return nil
}

// inodeSeed is that of what belongs to an inode.
func (v *volume) inodeSeed(ino uint32, record []byte) uint32 {
	return crc(crc(v.seed, le32(ino)), record[0x64:0x68])
}

func (v *volume) checkInode(ino uint32, record []byte) error {
	if !v.hasCsum() {
		return nil
	}
	want, mask := uint32(le.Uint16(record[0x7C:])), uint32(0xFFFF)
	c := crc(v.inodeSeed(ino, record), record[:0x7C])
	c = crc(crc(c, []byte{0, 0}), record[0x7E:smallestInodeRecord])
	if len(record) > smallestInodeRecord {
		c = crc(c, record[smallestInodeRecord:0x82])
		rest := record[0x82:]
		if le.Uint16(record[0x80:]) >= 4 { // it has room for the other half
			want, mask = want|uint32(le.Uint16(rest))<<16, ^uint32(0)
			c = crc(c, []byte{0, 0})
			rest = rest[2:]
		}
		c = crc(c, rest)
	}
	if c&mask != want {
		return v.cannot("inode %d has a wrong checksum", ino)
	}
	return nil
}

// checkTail checks a node of extents, whose checksum is behind the room for them.
func (v *volume) checkTail(n *inode, block uint64, b []byte, end int) error {
	if v.hasCsum() && (end+4 > len(b) || crc(n.seed, b[:end]) != le.Uint32(b[end:])) {
		return v.cannot("block %d of the extents of inode %d has a wrong checksum", block, n.ino)
	}
	return nil
}
