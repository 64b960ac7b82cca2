package metadata

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/containerd/errdefs"
)

// BlockSize is the size of a block of metadata, and of every read.
const BlockSize = 4096

// What checksums are xored with, by the kind of the block
// (drivers/md/dm-thin-metadata.c, drivers/md/persistent-data/dm-btree-spine.c).
const (
	superblockXor = 160774
	nodeXor       = 121107
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// checksum is what a block of a kind has in its first four bytes. The kernel's
// CRC leaves out the last inversion.
func checksum(block []byte, xor uint32) uint32 {
	return ^crc32.Checksum(block[4:], castagnoli) ^ xor
}

// store reads blocks.
type store struct {
	r     io.ReaderAt
	count uint64 // blocks are 0 to count-1
}

// read returns a block whose checksum and number are right.
func (s *store) read(n uint64, xor uint32) ([]byte, error) {
	if n >= s.count {
		return nil, corrupt(n, "is beyond the end of the metadata, %d blocks", s.count)
	}
	b := make([]byte, BlockSize)
	if got, err := s.r.ReadAt(b, int64(n)*BlockSize); got < len(b) {
		if errors.Is(err, io.EOF) {
			return nil, corrupt(n, "is beyond the end of the device")
		}
		return nil, fmt.Errorf("thin metadata: read block %d: %w", n, err)
	}
	if want, got := checksum(b, xor), le.Uint32(b); got != want {
		return nil, corrupt(n, "has checksum %#x, should be %#x", got, want)
	}
	if at := le.Uint64(b[8:]); at != n {
		return nil, corrupt(n, "says that it is block %d", at)
	}
	return b, nil
}

// corrupt is the error of a block that is not what it must be.
func corrupt(block uint64, format string, args ...any) error {
	return fmt.Errorf("thin metadata: block %d %s (thin_check tells more): %w", block, fmt.Sprintf(format, args...), errdefs.ErrDataLoss)
}
