package sys

import (
	"errors"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Semaphore is a System V semaphore, a set of one. It outlives the process: whoever
// makes it removes it.
type Semaphore struct{ id uintptr }

// Constants of include/uapi/linux/sem.h.
const (
	semGetval  = 12
	semSetval  = 16
	semIPCRMID = 0
)

// MakeSemaphore makes a semaphore of a key that nobody uses (EEXIST otherwise), with
// the value.
func MakeSemaphore(key int32, value int) (Semaphore, error) {
	id, _, e := unix.Syscall(unix.SYS_SEMGET, uintptr(uint32(key)), 1, unix.IPC_CREAT|unix.IPC_EXCL|0o600)
	if e != 0 {
		return Semaphore{}, semErr("semget", e)
	}
	s := Semaphore{id}
	if _, _, e := unix.Syscall6(unix.SYS_SEMCTL, id, 0, semSetval, uintptr(value), 0, 0); e != 0 {
		return Semaphore{}, errors.Join(semErr("semctl SETVAL", e), s.Remove())
	}
	return s, nil
}

// Add changes the value by n without waiting; EAGAIN if it would be below 0.
func (s Semaphore) Add(n int16) error { return s.op(n, unix.IPC_NOWAIT, 0) }

// WaitZero waits until the value is 0; EAGAIN after that time.
func (s Semaphore) WaitZero(most time.Duration) error { return s.op(0, 0, most) }

func (s Semaphore) op(n, flags int16, most time.Duration) error {
	b := struct {
		num       uint16
		op, flags int16
	}{0, n, flags}
	ts := unix.NsecToTimespec(int64(most))
	return retry(func() error {
		_, _, e := unix.Syscall6(unix.SYS_SEMTIMEDOP, s.id, uintptr(unsafe.Pointer(&b)), 1, uintptr(unsafe.Pointer(&ts)), 0, 0)
		if e == unix.EINTR {
			return e
		}
		return semErr("semtimedop", e)
	})
}

// Value returns the value.
func (s Semaphore) Value() (int, error) {
	v, _, e := unix.Syscall6(unix.SYS_SEMCTL, s.id, 0, semGetval, 0, 0, 0)
	return int(v), semErr("semctl GETVAL", e)
}

// Remove removes the semaphore; who waits for it gets EIDRM.
func (s Semaphore) Remove() error {
	_, _, e := unix.Syscall6(unix.SYS_SEMCTL, s.id, 0, semIPCRMID, 0, 0, 0)
	return semErr("semctl IPC_RMID", e)
}

func semErr(op string, e unix.Errno) error {
	if e == 0 {
		return nil
	}
	return fmt.Errorf("%s: %w", op, e)
}
