package server

import (
	"bytes"
	"errors"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/internal/sys"
)

// Requests of include/uapi/linux/fuse.h (7.45); go-fuse keeps its own to itself.
const (
	opLookup        = 1
	opForget        = 2
	opGetattr       = 3
	opSetattr       = 4
	opReadlink      = 5
	opSymlink       = 6
	opMknod         = 8
	opMkdir         = 9
	opUnlink        = 10
	opRmdir         = 11
	opRename        = 12
	opLink          = 13
	opOpen          = 14
	opRead          = 15
	opWrite         = 16
	opStatfs        = 17
	opRelease       = 18
	opFsync         = 20
	opSetxattr      = 21
	opGetxattr      = 22
	opListxattr     = 23
	opRemovexattr   = 24
	opFlush         = 25
	opInit          = 26
	opOpendir       = 27
	opReaddir       = 28
	opFsyncdir      = 30
	opAccess        = 34
	opCreate        = 35
	opInterrupt     = 36
	opDestroy       = 38
	opIoctl         = 39
	opBatchForget   = 42
	opFallocate     = 43
	opReaddirplus   = 44
	opRename2       = 45
	opLseek         = 46
	opCopyFileRange = 47
	opSyncfs        = 50
	opTmpfile       = 51
	opStatx         = 52
	opCopyRange64   = 53
	opCount         = 54
)

// oldRename is struct fuse_rename_in, without the flags of fuse_rename2_in.
type oldRename struct {
	fuse.InHeader
	Newdir uint64
}

// oldSetxattr is struct fuse_setxattr_in before FUSE_SETXATTR_EXT.
type oldSetxattr struct {
	fuse.InHeader
	Size  uint32
	Flags uint32
}

type batchForget struct {
	fuse.InHeader
	Count uint32
	Dummy uint32
}

type forgetOne struct{ Nodeid, Nlookup uint64 }

type dirent struct {
	Ino     uint64
	Off     uint64
	Namelen uint32
	Type    uint32
}

// request is one message and the room for its answer.
type request struct {
	in  []byte // whole
	out []byte // what comes after the header of the answer
}

func (r *request) header() *fuse.InHeader { return sys.View[fuse.InHeader](r.in) }

// name returns the NUL-ended string at offset at, and where the next one is.
func (r *request) name(at int) (string, int, bool) {
	if at > len(r.in) {
		return "", 0, false
	}
	n := bytes.IndexByte(r.in[at:], 0)
	if n <= 0 {
		return "", 0, false
	}
	return string(r.in[at : at+n]), at + n + 1, true
}

// reply makes the answer a T of zeros.
func reply[T any](r *request) *T {
	size := sys.SizeOf[T]()
	clear(r.out[:size])
	return sys.View[T](r.out)
}

// status is what the kernel is told of err. ENOSYS would tell it that there is
// no such request at all: it would never ask again, or open every file without
// us. Where that is meant the handlers say so themselves.
func status(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	e, bare := err.(syscall.Errno) // nearly always; errors.As allocates
	if !bare && !errors.As(err, &e) {
		return fuse.EIO
	}
	if e == syscall.ENOSYS {
		return fuse.ENOTSUP
	}
	return fuse.Status(e)
}
