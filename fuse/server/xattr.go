package server

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/internal/sys"
)

// sized answers a request for a value or a list: with its size where none is
// given, as far as it fits into the answer otherwise.
func (s *Server) sized(r *request, size uint32, read func(dest []byte) (int, error)) (int, fuse.Status) {
	if s.o.NoXattrs {
		return 0, fuse.ENOSYS // the kernel asks no more
	}
	if size > 0 {
		n, err := read(r.out[:min(int(size), len(r.out))])
		return n, status(err)
	}
	n, err := read(nil)
	if err != nil {
		return 0, status(err)
	}
	reply[fuse.GetXAttrOut](r).Size = uint32(n)
	return sys.SizeOf[fuse.GetXAttrOut](), fuse.OK
}

func (s *Server) getxattr(r *request) (int, fuse.Status) {
	in := sys.View[fuse.GetXAttrIn](r.in)
	n, attr, st := s.at(r, sys.SizeOf[fuse.GetXAttrIn]())
	if st != fuse.OK {
		return 0, st
	}
	return s.sized(r, in.Size, func(dest []byte) (int, error) { return s.union.Getxattr(n, attr, dest) })
}

func (s *Server) listxattr(r *request) (int, fuse.Status) {
	in := sys.View[fuse.GetXAttrIn](r.in)
	n := s.node(in.NodeId)
	if n == nil {
		return 0, estale
	}
	return s.sized(r, in.Size, func(dest []byte) (int, error) { return s.union.Listxattr(n, dest) })
}

func (s *Server) setxattr(r *request) fuse.Status {
	if s.o.NoXattrs {
		return fuse.ENOSYS
	}
	in := sys.View[oldSetxattr](r.in)
	size, kill := sys.SizeOf[oldSetxattr](), false
	if s.setxattrExt {
		size = sys.SizeOf[fuse.SetXAttrIn]()
		if len(r.in) < size {
			return fuse.EIO
		}
		kill = sys.View[fuse.SetXAttrIn](r.in).SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0
	}
	n := s.node(in.NodeId)
	if n == nil {
		return estale
	}
	attr, at, ok := r.name(size)
	if !ok || at+int(in.Size) > len(r.in) {
		return fuse.EINVAL
	}
	return status(s.union.Setxattr(s.caller(&in.InHeader, 0), n, attr, r.in[at:at+int(in.Size)], in.Flags, kill))
}

func (s *Server) removexattr(r *request) fuse.Status {
	if s.o.NoXattrs {
		return fuse.ENOSYS
	}
	n, attr, st := s.at(r, inHeaderSize)
	if st != fuse.OK {
		return st
	}
	return status(s.union.Removexattr(s.caller(r.header(), 0), n, attr))
}
