package ext4

import (
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// Identity is what a superblock says of its file system.
type Identity struct {
	UUID  string
	Dirty bool // the journal holds what is nowhere else yet: it is to be replayed
}

// Identify reads the superblock of a file system that is not mounted, on its device.
// ErrDataLoss if there is none.
func Identify(r io.ReaderAt) (Identity, error) {
	b := make([]byte, superSize)
	n, err := r.ReadAt(b, superOffset)
	if n < len(b) && err != nil && !errors.Is(err, io.EOF) {
		return Identity{}, err
	}
	if n < len(b) || le.Uint16(b[superMagicAt:]) != superMagic {
		return Identity{}, fmt.Errorf("no ext4 on it: %w", errdefs.ErrDataLoss)
	}
	u := b[superUUIDAt : superUUIDAt+16]
	return Identity{
		UUID:  fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]),
		Dirty: le.Uint32(b[superIncompatAt:])&incompatRecover != 0,
	}, nil
}
