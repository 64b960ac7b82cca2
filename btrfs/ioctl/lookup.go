package ioctl

import (
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Requests of include/uapi/linux/btrfs.h.
const (
	BTRFS_IOC_INO_LOOKUP         = 0xd0009412 // _IOWR 18, struct btrfs_ioctl_ino_lookup_args
	BTRFS_IOC_GET_SUBVOL_ROOTREF = 0xd000943d // _IOWR 61, struct btrfs_ioctl_get_subvol_rootref_args, Linux 4.18
	BTRFS_IOC_INO_LOOKUP_USER    = 0xd000943e // _IOWR 62, struct btrfs_ioctl_ino_lookup_user_args, Linux 4.18
	BTRFS_MAX_ROOTREF_BUFFER_NUM = 255
)

// Child is a subvolume and the inode of the directory that it stands in.
type Child struct{ ID, Dir uint64 }

// Children lists the subvolumes that stand right in the subvolume whose root fd
// is. Linux 4.18.
func Children(subvol *sys.Fd) ([]Child, error) {
	var all []Child
	for min := uint64(0); ; {
		b := make([]byte, 4096) // u64 min_treeid, {u64 treeid, u64 dirid}[255], u8 num_items
		le.PutUint64(b, min)
		err := subvol.Ioctl("BTRFS_IOC_GET_SUBVOL_ROOTREF", BTRFS_IOC_GET_SUBVOL_ROOTREF, b)
		more := err != nil && isErrno(err, syscall.EOVERFLOW)
		if err != nil && !more {
			return nil, err
		}
		for i := range int(b[8+16*BTRFS_MAX_ROOTREF_BUFFER_NUM]) {
			e := b[8+16*i:]
			all = append(all, Child{ID: le.Uint64(e), Dir: le.Uint64(e[8:])})
		}
		if !more {
			return all, nil
		}
		min = le.Uint64(b) // where to go on
	}
}

// UserPath returns the directory of a child, as a path below dir ("" for dir
// itself), and the child's name; dir and all directories on the way must be
// readable. Linux 4.18.
func UserPath(dir *sys.Fd, c Child) (path, name string, err error) {
	b := make([]byte, 4096) // u64 dirid, u64 treeid, char name[256], char path[3824]
	le.PutUint64(b, c.Dir)
	le.PutUint64(b[8:], c.ID)
	err = dir.Ioctl("BTRFS_IOC_INO_LOOKUP_USER", BTRFS_IOC_INO_LOOKUP_USER, b)
	return strings.TrimSuffix(cString(b[272:]), "/"), cString(b[16:272]), err
}

// Path returns a path of an inode below the root of a subvolume, "" for the root
// itself; of a file of several names it is one of them. tree 0 is the subvolume
// that fd is in. ENAMETOOLONG beyond 4,079 bytes.
func Path(fd *sys.Fd, tree, ino uint64) (string, error) {
	b := make([]byte, 4096) // u64 treeid, u64 objectid, char name[4080]
	le.PutUint64(b, tree)
	le.PutUint64(b[8:], ino)
	err := fd.Ioctl("BTRFS_IOC_INO_LOOKUP", BTRFS_IOC_INO_LOOKUP, b)
	return strings.TrimSuffix(cString(b[16:]), "/"), err
}

// SubvolID returns the id of the subvolume that fd is in.
func SubvolID(fd *sys.Fd) (uint64, error) {
	b := make([]byte, 4096)
	le.PutUint64(b[8:], BTRFS_FIRST_FREE_OBJECTID)
	err := fd.Ioctl("BTRFS_IOC_INO_LOOKUP", BTRFS_IOC_INO_LOOKUP, b)
	return le.Uint64(b), err
}
