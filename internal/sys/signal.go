package sys

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Undisturbed calls f on a thread that takes no signal: a system call that had to wait
// in the middle of its work would be begun anew, and the Go runtime sends signals all
// the time. What stops the whole process (SIGSTOP, a freezer) does so all the same.
func Undisturbed(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, before unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^uint64(0)
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &before); err != nil {
		return pathErr("rt_sigprocmask", "", err)
	}
	defer func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil) }() // has no way to fail
	return f()
}
