package ioctl

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Requests of include/uapi/linux/btrfs.h; magic 0x94.
const (
	BTRFS_IOC_SNAP_DESTROY          = 0x5000940f // _IOW 15, struct btrfs_ioctl_vol_args
	BTRFS_IOC_SNAP_CREATE_V2        = 0x50009417 // _IOW 23, struct btrfs_ioctl_vol_args_v2
	BTRFS_IOC_SUBVOL_CREATE_V2      = 0x50009418 // _IOW 24, the same
	BTRFS_IOC_SUBVOL_GETFLAGS       = 0x80089419 // _IOR 25, u64
	BTRFS_IOC_SUBVOL_SETFLAGS       = 0x4008941a // _IOW 26, u64
	BTRFS_IOC_GET_SUBVOL_INFO       = 0x81f8943c // _IOR 60, struct btrfs_ioctl_get_subvol_info_args, Linux 4.18
	BTRFS_IOC_SNAP_DESTROY_V2       = 0x5000943f // _IOW 63, struct btrfs_ioctl_vol_args_v2, Linux 5.7
	BTRFS_IOC_SUBVOL_SYNC_WAIT      = 0x40109441 // _IOW 65, struct btrfs_ioctl_subvol_wait, Linux 6.13
	BTRFS_SUBVOL_RDONLY             = 1 << 1
	BTRFS_SUBVOL_SPEC_BY_ID         = 1 << 4
	BTRFS_SUBVOL_NAME_MAX           = 4039
	BTRFS_FIRST_FREE_OBJECTID       = 256 // the inode number of every subvolume's root
	BTRFS_FS_TREE_OBJECTID          = 5   // the subvolume that a file system begins with
	BTRFS_EMPTY_SUBVOL_DIR_OBJECTID = 2   // the inode number of what stands for a subvolume in a snapshot of the one around it
)

var le = binary.LittleEndian

// volArgs is struct btrfs_ioctl_vol_args: s64 fd, char name[4088].
func volArgs(name string) []byte {
	b := make([]byte, 4096)
	copy(b[8:4095], name)
	return b
}

// volArgsV2 is struct btrfs_ioctl_vol_args_v2: s64 fd, u64 transid, u64 flags,
// u64 unused[4], then char name[4040] or u64 subvolid.
func volArgsV2(fd int, flags uint64, name string) []byte {
	b := make([]byte, 4096)
	le.PutUint64(b, uint64(int64(fd)))
	le.PutUint64(b[16:], flags)
	copy(b[56:56+BTRFS_SUBVOL_NAME_MAX], name)
	return b
}

func checkName(name string) error {
	if name == "" || len(name) > BTRFS_SUBVOL_NAME_MAX || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("subvolume name %q: %w", name, syscall.EINVAL)
	}
	return nil
}

// Create makes an empty subvolume name in dir; its root has mode 0777 less the
// umask.
func Create(dir *sys.Fd, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	return dir.Ioctl("BTRFS_IOC_SUBVOL_CREATE_V2", BTRFS_IOC_SUBVOL_CREATE_V2, volArgsV2(0, 0, name))
}

// Snapshot makes name in dir a snapshot of the subvolume source. The source's
// data is flushed before.
func Snapshot(source, dir *sys.Fd, name string, readOnly bool) error {
	if err := checkName(name); err != nil {
		return err
	}
	var flags uint64
	if readOnly {
		flags = BTRFS_SUBVOL_RDONLY
	}
	return dir.Ioctl("BTRFS_IOC_SNAP_CREATE_V2", BTRFS_IOC_SNAP_CREATE_V2, volArgsV2(source.Int(), flags, name))
}

// Destroy deletes the subvolume name in dir. Its blocks are freed later, in the
// background. ENOTEMPTY if it has subvolumes in it, EPERM while it is being sent.
func Destroy(dir *sys.Fd, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	return dir.Ioctl("BTRFS_IOC_SNAP_DESTROY", BTRFS_IOC_SNAP_DESTROY, volArgs(name))
}

// DestroyID deletes a subvolume by its id; fd is any directory of the file
// system from which the subvolume can be reached. Linux 5.7.
func DestroyID(fd *sys.Fd, id uint64) error {
	b := volArgsV2(0, BTRFS_SUBVOL_SPEC_BY_ID, "")
	le.PutUint64(b[56:], id)
	return fd.Ioctl("BTRFS_IOC_SNAP_DESTROY_V2", BTRFS_IOC_SNAP_DESTROY_V2, b)
}

// ReadOnly reports whether the subvolume may be written to.
func ReadOnly(subvol *sys.Fd) (bool, error) {
	b := make([]byte, 8)
	err := subvol.Ioctl("BTRFS_IOC_SUBVOL_GETFLAGS", BTRFS_IOC_SUBVOL_GETFLAGS, b)
	return le.Uint64(b)&BTRFS_SUBVOL_RDONLY != 0, err
}

// SetReadOnly sets or clears the read-only flag. It flushes no data, and a file
// that is open for writing goes on being written to.
func SetReadOnly(subvol *sys.Fd, readOnly bool) error {
	b := make([]byte, 8)
	if readOnly {
		le.PutUint64(b, BTRFS_SUBVOL_RDONLY)
	}
	return subvol.Ioctl("BTRFS_IOC_SUBVOL_SETFLAGS", BTRFS_IOC_SUBVOL_SETFLAGS, b)
}

// Subvol describes a subvolume.
type Subvol struct {
	ID       uint64
	Name     string
	Parent   uint64 // the subvolume that it stands in
	Dir      uint64 // inode of the directory that it stands in
	ReadOnly bool
	// Generation is the transaction of the last change, Born that of its creation:
	// what a snapshot shares with its source is not younger than Born.
	Generation, Born uint64
	UUID, ParentUUID [16]byte // ParentUUID: of what it is a snapshot of
}

// SubvolInfo describes the subvolume that fd is in. Linux 4.18.
func SubvolInfo(fd *sys.Fd) (Subvol, error) {
	b := make([]byte, 504)
	err := fd.Ioctl("BTRFS_IOC_GET_SUBVOL_INFO", BTRFS_IOC_GET_SUBVOL_INFO, b)
	return decodeSubvol(b), err
}

// decodeSubvol reads struct btrfs_ioctl_get_subvol_info_args.
func decodeSubvol(b []byte) Subvol {
	s := Subvol{
		ID: le.Uint64(b), Name: cString(b[8:264]), Parent: le.Uint64(b[264:]), Dir: le.Uint64(b[272:]),
		Generation: le.Uint64(b[280:]), ReadOnly: le.Uint64(b[288:])&1 != 0, // BTRFS_ROOT_SUBVOL_RDONLY
		Born: le.Uint64(b[352:]),
	}
	copy(s.UUID[:], b[296:])
	copy(s.ParentUUID[:], b[312:])
	return s
}

func cString(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// Deleted lists the subvolumes that are deleted and whose blocks are not free yet:
// the root tree has an orphan item for each. Needs CAP_SYS_ADMIN.
func Deleted(fd *sys.Fd) (ids []uint64, err error) {
	q := Query{
		Tree: BTRFS_ROOT_TREE_OBJECTID,
		Min:  Key{Object: BTRFS_ORPHAN_OBJECTID, Type: BTRFS_ORPHAN_ITEM_KEY},
		Max:  Key{Object: BTRFS_ORPHAN_OBJECTID, Type: BTRFS_ORPHAN_ITEM_KEY, Offset: ^uint64(0)},
	}
	for i, err := range Search(fd, q) {
		if err != nil {
			return nil, err
		}
		ids = append(ids, i.Offset)
	}
	return ids, nil
}

// WaitDeleted waits until the blocks of a deleted subvolume are free. ENOENT if
// there is none, EEXIST if it is not deleted; ENOTTY before Linux 6.13.
func WaitDeleted(fd *sys.Fd, id uint64) error {
	b := make([]byte, 16) // u64 subvolid, u32 mode (0: BTRFS_SUBVOL_SYNC_WAIT_FOR_ONE), u32 count
	le.PutUint64(b, id)
	return fd.Ioctl("BTRFS_IOC_SUBVOL_SYNC_WAIT", BTRFS_IOC_SUBVOL_SYNC_WAIT, b)
}
