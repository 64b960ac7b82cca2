package sys

import (
	"bytes"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls in bare*.go are for who makes millions of them: they take bare
// descriptor numbers that somebody else owns, allocate nothing, and their errors
// are bare syscall.Errno values. A name is one component below dir and never
// followed if it is a symlink; "" means dir itself, which may be O_PATH. A name
// with a NUL in it is EINVAL, one of more than 255 bytes ENAMETOOLONG.

// cname is a name as the kernel reads it.
type cname [256]byte

func (c *cname) set(name string) error {
	if len(name) >= len(c) {
		return unix.ENAMETOOLONG
	}
	n := copy(c[:], name)
	for _, b := range c[:n] {
		if b == 0 {
			return unix.EINVAL
		}
	}
	c[n] = 0
	return nil
}

// procName is "/proc/self/fd/N", or a name below that, for calls that take
// nothing but paths.
type procName [16 + 20 + 256]byte

func (p *procName) set(n int, name string) error {
	const dir = "/proc/self/fd/"
	at := copy(p[:], dir)
	var digits [20]byte
	i := len(digits)
	for i == len(digits) || n > 0 {
		i--
		digits[i] = byte('0' + n%10)
		n /= 10
	}
	at += copy(p[at:], digits[i:])
	if name != "" {
		p[at] = '/'
		at++
		if len(name) > 255 {
			return unix.ENAMETOOLONG
		}
		for i := 0; i < len(name); i++ {
			if name[i] == 0 {
				return unix.EINVAL
			}
		}
		at += copy(p[at:], name)
	}
	p[at] = 0
	return nil
}

func bare(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e // an Errno fits the runtime's table of small values: no allocation
}

// emptyPath is the flag that makes name "" mean the descriptor itself.
func emptyPath(name string) uintptr {
	if name == "" {
		return unix.AT_EMPTY_PATH
	}
	return 0
}

// CloseBare closes descriptor n.
func CloseBare(n int) { _, _, _ = unix.Syscall(unix.SYS_CLOSE, uintptr(n), 0, 0) }

// StatBare describes name below dir into s.
func StatBare(dir int, name string, s *Stat) error {
	var c cname
	if err := c.set(name); err != nil {
		return err
	}
	const flags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT
	var x unix.Statx_t
	for {
		_, _, e := unix.Syscall6(unix.SYS_STATX, uintptr(dir), uintptr(unsafe.Pointer(&c)), flags|emptyPath(name),
			statxMask, uintptr(unsafe.Pointer(&x)), 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return bare(e)
		}
		s.set(&x)
		return nil
	}
}

// OpenBare opens name below dir; O_CLOEXEC and O_NOFOLLOW are added. For dir
// itself see ReopenBare.
func OpenBare(dir int, name string, flags int, mode uint32) (int, error) {
	var c cname
	if err := c.set(name); err != nil {
		return -1, err
	}
	for {
		n, _, e := unix.Syscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(&c)),
			uintptr(flags|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_LARGEFILE), uintptr(mode), 0, 0)
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return -1, bare(e)
		}
	}
}

// ExistsBelowBare tells by one call whether the directory name below dir has the
// name sub; neither is followed if it is a symlink. An error says that there is no
// telling this way: openat2(2) is not there (before Linux 5.6, or a sandbox's no),
// or somebody has put a symlink in the directory's place.
func ExistsBelowBare(dir int, name, sub string) (bool, error) {
	var c [2 * len(cname{})]byte
	n := len(name) + 1 + len(sub)
	if n >= len(c) {
		return false, unix.ENAMETOOLONG
	}
	copy(c[:], name)
	c[len(name)] = '/'
	copy(c[len(name)+1:], sub)
	if bytes.IndexByte(c[:n], 0) >= 0 {
		return false, unix.EINVAL
	}
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_BENEATH}
	for {
		fd, _, e := unix.Syscall6(unix.SYS_OPENAT2, uintptr(dir), uintptr(unsafe.Pointer(&c)), uintptr(unsafe.Pointer(&how)),
			unsafe.Sizeof(how), 0, 0)
		switch e {
		case 0:
			CloseBare(int(fd))
			return true, nil
		case unix.ENOENT:
			return false, nil
		case unix.EINTR:
		default:
			return false, bare(e)
		}
	}
}

// ReopenBare opens once more, with other flags, the file that n, O_PATH or not,
// is open on, by way of /proc/self/fd. O_CLOEXEC is added.
func ReopenBare(n int, flags int) (int, error) {
	var p procName
	if err := p.set(n, ""); err != nil {
		return -1, err
	}
	for {
		fd, _, e := unix.Syscall6(unix.SYS_OPENAT, atFDCWD, uintptr(unsafe.Pointer(&p)),
			uintptr(flags|unix.O_CLOEXEC|unix.O_LARGEFILE), 0, 0, 0)
		if e == 0 {
			return int(fd), nil
		}
		if e != unix.EINTR {
			return -1, bare(e)
		}
	}
}

// atFDCWD is AT_FDCWD as an argument of a system call.
const atFDCWD = ^uintptr(-unix.AT_FDCWD - 1)

// DupBare gives a second number of the same open file.
func DupBare(n int) (int, error) {
	fd, _, e := unix.Syscall(unix.SYS_FCNTL, uintptr(n), unix.F_DUPFD_CLOEXEC, 3)
	if e != 0 {
		return -1, bare(e)
	}
	return int(fd), nil
}

// ReadlinkBare reads the target of name below dir into b: all of it, if the
// result is less than len(b).
func ReadlinkBare(dir int, name string, b []byte) (int, error) {
	var c cname
	if err := c.set(name); err != nil {
		return 0, err
	}
	n, _, e := unix.Syscall6(unix.SYS_READLINKAT, uintptr(dir), uintptr(unsafe.Pointer(&c)),
		uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0, 0)
	if e != 0 {
		return 0, bare(e)
	}
	return int(n), nil
}

// StatfsBare describes the file system that n is on.
func StatfsBare(n int, s *Statfs) error {
	var b unix.Statfs_t
	for {
		_, _, e := unix.Syscall(unix.SYS_FSTATFS, uintptr(n), uintptr(unsafe.Pointer(&b)), 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return bare(e)
		}
		*s = newStatfs(&b)
		return nil
	}
}

// Umask sets the process's umask and returns the one before.
func Umask(mask int) int { return unix.Umask(mask) }

// SetFsID makes the calling thread uid and gid for access to files, until it is
// called again: the goroutine must be locked to its thread meanwhile. Root's
// capabilities about files go and come back with uid 0.
func SetFsID(uid, gid uint32) error {
	// The order lets root go down and come back: setfsgid needs a capability that
	// is not among those that setfsuid touches.
	if err := setFsID(unix.SYS_SETFSGID, gid); err != nil {
		return err
	}
	return setFsID(unix.SYS_SETFSUID, uid)
}

// setFsID sets and looks: the call itself reports no error.
func setFsID(call uintptr, id uint32) error {
	_, _, _ = unix.RawSyscall(call, uintptr(id), 0, 0)
	now, _, _ := unix.RawSyscall(call, uintptr(^uint32(0)), 0, 0)
	if uint32(now) != id {
		return unix.EPERM
	}
	return nil
}

// FileLimit raises the soft limit of open files to the hard one and returns it.
func FileLimit() (uint64, error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 0, err
	}
	if l.Cur < l.Max {
		up := unix.Rlimit{Cur: l.Max, Max: l.Max}
		if unix.Setrlimit(unix.RLIMIT_NOFILE, &up) == nil {
			return up.Cur, nil
		}
	}
	return l.Cur, nil
}
