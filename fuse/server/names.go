package server

import (
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
)

const (
	estale = fuse.Status(syscall.ESTALE)
	enomem = fuse.Status(syscall.ENOMEM)
)

// at returns the directory that a request is about, and the name in it that
// stands after its fixed part of size bytes.
func (s *Server) at(r *request, size int) (*union.Node, string, fuse.Status) {
	dir := s.node(r.header().NodeId)
	if dir == nil {
		return nil, "", estale
	}
	name, _, ok := r.name(size)
	if !ok {
		return nil, "", fuse.EINVAL
	}
	return dir, name, fuse.OK
}

func (s *Server) lookup(r *request) (int, fuse.Status) {
	dir, name, st := s.at(r, inHeaderSize)
	if name == "." || st == estale && s.o.Export {
		return s.recall(r)
	}
	if st != fuse.OK {
		return 0, st
	}
	e, err := s.union.Lookup(dir, name)
	if err != nil && status(err) == fuse.ENOENT {
		o := reply[fuse.EntryOut](r) // node 0: there is none, which holds as long as a name
		o.EntryValid, o.EntryValidNsec = s.valid.sec, s.valid.nsec
		return sys.SizeOf[fuse.EntryOut](), fuse.OK
	}
	return s.entry(r, e, err)
}

// recall answers a LOOKUP of ".", by which the kernel asks for the inode of a file
// handle that it does not have any more. It compares the generation itself
// (fs/fuse/inode.c: fuse_get_dentry).
func (s *Server) recall(r *request) (int, fuse.Status) {
	if name, _, ok := r.name(inHeaderSize); !ok || name != "." {
		return 0, estale
	}
	e, err := s.union.Recall(r.header().NodeId & nodeMask)
	return s.entry(r, e, err)
}

func (s *Server) forget(r *request) (int, fuse.Status) {
	in := sys.View[fuse.ForgetIn](r.in)
	s.forgetNode(in.NodeId, in.Nlookup)
	return 0, fuse.OK
}

func (s *Server) batchForget(r *request) (int, fuse.Status) {
	in := sys.View[batchForget](r.in)
	at, each := sys.SizeOf[batchForget](), sys.SizeOf[forgetOne]()
	for i := uint32(0); i < in.Count && at+each <= len(r.in); i++ {
		one := sys.View[forgetOne](r.in[at:])
		s.forgetNode(one.Nodeid, one.Nlookup)
		at += each
	}
	return 0, fuse.OK
}

func (s *Server) forgetNode(nodeid, count uint64) {
	node := nodeid & nodeMask
	s.half.drop(node) // it would keep the node
	s.union.Forget(node, count)
	if s.opens.switched.Load() && s.union.Node(node) == nil {
		s.opens.forget(node)
	}
	s.memory.forgot()
}

func (s *Server) readlink(r *request) (int, fuse.Status) {
	n := s.node(r.header().NodeId)
	if n == nil {
		return 0, estale
	}
	target, err := s.union.Readlink(n)
	return copy(r.out, target), status(err)
}

func (s *Server) mkdir(r *request) (int, fuse.Status) {
	in := sys.View[fuse.MkdirIn](r.in)
	dir, name, st := s.at(r, sys.SizeOf[fuse.MkdirIn]())
	if st != fuse.OK {
		return 0, st
	}
	e, err := s.union.Mkdir(s.caller(&in.InHeader, in.Umask), dir, name, in.Mode)
	return s.entry(r, e, err)
}

func (s *Server) mknod(r *request) (int, fuse.Status) {
	in := sys.View[fuse.MknodIn](r.in)
	dir, name, st := s.at(r, sys.SizeOf[fuse.MknodIn]())
	if st != fuse.OK {
		return 0, st
	}
	major, minor := decodeDev(in.Rdev)
	e, err := s.union.Mknod(s.caller(&in.InHeader, in.Umask), dir, name, in.Mode, major, minor)
	return s.entry(r, e, err)
}

func (s *Server) symlink(r *request) (int, fuse.Status) {
	h := r.header()
	dir := s.node(h.NodeId)
	if dir == nil {
		return 0, estale
	}
	name, next, ok := r.name(inHeaderSize)
	target, _, ok2 := r.name(next)
	if !ok || !ok2 {
		return 0, fuse.EINVAL
	}
	e, err := s.union.Symlink(s.caller(h, 0), dir, name, target)
	return s.entry(r, e, err)
}

func (s *Server) link(r *request) (int, fuse.Status) {
	in := sys.View[fuse.LinkIn](r.in)
	dir, name, st := s.at(r, sys.SizeOf[fuse.LinkIn]())
	if st != fuse.OK {
		return 0, st
	}
	n := s.node(in.Oldnodeid)
	if n == nil {
		return 0, estale
	}
	e, err := s.union.Link(s.caller(&in.InHeader, 0), n, dir, name)
	return s.entry(r, e, err)
}

func (s *Server) unlink(r *request) fuse.Status {
	dir, name, st := s.at(r, inHeaderSize)
	if st != fuse.OK {
		return st
	}
	return status(s.union.Unlink(dir, name))
}

func (s *Server) rmdir(r *request) fuse.Status {
	dir, name, st := s.at(r, inHeaderSize)
	if st != fuse.OK {
		return st
	}
	return status(s.union.Rmdir(dir, name))
}

func (s *Server) rename(r *request) fuse.Status {
	return s.move(r, sys.View[oldRename](r.in).Newdir, 0, sys.SizeOf[oldRename]())
}

func (s *Server) rename2(r *request) fuse.Status {
	in := sys.View[fuse.RenameIn](r.in)
	return s.move(r, in.Newdir, in.Flags, sys.SizeOf[fuse.RenameIn]())
}

func (s *Server) move(r *request, to uint64, flags uint32, size int) fuse.Status {
	h := r.header()
	olddir, newdir := s.node(h.NodeId), s.node(to)
	if olddir == nil || newdir == nil {
		return estale
	}
	oldname, next, ok := r.name(size)
	newname, _, ok2 := r.name(next)
	if !ok || !ok2 {
		return fuse.EINVAL
	}
	return status(s.union.Rename(s.caller(h, 0), olddir, oldname, newdir, newname, flags))
}

func (s *Server) statfs(r *request) (int, fuse.Status) {
	x, err := s.union.Statfs()
	if err != nil {
		return 0, status(err)
	}
	*reply[fuse.StatfsOut](r) = fuse.StatfsOut{Blocks: x.Blocks, Bfree: x.BlocksFree, Bavail: x.BlocksUser, Files: x.Files,
		Ffree: x.FilesFree, Bsize: uint32(x.BlockSize), Frsize: uint32(x.BlockSize), NameLen: 255}
	return sys.SizeOf[fuse.StatfsOut](), fuse.OK
}

// syncfs is not asked for by the kernels known (6.18: virtiofs alone has it).
func (s *Server) syncfs(*request) fuse.Status { return status(s.union.Syncfs()) }
