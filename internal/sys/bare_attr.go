package sys

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// noFchmodat2 is set once the kernel has said that it lacks fchmodat2(2) (6.6).
var noFchmodat2 atomic.Bool

// ChmodBare sets the mode (07777) of name below dir; EOPNOTSUPP where that is a symlink,
// which is never followed.
func ChmodBare(dir int, name string, mode uint32) error {
	if name == "" {
		return chmodOpen(dir, mode)
	}
	var c cname
	if err := c.set(name); err != nil {
		return err
	}
	if !noFchmodat2.Load() {
		_, _, e := unix.Syscall6(unix.SYS_FCHMODAT2, uintptr(dir), uintptr(unsafe.Pointer(&c)), uintptr(mode), unix.AT_SYMLINK_NOFOLLOW, 0, 0)
		switch e {
		case unix.ENOSYS:
			noFchmodat2.Store(true)
		case unix.EPERM: // perhaps a sandbox's no
		default:
			return bare(e)
		}
	}
	// fchmodat(2) would follow a symlink that somebody has put there.
	n, err := OpenBare(dir, name, unix.O_PATH, 0)
	if err != nil {
		return err
	}
	defer CloseBare(n)
	return chmodOpen(n, mode)
}

func chmodOpen(n int, mode uint32) error {
	_, _, e := unix.Syscall(unix.SYS_FCHMOD, uintptr(n), uintptr(mode), 0)
	if e != unix.EBADF {
		return bare(e)
	}
	var p procName // O_PATH
	if err := p.set(n, ""); err != nil {
		return err
	}
	_, _, e = unix.Syscall(unix.SYS_FCHMODAT, atFDCWD, uintptr(unsafe.Pointer(&p)), uintptr(mode))
	return bare(e)
}

// ChownBare sets owner and group of name below dir; ^uint32(0) leaves one as it is.
func ChownBare(dir int, name string, uid, gid uint32) error {
	var c cname
	if err := c.set(name); err != nil {
		return err
	}
	_, _, e := unix.Syscall6(unix.SYS_FCHOWNAT, uintptr(dir), uintptr(unsafe.Pointer(&c)), uintptr(uid), uintptr(gid),
		unix.AT_SYMLINK_NOFOLLOW|emptyPath(name), 0)
	return bare(e)
}

// TimeNow makes a timestamp the present (Utimes, UtimesBare).
var TimeNow = Time{Nsec: unix.UTIME_NOW}

// UtimesBare sets the times of name below dir; see TimeNow, TimeOmit.
func UtimesBare(dir int, name string, atime, mtime Time) error {
	var c cname
	if err := c.set(name); err != nil {
		return err
	}
	ts := [2]unix.Timespec{{Sec: atime.Sec, Nsec: int64(atime.Nsec)}, {Sec: mtime.Sec, Nsec: int64(mtime.Nsec)}}
	_, _, e := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(dir), uintptr(unsafe.Pointer(&c)), uintptr(unsafe.Pointer(&ts)),
		unix.AT_SYMLINK_NOFOLLOW|emptyPath(name), 0, 0)
	return bare(e)
}

// Inode flags, of linux/fs.h, of FlagsBare and SetFlagsBare: chattr +S, +i, +a, +A.
const (
	FS_SYNC_FL      = 0x8
	FS_IMMUTABLE_FL = 0x10
	FS_APPEND_FL    = 0x20
	FS_NOATIME_FL   = 0x80
)

// FlagsBare reads the inode flags FS_*_FL of n (FS_IOC_GETFLAGS), which must not be
// O_PATH. ENOTTY where the file system has none.
func FlagsBare(n int) (uint32, error) {
	var word [2]uint32 // the kernel writes an int, whatever the number says
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(n), unix.FS_IOC_GETFLAGS, uintptr(unsafe.Pointer(&word)))
	return word[0], bare(e)
}

// SetFlagsBare sets the inode flags of n.
func SetFlagsBare(n int, flags uint32) error {
	word := [2]uint32{flags}
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(n), unix.FS_IOC_SETFLAGS, uintptr(unsafe.Pointer(&word)))
	return bare(e)
}
