package thin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// The start of a pool's metadata (drivers/md/dm-thin-metadata.c: struct
// thin_disk_superblock), little-endian.
const (
	superblockBytes = 4096
	superblockMagic = 27022010

	atFlags       = 4
	atMagic       = 32
	atVersion     = 40
	atTransaction = 48
	atDataBlock   = 336 // sectors

	flagNeedsCheck = 1
)

// superblock is what the metadata says of the pool before it is active.
type superblock struct {
	zero        bool // there has never been a pool
	version     uint32
	transaction uint64
	block       int64 // bytes
	needsCheck  bool
}

// parseSuperblock reads the first block of metadata. The kernel checks the sum.
func parseSuperblock(b []byte) (superblock, error) {
	if len(b) < superblockBytes {
		return superblock{}, fmt.Errorf("the metadata has %d bytes: %w", len(b), errdefs.ErrDataLoss)
	}
	if allZero(b[:superblockBytes]) {
		return superblock{zero: true}, nil
	}
	le := binary.LittleEndian
	if le.Uint64(b[atMagic:]) != superblockMagic {
		return superblock{}, fmt.Errorf("the metadata is not that of a thin pool: %w", errdefs.ErrDataLoss)
	}
	return superblock{
		version: le.Uint32(b[atVersion:]), transaction: le.Uint64(b[atTransaction:]),
		block: int64(le.Uint32(b[atDataBlock:])) * 512, needsCheck: le.Uint32(b[atFlags:])&flagNeedsCheck != 0,
	}, nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// readSuperblock reads that of the metadata at path.
func readSuperblock(path string) (superblock, error) {
	b, err := readStart(path, superblockBytes)
	if err != nil {
		return superblock{}, err
	}
	s, err := parseSuperblock(b)
	if err != nil {
		return s, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// readStart reads the first n bytes of a file or device, or as many as it has.
func readStart(path string, n int) ([]byte, error) {
	f, err := sys.Open(path, sys.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat("")
	if err == nil && st.Type() == sys.S_IFBLK { // the kernel's pool writes past the cache
		err = f.DropBuffers()
	}
	if err != nil {
		return nil, err
	}
	b := make([]byte, n)
	n, err = io.ReadFull(io.NewSectionReader(f, 0, int64(n)), b)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		err = nil
	}
	return b[:n], err
}

// usedBytes is how far file systems, volume managers and partition tables write
// what they are known by.
const usedBytes = 128 << 10

// refuseUsed refuses a device of a new pool that holds something.
func refuseUsed(path string, metadata bool) error {
	if metadata {
		s, err := readSuperblock(path)
		if err == nil && (s.zero || s.transaction == 0) { // maybe of an Open that died
			return nil
		}
		if err == nil {
			err = fmt.Errorf("%s is the metadata of a thin pool (transaction %d)", path, s.transaction)
		}
		return fmt.Errorf("%w: %w: if nobody needs it `dd if=/dev/zero of=%s bs=4096 count=1`", errdefs.ErrFailedPrecondition, noSentinel{err}, path)
	}
	b, err := readStart(path, usedBytes)
	if err != nil {
		return err
	}
	if !allZero(b) {
		return fmt.Errorf("%s holds something: %w: if nobody needs it `wipefs -a %s`, or `dd if=/dev/zero of=%s bs=128K count=1`",
			path, errdefs.ErrFailedPrecondition, path, path)
	}
	return nil
}

// noSentinel keeps an error's words alone.
type noSentinel struct{ err error }

func (n noSentinel) Error() string { return n.err.Error() }

// checkSuperblock compares the metadata with the record before the kernel does,
// which says why only in its log.
func (r *record) checkSuperblock(path string) error {
	s, err := readSuperblock(path)
	if err != nil {
		return err
	}
	switch {
	case s.zero && !r.New:
		return fmt.Errorf("%s is empty: the pool's metadata is gone: %w", path, errdefs.ErrDataLoss)
	case s.zero:
		return nil
	case s.version > 2:
		return fmt.Errorf("%s has version %d of the metadata's format, this program knows 2: %w", path, s.version, errdefs.ErrNotImplemented)
	case s.block != r.Block:
		return fmt.Errorf("%s is of a pool with blocks of %d bytes, not %d as %s says: is it another's? %w", path, s.block, r.Block, recordFile, errdefs.ErrFailedPrecondition)
	}
	return nil
}

var errNoSpace = fmt.Errorf("%w: %w", errdefs.ErrResourceExhausted, syscall.ENOSPC)
