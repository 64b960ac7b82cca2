package server

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
)

// The kernel opens and closes directories without us: OPENDIR is answered once,
// with ENOSYS, and reading a directory again that the kernel keeps costs nothing.
// A READDIR then has no handle; the union's offsets are good without one. What was
// read halfway, or to the end, is kept for the next request: that the end was
// reached the kernel finds out by asking what comes behind it.

// opendir says that there is no such request.
func (s *Server) opendir(*request) (int, fuse.Status) { return 0, fuse.ENOSYS }

func (s *Server) fsyncdir(r *request) fuse.Status {
	n := s.node(r.header().NodeId)
	if n == nil {
		return estale
	}
	if s.o.NoFsync {
		return fuse.OK
	}
	d, err := s.union.OpenDir(n)
	if err != nil {
		return status(err)
	}
	defer d.Close()
	return status(d.Fsync())
}

// halfRead are directories that were read to some point, the last used last.
type halfRead struct {
	some atomic.Int32 // len(list), for who has no lock
	mu   sync.Mutex
	list []halfDir
}

type halfDir struct {
	node uint64
	next uint64 // where the next request is to go on
	d    *union.Dir
}

// maxHalfRead is how many are kept: who reads more at once has them listed again.
const maxHalfRead = 32

// take returns the directory that was read up to off, for its next request alone;
// nil if there is none. For who begins any will do in which nothing has changed: many
// look whether a directory is empty, and then read it.
func (h *halfRead) take(node, off uint64) *union.Dir {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := len(h.list) - 1; i >= 0; i-- {
		if x := h.list[i]; x.node == node && (x.next == off || off == dots && x.d.Again()) {
			h.list = slices.Delete(h.list, i, i+1)
			h.some.Store(int32(len(h.list)))
			return x.d
		}
	}
	return nil
}

func (h *halfRead) put(x halfDir) {
	h.mu.Lock()
	h.list = append(h.list, x)
	var old *union.Dir
	if len(h.list) > maxHalfRead {
		old = h.list[0].d
		h.list = slices.Delete(h.list, 0, 1)
	}
	h.some.Store(int32(len(h.list)))
	h.mu.Unlock()
	if old != nil {
		_ = old.Close()
	}
}

// drop closes what there is of a node, or everything if node is 0.
func (h *halfRead) drop(node uint64) {
	if h.some.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	defer func() { h.some.Store(int32(len(h.list))) }()
	h.list = slices.DeleteFunc(h.list, func(x halfDir) bool {
		if node != 0 && x.node != node {
			return false
		}
		_ = x.d.Close()
		return true
	})
}

// dots are the entries that the union does not list: "." and ".." come first,
// with offsets behind them that the union does not use.
const dots = 2

// entries fills an answer with entries of a directory.
type entries struct {
	out  []byte // the room that is left
	used int
	next uint64 // the offset behind the last entry
	full bool   // something did not fit
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
		l.full = true
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
	l.next = next
	return node, true
}

// list answers a READDIR: it adds what fits, the dots first.
func (s *Server) list(r *request, plus bool, read func(d *union.Dir, off uint64, l *entries) error) (int, fuse.Status) {
	in := sys.View[fuse.ReadIn](r.in)
	n := s.node(in.NodeId)
	if n == nil {
		return 0, estale
	}
	l := &entries{out: r.out[:min(int(in.Size), len(r.out))], next: in.Offset}
	self, parent := s.union.DirNumbers(n)
	for l.next < dots {
		ino := self
		if l.next == 1 {
			ino = parent
		}
		if _, ok := l.add(".."[:l.next+1], ino, l.next+1, sys.S_IFDIR, plus); !ok {
			return l.used, fuse.OK
		}
	}
	d := s.half.take(n.ID(), l.next)
	if d == nil {
		var err error
		if d, err = s.union.OpenDir(n); err != nil {
			return 0, status(err)
		}
	}
	off := l.next
	if off == dots {
		off = 0 // where the union's entries begin
	}
	err := read(d, off, l)
	if l.full || d.Ended() {
		s.half.put(halfDir{n.ID(), l.next, d})
	} else {
		_ = d.Close()
	}
	if err != nil && l.used == 0 {
		return 0, status(err)
	}
	return l.used, fuse.OK // an error behind entries comes again with the next request
}

func (s *Server) readdir(r *request) (int, fuse.Status) {
	return s.list(r, false, func(d *union.Dir, off uint64, l *entries) error {
		return d.Read(off, func(e union.DirEntry) bool {
			_, ok := l.add(e.Name, e.Ino, e.Next, e.Type, false)
			return ok
		})
	})
}

// readdirplus is what the kernel always asks for: most who read a directory look at
// what is in it next, and a LOOKUP costs several times what an entry with its
// attributes does. Left to choose (READDIRPLUS_AUTO) the kernel asks for plain names
// behind the first 32 KiB of a directory.
func (s *Server) readdirplus(r *request) (int, fuse.Status) {
	return s.list(r, true, func(d *union.Dir, off uint64, l *entries) error {
		return d.ReadPlus(off, func(e union.DirEntry, x union.Entry) bool {
			node, ok := l.add(e.Name, e.Ino, e.Next, e.Type, true)
			if ok && x.Node != nil { // without one the kernel looks the name up
				s.setEntry(sys.View[fuse.EntryOut](node), &x)
			}
			return ok
		})
	})
}
