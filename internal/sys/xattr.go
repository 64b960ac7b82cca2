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
	call := unix.Llistxattr
	if name == "" {
		call = unix.Listxattr // the magic link must be followed
	}
	b, err := grow(256, func(b []byte) (int, error) { return call(f.path(name), b) })
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
	call := unix.Lgetxattr
	if name == "" {
		call = unix.Getxattr
	}
	b, err := grow(256, func(b []byte) (int, error) { return call(f.path(name), attr, b) })
	return string(b), f.err("getxattr "+attr, name, err)
}

// Setxattr sets one xattr.
func (f *Fd) Setxattr(name, attr, value string) error {
	call := unix.Lsetxattr
	if name == "" {
		call = unix.Setxattr
	}
	return f.err("setxattr "+attr, name, retry(func() error { return call(f.path(name), attr, []byte(value), 0) }))
}

// Removexattr removes one xattr; ENODATA if it is not there.
func (f *Fd) Removexattr(name, attr string) error {
	call := unix.Lremovexattr
	if name == "" {
		call = unix.Removexattr
	}
	return f.err("removexattr "+attr, name, retry(func() error { return call(f.path(name), attr) }))
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
