// Package sys is the one door to the kernel: the only importer of
// golang.org/x/sys/unix and unsafe. It gives file descriptors with one owner,
// and system calls in terms of a directory descriptor and a name, so that
// callers cannot resolve a path outside a tree by mistake.
//
// Every error is an *os.PathError (or *os.LinkError) that wraps the
// syscall.Errno. EINTR is retried here.
package sys

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Fd owns one file descriptor. It is not safe to use after Close. It has no
// finalizer: an Fd that is not closed is a leak, which tests find.
type Fd struct {
	n    int
	name string // for errors: the path it was opened by
}

// NewFd takes ownership of descriptor n.
func NewFd(n int, name string) *Fd { return &Fd{n: n, name: name} }

// Int returns the descriptor's number, valid until Close.
func (f *Fd) Int() int { return f.n }

// Name returns the path that the descriptor was opened by.
func (f *Fd) Name() string { return f.name }

// ProcPath returns /proc/self/fd/N: a path that names the open file itself,
// for interfaces that take only paths.
func (f *Fd) ProcPath() string { return "/proc/self/fd/" + strconv.Itoa(f.n) }

// Close closes the descriptor. A second Close does nothing.
func (f *Fd) Close() error {
	if f == nil || f.n < 0 {
		return nil
	}
	n := f.n
	f.n = -1
	if err := unix.Close(n); err != nil && err != unix.EINTR {
		return f.err("close", "", err)
	}
	return nil
}

// File gives the descriptor to an *os.File, which owns it from then on.
func (f *Fd) File() *os.File {
	n := f.n
	f.n = -1
	return os.NewFile(uintptr(n), f.name)
}

func (f *Fd) err(op, name string, err error) error {
	if err == nil {
		return nil
	}
	p := f.name
	if name != "" {
		p += "/" + name
	}
	return &os.PathError{Op: op, Path: p, Err: err}
}

func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// Flags that callers of Open need, with the kernel's spelling.
const (
	O_RDONLY    = unix.O_RDONLY
	O_WRONLY    = unix.O_WRONLY
	O_RDWR      = unix.O_RDWR
	O_CREAT     = unix.O_CREAT
	O_EXCL      = unix.O_EXCL
	O_TRUNC     = unix.O_TRUNC
	O_DIRECTORY = unix.O_DIRECTORY
	O_NOFOLLOW  = unix.O_NOFOLLOW
	O_PATH      = unix.O_PATH
	O_TMPFILE   = unix.O_TMPFILE
	O_NOATIME   = unix.O_NOATIME
	O_NONBLOCK  = unix.O_NONBLOCK

	RESOLVE_BENEATH       = unix.RESOLVE_BENEATH
	RESOLVE_IN_ROOT       = unix.RESOLVE_IN_ROOT
	RESOLVE_NO_SYMLINKS   = unix.RESOLVE_NO_SYMLINKS
	RESOLVE_NO_MAGICLINKS = unix.RESOLVE_NO_MAGICLINKS
	RESOLVE_NO_XDEV       = unix.RESOLVE_NO_XDEV

	AT_REMOVEDIR = unix.AT_REMOVEDIR

	RENAME_NOREPLACE = unix.RENAME_NOREPLACE
	RENAME_EXCHANGE  = unix.RENAME_EXCHANGE
	RENAME_WHITEOUT  = unix.RENAME_WHITEOUT
)

// Open opens an absolute or working-directory path that the caller trusts
// (a configured root, not a path from an archive). O_CLOEXEC is added.
func Open(path string, flags int, mode uint32) (*Fd, error) {
	var n int
	err := retry(func() (err error) {
		n, err = unix.Open(path, flags|unix.O_CLOEXEC, mode)
		return err
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &Fd{n: n, name: path}, nil
}

// OpenDir opens a trusted directory for reading.
func OpenDir(path string) (*Fd, error) { return Open(path, O_RDONLY|O_DIRECTORY, 0) }

// Openat opens one component below f, never following a symlink there.
// O_CLOEXEC and O_NOFOLLOW are added.
func (f *Fd) Openat(name string, flags int, mode uint32) (*Fd, error) {
	var n int
	err := retry(func() (err error) {
		n, err = unix.Openat(f.n, name, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, mode)
		return err
	})
	if err != nil {
		return nil, f.err("openat", name, err)
	}
	return &Fd{n: n, name: f.name + "/" + name}, nil
}

// Openat2 opens a path below f under the given RESOLVE_ flags: the door for
// paths that come from an archive, an image or a request. O_CLOEXEC is added.
// The kernel answers EAGAIN when a rename races with RESOLVE_IN_ROOT; it is
// retried.
func (f *Fd) Openat2(path string, flags int, mode uint32, resolve uint64) (*Fd, error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Mode: uint64(mode), Resolve: resolve}
	for range 1000 {
		n, err := unix.Openat2(f.n, path, &how)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return nil, f.err("openat2", path, err)
		}
		return &Fd{n: n, name: f.name + "/" + path}, nil
	}
	return nil, f.err("openat2", path, unix.EAGAIN)
}

// Dup returns a second descriptor of the same open file.
func (f *Fd) Dup() (*Fd, error) {
	n, err := unix.FcntlInt(uintptr(f.n), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, f.err("dup", "", err)
	}
	return &Fd{n: n, name: f.name}, nil
}
