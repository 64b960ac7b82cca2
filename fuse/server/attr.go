package server

import (
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
)

// node finds the node of a nodeid; nil for one that the kernel has no reference to.
func (s *Server) node(nodeid uint64) *union.Node { return s.union.Node(nodeid & nodeMask) }

func (s *Server) caller(h *fuse.InHeader, umask uint32) union.Caller {
	return union.Caller{UID: h.Uid, GID: h.Gid, PID: h.Pid, Umask: umask}
}

// encodeDev is the kernel's new_encode_dev.
func encodeDev(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | minor&^0xff<<12
}

// decodeDev is the kernel's new_decode_dev.
func decodeDev(dev uint32) (major, minor uint32) {
	return dev & 0xfff00 >> 8, dev&0xff | dev>>12&0xfff00
}

func setAttr(to *fuse.Attr, a *union.Attr) {
	*to = fuse.Attr{
		Ino: a.Ino, Size: uint64(a.Size), Blocks: uint64(a.Blocks),
		Atime: uint64(a.Atime.Sec), Mtime: uint64(a.Mtime.Sec), Ctime: uint64(a.Ctime.Sec),
		Atimensec: uint32(a.Atime.Nsec), Mtimensec: uint32(a.Mtime.Nsec), Ctimensec: uint32(a.Ctime.Nsec),
		Mode: a.Mode, Nlink: a.Nlink, Owner: fuse.Owner{Uid: a.UID, Gid: a.GID},
		Rdev: encodeDev(a.RdevMajor, a.RdevMinor), Blksize: a.Blksize,
	}
}

// attrValid says how long attributes hold: not at all while somebody may write
// the file through a mapping that neither the kernel's inode nor we hear of, nor
// where a write in passthrough takes setuid or setgid away, of which the kernel's
// inode does not hear.
func (s *Server) attrValid(nodeid uint64, mode uint32) validity {
	if mode&syscall.S_IFMT == syscall.S_IFREG && mode&setID != 0 {
		return validity{}
	}
	if s.opens.mapped.Load() > 0 && s.opens.mayBeMapped(nodeid) {
		return validity{}
	}
	return s.valid
}

func (s *Server) setEntry(to *fuse.EntryOut, e *union.Entry) {
	id := s.opens.nodeid(e.Node.ID())
	valid := s.attrValid(id, e.Attr.Mode)
	to.NodeId, to.Generation = id, uint64(e.Node.Generation())
	to.EntryValid, to.EntryValidNsec = s.valid.sec, s.valid.nsec
	to.AttrValid, to.AttrValidNsec = valid.sec, valid.nsec
	setAttr(&to.Attr, &e.Attr)
}

// entry answers with a node that was found or made.
func (s *Server) entry(r *request, e union.Entry, err error) (int, fuse.Status) {
	if err != nil {
		return 0, status(err)
	}
	s.setEntry(sys.View[fuse.EntryOut](r.out), &e)
	return sys.SizeOf[fuse.EntryOut](), fuse.OK
}

func (s *Server) attr(r *request, nodeid uint64, a union.Attr, err error) (int, fuse.Status) {
	if err != nil {
		return 0, status(err)
	}
	valid := s.attrValid(nodeid, a.Mode)
	o := reply[fuse.AttrOut](r)
	o.AttrValid, o.AttrValidNsec = valid.sec, valid.nsec
	setAttr(&o.Attr, &a)
	return sys.SizeOf[fuse.AttrOut](), fuse.OK
}

// openOf returns the open file with number fh, nil if there is none.
func (s *Server) openOf(fh uint64) *union.File {
	if f := s.files.get(fh); f != nil {
		return f.f
	}
	return nil
}

func (s *Server) getattr(r *request) (int, fuse.Status) {
	in := sys.View[fuse.GetAttrIn](r.in)
	n := s.node(in.NodeId)
	if n == nil {
		return 0, estale
	}
	var f *union.File
	if in.Flags()&fuse.FUSE_GETATTR_FH != 0 {
		f = s.openOf(in.Fh())
	}
	a, err := s.union.Getattr(n, f)
	return s.attr(r, in.NodeId, a, err)
}

// statx tells what GETATTR has no room for: the time of birth.
func (s *Server) statx(r *request) (int, fuse.Status) {
	in := sys.View[fuse.StatxIn](r.in)
	n := s.node(in.NodeId)
	if n == nil {
		return 0, estale
	}
	var f *union.File
	if in.GetattrFlags&fuse.FUSE_GETATTR_FH != 0 {
		f = s.openOf(in.Fh)
	}
	a, err := s.union.Getattr(n, f)
	if err != nil {
		return 0, status(err)
	}
	valid := s.attrValid(in.NodeId, a.Mode)
	o := reply[fuse.StatxOut](r)
	o.AttrValid, o.AttrValidNsec = valid.sec, valid.nsec
	o.Statx = fuse.Statx{
		Mask: statxBasic, Blksize: a.Blksize, Attributes: a.Flags, Nlink: a.Nlink, Uid: a.UID, Gid: a.GID,
		Mode: uint16(a.Mode), Ino: a.Ino, Size: uint64(a.Size), Blocks: uint64(a.Blocks),
		Atime: sxTime(a.Atime), Btime: sxTime(a.Btime), Ctime: sxTime(a.Ctime), Mtime: sxTime(a.Mtime),
		RdevMajor: a.RdevMajor, RdevMinor: a.RdevMinor,
	}
	if a.Btime != (sys.Time{}) {
		o.Mask |= statxBtime
	}
	return sys.SizeOf[fuse.StatxOut](), fuse.OK
}

const (
	statxBasic = 0x7ff // STATX_BASIC_STATS
	statxBtime = 0x800 // STATX_BTIME
)

func sxTime(t sys.Time) fuse.SxTime { return fuse.SxTime{Sec: uint64(t.Sec), Nsec: uint32(t.Nsec)} }

func (s *Server) setattr(r *request) (int, fuse.Status) {
	in := sys.View[fuse.SetAttrIn](r.in)
	n := s.node(in.NodeId)
	if n == nil {
		return 0, estale
	}
	var f *union.File
	if in.Valid&fuse.FATTR_FH != 0 {
		f = s.openOf(in.Fh)
	}
	a, err := s.union.Setattr(s.caller(&in.InHeader, 0), n, f, setAttrOf(in))
	return s.attr(r, in.NodeId, a, err)
}

// setAttrOf says what a SETATTR changes. A time "now" is the server's present,
// which is the caller's: one clock.
func setAttrOf(in *fuse.SetAttrIn) union.SetAttr {
	to := union.SetAttr{
		Mode: in.Mode & 0o7777, UID: in.Uid, GID: in.Gid, Size: int64(in.Size),
		Atime: sys.Time{Sec: int64(in.Atime), Nsec: in.Atimensec},
		Mtime: sys.Time{Sec: int64(in.Mtime), Nsec: in.Mtimensec},
		// Without the writeback cache the change time is for the layer's file
		// system to set; with it, the kernel sends times that it kept itself.
		KillPriv: in.Valid&fuse.FATTR_KILL_SUIDGID != 0,
	}
	for _, x := range [...]struct {
		wire uint32
		mask union.SetAttrMask
	}{{fuse.FATTR_MODE, union.SetMode}, {fuse.FATTR_UID, union.SetUID}, {fuse.FATTR_GID, union.SetGID},
		{fuse.FATTR_SIZE, union.SetSize}, {fuse.FATTR_ATIME, union.SetAtime}, {fuse.FATTR_MTIME, union.SetMtime}} {
		if in.Valid&x.wire != 0 {
			to.Valid |= x.mask
		}
	}
	if in.Valid&fuse.FATTR_ATIME_NOW != 0 {
		to.Atime = sys.TimeNow
	}
	if in.Valid&fuse.FATTR_MTIME_NOW != 0 {
		to.Mtime = sys.TimeNow
	}
	return to
}
