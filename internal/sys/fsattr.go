package sys

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FSXattr is struct fsxattr of include/uapi/linux/fs.h: the inode attributes
// that project quota needs.
type FSXattr struct {
	Xflags     uint32 // FS_XFLAG_*
	Extsize    uint32
	Nextents   uint32
	Projid     uint32
	Cowextsize uint32
	_          [8]byte
}

// FS_XFLAG_PROJINHERIT makes new files in a directory take its project id; a
// rename or link into the directory from another project is EXDEV.
const FS_XFLAG_PROJINHERIT = 0x200

// _IOR('X', 31, struct fsxattr) and _IOW('X', 32, struct fsxattr), which is 28
// bytes, as include/uapi/asm-generic/ioctl.h encodes them: amd64, arm64,
// riscv64, s390x, loong64, 386, arm.
const (
	ioc_X           = 28<<16 | 'X'<<8
	iocReadBit      = 2 << 30
	iocWriteBit     = 1 << 30
	fsIocFSGetXattr = iocReadBit | ioc_X | 31
	fsIocFSSetXattr = iocWriteBit | ioc_X | 32
)

// GetFSXattr reads the attributes of f (FS_IOC_FSGETXATTR), which must not be
// O_PATH; ENOTTY where the file system has none.
func (f *Fd) GetFSXattr() (FSXattr, error) {
	var x FSXattr
	err := retry(func() error { return ioctl(f.n, fsIocFSGetXattr, unsafe.Pointer(&x)) })
	return x, f.err("ioctl FS_IOC_FSGETXATTR", "", err)
}

// SetFSXattr sets the attributes of f (FS_IOC_FSSETXATTR). EOPNOTSUPP where the
// file system keeps no project ids (ext4 without the "project" feature).
func (f *Fd) SetFSXattr(x FSXattr) error {
	err := retry(func() error { return ioctl(f.n, fsIocFSSetXattr, unsafe.Pointer(&x)) })
	return f.err("ioctl FS_IOC_FSSETXATTR", "", err)
}

// SetProject gives f the project id and, with inherit, passes it on to what is
// made in f. Other attributes stay.
func (f *Fd) SetProject(id uint32, inherit bool) error {
	x, err := f.GetFSXattr()
	if err != nil {
		return err
	}
	x.Projid = id
	x.Xflags &^= FS_XFLAG_PROJINHERIT
	if inherit {
		x.Xflags |= FS_XFLAG_PROJINHERIT
	}
	return f.SetFSXattr(x)
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

// FSType is statfs(2)'s f_type.
type FSType int64

// File systems that the program knows by number.
const (
	EXT4_SUPER_MAGIC      FSType = unix.EXT4_SUPER_MAGIC
	XFS_SUPER_MAGIC       FSType = unix.XFS_SUPER_MAGIC
	BTRFS_SUPER_MAGIC     FSType = unix.BTRFS_SUPER_MAGIC
	TMPFS_MAGIC           FSType = unix.TMPFS_MAGIC
	OVERLAYFS_SUPER_MAGIC FSType = unix.OVERLAYFS_SUPER_MAGIC
	FUSE_SUPER_MAGIC      FSType = unix.FUSE_SUPER_MAGIC
	NFS_SUPER_MAGIC       FSType = unix.NFS_SUPER_MAGIC
)

// String returns the name of a known type, else its number.
func (t FSType) String() string {
	switch t {
	case EXT4_SUPER_MAGIC:
		return "ext4"
	case XFS_SUPER_MAGIC:
		return "xfs"
	case BTRFS_SUPER_MAGIC:
		return "btrfs"
	case TMPFS_MAGIC:
		return "tmpfs"
	case OVERLAYFS_SUPER_MAGIC:
		return "overlay"
	case FUSE_SUPER_MAGIC:
		return "fuse"
	case NFS_SUPER_MAGIC:
		return "nfs"
	}
	return hex(uint64(uint32(t)))
}

func hex(n uint64) string {
	const digits = "0123456789abcdef"
	b := []byte{}
	for ; n > 0 || len(b) == 0; n >>= 4 {
		b = append([]byte{digits[n&15]}, b...)
	}
	return "0x" + string(b)
}

// Statfs is what statfs(2) says of a file system.
type Statfs struct {
	Type       FSType
	BlockSize  int64
	Blocks     uint64 // of BlockSize
	BlocksFree uint64
	BlocksUser uint64 // free for a user without privileges
	Files      uint64
	FilesFree  uint64
	ReadOnly   bool // the mount or the file system
	FragSize   int64
	NameMax    int64
	Fsid       [2]int32
	Flags      int64 // ST_*
}

// Statfs describes the file system that f is on; f may be O_PATH.
func (f *Fd) Statfs() (Statfs, error) {
	var b unix.Statfs_t
	err := retry(func() error { return unix.Fstatfs(f.n, &b) })
	return newStatfs(&b), f.err("fstatfs", "", err)
}

// StatfsPath describes the file system that a trusted path is on.
func StatfsPath(path string) (Statfs, error) {
	var b unix.Statfs_t
	err := retry(func() error { return unix.Statfs(path, &b) })
	return newStatfs(&b), pathErr("statfs", path, err)
}

func newStatfs(b *unix.Statfs_t) Statfs {
	return Statfs{
		Type: FSType(b.Type), BlockSize: int64(b.Bsize),
		Blocks: b.Blocks, BlocksFree: b.Bfree, BlocksUser: b.Bavail,
		Files: b.Files, FilesFree: b.Ffree,
		ReadOnly: int64(b.Flags)&unix.ST_RDONLY != 0,
		FragSize: int64(b.Frsize), NameMax: int64(b.Namelen), Fsid: b.Fsid.Val, Flags: int64(b.Flags),
	}
}

// FSXattrBare is GetFSXattr of a bare descriptor (bare.go).
func FSXattrBare(n int) (FSXattr, error) {
	var x FSXattr
	err := ioctl(n, fsIocFSGetXattr, unsafe.Pointer(&x))
	return x, err
}

// SetFSXattrBare is SetFSXattr of a bare descriptor.
func SetFSXattrBare(n int, x FSXattr) error { return ioctl(n, fsIocFSSetXattr, unsafe.Pointer(&x)) }

// Unprotect takes away from name, a file or directory, or from f for "", the flags
// by which nobody, root neither, may change or remove it (chattr +i and +a). It
// does nothing to what has none; EPERM without CAP_LINUX_IMMUTABLE.
func (f *Fd) Unprotect(name string) error {
	const protected = STATX_ATTR_IMMUTABLE | STATX_ATTR_APPEND
	s, err := f.Stat(name)
	if err != nil || s.Attributes&protected == 0 || !s.IsDir() && !s.IsReg() {
		return err
	}
	at := f
	if name != "" {
		if at, err = f.Openat(name, unix.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
			return err
		}
		defer at.Close()
	}
	flags, err := FlagsBare(at.n)
	if err == nil {
		err = SetFlagsBare(at.n, flags&^(FS_IMMUTABLE_FL|FS_APPEND_FL))
	}
	return at.err("ioctl FS_IOC_SETFLAGS", "", err)
}

// UnlinkProtected is Unlink of a file, of what chattr +i or +a, on it or on f, makes
// refused, too: for trees that are removed whole.
func (f *Fd) UnlinkProtected(name string) error {
	err := f.Unlink(name, 0)
	if !errors.Is(err, unix.EPERM) || errors.Join(f.Unprotect(""), f.Unprotect(name)) != nil {
		return err
	}
	return f.Unlink(name, 0)
}

// AllowOwner gives the owner of a directory every right to it. It does nothing to
// anything else.
func (f *Fd) AllowOwner(name string) error {
	s, err := f.Stat(name)
	if err != nil || !s.IsDir() || s.Mode&0o700 == 0o700 {
		return err
	}
	return f.ChmodAt(name, 0o700)
}
