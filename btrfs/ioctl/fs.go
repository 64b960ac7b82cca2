package ioctl

import "github.com/layerctl/layerctl/internal/sys"

// Requests of include/uapi/linux/btrfs.h.
const (
	BTRFS_IOC_SYNC       = 0x9408     // _IO 8
	BTRFS_IOC_SPACE_INFO = 0xc0109414 // _IOWR 20, struct btrfs_ioctl_space_args
	BTRFS_IOC_WAIT_SYNC  = 0x40089416 // _IOW 22, u64
	BTRFS_IOC_START_SYNC = 0x80089418 // _IOR 24, u64
	BTRFS_IOC_DEV_INFO   = 0xd000941e // _IOWR 30, struct btrfs_ioctl_dev_info_args
	BTRFS_IOC_FS_INFO    = 0x8400941f // _IOR 31, struct btrfs_ioctl_fs_info_args
)

// StartSync begins the commit of the running transaction and returns its number. A
// kernel thread commits, and it may not hear: when several ask, some have been seen
// to wait here for the next periodic commit, 30 s (6.18).
func StartSync(fd *sys.Fd) (uint64, error) {
	b := make([]byte, 8)
	err := fd.Ioctl("BTRFS_IOC_START_SYNC", BTRFS_IOC_START_SYNC, b)
	return le.Uint64(b), err
}

// WaitSync waits until a transaction is on the disk.
func WaitSync(fd *sys.Fd, transaction uint64) error {
	b := make([]byte, 8)
	le.PutUint64(b, transaction)
	return fd.Ioctl("BTRFS_IOC_WAIT_SYNC", BTRFS_IOC_WAIT_SYNC, b)
}

// Sync puts the running transaction on the disk: names, metadata and deletions,
// not the data of files that nobody flushed. See StartSync.
func Sync(fd *sys.Fd) error {
	t, err := StartSync(fd)
	if err != nil {
		return err
	}
	return WaitSync(fd, t)
}

// SyncAll puts the running transaction on the disk and wakes the kernel's cleaner,
// which frees what deleted subvolumes held.
func SyncAll(fd *sys.Fd) error { return fd.Ioctl("BTRFS_IOC_SYNC", BTRFS_IOC_SYNC, nil) }

// FSInfo is what struct btrfs_ioctl_fs_info_args says.
type FSInfo struct {
	MaxDevice, Devices   uint64
	FSID                 [16]byte
	NodeSize, SectorSize uint32
}

// Info describes the file system.
func Info(fd *sys.Fd) (FSInfo, error) {
	b := make([]byte, 1024)
	err := fd.Ioctl("BTRFS_IOC_FS_INFO", BTRFS_IOC_FS_INFO, b)
	i := FSInfo{MaxDevice: le.Uint64(b), Devices: le.Uint64(b[8:]), NodeSize: le.Uint32(b[32:]), SectorSize: le.Uint32(b[36:])}
	copy(i.FSID[:], b[16:])
	return i, err
}

// Device is what struct btrfs_ioctl_dev_info_args says.
type Device struct {
	ID          uint64
	Used, Total uint64
	Path        string
}

// DeviceInfo describes one device; ENODEV if the file system has none of that
// number.
func DeviceInfo(fd *sys.Fd, id uint64) (Device, error) {
	b := make([]byte, 4096) // u64 devid, u8 uuid[16], u64 bytes_used, total_bytes, ..., u8 path[1024] at 3072
	le.PutUint64(b, id)
	err := fd.Ioctl("BTRFS_IOC_DEV_INFO", BTRFS_IOC_DEV_INFO, b)
	return Device{ID: le.Uint64(b), Used: le.Uint64(b[24:]), Total: le.Uint64(b[32:]), Path: cString(b[3072:])}, err
}

// Space is one kind of block groups: Flags says data, metadata or system, and the
// profile (BTRFS_BLOCK_GROUP_* of btrfs_tree.h).
type Space struct{ Flags, Total, Used uint64 }

// SpaceInfo lists the space that is given to each kind of block groups.
func SpaceInfo(fd *sys.Fd) ([]Space, error) {
	const slots = 64
	b := make([]byte, 16+24*slots) // u64 space_slots, u64 total_spaces, {u64 flags, total, used}[]
	le.PutUint64(b, slots)
	if err := fd.Ioctl("BTRFS_IOC_SPACE_INFO", BTRFS_IOC_SPACE_INFO, b); err != nil {
		return nil, err
	}
	var all []Space
	for i := range min(int(le.Uint64(b[8:])), slots) {
		e := b[16+24*i:]
		all = append(all, Space{Flags: le.Uint64(e), Total: le.Uint64(e[8:]), Used: le.Uint64(e[16:])})
	}
	return all, nil
}
