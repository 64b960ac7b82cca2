package sys

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DirentsBare fills buf with names of directory n from where it stands
// (getdents64) and returns how many bytes; 0 at the end.
func DirentsBare(n int, buf []byte) (int, error) {
	for {
		got, _, e := unix.Syscall(unix.SYS_GETDENTS64, uintptr(n), uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)))
		if e == 0 {
			return int(got), nil
		}
		if e != unix.EINTR {
			return 0, bare(e)
		}
	}
}

// BareDirent is one name in a buffer of DirentsBare; Name is part of the buffer.
type BareDirent struct {
	Name []byte
	Ino  uint64
	Off  int64  // where the next name is, for SeekBare
	Type uint32 // S_IFMT value; 0 where the file system does not say
}

// IsDot reports whether the name is "." or "..".
func (d *BareDirent) IsDot() bool {
	n := d.Name
	return len(n) == 1 && n[0] == '.' || len(n) == 2 && n[0] == '.' && n[1] == '.'
}

// NextDirent decodes the first name in b, "." and ".." too, and returns what comes
// after it; false at the end of b.
func NextDirent(b []byte, d *BareDirent) (rest []byte, ok bool) {
	if len(b) < 19 {
		return nil, false
	}
	reclen := int(binary.NativeEndian.Uint16(b[16:]))
	if reclen < 20 || reclen > len(b) {
		return nil, false
	}
	d.Ino = binary.NativeEndian.Uint64(b)
	d.Off = int64(binary.NativeEndian.Uint64(b[8:]))
	d.Type = uint32(b[18]) << 12
	d.Name = b[19:reclen]
	for i, c := range d.Name {
		if c == 0 {
			d.Name = d.Name[:i]
			break
		}
	}
	return b[reclen:], true
}

// SeekBare is lseek(2).
func SeekBare(n int, off int64, whence int) (int64, error) { return unix.Seek(n, off, whence) }

// MkdirBare makes a directory name below dir; umask applies.
func MkdirBare(dir int, name string, mode uint32) error {
	var c cname
	if err := c.set(name); err != nil {
		return err
	}
	_, _, e := unix.Syscall(unix.SYS_MKDIRAT, uintptr(dir), uintptr(unsafe.Pointer(&c)), uintptr(mode))
	return bare(e)
}

// MknodBare makes a fifo, socket, device or empty file; mode has the type. umask
// applies.
func MknodBare(dir int, name string, mode, major, minor uint32) error {
	var c cname
	if err := c.set(name); err != nil {
		return err
	}
	_, _, e := unix.Syscall6(unix.SYS_MKNODAT, uintptr(dir), uintptr(unsafe.Pointer(&c)), uintptr(mode),
		uintptr(unix.Mkdev(major, minor)), 0, 0)
	return bare(e)
}

// SymlinkBare makes a symlink to target.
func SymlinkBare(target string, dir int, name string) error { return unix.Symlinkat(target, dir, name) }

// LinkBare makes newname in newdir another name of name in dir; name "" means the
// file that dir is open on, one of TmpfileBare too.
func LinkBare(dir int, name string, newdir int, newname string) error {
	var to cname
	if err := to.set(newname); err != nil {
		return err
	}
	if name == "" {
		return linkOpen(dir, newdir, &to)
	}
	var from cname
	if err := from.set(name); err != nil {
		return err
	}
	_, _, e := unix.Syscall6(unix.SYS_LINKAT, uintptr(dir), uintptr(unsafe.Pointer(&from)), uintptr(newdir), uintptr(unsafe.Pointer(&to)), 0, 0)
	return bare(e)
}

// linkOpen links an open file. AT_EMPTY_PATH is for who may read any file
// (ENOENT is the answer to others, before 6.10); /proc is for all.
func linkOpen(n, newdir int, to *cname) error {
	var none cname
	_, _, e := unix.Syscall6(unix.SYS_LINKAT, uintptr(n), uintptr(unsafe.Pointer(&none)), uintptr(newdir), uintptr(unsafe.Pointer(to)), unix.AT_EMPTY_PATH, 0)
	if e != unix.ENOENT && e != unix.EPERM {
		return bare(e)
	}
	var p procName
	if err := p.set(n, ""); err != nil {
		return err
	}
	_, _, e = unix.Syscall6(unix.SYS_LINKAT, atFDCWD, uintptr(unsafe.Pointer(&p)), uintptr(newdir), uintptr(unsafe.Pointer(to)), unix.AT_SYMLINK_FOLLOW, 0)
	return bare(e)
}

// RenameBare is renameat2(2).
func RenameBare(dir int, name string, newdir int, newname string, flags uint) error {
	var from, to cname
	if err := from.set(name); err != nil {
		return err
	}
	if err := to.set(newname); err != nil {
		return err
	}
	_, _, e := unix.Syscall6(unix.SYS_RENAMEAT2, uintptr(dir), uintptr(unsafe.Pointer(&from)), uintptr(newdir),
		uintptr(unsafe.Pointer(&to)), uintptr(flags), 0)
	return bare(e)
}

// UnlinkBare removes a name below dir; flags may be AT_REMOVEDIR.
func UnlinkBare(dir int, name string, flags int) error {
	var c cname
	if err := c.set(name); err != nil {
		return err
	}
	_, _, e := unix.Syscall(unix.SYS_UNLINKAT, uintptr(dir), uintptr(unsafe.Pointer(&c)), uintptr(flags))
	return bare(e)
}

// TmpfileBare makes a file without a name in the directory dir (O_TMPFILE), which
// LinkBare can give one. flags have the access mode; O_CLOEXEC is added.
func TmpfileBare(dir int, flags int, mode uint32) (int, error) {
	dot := [2]byte{'.'}
	for {
		n, _, e := unix.Syscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(&dot)),
			uintptr(flags|unix.O_TMPFILE|unix.O_CLOEXEC|unix.O_LARGEFILE), uintptr(mode), 0, 0)
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return -1, bare(e)
		}
	}
}
