package sys

import "golang.org/x/sys/unix"

// The operations of Flock, with the kernel's spelling.
const (
	LOCK_SH = unix.LOCK_SH
	LOCK_EX = unix.LOCK_EX
	LOCK_NB = unix.LOCK_NB
	LOCK_UN = unix.LOCK_UN
)

// Flock takes or releases the advisory lock of f's open file, which may be a
// directory: EAGAIN under LOCK_NB when another open file has it. It is released
// when the last descriptor of this open file is closed, by a crash too. Changing
// from one kind to the other is not atomic (flock(2)).
func (f *Fd) Flock(how int) error {
	return f.err("flock", "", retry(func() error { return unix.Flock(f.n, how) }))
}
