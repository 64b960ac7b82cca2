package sys

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// BlockBytes returns the size of an open block device (BLKGETSIZE64).
func (f *Fd) BlockBytes() (int64, error) {
	var size uint64
	err := retry(func() error { return ioctl(f.n, unix.BLKGETSIZE64, unsafe.Pointer(&size)) })
	return int64(size), f.err("ioctl BLKGETSIZE64", "", err)
}

// Discard tells an open block device that a range holds nothing any more
// (BLKDISCARD). EOPNOTSUPP where it cannot do with that.
func (f *Fd) Discard(off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)}
	err := retry(func() error { return ioctl(f.n, unix.BLKDISCARD, unsafe.Pointer(&r)) })
	runtime.KeepAlive(&r)
	return f.err("ioctl BLKDISCARD", "", err)
}

// DropBuffers writes and drops what is cached of an open block device
// (BLKFLSBUF): the next read sees what others wrote past the cache.
func (f *Fd) DropBuffers() error {
	return f.err("ioctl BLKFLSBUF", "", unix.IoctlSetInt(f.n, unix.BLKFLSBUF, 0))
}
