package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// fsIocGetFSUUID is FS_IOC_GETFSUUID, _IOR(0x15, 0, struct fsuuid2) of 17 bytes.
const fsIocGetFSUUID = iocReadBit | 17<<16 | 0x15<<8

// FSUUID reads the UUID of the file system that f, not O_PATH, is on, as overlayfs
// knows it (super_block.s_uuid): FS_IOC_GETFSUUID, Linux 6.9, or what ext4, xfs
// and btrfs have had before that. ENOTTY where there is none or the kernel does
// not say.
func (f *Fd) FSUUID() (uuid [16]byte, err error) {
	var u struct {
		size uint8
		uuid [16]byte
	}
	err = ioctl(f.n, fsIocGetFSUUID, unsafe.Pointer(&u))
	if err == nil && u.size != 16 {
		err = unix.ENOTTY
	}
	if err != nil {
		if old, ok := f.oldUUID(); ok {
			return old, nil
		}
		return uuid, f.err("ioctl FS_IOC_GETFSUUID", "", err)
	}
	return u.uuid, nil
}

// Requests of single file systems, where FS_IOC_GETFSUUID is not to be had:
// include/uapi/linux/btrfs.h, fs/ext4/ext4.h, fs/xfs/libxfs/xfs_fs.h.
const (
	btrfsIocFSInfo    = iocReadBit | 1024<<16 | 0x94<<8 | 31
	ext4IocGetFSUUID  = iocReadBit | 8<<16 | 'f'<<8 | 44
	xfsIocFSGeometry1 = iocReadBit | 112<<16 | 'X'<<8 | 100
)

func (f *Fd) oldUUID() (uuid [16]byte, ok bool) {
	s, err := f.Statfs()
	if err != nil {
		return uuid, false
	}
	switch s.Type {
	case BTRFS_SUPER_MAGIC:
		var info [1024]byte // max_id u64, num_devices u64, fsid
		err = ioctl(f.n, btrfsIocFSInfo, unsafe.Pointer(&info))
		return [16]byte(info[16:]), err == nil
	case EXT4_SUPER_MAGIC:
		var u struct {
			size, flags uint32
			uuid        [16]byte
		}
		u.size = 16
		err = ioctl(f.n, ext4IocGetFSUUID, unsafe.Pointer(&u))
		return u.uuid, err == nil && u.size == 16
	case XFS_SUPER_MAGIC:
		var geo [112]byte // struct xfs_fsop_geom_v1: 8 u32, 4 u64, then the uuid
		err = ioctl(f.n, xfsIocFSGeometry1, unsafe.Pointer(&geo))
		return [16]byte(geo[64:]), err == nil
	}
	return uuid, false
}
