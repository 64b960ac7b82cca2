package server

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
)

// file is an open file.
type file struct {
	f       *union.File
	nodeid  uint64
	through bool // in passthrough
	mapped  bool // in passthrough, and can be mapped for writing
}

const (
	setID      = syscall.S_ISUID | syscall.S_ISGID
	accessMode = sys.O_RDONLY | sys.O_WRONLY | sys.O_RDWR
)

// openFlags is how a file is opened for the kernel's open flags. Where to append
// and what to flush the kernel says with each request (O_APPEND only tells the
// union that nothing else is meant); O_DIRECT would need aligned buffers, and who
// wants it wants the file below (passthrough).
func (s *Server) openFlags(wire uint32) uint32 {
	flags := wire & (accessMode | sys.O_TRUNC | syscall.O_APPEND)
	if s.writeback && flags&accessMode == sys.O_WRONLY {
		flags = flags&^accessMode | sys.O_RDWR // to write a part of a page the kernel reads all of it
	}
	return flags
}

func (s *Server) open(r *request) (int, fuse.Status) {
	in := sys.View[fuse.OpenIn](r.in)
	n := s.node(in.NodeId)
	if n == nil {
		return 0, estale
	}
	f, err := s.union.Open(s.caller(&in.InHeader, 0), n, s.openFlags(in.Flags))
	if err != nil {
		return 0, status(err)
	}
	if in.Mode&fuse.OPEN_KILL_SUIDGID != 0 {
		if _, err := s.union.Setattr(s.caller(&in.InHeader, 0), n, f, union.SetAttr{KillPriv: true}); err != nil {
			_ = f.Close()
			return 0, status(err)
		}
	}
	mode := uint32(setID) // not known to have none
	if s.wantsPassthrough(f.Upper()) {
		a, err := s.union.Getattr(n, f)
		if err != nil {
			_ = f.Close()
			return 0, status(err)
		}
		mode = a.Mode
	}
	o := reply[fuse.OpenOut](r)
	if st := s.openFile(o, f, in.NodeId, in.Flags, mode, false); st != fuse.OK {
		_ = f.Close()
		return 0, st
	}
	return sys.SizeOf[fuse.OpenOut](), fuse.OK
}

// openFile decides how the kernel uses a file, and answers. The rules
// (fs/fuse/iomode.c):
//
//   - While a node is open in passthrough, each further open of it is, with the
//     same backing id. If that is the file of a layer that the node is not in any
//     more, the open is ESTALE: the kernel looks the name up again and finds a
//     node that it does not know yet.
//   - While a node is open with the page cache, each further open is.
//   - Else it is as the policy wants it.
//
// A setuid or setgid file is not in passthrough, where nobody asks who writes. One
// that gets the bits while it is in passthrough loses them at the next write.
func (s *Server) openFile(o *fuse.OpenOut, f *union.File, nodeid uint64, flags, mode uint32, created bool) fuse.Status {
	upper := f.Upper()
	of := &file{f: f, nodeid: nodeid}
	n := s.opens.get(nodeid)
	defer s.opens.put(nodeid, n)
	switch {
	case n.through > 0 && n.upper != upper:
		s.opens.renew(nodeid)
		return estale
	case n.through > 0:
		of.through = true
	case n.cached > 0 || mode&setID != 0 || !s.wantsPassthrough(upper):
	default:
		var fd int
		fd, upper = f.Fd() // of what it is now
		id, err := s.dev.BackingOpen(fd)
		if err != nil { // the page cache works everywhere
			s.refused(err)
			break
		}
		n.backing, n.upper, of.through = id, upper, true
		s.opens.through.Add(1)
	}
	s.count(n, of, o, flags, upper)
	if of.mapped && !created {
		s.notifyAttr(nodeid & nodeMask)
	}
	o.Fh = s.files.add(of)
	return fuse.OK
}

// count enters an open into the node's state and makes its answer.
func (s *Server) count(n *nodeOpens, of *file, o *fuse.OpenOut, flags uint32, upper bool) {
	o.OpenFlags = fuse.FOPEN_NOFLUSH
	if !of.through {
		// The pages of a lower file hold. Those of an upper one may be older than
		// what was written in passthrough since, unless the file is open now.
		if !upper || n.cached > 0 || !s.passthrough {
			o.OpenFlags |= fuse.FOPEN_KEEP_CACHE
		}
		n.cached++
		s.opens.cachedOpens.Add(1)
		return
	}
	o.OpenFlags |= fuse.FOPEN_PASSTHROUGH
	o.BackingID = n.backing
	n.through++
	s.opens.throughOpens.Add(1)
	if flags&accessMode == sys.O_RDWR {
		of.mapped = true
		n.mapped++
		s.opens.mapped.Add(1)
	}
}

func (s *Server) wantsPassthrough(upper bool) bool {
	if !s.passthrough || s.opens.refused.Load() {
		return false
	}
	switch s.o.Passthrough {
	case PassthroughAll:
		return true
	case PassthroughReadOnly:
		return upper || s.o.ReadOnly
	}
	return upper
}

// refused gives passthrough up for the whole mount: a refusal is about
// privileges or the file system below, not about one file.
func (s *Server) refused(err error) {
	if s.opens.refused.CompareAndSwap(false, true) {
		s.logf("no passthrough: %v", err)
	}
}

func (s *Server) release(r *request) fuse.Status {
	in := sys.View[fuse.ReleaseIn](r.in)
	of := s.files.remove(in.Fh)
	if of == nil {
		return fuse.EBADF
	}
	n := s.opens.get(of.nodeid)
	switch {
	case !of.through:
		n.cached--
	default:
		if of.mapped {
			n.mapped--
			s.opens.mapped.Add(-1)
		}
		if n.through--; n.through == 0 {
			s.opens.through.Add(-1)
			if err := s.dev.BackingClose(n.backing); err != nil {
				s.logf("%v", err)
			}
		}
	}
	s.opens.put(of.nodeid, n)
	return status(of.f.Close())
}

func (s *Server) create(r *request) (int, fuse.Status) {
	in := sys.View[fuse.CreateIn](r.in)
	dir, name, st := s.at(r, sys.SizeOf[fuse.CreateIn]())
	if st != fuse.OK {
		return 0, st
	}
	e, f, err := s.union.Create(s.caller(&in.InHeader, in.Umask), dir, name, s.openFlags(in.Flags)|in.Flags&sys.O_EXCL, in.Mode)
	return s.created(r, in, e, f, err)
}

func (s *Server) tmpfile(r *request) (int, fuse.Status) {
	in := sys.View[fuse.CreateIn](r.in)
	dir := s.node(in.NodeId)
	if dir == nil {
		return 0, estale
	}
	e, f, err := s.union.Tmpfile(s.caller(&in.InHeader, in.Umask), dir, s.openFlags(in.Flags)|in.Flags&sys.O_EXCL, in.Mode)
	return s.created(r, in, e, f, err)
}

func (s *Server) created(r *request, in *fuse.CreateIn, e union.Entry, f *union.File, err error) (int, fuse.Status) {
	if err != nil {
		return 0, status(err)
	}
	o := reply[fuse.CreateOut](r)
	if st := s.openFile(&o.OpenOut, f, s.opens.nodeid(e.Node.ID()), in.Flags, e.Attr.Mode, true); st != fuse.OK {
		_ = f.Close()
		s.union.Forget(e.Node.ID(), 1)
		return 0, st
	}
	s.setEntry(&o.EntryOut, &e)
	return sys.SizeOf[fuse.CreateOut](), fuse.OK
}

func (s *Server) read(r *request) (int, fuse.Status) {
	in := sys.View[fuse.ReadIn](r.in)
	f := s.openOf(in.Fh)
	if f == nil {
		return 0, fuse.EBADF
	}
	n, err := f.ReadAt(r.out[:min(int(in.Size), len(r.out))], int64(in.Offset))
	return n, status(err)
}

func (s *Server) write(r *request) (int, fuse.Status) {
	in := sys.View[fuse.WriteIn](r.in)
	f := s.openOf(in.Fh)
	if f == nil {
		return 0, fuse.EBADF
	}
	data := r.in[sys.SizeOf[fuse.WriteIn]():]
	if len(data) < int(in.Size) {
		return 0, fuse.EIO
	}
	var n int
	var err error
	if s.writeback && in.WriteFlags&fuse.WRITE_CACHE != 0 {
		n, err = f.WriteBack(data[:in.Size], int64(in.Offset))
	} else {
		n, err = f.WriteAt(data[:in.Size], int64(in.Offset), in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0)
	}
	if err != nil && n == 0 {
		return 0, status(err)
	}
	reply[fuse.WriteOut](r).Size = uint32(n)
	return sys.SizeOf[fuse.WriteOut](), fuse.OK
}

func (s *Server) flush(r *request) fuse.Status {
	f := s.openOf(sys.View[fuse.FlushIn](r.in).Fh)
	if f == nil {
		return fuse.EBADF
	}
	return status(f.Flush())
}

const dataOnly = 1 // FUSE_FSYNC_FDATASYNC

func (s *Server) fsync(r *request) fuse.Status {
	in := sys.View[fuse.FsyncIn](r.in)
	f := s.openOf(in.Fh)
	if f == nil {
		return fuse.EBADF
	}
	if s.o.NoFsync {
		return fuse.OK
	}
	return status(f.Fsync(in.FsyncFlags&dataOnly != 0))
}

func (s *Server) fallocate(r *request) fuse.Status {
	in := sys.View[fuse.FallocateIn](r.in)
	f := s.openOf(in.Fh)
	if f == nil {
		return fuse.EBADF
	}
	err := f.Fallocate(in.Mode, int64(in.Offset), int64(in.Length))
	if err == nil {
		err = s.dropSetID(&in.InHeader, in.NodeId, f)
	}
	return status(err)
}

// dropSetID takes setuid and setgid bits away after a change that the kernel asks
// us for without saying whether its caller may leave them (fs/fuse/file.c:
// file_modified comes to nothing with KILLPRIV_V2).
func (s *Server) dropSetID(h *fuse.InHeader, nodeid uint64, f *union.File) error {
	n := s.node(nodeid)
	if n == nil {
		return nil
	}
	a, err := s.union.Getattr(n, f)
	if err != nil || a.Mode&setID == 0 || mayKeepSetID(h.Pid) {
		return err
	}
	a, err = s.union.Setattr(s.caller(h, 0), n, f, union.SetAttr{KillPriv: true})
	// Without execution by the group setgid stays, for those in the group.
	if err == nil && a.Mode&syscall.S_ISGID != 0 && !inGroup(h.Pid, a.GID) {
		_, err = s.union.Setattr(s.caller(h, 0), n, f, union.SetAttr{Valid: union.SetMode, Mode: a.Mode &^ setID})
	}
	s.notifyAttr(n.ID())
	return err
}

// inGroup reports whether a process is in a group; not if there is no telling. The
// header of a request that makes nothing says no ids where mounts may map them.
func inGroup(pid, gid uint32) bool {
	b, err := os.ReadFile("/proc/" + strconv.FormatUint(uint64(pid), 10) + "/status")
	if pid == 0 || err != nil {
		return false
	}
	var groups []string
	for line := range strings.Lines(string(b)) {
		switch key, value, _ := strings.Cut(line, ":"); key {
		case "Gid": // real, effective, saved, for file systems
			groups = append(groups, strings.Fields(value)[3:]...)
		case "Groups":
			groups = append(groups, strings.Fields(value)...)
		}
	}
	return slices.Contains(groups, strconv.FormatUint(uint64(gid), 10))
}

// mayKeepSetID reports whether a process has CAP_FSETID in the first user
// namespace; not if there is no telling.
func mayKeepSetID(pid uint32) bool {
	dir := "/proc/" + strconv.FormatUint(uint64(pid), 10)
	ids, err := os.ReadFile(dir + "/uid_map")
	if pid == 0 || err != nil || strings.Join(strings.Fields(string(ids)), " ") != "0 0 4294967295" {
		return false
	}
	b, err := os.ReadFile(dir + "/status")
	if err != nil {
		return false
	}
	_, line, _ := strings.Cut(string(b), "\nCapEff:\t")
	line, _, _ = strings.Cut(line, "\n")
	caps, err := strconv.ParseUint(line, 16, 64)
	const fsetid = 4 // CAP_FSETID
	return err == nil && caps&(1<<fsetid) != 0
}

func (s *Server) lseek(r *request) (int, fuse.Status) {
	if s.writeback {
		return 0, fuse.ENOSYS // the kernel may have data that we do not: it answers that all is data
	}
	in := sys.View[fuse.LseekIn](r.in)
	f := s.openOf(in.Fh)
	if f == nil {
		return 0, fuse.EBADF
	}
	off, err := f.Seek(int64(in.Offset), int(in.Whence))
	if err != nil {
		return 0, status(err)
	}
	reply[fuse.LseekOut](r).Offset = uint64(off)
	return sys.SizeOf[fuse.LseekOut](), fuse.OK
}

// copyFileRange answers the old request, whose answer has 32 bits, and the new one.
func (s *Server) copyFileRange(r *request) (int, fuse.Status) {
	in := sys.View[fuse.CopyFileRangeIn](r.in)
	from, to := s.openOf(in.FhIn), s.openOf(in.FhOut)
	if from == nil || to == nil {
		return 0, fuse.EBADF
	}
	const most = 0x7ffff000 // MAX_RW_COUNT
	size, short := in.Len, in.Opcode == opCopyFileRange
	if short {
		size = min(size, most)
	}
	n, err := to.CopyRange(int64(in.OffOut), from, int64(in.OffIn), int64(min(size, 1<<62)))
	if err == nil {
		err = s.dropSetID(&in.InHeader, in.NodeIdOut, to)
	}
	if err != nil {
		return 0, status(err)
	}
	if short {
		reply[fuse.WriteOut](r).Size = uint32(n)
		return sys.SizeOf[fuse.WriteOut](), fuse.OK
	}
	reply[fuse.CopyFileRangeOut](r).BytesCopied = uint64(n)
	return sys.SizeOf[fuse.CopyFileRangeOut](), fuse.OK
}
