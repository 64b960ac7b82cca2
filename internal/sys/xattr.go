package sys

import (
	"strings"

	"golang.org/x/sys/unix"
)

// path names a component below f for the l*xattr calls, which take no
// descriptor before kernel 6.13; name "" means f itself, O_PATH or not.
func (f *Fd) path(name string) string {
	if name == "" {
		return f.ProcPath()
	}
	return f.ProcPath() + "/" + name
}

// Listxattr lists the xattr names of a component below f, not following a
// symlink; name "" means f itself. A file system without xattrs gives none.
func (f *Fd) Listxattr(name string) ([]string, error) {
	b, err := grow(256, func(b []byte) (int, error) {
		if name != "" {
			return f.listxattrat(name, b)
		}
		n, err := unix.Flistxattr(f.n, b)
		if err == unix.EBADF { // O_PATH: the magic link must be followed
			n, err = unix.Listxattr(f.ProcPath(), b)
		}
		return n, err
	})
	if err == unix.EOPNOTSUPP {
		return nil, nil
	}
	if err != nil || len(b) == 0 {
		return nil, f.err("listxattr", name, err)
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"), nil
}

// Getxattr reads one xattr; ENODATA if it is not there.
func (f *Fd) Getxattr(name, attr string) (string, error) {
	b, err := grow(256, func(b []byte) (int, error) {
		if name != "" {
			return unix.Lgetxattr(f.path(name), attr, b)
		}
		n, err := unix.Fgetxattr(f.n, attr, b)
		if err == unix.EBADF {
			n, err = unix.Getxattr(f.ProcPath(), attr, b)
		}
		return n, err
	})
	return string(b), f.err("getxattr "+attr, name, err)
}

// Setxattr sets one xattr.
func (f *Fd) Setxattr(name, attr, value string) error {
	return f.err("setxattr "+attr, name, retry(func() error {
		if name != "" {
			return unix.Lsetxattr(f.path(name), attr, []byte(value), 0)
		}
		err := unix.Fsetxattr(f.n, attr, []byte(value), 0)
		if err == unix.EBADF {
			err = unix.Setxattr(f.ProcPath(), attr, []byte(value), 0)
		}
		return err
	}))
}

// Removexattr removes one xattr; ENODATA if it is not there.
func (f *Fd) Removexattr(name, attr string) error {
	return f.err("removexattr "+attr, name, retry(func() error {
		if name != "" {
			return unix.Lremovexattr(f.path(name), attr)
		}
		err := unix.Fremovexattr(f.n, attr)
		if err == unix.EBADF {
			err = unix.Removexattr(f.ProcPath(), attr)
		}
		return err
	}))
}

// grow calls read with larger buffers until its answer fits. The kernel's
// bound is 64 KiB; an answer that grows meanwhile is asked for again.
func grow(size int, read func([]byte) (int, error)) ([]byte, error) {
	for {
		b := make([]byte, size)
		n, err := read(b)
		switch {
		case err == unix.EINTR:
		case err == unix.ERANGE && size < 1<<20:
			size *= 4
		case err != nil:
			return nil, err
		default:
			return b[:n], nil
		}
	}
}
