package sys

import (
	"encoding/binary"
	"sync"

	"golang.org/x/sys/unix"
)

// Dirent is one name of a directory.
type Dirent struct {
	Name string
	Ino  uint64
	Type uint32 // S_IFMT value; 0 where the file system does not say
}

var direntBuffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// ReadDir reads a whole directory from its start, without "." and "..", in the
// file system's order. f must not be O_PATH.
func (f *Fd) ReadDir() ([]Dirent, error) {
	var all []Dirent
	err := f.EachDirents(func(some []Dirent) error {
		all = append(all, some...)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// EachDirents is ReadDir for directories of any size: it hands out a directory's
// names some at a time, in a slice that it uses again. do may remove names that it
// was given; what is made meanwhile may be seen or not.
func (f *Fd) EachDirents(do func([]Dirent) error) error {
	if _, err := unix.Seek(f.n, 0, unix.SEEK_SET); err != nil {
		return f.err("lseek", "", err)
	}
	var some []Dirent
	for {
		var n int
		var err error
		if some, n, err = f.nextDirents(some[:0]); err != nil || n == 0 {
			return err
		}
		if err := do(some); err != nil {
			return err
		}
	}
}

// nextDirents reads one buffer of names, n bytes of them, and keeps no buffer: do may
// go down a deep tree.
func (f *Fd) nextDirents(some []Dirent) (_ []Dirent, n int, err error) {
	p := direntBuffers.Get().(*[]byte)
	defer direntBuffers.Put(p)
	err = retry(func() (err error) { n, err = unix.Getdents(f.n, *p); return err })
	return appendDirents(some, (*p)[:max(n, 0)]), n, f.err("getdents64", "", err)
}

// appendDirents decodes struct linux_dirent64 (include/linux/dirent.h): ino 8,
// off 8, reclen 2, type 1, name NUL-terminated.
func appendDirents(all []Dirent, b []byte) []Dirent {
	for len(b) >= 19 {
		reclen := int(binary.NativeEndian.Uint16(b[16:]))
		if reclen < 19 || reclen > len(b) {
			return all
		}
		name := b[19:reclen]
		for i, c := range name {
			if c == 0 {
				name = name[:i]
				break
			}
		}
		if s := string(name); s != "." && s != ".." {
			all = append(all, Dirent{Name: s, Ino: binary.NativeEndian.Uint64(b), Type: uint32(b[18]) << 12})
		}
		b = b[reclen:]
	}
	return all
}
