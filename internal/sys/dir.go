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
	if _, err := unix.Seek(f.n, 0, unix.SEEK_SET); err != nil {
		return nil, f.err("lseek", "", err)
	}
	p := direntBuffers.Get().(*[]byte)
	defer direntBuffers.Put(p)
	var all []Dirent
	for {
		var n int
		err := retry(func() (err error) { n, err = unix.Getdents(f.n, *p); return err })
		if err != nil {
			return nil, f.err("getdents64", "", err)
		}
		if n == 0 {
			return all, nil
		}
		all = appendDirents(all, (*p)[:n])
	}
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
