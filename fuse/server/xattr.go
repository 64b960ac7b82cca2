package server

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/fuse/union"
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
	return s.sized(r, in.Size, func(dest []byte) (int, error) {
		size, err := s.union.Listxattr(n, dest)
		if err != nil || dest != nil && !bytes.Contains(dest[:size], []byte("trusted.")) {
			return size, err
		}
		return s.listFor(r.header().Pid, n, dest)
	})
}

// listFor leaves out the names whose values only CAP_SYS_ADMIN may read, where
// the caller has it not: the kernel checks a getxattr and not what a list tells.
func (s *Server) listFor(pid uint32, n *union.Node, dest []byte) (int, error) {
	all := make([]byte, maxXattrList)
	size, err := s.union.Listxattr(n, all)
	if err != nil {
		return 0, err
	}
	names := all[:size]
	if bytes.Contains(names, []byte("trusted.")) && !mayAdmin(pid) {
		names = nil
		for name := range bytes.SplitAfterSeq(all[:size], []byte{0}) {
			if !bytes.HasPrefix(name, []byte("trusted.")) {
				names = append(names, name...)
			}
		}
	}
	switch {
	case dest == nil:
		return len(names), nil
	case len(names) > len(dest):
		return 0, syscall.ERANGE
	}
	return copy(dest, names), nil
}

// mayAdmin reports whether the thread pid has CAP_SYS_ADMIN here, in our user
// namespace. Requests of a mount that may be id-mapped carry no user (fs/fuse/dev.c:
// fuse_get_req), and an id would not say it. A thread that cannot be seen (0: it
// is in another pid namespace) is taken for one that may.
func mayAdmin(pid uint32) bool {
	proc := "/proc/" + strconv.FormatUint(uint64(pid), 10)
	b, err := os.ReadFile(proc + "/status")
	if err != nil {
		return true
	}
	_, after, _ := strings.Cut(string(b), "\nCapEff:")
	mask, _, _ := strings.Cut(after, "\n")
	caps, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
	if err != nil || caps&(1<<capSysAdmin) == 0 {
		return err != nil
	}
	theirs, err := os.Readlink(proc + "/ns/user")
	ours, err2 := os.Readlink("/proc/self/ns/user")
	return err != nil || err2 != nil || theirs == ours
}

// capSysAdmin is CAP_SYS_ADMIN of include/uapi/linux/capability.h.
const capSysAdmin = 21

// maxXattrList is the kernel's XATTR_LIST_MAX.
const maxXattrList = 64 << 10

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
