package sys

import (
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// noXattrat is set once the kernel has said that it lacks getxattrat(2) and its
// kin (6.13). Paths through /proc, the old way, take three times as long.
var noXattrat atomic.Bool

// xattrArgs is struct xattr_args of include/uapi/linux/xattr.h where a pointer has
// 8 bytes. value is a pointer that a moving stack and the garbage collector know.
type xattrArgs struct {
	value unsafe.Pointer
	size  uint32
	flags uint32
}

// xattratMissing tells whether to take the old call.
func xattratMissing(e syscall.Errno) bool {
	if e == unix.ENOSYS {
		noXattrat.Store(true)
	}
	return e == unix.ENOSYS || e == unix.EPERM // EPERM: perhaps a sandbox's no
}

// useXattrat: the structure above is right where a pointer has 8 bytes only.
func useXattrat() bool { return unsafe.Sizeof(uintptr(0)) == 8 && !noXattrat.Load() }

// setAttr sets c to an xattr's name; one that is too long is ERANGE, as the
// kernel says.
func (c *cname) setAttr(attr string) error {
	err := c.set(attr)
	if err == unix.ENAMETOOLONG {
		err = unix.ERANGE
	}
	return err
}

// GetxattrBare reads an xattr of name below dir into dest and returns its size;
// with an empty dest only that. ERANGE where dest is too small, ENODATA where
// there is none.
func GetxattrBare(dir int, name, attr string, dest []byte) (int, error) {
	var a cname
	if err := a.setAttr(attr); err != nil {
		return 0, err
	}
	if name == "" {
		n, _, e := unix.Syscall6(unix.SYS_FGETXATTR, uintptr(dir), uintptr(unsafe.Pointer(&a)),
			uintptr(unsafe.Pointer(unsafe.SliceData(dest))), uintptr(len(dest)), 0, 0)
		if e != unix.EBADF {
			return bareInt(n, e)
		}
	} else if useXattrat() {
		var c cname
		if err := c.set(name); err != nil {
			return 0, err
		}
		args := xattrArgs{value: unsafe.Pointer(unsafe.SliceData(dest)), size: uint32(len(dest))}
		n, _, e := unix.Syscall6(unix.SYS_GETXATTRAT, uintptr(dir), uintptr(unsafe.Pointer(&c)), unix.AT_SYMLINK_NOFOLLOW,
			uintptr(unsafe.Pointer(&a)), uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args))
		if !xattratMissing(e) {
			return bareInt(n, e)
		}
	}
	var p procName
	if err := p.set(dir, name); err != nil {
		return 0, err
	}
	call := uintptr(unix.SYS_LGETXATTR)
	if name == "" {
		call = unix.SYS_GETXATTR // through the magic link
	}
	n, _, e := unix.Syscall6(call, uintptr(unsafe.Pointer(&p)), uintptr(unsafe.Pointer(&a)),
		uintptr(unsafe.Pointer(unsafe.SliceData(dest))), uintptr(len(dest)), 0, 0)
	return bareInt(n, e)
}

// ListxattrBare lists the xattrs of name below dir into dest, each ended by NUL,
// and returns how many bytes; with an empty dest only that.
func ListxattrBare(dir int, name string, dest []byte) (int, error) {
	if name == "" {
		n, _, e := unix.Syscall(unix.SYS_FLISTXATTR, uintptr(dir), uintptr(unsafe.Pointer(unsafe.SliceData(dest))), uintptr(len(dest)))
		if e != unix.EBADF {
			return bareInt(n, e)
		}
	} else if !noXattrat.Load() {
		var c cname
		if err := c.set(name); err != nil {
			return 0, err
		}
		n, _, e := unix.Syscall6(unix.SYS_LISTXATTRAT, uintptr(dir), uintptr(unsafe.Pointer(&c)), unix.AT_SYMLINK_NOFOLLOW,
			uintptr(unsafe.Pointer(unsafe.SliceData(dest))), uintptr(len(dest)), 0)
		if !xattratMissing(e) {
			return bareInt(n, e)
		}
	}
	var p procName
	if err := p.set(dir, name); err != nil {
		return 0, err
	}
	call := uintptr(unix.SYS_LLISTXATTR)
	if name == "" {
		call = unix.SYS_LISTXATTR
	}
	n, _, e := unix.Syscall(call, uintptr(unsafe.Pointer(&p)), uintptr(unsafe.Pointer(unsafe.SliceData(dest))), uintptr(len(dest)))
	return bareInt(n, e)
}

// Flags of SetxattrBare, with the kernel's spelling.
const (
	XATTR_CREATE  = unix.XATTR_CREATE
	XATTR_REPLACE = unix.XATTR_REPLACE
)

// SetxattrBare sets an xattr of name below dir.
func SetxattrBare(dir int, name, attr string, value []byte, flags int) error {
	var a cname
	if err := a.setAttr(attr); err != nil {
		return err
	}
	if name == "" {
		_, _, e := unix.Syscall6(unix.SYS_FSETXATTR, uintptr(dir), uintptr(unsafe.Pointer(&a)),
			uintptr(unsafe.Pointer(unsafe.SliceData(value))), uintptr(len(value)), uintptr(flags), 0)
		if e != unix.EBADF {
			return bare(e)
		}
	} else if useXattrat() {
		var c cname
		if err := c.set(name); err != nil {
			return err
		}
		args := xattrArgs{value: unsafe.Pointer(unsafe.SliceData(value)), size: uint32(len(value)), flags: uint32(flags)}
		_, _, e := unix.Syscall6(unix.SYS_SETXATTRAT, uintptr(dir), uintptr(unsafe.Pointer(&c)), unix.AT_SYMLINK_NOFOLLOW,
			uintptr(unsafe.Pointer(&a)), uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args))
		if !xattratMissing(e) {
			return bare(e)
		}
	}
	var p procName
	if err := p.set(dir, name); err != nil {
		return err
	}
	call := uintptr(unix.SYS_LSETXATTR)
	if name == "" {
		call = unix.SYS_SETXATTR
	}
	_, _, e := unix.Syscall6(call, uintptr(unsafe.Pointer(&p)), uintptr(unsafe.Pointer(&a)),
		uintptr(unsafe.Pointer(unsafe.SliceData(value))), uintptr(len(value)), uintptr(flags), 0)
	return bare(e)
}

// RemovexattrBare removes an xattr of name below dir; ENODATA if it is not there.
func RemovexattrBare(dir int, name, attr string) error {
	var a cname
	if err := a.setAttr(attr); err != nil {
		return err
	}
	if name == "" {
		_, _, e := unix.Syscall(unix.SYS_FREMOVEXATTR, uintptr(dir), uintptr(unsafe.Pointer(&a)), 0)
		if e != unix.EBADF {
			return bare(e)
		}
	} else if !noXattrat.Load() {
		var c cname
		if err := c.set(name); err != nil {
			return err
		}
		_, _, e := unix.Syscall6(unix.SYS_REMOVEXATTRAT, uintptr(dir), uintptr(unsafe.Pointer(&c)), unix.AT_SYMLINK_NOFOLLOW,
			uintptr(unsafe.Pointer(&a)), 0, 0)
		if !xattratMissing(e) {
			return bare(e)
		}
	}
	var p procName
	if err := p.set(dir, name); err != nil {
		return err
	}
	call := uintptr(unix.SYS_LREMOVEXATTR)
	if name == "" {
		call = unix.SYS_REMOVEXATTR
	}
	_, _, e := unix.Syscall(call, uintptr(unsafe.Pointer(&p)), uintptr(unsafe.Pointer(&a)), 0)
	return bare(e)
}

func bareInt(n uintptr, e syscall.Errno) (int, error) {
	if e != 0 {
		return 0, bare(e)
	}
	return int(n), nil
}

// TrustedXattrs tells whether this process may read and write trusted.* xattrs:
// others are told that there are none, so that reading does not show it.
func TrustedXattrs() bool {
	n, err := unix.MemfdCreate("trusted-xattrs", unix.MFD_CLOEXEC)
	if err != nil {
		return false
	}
	defer CloseBare(n)
	return RemovexattrBare(n, "", "trusted.none") != unix.EPERM
}
