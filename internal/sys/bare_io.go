package sys

import (
	"io"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PreadBare is pread(2): it may read less than len(p).
func PreadBare(n int, p []byte, off int64) (int, error) {
	for {
		got, err := unix.Pread(n, p, off)
		if err != unix.EINTR {
			return max(got, 0), err
		}
	}
}

// PwriteBare is pwrite(2): it may write less than len(p).
func PwriteBare(n int, p []byte, off int64) (int, error) {
	for {
		done, err := unix.Pwrite(n, p, off)
		if err != unix.EINTR {
			return max(done, 0), err
		}
	}
}

// FsyncBare is fsync(2), or fdatasync(2).
func FsyncBare(n int, dataOnly bool) error {
	call := uintptr(unix.SYS_FSYNC)
	if dataOnly {
		call = unix.SYS_FDATASYNC
	}
	for {
		_, _, e := unix.Syscall(call, uintptr(n), 0, 0)
		if e != unix.EINTR {
			return bare(e)
		}
	}
}

// FallocateBare is fallocate(2).
func FallocateBare(n int, mode uint32, off, size int64) error {
	for {
		err := unix.Fallocate(n, mode, off, size)
		if err != unix.EINTR {
			return err
		}
	}
}

// FtruncateBare is ftruncate(2).
func FtruncateBare(n int, size int64) error {
	for {
		err := unix.Ftruncate(n, size)
		if err != unix.EINTR {
			return err
		}
	}
}

// CopyRangeBare is copy_file_range(2).
func CopyRangeBare(dst int, dstOff int64, src int, srcOff int64, size int) (int, error) {
	for {
		from, to := srcOff, dstOff
		n, _, e := unix.Syscall6(unix.SYS_COPY_FILE_RANGE, uintptr(src), uintptr(unsafe.Pointer(&from)), uintptr(dst),
			uintptr(unsafe.Pointer(&to)), uintptr(size), 0)
		if e != unix.EINTR {
			return bareInt(n, e)
		}
	}
}

// CloneBare makes dst share all blocks of src (FICLONE).
func CloneBare(dst, src int) error {
	for {
		_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(dst), unix.FICLONE, uintptr(src))
		if e != unix.EINTR {
			return bare(e)
		}
	}
}

// FlockBare is flock(2); how has LOCK_SH, LOCK_EX or LOCK_UN, and LOCK_NB. A wait
// can end with EINTR.
func FlockBare(n int, how int) error {
	_, _, e := unix.Syscall(unix.SYS_FLOCK, uintptr(n), uintptr(how), 0)
	return bare(e)
}

// Kinds of locks, with the kernel's spelling.
const (
	F_RDLCK = unix.F_RDLCK
	F_WRLCK = unix.F_WRLCK
	F_UNLCK = unix.F_UNLCK

	LOCK_SH = unix.LOCK_SH
	LOCK_EX = unix.LOCK_EX
	LOCK_UN = unix.LOCK_UN
	LOCK_NB = unix.LOCK_NB
)

// RangeLock is a lock on a range of a file, as struct flock has it.
type RangeLock struct {
	Type       int16 // F_RDLCK, F_WRLCK, F_UNLCK
	Start, Len int64 // Len 0: to the end, wherever that is
}

// SetRangeLock takes or drops a lock of the open file n (F_OFD_SETLK): EAGAIN if
// another open file is in the way. With wait (F_OFD_SETLKW) it waits, and EINTR
// ends the wait.
func SetRangeLock(n int, l RangeLock, wait bool) error {
	cmd := unix.F_OFD_SETLK
	if wait {
		cmd = unix.F_OFD_SETLKW
	}
	lk := unix.Flock_t{Type: l.Type, Whence: io.SeekStart, Start: l.Start, Len: l.Len}
	err := unix.FcntlFlock(uintptr(n), cmd, &lk)
	if err == unix.EACCES {
		err = unix.EAGAIN // POSIX allows either
	}
	return err
}

// GetRangeLock tells which lock of another open file is in the way of l
// (F_OFD_GETLK); Type F_UNLCK: none.
func GetRangeLock(n int, l RangeLock) (RangeLock, error) {
	lk := unix.Flock_t{Type: l.Type, Whence: io.SeekStart, Start: l.Start, Len: l.Len}
	if err := unix.FcntlFlock(uintptr(n), unix.F_OFD_GETLK, &lk); err != nil {
		return RangeLock{}, err
	}
	return RangeLock{Type: lk.Type, Start: lk.Start, Len: lk.Len}, nil
}
