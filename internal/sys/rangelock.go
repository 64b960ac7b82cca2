package sys

import (
	"io"

	"golang.org/x/sys/unix"
)

// Locks on ranges of a file, of the open-file-description kind (fcntl(2),
// F_OFD_SETLK, Linux 3.15). Like flock they belong to the open file and not to
// the process, and the kernel drops them with it; unlike flock there are 2^63
// of them in one file, whose bytes need not exist. Two ranges locked through one
// open file never exclude each other.

// LockRange takes a lock on n bytes at off without waiting: shared, or
// exclusive, which needs f to be open for writing. ErrLocked (through errors.Is)
// if another open file holds a lock in the way. A range that f has locked is
// changed to kind.
func (f *Fd) LockRange(kind LockKind, off, n int64) error {
	t := int16(unix.F_RDLCK)
	if kind == LockExclusive {
		t = unix.F_WRLCK
	}
	return f.setRange(t, off, n)
}

// UnlockRange drops what f holds of n bytes at off; nothing is fine.
func (f *Fd) UnlockRange(off, n int64) error { return f.setRange(unix.F_UNLCK, off, n) }

func (f *Fd) setRange(typ int16, off, n int64) error {
	lk := unix.Flock_t{Type: typ, Whence: io.SeekStart, Start: off, Len: n}
	err := retry(func() error { return unix.FcntlFlock(uintptr(f.n), unix.F_OFD_SETLK, &lk) })
	if err == unix.EACCES {
		err = unix.EAGAIN // POSIX allows either
	}
	return f.err("fcntl F_OFD_SETLK", "", err)
}

// RangeLocked reports whether another open file holds any lock within n bytes
// at off.
func (f *Fd) RangeLocked(off, n int64) (bool, error) {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: off, Len: n}
	err := retry(func() error { return unix.FcntlFlock(uintptr(f.n), unix.F_OFD_GETLK, &lk) })
	return err == nil && lk.Type != unix.F_UNLCK, f.err("fcntl F_OFD_GETLK", "", err)
}

// WaitLock takes a flock on the file that path names, waiting as long as it
// takes; flags are those of Open. The wait cannot be cancelled: it belongs in a
// goroutine whose result nobody has to wait for.
func WaitLock(path string, flags int, kind LockKind) (*Lock, error) {
	f, err := Open(path, flags|O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := retry(func() error { return unix.Flock(f.n, int(kind)) }); err != nil {
		f.Close()
		return nil, pathErr("flock", path, err)
	}
	return &Lock{f}, nil
}

// FlockHeld reports whether another open file holds the exclusive flock of the
// file that f is open on. To find out it takes a shared one for a moment, which a
// waiting exclusive one outlasts.
func (f *Fd) FlockHeld() (bool, error) {
	err := retry(func() error { return unix.Flock(f.n, unix.LOCK_SH|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		return true, nil
	}
	if err == nil {
		err = retry(func() error { return unix.Flock(f.n, unix.LOCK_UN) })
	}
	return false, f.err("flock", "", err)
}
