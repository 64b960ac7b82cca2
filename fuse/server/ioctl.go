package server

import (
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/internal/sys"
)

// The commands that reach us, include/uapi/linux/fs.h.
const (
	fsIocGetFlags  = 0x80086601
	fsIocSetFlags  = 0x40086602
	fsIocGetXattr  = 0x801c581f
	fsIocSetXattr  = 0x401c5820
	fsIocGetFlags4 = 0x80046601 // of a 32-bit caller
	fsIocSetFlags4 = 0x40046602
)

const enotty = fuse.Status(syscall.ENOTTY)

// ioctl answers what FUSE lets through and the union has: the inode flags. The
// kernel asks for them itself, on a handle that it opens for that
// (fs/fuse/ioctl.c: fuse_fileattr_get, fuse_fileattr_set), so the handle says
// nothing that the node does not.
func (s *Server) ioctl(r *request) (int, fuse.Status) {
	in := sys.View[fuse.IoctlIn](r.in)
	n := s.node(in.NodeId)
	if n == nil {
		return 0, estale
	}
	data := r.in[sys.SizeOf[fuse.IoctlIn]():]
	size := sys.SizeOf[fuse.IoctlOut]() // its result is 0
	if len(data) < int(in.InSize) || int(in.OutSize) > len(r.out)-size {
		return 0, fuse.EINVAL
	}
	data = data[:in.InSize]
	clear(r.out[:size+int(in.OutSize)])
	out := r.out[size : size+int(in.OutSize)]
	var err error
	switch in.Cmd {
	case fsIocGetFlags, fsIocGetFlags4:
		var flags uint32
		if flags, err = s.union.FileFlags(n); err == nil && copy(out, sys.Bytes(&flags)) < 4 {
			return 0, fuse.EINVAL
		}
	case fsIocSetFlags, fsIocSetFlags4:
		if len(data) < 4 {
			return 0, fuse.EINVAL
		}
		err = s.union.SetFileFlags(s.caller(r.header(), 0), n, *sys.View[uint32](data))
	case fsIocGetXattr:
		var x sys.FSXattr
		if x, err = s.union.FSXattr(n); err == nil && copy(out, sys.Bytes(&x)) < sys.SizeOf[sys.FSXattr]() {
			return 0, fuse.EINVAL
		}
	case fsIocSetXattr:
		if len(data) < sys.SizeOf[sys.FSXattr]() {
			return 0, fuse.EINVAL
		}
		err = s.union.SetFSXattr(s.caller(r.header(), 0), n, *sys.View[sys.FSXattr](data))
	default:
		return 0, enotty
	}
	if set := in.Cmd; err == nil && set != fsIocGetFlags && set != fsIocGetFlags4 && set != fsIocGetXattr {
		s.notifyAttr(in.NodeId & nodeMask) // its ctime
	}
	return size + len(out), status(err)
}
