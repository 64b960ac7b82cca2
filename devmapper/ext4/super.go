package ext4

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
)

var le = binary.LittleEndian

// Features, by the names of fs/ext4/ext4.h.
const (
	compatHasJournal    = 0x4
	compatExtAttr       = 0x8
	compatResizeInode   = 0x10
	compatSparseSuper2  = 0x200
	compatOrphanFile    = 0x1000
	incompatFiletype    = 0x2
	incompatRecover     = 0x4
	incompatMetaBG      = 0x10
	incompatExtents     = 0x40
	incompat64bit       = 0x80
	incompatMMP         = 0x100
	incompatCsumSeed    = 0x2000
	roSparseSuper       = 0x1
	roLargeFile         = 0x2
	roGdtCsum           = 0x10
	roDirNlink          = 0x20
	roMetadataCsum      = 0x400
	roOrphanPresent     = 0x10000
	stateValid          = 0x1
	stateError          = 0x2
	groupInodeUninit    = 0x1
	groupBlockUninit    = 0x2
	rootInode           = 2
	maxGroups           = 1 << 22
	superOffset         = 1024
	superSize           = 1024
	superMagic          = 0xEF53
	superMagicAt        = 0x38
	superIncompatAt     = 0x60
	superUUIDAt         = 0x68
	smallestInodeRecord = 128
)

// What is understood here. Left out are, among others, inline_data, ea_inode,
// casefold, encrypt, bigalloc, shared_blocks, verity and external journals.
const (
	compatKnown   = 0x1 | compatHasJournal | compatExtAttr | compatResizeInode | 0x20 | compatSparseSuper2 | 0x400 | 0x800 | compatOrphanFile
	incompatKnown = incompatFiletype | incompatMetaBG | incompatExtents | incompat64bit | incompatMMP | 0x200 | incompatCsumSeed | 0x4000
	roKnown       = roSparseSuper | roLargeFile | 0x4 | 0x8 | roGdtCsum | roDirNlink | 0x40 | 0x100 | roMetadataCsum | 0x1000 | 0x2000 | roOrphanPresent
)

// geometry is what two file systems must have in common, but for growth.
type geometry struct {
	uuid             [16]byte
	blocks           uint64
	blockSize        int
	firstData        uint64
	blocksPerGroup   uint64
	inodesPerGroup   uint32
	inodes           uint32
	inodeSize        int
	firstInode       uint32
	descSize         int
	reservedGDT      uint64
	firstMetaBG      uint32
	flexGroups       uint32 // groups that keep their tables together
	backupGroups     [2]uint32
	mmp              uint64
	compat, incompat uint32
	ro               uint32
	systemInodes     [5]uint32 // journal, quotas, orphans
	seed             uint32    // of checksums
}

// grown is a geometry without what changes when the kernel, or resize2fs, makes a file
// system larger: what is there stays where it is, and groups come behind it.
func (g geometry) grown() geometry {
	g.blocks, g.inodes, g.reservedGDT, g.firstMetaBG = 0, 0, 0, 0
	g.compat &^= compatResizeInode // reserved blocks that are used up
	g.incompat &^= incompatMetaBG
	return g
}

// volume is one file system.
type volume struct {
	geometry
	r      io.ReaderAt
	name   string
	groups []group
	cache  [cacheSlots]cached
	reads  uint64 // blocks, against a loop in damaged metadata
}

const cacheSlots = 256

type cached struct {
	block uint64
	data  []byte
}

// group is what a group descriptor says.
type group struct {
	blockBitmap, inodeBitmap, inodeTable uint64
	dirs, unused                         uint32
	flags                                uint16
	blockCsum, inodeCsum                 uint32
}

// open reads superblock and group descriptors.
func open(r io.ReaderAt, name string) (*volume, error) {
	v := &volume{r: r, name: name}
	b := make([]byte, superSize)
	if err := v.readAt(b, superOffset, "superblock"); err != nil {
		return nil, err
	}
	if err := v.super(b); err != nil {
		return nil, err
	}
	if err := v.loadGroups(); err != nil {
		return nil, err
	}
	_, err := v.block(v.blocks - 1) // what is larger than its device cannot bound anything
	return v, err
}

func (v *volume) readAt(b []byte, off int64, what string) error {
	n, err := v.r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || err == io.EOF {
		return v.cannot("the %s is beyond the end of the device", what)
	}
	return fmt.Errorf("ext4: %s: read the %s: %w", v.name, what, err)
}

// cannot is the reason why there is no answer.
func (v *volume) cannot(format string, args ...any) error {
	return fmt.Errorf("ext4: %s: %s: %w", v.name, fmt.Sprintf(format, args...), ErrCannotTell)
}

func (v *volume) super(b []byte) error {
	if m := le.Uint16(b[superMagicAt:]); m != superMagic {
		return v.cannot("no ext4: magic number %#x", m)
	}
	if le.Uint32(b[0x4C:]) == 0 {
		return v.cannot("revision 0")
	}
	g := &v.geometry
	g.compat, g.incompat, g.ro = le.Uint32(b[0x5C:]), le.Uint32(b[superIncompatAt:]), le.Uint32(b[0x64:])
	if err := v.understood(le.Uint16(b[0x3A:])); err != nil {
		return err
	}
	copy(g.uuid[:], b[superUUIDAt:])
	g.blocks, g.firstData = uint64(le.Uint32(b[0x4:])), uint64(le.Uint32(b[0x14:]))
	g.descSize = 32
	if g.incompat&incompat64bit != 0 {
		g.blocks |= uint64(le.Uint32(b[0x150:])) << 32
		g.descSize = int(le.Uint16(b[0xFE:]))
	}
	logSize := le.Uint32(b[0x18:])
	if logSize > 6 {
		return v.cannot("blocks of 2^%d bytes", logSize+10)
	}
	g.blockSize = 1024 << logSize
	g.blocksPerGroup, g.inodesPerGroup = uint64(le.Uint32(b[0x20:])), le.Uint32(b[0x28:])
	g.inodes, g.firstInode, g.inodeSize = le.Uint32(b[0x0:]), le.Uint32(b[0x54:]), int(le.Uint16(b[0x58:]))
	g.firstMetaBG = le.Uint32(b[0x104:])
	if g.compat&compatResizeInode != 0 {
		g.reservedGDT = uint64(le.Uint16(b[0xCE:]))
	}
	g.flexGroups = 1 << min(b[0x174], 31)
	g.backupGroups = [2]uint32{le.Uint32(b[0x24C:]), le.Uint32(b[0x250:])}
	if g.incompat&incompatMMP != 0 {
		g.mmp = le.Uint64(b[0x168:])
	}
	g.systemInodes = [5]uint32{le.Uint32(b[0xE0:]), le.Uint32(b[0x240:]), le.Uint32(b[0x244:]), le.Uint32(b[0x26C:]), le.Uint32(b[0x280:])}
	return v.sane(b)
}

// understood refuses what could hide a change, and a file system that is not at
// rest.
func (v *volume) understood(state uint16) error {
	g := &v.geometry
	if g.incompat&incompatRecover != 0 {
		return v.cannot("the journal needs recovery")
	}
	if g.compat&compatHasJournal == 0 && state&stateValid == 0 {
		return v.cannot("it was not unmounted, and has no journal")
	}
	if state&stateError != 0 {
		return v.cannot("it is marked as having errors (e2fsck)")
	}
	for _, f := range []struct {
		what        string
		have, known uint32
	}{{"compatible", g.compat, compatKnown}, {"incompatible", g.incompat, incompatKnown}, {"read-only compatible", g.ro, roKnown}} {
		if x := f.have &^ f.known; x != 0 {
			return v.cannot("%s features %#x are not understood", f.what, x)
		}
	}
	if need := uint32(incompatFiletype | incompatExtents); g.incompat&need != need {
		return v.cannot("it lacks the features filetype or extent")
	}
	return nil
}

// sane bounds everything that is computed with later.
func (v *volume) sane(b []byte) error {
	g := &v.geometry
	bs := uint64(g.blockSize)
	wantFirst := uint64(0)
	if bs == 1024 {
		wantFirst = 1
	}
	switch {
	case g.firstData != wantFirst, g.blocks <= g.firstData, g.blocks > 1<<48:
		return v.cannot("%d blocks, the first is %d", g.blocks, g.firstData)
	case g.blocksPerGroup < 8, g.blocksPerGroup > 8*bs, g.blocksPerGroup%8 != 0:
		return v.cannot("%d blocks in a group", g.blocksPerGroup)
	case g.inodeSize < smallestInodeRecord, g.inodeSize > g.blockSize, bits.OnesCount(uint(g.inodeSize)) != 1:
		return v.cannot("inodes of %d bytes", g.inodeSize)
	case g.inodesPerGroup == 0, uint64(g.inodesPerGroup) > 8*bs, int(g.inodesPerGroup)%(g.blockSize/g.inodeSize) != 0:
		return v.cannot("%d inodes in a group", g.inodesPerGroup)
	case g.descSize < 32, g.descSize > 1024, bits.OnesCount(uint(g.descSize)) != 1, g.descSize < 64 && g.incompat&incompat64bit != 0:
		return v.cannot("group descriptors of %d bytes", g.descSize)
	case v.groupCount() > maxGroups, v.groupCount()*uint64(g.inodesPerGroup) != uint64(g.inodes):
		return v.cannot("%d inodes in %d groups of %d", g.inodes, v.groupCount(), g.inodesPerGroup)
	}
	// The kernel sets these when they are first needed.
	g.ro &^= roOrphanPresent | roLargeFile | roDirNlink
	g.compat &^= compatExtAttr
	return v.checkSuper(b)
}

func (g *geometry) groupCount() uint64 {
	return (g.blocks - g.firstData + g.blocksPerGroup - 1) / g.blocksPerGroup
}

func (g *geometry) groupStart(n uint64) uint64 { return g.firstData + n*g.blocksPerGroup }

// hasSuper reports whether a group has a copy of the superblock.
func (g *geometry) hasSuper(n uint64) bool {
	switch {
	case n == 0:
		return true
	case g.compat&compatSparseSuper2 != 0:
		return n == uint64(g.backupGroups[0]) || n == uint64(g.backupGroups[1])
	case n == 1 || g.ro&roSparseSuper == 0:
		return true
	}
	for _, p := range []uint64{3, 5, 7} {
		q := p
		for q < n {
			q *= p
		}
		if q == n {
			return true
		}
	}
	return false
}

// descBlocks is how many blocks the descriptors take.
func (g *geometry) descBlocks() uint64 {
	per := uint64(g.blockSize / g.descSize)
	return (g.groupCount() + per - 1) / per
}

// descBlock is where a block of descriptors is.
func (g *geometry) descBlock(n uint64) uint64 {
	if g.incompat&incompatMetaBG == 0 || n < uint64(g.firstMetaBG) {
		return g.firstData + 1 + n
	}
	first := n * uint64(g.blockSize/g.descSize)
	at := g.groupStart(first)
	if g.hasSuper(first) {
		at++
	}
	return at
}

func (v *volume) loadGroups() error {
	per := v.blockSize / v.descSize
	for n := uint64(0); n < v.descBlocks(); n++ {
		b, err := v.block(v.descBlock(n))
		if err != nil {
			return err
		}
		for i := 0; i < per && uint64(len(v.groups)) < v.groupCount(); i++ {
			d := b[i*v.descSize : (i+1)*v.descSize]
			if err := v.checkDesc(uint32(len(v.groups)), d); err != nil {
				return err
			}
			if err := v.addGroup(d); err != nil {
				return err
			}
		}
	}
	return nil
}

func (v *volume) addGroup(d []byte) error {
	g := group{
		blockBitmap: uint64(le.Uint32(d)), inodeBitmap: uint64(le.Uint32(d[4:])), inodeTable: uint64(le.Uint32(d[8:])),
		dirs: uint32(le.Uint16(d[0x10:])), unused: uint32(le.Uint16(d[0x1C:])), flags: le.Uint16(d[0x12:]),
		blockCsum: uint32(le.Uint16(d[0x18:])), inodeCsum: uint32(le.Uint16(d[0x1A:])),
	}
	if v.descSize >= 64 {
		g.blockBitmap |= uint64(le.Uint32(d[0x20:])) << 32
		g.inodeBitmap |= uint64(le.Uint32(d[0x24:])) << 32
		g.inodeTable |= uint64(le.Uint32(d[0x28:])) << 32
		g.dirs |= uint32(le.Uint16(d[0x30:])) << 16
		g.unused |= uint32(le.Uint16(d[0x32:])) << 16
		g.blockCsum |= uint32(le.Uint16(d[0x38:])) << 16
		g.inodeCsum |= uint32(le.Uint16(d[0x3A:])) << 16
	}
	if v.ro&(roGdtCsum|roMetadataCsum) == 0 {
		g.flags, g.unused = 0, 0
	}
	if g.blockBitmap >= v.blocks || g.inodeBitmap >= v.blocks || g.inodeTable >= v.blocks || v.tableBlocks() > v.blocks-g.inodeTable || g.unused > v.inodesPerGroup {
		return v.cannot("group %d has its tables beyond the end", len(v.groups))
	}
	v.groups = append(v.groups, g)
	return nil
}

// tableBlocks is the length of a group's inode table.
func (g *geometry) tableBlocks() uint64 {
	return uint64(g.inodesPerGroup) * uint64(g.inodeSize) / uint64(g.blockSize)
}

// fixed are the blocks that belong to no inode: superblocks, descriptors with the
// room that is reserved for more, bitmaps, inode tables.
func (v *volume) fixed() spans {
	var s spans
	s.add(0, v.firstData+1)
	gdt := v.descBlocks()
	meta := v.incompat&incompatMetaBG != 0
	if meta {
		gdt = min(gdt, uint64(v.firstMetaBG))
	}
	per := uint64(v.blockSize / v.descSize)
	for n := uint64(0); n < v.groupCount(); n++ {
		at, g := v.groupStart(n), &v.groups[n]
		super := v.hasSuper(n)
		if super {
			s.add(at, 1+gdt+v.reservedGDT)
		}
		if in := n % per; meta && n/per >= uint64(v.firstMetaBG) && (in <= 1 || in == per-1) {
			if super {
				at++
			}
			s.add(at, 1)
		}
		s.add(g.blockBitmap, 1)
		s.add(g.inodeBitmap, 1)
		s.add(g.inodeTable, v.tableBlocks())
	}
	if v.mmp != 0 {
		s.add(v.mmp, 1)
	}
	return s.normal()
}

// block reads a block, which must not be changed.
func (v *volume) block(n uint64) ([]byte, error) {
	if n >= v.blocks {
		return nil, v.cannot("block %d of %d", n, v.blocks)
	}
	c := &v.cache[n%cacheSlots]
	if c.data != nil && c.block == n {
		return c.data, nil
	}
	b, err := v.run(n, 1)
	if err == nil {
		*c = cached{n, b}
	}
	return b, err
}

// runIfAny is run, with zeros for what is beyond the end.
func (v *volume) runIfAny(n, count uint64) ([]byte, error) {
	if n+count <= v.blocks {
		return v.run(n, count)
	}
	b := make([]byte, count*uint64(v.blockSize))
	if n >= v.blocks {
		return b, nil
	}
	have, err := v.run(n, v.blocks-n)
	copy(b, have)
	return b, err
}

// run reads several blocks. Metadata of which each block is in one place is read a
// few times at most: more is a loop.
func (v *volume) run(n, count uint64) ([]byte, error) {
	if v.reads += count; v.reads > 16*v.blocks+1<<12 {
		return nil, v.cannot("its metadata goes in circles (e2fsck)")
	}
	b := make([]byte, count*uint64(v.blockSize))
	err := v.readAt(b, int64(n)*int64(v.blockSize), fmt.Sprintf("block %d", n))
	return b, err
}
