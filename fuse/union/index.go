package union

import (
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// openIndexed opens (O_PATH) the index entry of a lower object: -1 and nil where there
// is none. whiteout: all its names in upper were removed.
func (u *upper) openIndexed(id *fileID) (fd int, whiteout bool, err error) {
	return -1, false, syscall.ENOSYS
}

// linkIndexed makes name below dir another name of the index entry of id and sets its
// link count xattr to what shows shown links.
func (u *upper) linkIndexed(id *fileID, dir int, name string) error { return syscall.ENOSYS }

// setNlink sets xattr nlink of the file fd, relative to its own link count ('U') or
// the lower's ('L'); see formatNlink. The kernel does so before a change of links.
func (u *upper) setNlink(fd int, relTo byte, shown, real uint32) error { return syscall.ENOSYS }

// dropIndexed is called when the last name in upper of an indexed file is gone
// though the lower still has names (whiteout), or not (the entry is removed).
func (u *upper) dropIndexed(id *fileID, whiteout bool) error { return syscall.ENOSYS }

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
