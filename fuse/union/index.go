package union

import (
	"context"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// copyUpIndexed copies up what goes by way of index.
func (u *upper) copyUpIndexed(ctx context.Context, r *copyRequest) error { return syscall.ENOSYS }

// openIndexed opens (O_PATH) the index entry of a lower object: -1 and nil where there
// is none. whiteout: all its names in upper were removed.
func (u *upper) openIndexed(id *fileID) (fd int, whiteout bool, err error) {
	return -1, false, syscall.ENOSYS
}

// dropIndexed is called when the last name of an indexed file is gone.
func (u *upper) dropIndexed(id *fileID) error { return syscall.ENOSYS }

// cleanIndex removes index entries that lead nowhere; lowers are descriptors of
// the lower roots with the uuid of their file systems. Called once, at Open.
func (u *upper) cleanIndex(lowers []layerRoot) error { return syscall.ENOSYS }

// layerRoot is the root of a layer.
type layerRoot struct {
	fd   int
	uuid [16]byte
}

// verifyOrigins stores which lower root and upper root belong together (xattr
// origin of upper's root, xattr upper of index), or checks what is stored: ESTALE
// where it is another one.
func (u *upper) verifyOrigins(lower layerRoot) error { return syscall.ENOSYS }

// resolve opens (O_PATH) a file by its id in one of the layers: -1 where none has it.
func resolve(id *fileID, layers []layerRoot) (fd int, layer int, err error) {
	return -1, 0, syscall.ENOSYS
}

var _ = sys.O_PATH
