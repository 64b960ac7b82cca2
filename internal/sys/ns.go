package sys

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Namespace kinds for Unshare and Setns, with the kernel's spelling.
const (
	CLONE_NEWNS   = unix.CLONE_NEWNS
	CLONE_NEWUSER = unix.CLONE_NEWUSER
	CLONE_FS      = unix.CLONE_FS
)

// Unshare gives the calling thread its own namespaces or working directory.
// The goroutine must be locked to its thread and must never unlock it, so that
// the runtime ends the thread with the goroutine.
func Unshare(flags int) error {
	return os.NewSyscallError("unshare", unix.Unshare(flags))
}

// OnMainThread reports whether the caller runs on the process's first thread,
// which a Go program cannot end and whose namespaces /proc/self shows. Only a
// goroutine that is locked to its thread can use the answer.
func OnMainThread() bool { return unix.Gettid() == unix.Getpid() }

// Setns moves the calling thread into the namespace that f is open on; kind is
// a CLONE_NEW flag. The rule of Unshare holds.
func (f *Fd) Setns(kind int) error { return f.err("setns", "", unix.Setns(f.n, kind)) }

// Fchdir makes f the working directory of the calling thread's file-system
// context: of the whole process, unless Unshare(CLONE_FS) came first.
func (f *Fd) Fchdir() error {
	return f.err("fchdir", "", retry(func() error { return unix.Fchdir(f.n) }))
}

// PidfdOpen returns a descriptor of process pid; ESRCH if there is none.
func PidfdOpen(pid int) (*Fd, error) {
	n, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	return NewFd(n, "pidfd"), nil
}

// Kill sends signal to the process of a pidfd; ESRCH if it is gone.
func (f *Fd) Kill(signal unix.Signal) error {
	return f.err("pidfd_send_signal", "", unix.PidfdSendSignal(f.n, signal, nil, 0))
}

// InFirstUserNS tells whether this process is in the first user namespace; not if
// there is no telling.
func InFirstUserNS() bool {
	ids, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && strings.Join(strings.Fields(string(ids)), " ") == "0 0 4294967295"
}
