package server

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
)

// dir is an open directory.
type dir struct {
	d    *union.Dir
	node *union.Node
}

func (d *dir) close() error { return d.d.Close() }

// dots are the entries that the union does not list: "." and ".." come first,
// with offsets behind them that the union does not use.
const dots = 2

func (s *Server) opendir(r *request) (int, fuse.Status) {
	in := sys.View[fuse.OpenIn](r.in)
	n := s.node(in.NodeId)
	if n == nil {
		return 0, estale
	}
	d, err := s.union.OpenDir(n)
	if err != nil {
		return 0, status(err)
	}
	o := reply[fuse.OpenOut](r)
	o.Fh = s.dirs.add(&dir{d: d, node: n})
	o.OpenFlags = fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
	return sys.SizeOf[fuse.OpenOut](), fuse.OK
}

func (s *Server) releasedir(r *request) fuse.Status {
	d := s.dirs.remove(sys.View[fuse.ReleaseIn](r.in).Fh)
	if d == nil {
		return fuse.EBADF
	}
	return status(d.close())
}

func (s *Server) fsyncdir(r *request) fuse.Status {
	d := s.dirs.get(sys.View[fuse.FsyncIn](r.in).Fh)
	if d == nil {
		return fuse.EBADF
	}
	if s.o.NoFsync {
		return fuse.OK
	}
	return status(d.d.Fsync())
}

// entries fills an answer with entries of a directory.
type entries struct {
	out  []byte // the room that is left
	used int
}

const direntSize, entrySize = 24, 128

// add appends an entry, behind room for a node if plus; it returns that room
// and whether the entry fitted.
func (l *entries) add(name string, ino, next uint64, typ uint32, plus bool) (node []byte, ok bool) {
	size := direntSize + (len(name)+7)&^7
	if plus {
		size += entrySize
	}
	if size > len(l.out) {
		return nil, false
	}
	to := l.out[:size]
	clear(to[size-8:]) // the padding
	if plus {
		node, to = to[:entrySize], to[entrySize:]
		clear(node)
	}
	*sys.View[dirent](to) = dirent{Ino: ino, Off: next, Namelen: uint32(len(name)), Type: typ >> 12}
	copy(to[direntSize:], name)
	l.out = l.out[size:]
	l.used += size
	return node, true
}

// startDir finds the open directory that a READDIR is about, and answers with
// its dots as far as they are asked for; more says whether to go on, at off.
func (s *Server) startDir(r *request, plus bool) (d *dir, l *entries, off uint64, more bool, st fuse.Status) {
	in := sys.View[fuse.ReadIn](r.in)
	if d = s.dirs.get(in.Fh); d == nil {
		return nil, nil, 0, false, fuse.EBADF
	}
	l = &entries{out: r.out[:min(int(in.Size), len(r.out))]}
	off = in.Offset
	for ; off < dots; off++ {
		ino, err := s.dotIno(d.node, off)
		if err != nil {
			return nil, nil, 0, false, status(err)
		}
		if _, ok := l.add(".."[:off+1], ino, off+1, sys.S_IFDIR, plus); !ok {
			return d, l, off, false, fuse.OK
		}
	}
	if off == dots {
		off = 0 // where the union's entries begin
	}
	return d, l, off, true, fuse.OK
}

// dotIno is the inode number of ".", or of ".." if which is 1.
func (s *Server) dotIno(n *union.Node, which uint64) (uint64, error) {
	if which == 1 && n.ID() != fuse.FUSE_ROOT_ID {
		if e, err := s.union.Lookup(n, ".."); err == nil {
			s.union.Forget(e.Node.ID(), 1)
			return e.Attr.Ino, nil
		} // a removed directory has none
	}
	a, err := s.union.Getattr(n, nil)
	return a.Ino, err
}

func (s *Server) readdir(r *request) (int, fuse.Status) {
	d, l, off, more, st := s.startDir(r, false)
	if st != fuse.OK || !more {
		return l.size(), st
	}
	err := d.d.Read(off, func(e union.DirEntry) bool {
		_, ok := l.add(e.Name, e.Ino, e.Next, e.Type, false)
		return ok
	})
	return l.end(err)
}

func (s *Server) readdirplus(r *request) (int, fuse.Status) {
	d, l, off, more, st := s.startDir(r, true)
	if st != fuse.OK || !more {
		return l.size(), st
	}
	err := d.d.ReadPlus(off, func(e union.DirEntry, x union.Entry) bool {
		node, ok := l.add(e.Name, e.Ino, e.Next, e.Type, true)
		if ok && x.Node != nil { // without one the kernel looks the name up
			s.setEntry(sys.View[fuse.EntryOut](node), &x)
		}
		return ok
	})
	return l.end(err)
}

func (l *entries) size() int {
	if l == nil {
		return 0
	}
	return l.used
}

// end ends an answer: an error behind entries that are there waits for the
// next request.
func (l *entries) end(err error) (int, fuse.Status) {
	if l.used > 0 {
		return l.used, fuse.OK
	}
	return 0, status(err)
}
