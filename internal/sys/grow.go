package sys

import "encoding/binary"

// The ioctls that make a mounted file system larger: fs/ext4/ext4.h
// (EXT4_IOC_RESIZE_FS), fs/xfs/libxfs/xfs_fs.h (XFS_IOC_FSGROWFSDATA).
const (
	ext4IocResizeFS    = 0x40086610 // _IOW('f', 16, __u64)
	xfsIocFsgrowfsdata = 0x4010586e // _IOW('X', 110, struct xfs_growfs_data)
)

// GrowExt4 gives the ext4 that f is on so many blocks, which its device has. EPERM
// without CAP_SYS_RESOURCE in the initial user namespace.
func (f *Fd) GrowExt4(blocks uint64) error {
	return f.Ioctl("EXT4_IOC_RESIZE_FS", ext4IocResizeFS, binary.NativeEndian.AppendUint64(nil, blocks))
}

// GrowXFS gives the xfs that f is on so many blocks, which its device has, of which
// inodes may take so many percent. EPERM without CAP_SYS_ADMIN.
func (f *Fd) GrowXFS(blocks uint64, inodePercent uint32) error {
	arg := binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint64(nil, blocks), inodePercent)
	return f.Ioctl("XFS_IOC_FSGROWFSDATA", xfsIocFsgrowfsdata, append(arg, 0, 0, 0, 0))
}
