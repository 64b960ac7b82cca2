package metadata

import (
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// The names and values of drivers/md/dm-thin-metadata.c.
const (
	magic      = 27022010
	maxVersion = 2
	needsCheck = 1 << 0
	// maxBlocks is the most that a space map of metadata counts: 255 bitmaps of
	// at most 1<<14 entries each.
	maxBlocks = 255 << 14
)

// Superblock is what a pool, or a metadata snapshot of it, says of itself.
type Superblock struct {
	Block       uint64 // where it is: 0, or the root of a metadata snapshot
	UUID        [16]byte
	Version     uint32
	Time        uint32 // counts snapshots; part of each mapping
	Transaction uint64
	HeldRoot    uint64 // where the metadata snapshot is; 0: there is none
	NeedsCheck  bool   // the kernel met an error and takes no changes until thin_check has passed
	// DataSpace and MetadataSpace are zero in a metadata snapshot.
	DataSpace, MetadataSpace SpaceMap
	MappingRoot, DetailsRoot uint64
	DataBlockSize            uint32 // in sectors of 512 bytes
}

// SpaceMap counts the blocks of one of the pool's two devices.
type SpaceMap struct {
	Blocks    uint64 // there are
	Allocated uint64 // are in use
	Bitmaps   uint64 // the root of the bitmaps' index
	Counts    uint64 // the root of the tree of reference counts of 3 and more
}

// Pool is the metadata of a pool as of one superblock.
type Pool struct {
	sb         Superblock
	blocks     store
	dataBlocks uint64
}

// Open reads the superblock of a pool from its metadata device. See the package
// comment for what may be read then.
func Open(r io.ReaderAt) (*Pool, error) {
	b := make([]byte, BlockSize)
	if n, err := r.ReadAt(b, 0); n < len(b) {
		if errors.Is(err, io.EOF) {
			err = errdefs.ErrInvalidArgument
		}
		return nil, fmt.Errorf("thin metadata: read the superblock: %d bytes of %d: %w", n, len(b), err)
	}
	if m := le.Uint64(b[32:]); m != magic {
		return nil, fmt.Errorf("thin metadata: no superblock: magic number %d instead of %d: %w", m, magic, errdefs.ErrInvalidArgument)
	}
	p := &Pool{blocks: store{r: r, count: 1}}
	if err := p.load(0); err != nil {
		return nil, err
	}
	p.blocks.count = p.sb.MetadataSpace.Blocks
	if c := p.blocks.count; c == 0 || c > maxBlocks {
		return nil, corrupt(0, "counts %d blocks of metadata, not 1 to %d", c, maxBlocks)
	}
	p.dataBlocks = p.sb.DataSpace.Blocks
	return p, nil
}

// Superblock returns what was read.
func (p *Pool) Superblock() Superblock { return p.sb }

// Snapshot opens the metadata snapshot that the superblock names. What it shows
// stays as it is until the snapshot is released.
func (p *Pool) Snapshot() (*Pool, error) {
	if p.sb.HeldRoot == 0 {
		return nil, fmt.Errorf("thin metadata: the pool has no metadata snapshot: %w", errdefs.ErrNotFound)
	}
	s := &Pool{blocks: p.blocks, dataBlocks: p.dataBlocks}
	if err := s.load(p.sb.HeldRoot); err != nil {
		return nil, fmt.Errorf("metadata snapshot: %w", err)
	}
	return s, nil
}

func (p *Pool) load(block uint64) error {
	b, err := p.blocks.read(block, superblockXor)
	if err != nil {
		return err
	}
	if m := le.Uint64(b[32:]); m != magic {
		return corrupt(block, "is no superblock: magic number %d", m)
	}
	s := &p.sb
	s.Block = block
	copy(s.UUID[:], b[16:])
	s.NeedsCheck = le.Uint32(b[4:])&needsCheck != 0
	s.Version, s.Time = le.Uint32(b[40:]), le.Uint32(b[44:])
	s.Transaction, s.HeldRoot = le.Uint64(b[48:]), le.Uint64(b[56:])
	s.DataSpace, s.MetadataSpace = spaceMap(b[64:]), spaceMap(b[192:])
	s.MappingRoot, s.DetailsRoot = le.Uint64(b[320:]), le.Uint64(b[328:])
	s.DataBlockSize = le.Uint32(b[336:])
	return s.understood(b)
}

func (s *Superblock) understood(b []byte) error {
	if s.Version < 1 || s.Version > maxVersion {
		return fmt.Errorf("thin metadata: version %d, known are 1 to %d: %w", s.Version, maxVersion, errdefs.ErrNotImplemented)
	}
	if f := le.Uint32(b[360:]); f != 0 {
		return fmt.Errorf("thin metadata: unknown incompatible features %#x: %w", f, errdefs.ErrNotImplemented)
	}
	if size := le.Uint32(b[340:]); size != BlockSize/512 {
		return corrupt(s.Block, "says that blocks have %d sectors, not %d", size, BlockSize/512)
	}
	if s.DataBlockSize == 0 {
		return corrupt(s.Block, "says that data blocks have no size")
	}
	return nil
}

func spaceMap(b []byte) SpaceMap {
	return SpaceMap{Blocks: le.Uint64(b), Allocated: le.Uint64(b[8:]), Bitmaps: le.Uint64(b[16:]), Counts: le.Uint64(b[24:])}
}
