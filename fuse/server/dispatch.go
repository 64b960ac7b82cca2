package server

import (
	"runtime/debug"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/internal/sys"
)

const (
	inHeaderSize  = 40
	outHeaderSize = 16
)

// operation says how a request is read: how long its fixed part is, and who
// answers it with how many bytes.
type operation struct {
	name    string
	size    int
	silent  bool // no answer is sent
	perform func(s *Server, r *request) (int, fuse.Status)
}

// nothing makes an operation of one that answers with a status alone.
func nothing(f func(s *Server, r *request) fuse.Status) func(s *Server, r *request) (int, fuse.Status) {
	return func(s *Server, r *request) (int, fuse.Status) { return 0, f(s, r) }
}

var operations = [opCount]operation{
	opLookup:        {"LOOKUP", inHeaderSize, false, (*Server).lookup},
	opForget:        {"FORGET", sys.SizeOf[fuse.ForgetIn](), true, (*Server).forget},
	opBatchForget:   {"BATCH_FORGET", sys.SizeOf[batchForget](), true, (*Server).batchForget},
	opGetattr:       {"GETATTR", sys.SizeOf[fuse.GetAttrIn](), false, (*Server).getattr},
	opStatx:         {"STATX", sys.SizeOf[fuse.StatxIn](), false, (*Server).statx},
	opSetattr:       {"SETATTR", sys.SizeOf[fuse.SetAttrIn](), false, (*Server).setattr},
	opReadlink:      {"READLINK", inHeaderSize, false, (*Server).readlink},
	opSymlink:       {"SYMLINK", inHeaderSize, false, (*Server).symlink},
	opMknod:         {"MKNOD", sys.SizeOf[fuse.MknodIn](), false, (*Server).mknod},
	opMkdir:         {"MKDIR", sys.SizeOf[fuse.MkdirIn](), false, (*Server).mkdir},
	opUnlink:        {"UNLINK", inHeaderSize, false, nothing((*Server).unlink)},
	opRmdir:         {"RMDIR", inHeaderSize, false, nothing((*Server).rmdir)},
	opRename:        {"RENAME", sys.SizeOf[oldRename](), false, nothing((*Server).rename)},
	opRename2:       {"RENAME2", sys.SizeOf[fuse.RenameIn](), false, nothing((*Server).rename2)},
	opLink:          {"LINK", sys.SizeOf[fuse.LinkIn](), false, (*Server).link},
	opOpen:          {"OPEN", sys.SizeOf[fuse.OpenIn](), false, (*Server).open},
	opCreate:        {"CREATE", sys.SizeOf[fuse.CreateIn](), false, (*Server).create},
	opTmpfile:       {"TMPFILE", sys.SizeOf[fuse.CreateIn](), false, (*Server).tmpfile},
	opRead:          {"READ", sys.SizeOf[fuse.ReadIn](), false, (*Server).read},
	opWrite:         {"WRITE", sys.SizeOf[fuse.WriteIn](), false, (*Server).write},
	opRelease:       {"RELEASE", sys.SizeOf[fuse.ReleaseIn](), false, nothing((*Server).release)},
	opFlush:         {"FLUSH", sys.SizeOf[fuse.FlushIn](), false, nothing((*Server).flush)},
	opFsync:         {"FSYNC", sys.SizeOf[fuse.FsyncIn](), false, nothing((*Server).fsync)},
	opFallocate:     {"FALLOCATE", sys.SizeOf[fuse.FallocateIn](), false, nothing((*Server).fallocate)},
	opLseek:         {"LSEEK", sys.SizeOf[fuse.LseekIn](), false, (*Server).lseek},
	opCopyFileRange: {"COPY_FILE_RANGE", sys.SizeOf[fuse.CopyFileRangeIn](), false, (*Server).copyFileRange},
	opCopyRange64:   {"COPY_FILE_RANGE_64", sys.SizeOf[fuse.CopyFileRangeIn](), false, (*Server).copyFileRange},
	opIoctl:         {"IOCTL", sys.SizeOf[fuse.IoctlIn](), false, (*Server).ioctl},
	opOpendir:       {"OPENDIR", sys.SizeOf[fuse.OpenIn](), false, (*Server).opendir},
	opReaddir:       {"READDIR", sys.SizeOf[fuse.ReadIn](), false, (*Server).readdir},
	opReaddirplus:   {"READDIRPLUS", sys.SizeOf[fuse.ReadIn](), false, (*Server).readdirplus},
	opFsyncdir:      {"FSYNCDIR", sys.SizeOf[fuse.FsyncIn](), false, nothing((*Server).fsyncdir)},
	opGetxattr:      {"GETXATTR", sys.SizeOf[fuse.GetXAttrIn](), false, (*Server).getxattr},
	opListxattr:     {"LISTXATTR", sys.SizeOf[fuse.GetXAttrIn](), false, (*Server).listxattr},
	opSetxattr:      {"SETXATTR", sys.SizeOf[oldSetxattr](), false, nothing((*Server).setxattr)},
	opRemovexattr:   {"REMOVEXATTR", inHeaderSize, false, nothing((*Server).removexattr)},
	opStatfs:        {"STATFS", inHeaderSize, false, (*Server).statfs},
	opSyncfs:        {"SYNCFS", inHeaderSize, false, nothing((*Server).syncfs)},
	opInit:          {"INIT", inHeaderSize + 16, false, (*Server).init},
	opDestroy:       {"DESTROY", inHeaderSize, false, nothing(func(*Server, *request) fuse.Status { return fuse.OK })},
	// No request waits for another one, and what takes long (a copy-up) looks by
	// itself whether its caller is being killed: the kernel sends no more of these,
	// which come for harmless signals, too.
	opInterrupt: {"INTERRUPT", inHeaderSize, false, nothing(func(*Server, *request) fuse.Status { return fuse.ENOSYS })},
}

// handle answers one message: in is the message, out has room for the longest
// answer. It returns the length of the answer, 0 for none. r is only there so
// that who calls it again and again needs to make one only.
func (s *Server) handle(r *request, in, out []byte) int {
	if len(in) < inHeaderSize {
		s.logf("request of %d bytes", len(in))
		return 0
	}
	r.in, r.out = in, out[outHeaderSize:]
	h := r.header()
	n, st, silent := s.perform(h.Opcode, r)
	if silent {
		return 0
	}
	if st != fuse.OK {
		n = 0
	}
	o := sys.View[fuse.OutHeader](out)
	o.Length, o.Status, o.Unique = uint32(outHeaderSize+n), -int32(st), h.Unique
	return outHeaderSize + n
}

func (s *Server) perform(code uint32, r *request) (n int, st fuse.Status, silent bool) {
	if code >= opCount || operations[code].perform == nil {
		return 0, fuse.ENOSYS, false
	}
	op := &operations[code]
	if len(r.in) < op.size {
		s.logf("%s of %d bytes, not %d", op.name, len(r.in), op.size)
		return 0, fuse.EIO, op.silent
	}
	defer func() { // the mount goes on: one request is lost, not all of them
		if p := recover(); p != nil {
			s.logf("panic in %s: %v\n%s", op.name, p, debug.Stack())
			n, st, silent = 0, fuse.EIO, op.silent
		}
	}()
	s.requests.Add(1)
	n, st = op.perform(s, r)
	if s.o.Debug {
		h := r.header()
		s.logf("%d %s node %d pid %d: %d bytes, %v", h.Unique, op.name, h.NodeId, h.Pid, n, st)
	}
	return n, st, op.silent
}
