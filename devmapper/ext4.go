package devmapper

import (
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// The superblock of ext4 (fs/ext4/ext4.h: struct ext4_super_block), little-endian.
const (
	ext4At          = 1024
	ext4Bytes       = 1024
	ext4Magic       = 0xef53
	atMagic         = 0x38
	atIncompat      = 0x60
	atUUID          = 0x68
	incompatRecover = 0x4 // needs_recovery: the journal holds what is nowhere else yet
)

// ext4Super is what a superblock says.
type ext4Super struct {
	dirty bool // the journal is to be replayed
	uuid  string
}

func parseExt4(b []byte) (ext4Super, error) {
	le := binary.LittleEndian
	if len(b) < ext4Bytes || le.Uint16(b[atMagic:]) != ext4Magic {
		return ext4Super{}, fmt.Errorf("no ext4 on it: %w", errdefs.ErrDataLoss)
	}
	u := b[atUUID : atUUID+16]
	return ext4Super{
		dirty: le.Uint32(b[atIncompat:])&incompatRecover != 0,
		uuid:  fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]),
	}, nil
}

// readExt4 reads it from an open device that is not mounted.
func readExt4(f *sys.Fd) (ext4Super, error) {
	b := make([]byte, ext4Bytes)
	if _, err := f.ReadAt(b, ext4At); err != nil {
		return ext4Super{}, err
	}
	return parseExt4(b)
}
