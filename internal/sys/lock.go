package sys

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Lock is a flock(2) held on a file or directory. It belongs to the open file:
// the kernel drops it with the last descriptor, at the latest when the process
// dies. It does not follow the file: a renamed file keeps its lock.
type Lock struct{ fd *Fd }

// LockKind is how a lock excludes others.
type LockKind int

// The kinds of lock.
const (
	LockShared    LockKind = unix.LOCK_SH
	LockExclusive LockKind = unix.LOCK_EX
)

// ErrLocked is what TryLock returns when another holds the lock: EWOULDBLOCK.
var ErrLocked error = unix.EWOULDBLOCK

// TryLock takes a lock on a second open file of the file or directory that f
// is open on, without waiting. f may be O_PATH. ErrLocked (through errors.Is)
// if another open file holds it.
func (f *Fd) TryLock(kind LockKind) (*Lock, error) {
	own, err := Open(f.ProcPath(), O_RDONLY|O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	own.name = f.name
	if err := retry(func() error { return unix.Flock(own.n, int(kind)|unix.LOCK_NB) }); err != nil {
		own.Close()
		return nil, f.err("flock", "", err)
	}
	return &Lock{own}, nil
}

// LockFile opens path (made with mode 0600 if it is not there) and takes a
// lock on it without waiting; see TryLock.
func LockFile(path string, kind LockKind) (*Lock, error) {
	f, err := Open(path, O_RDWR|O_CREAT|O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := retry(func() error { return unix.Flock(f.n, int(kind)|unix.LOCK_NB) }); err != nil {
		f.Close()
		return nil, pathErr("flock", path, err)
	}
	return &Lock{f}, nil
}

// IsLocked reports whether err says that a lock is held by another.
func IsLocked(err error) bool { return errors.Is(err, ErrLocked) }

// Change turns the lock into another kind without waiting. The kernel does it
// in two steps: another may get in between, and then the lock is lost
// (ErrLocked).
func (l *Lock) Change(kind LockKind) error {
	return l.fd.err("flock", "", retry(func() error { return unix.Flock(l.fd.n, int(kind)|unix.LOCK_NB) }))
}

// Fd returns the locked open file, which the lock owns.
func (l *Lock) Fd() *Fd { return l.fd }

// Close releases the lock. A second Close, or one of a nil lock, does nothing.
func (l *Lock) Close() error {
	if l == nil {
		return nil
	}
	return l.fd.Close()
}
