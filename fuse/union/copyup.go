package union

import (
	"context"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// copyWhat says how much of a regular file is copied up.
type copyWhat int

const (
	copyAll    copyWhat = iota
	copyMeta            // owner, mode, times, xattrs; data stay below (metacopy)
	copyNoData          // the same, and the file is empty: it was opened with O_TRUNC
)

// copySource is the object below that is copied up.
type copySource struct {
	fd   int // O_PATH or better, of the object itself; the caller's
	stat sys.Stat
	data int     // regular files: O_PATH or better of the file with the data, if that is another one (metacopy); else -1
	id   *fileID // becomes xattr origin; nil: an empty origin is written (unknown)
}

// copyRequest is one copy-up. The parent is in upper already.
type copyRequest struct {
	src      copySource
	what     copyWhat
	dir      int    // the directory in upper: not O_PATH-only if durable is wanted
	name     string // must not be there
	redirect string // becomes xattr redirect (metacopy that was moved); "": none
	shared   bool   // Config.Index and the source has several links: built in index, then linked
	noOrigin bool   // no origin xattr, no impure parent: what the kernel does where handles do not work
}

// copyUp copies one object up: it is there whole afterwards, or not at all. The
// times of dir are as before. A directory is made without its children.
func (u *upper) copyUp(ctx context.Context, r *copyRequest) error { return syscall.ENOSYS }

// copyUpData fills in the data of a metacopy file in upper: fd is O_PATH or
// better of it, data of the file with the data.
func (u *upper) copyUpData(ctx context.Context, fd, data int) error { return syscall.ENOSYS }

// setImpure marks a directory in upper as one that has copied-up objects in it.
func (u *upper) setImpure(dir int) error { return syscall.ENOSYS }
