package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// FileHandle names a file of one file system whatever its path is, as
// name_to_handle_at(2) has it.
type FileHandle struct {
	Type int32
	Len  int
	Data [MaxHandle]byte
}

// MaxHandle is the kernel's MAX_HANDLE_SZ.
const MaxHandle = 128

// fileHandle is struct file_handle of include/linux/fs.h.
type fileHandle struct {
	bytes uint32
	typ   int32
	data  [MaxHandle]byte
}

// HandleBare gives the handle of name below dir, and the id of the mount that it
// is seen in. EOPNOTSUPP where the file system has none.
func HandleBare(dir int, name string, h *FileHandle) (mount int, err error) {
	var c cname
	if err := c.set(name); err != nil {
		return 0, err
	}
	raw := fileHandle{bytes: MaxHandle}
	var id int32
	_, _, e := unix.Syscall6(unix.SYS_NAME_TO_HANDLE_AT, uintptr(dir), uintptr(unsafe.Pointer(&c)), uintptr(unsafe.Pointer(&raw)),
		uintptr(unsafe.Pointer(&id)), emptyPath(name), 0)
	if e != 0 {
		return 0, bare(e)
	}
	h.Type, h.Len, h.Data = raw.typ, int(min(raw.bytes, MaxHandle)), raw.data
	return int(id), nil
}

// OpenHandleBare opens a file by its handle; mount is a descriptor, not O_PATH, of
// anything on that file system. ESTALE if the file is gone. Needs
// CAP_DAC_READ_SEARCH. O_CLOEXEC is added.
func OpenHandleBare(mount int, h *FileHandle, flags int) (int, error) {
	raw := fileHandle{bytes: uint32(h.Len), typ: h.Type, data: h.Data}
	for {
		n, _, e := unix.Syscall(unix.SYS_OPEN_BY_HANDLE_AT, uintptr(mount), uintptr(unsafe.Pointer(&raw)),
			uintptr(flags|unix.O_CLOEXEC|unix.O_LARGEFILE))
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return -1, bare(e)
		}
	}
}
