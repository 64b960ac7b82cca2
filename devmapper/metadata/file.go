package metadata

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"syscall"
)

// File reads a file or device with metadata past the page cache: the kernel writes
// to a device without a look at the pages that are cached of it, and what a buffered read
// finds there may be from before.
type File struct {
	f      *os.File
	direct bool // false where the file system cannot: there the pages are what the loop device above writes to
}

// OpenFile opens metadata for reading.
func OpenFile(path string) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECT, 0)
	direct := err == nil
	if errors.Is(err, syscall.EINVAL) {
		f, err = os.Open(path)
	}
	if err != nil {
		return nil, fmt.Errorf("thin metadata: %w", err)
	}
	return &File{f: f, direct: direct}, nil
}

// ReadAt reads a block, or a part of one.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if !f.direct {
		return f.f.ReadAt(p, off)
	}
	in := off % BlockSize
	if off < 0 || in+int64(len(p)) > BlockSize {
		return 0, fmt.Errorf("thin metadata: read of %d bytes at %d, not within a block: %w", len(p), off, syscall.EINVAL)
	}
	page := alignedPage()
	n, err := f.f.ReadAt(page, off-in)
	if n = copy(p, page[min(int64(n), in):n]); n == len(p) {
		err = nil
	}
	return n, err
}

// alignedPage is memory that begins at a page, as O_DIRECT wants it.
func alignedPage() []byte {
	b := make([]byte, 2*BlockSize)
	skip := -reflect.ValueOf(b).Pointer() % BlockSize
	return b[skip : skip+BlockSize]
}

// Close closes the file. It may be called again.
func (f *File) Close() error {
	if err := f.f.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
