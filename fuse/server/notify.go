package server

import (
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
)

// staleQueue holds what the kernel is yet to be told.
type staleQueue struct {
	mu   sync.Mutex
	some sync.Cond
	list []union.Stale
	end  bool
}

func (q *staleQueue) init() { q.some.L = &q.mu }

func (q *staleQueue) add(x union.Stale) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.list = append(q.list, x)
	q.some.Signal()
}

func (q *staleQueue) stop() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.end = true
	q.some.Signal()
}

// take waits for something to tell; nil at the end.
func (q *staleQueue) take() []union.Stale {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.list) == 0 && !q.end {
		q.some.Wait()
	}
	list := q.list
	q.list = nil
	return list
}

// Invalidate is for union.Config.Invalidate. Attributes and what directories are
// listed as are told at once, before the answer to the request that made them
// stale; a file's pages, one of which may be waited for, and names later.
func (s *Server) Invalidate(x union.Stale) {
	switch {
	case s.dev == nil:
		return
	case x.Names:
		s.notifyInode(x.Node, 0)
		return
	case x.Name == "":
		s.notifyAttr(x.Node)
		if !x.Data {
			return
		}
	}
	s.stale.add(x)
}

// notifyStale tells the kernel what is queued, until the queue ends.
func (s *Server) notifyStale() {
	for list := s.stale.take(); list != nil; list = s.stale.take() {
		for _, x := range list {
			if x.Name != "" {
				s.notifyEntry(x.Node, x.Name)
			} else {
				s.notifyInode(x.Node, 0)
			}
		}
	}
}

// notifyAttr makes the kernel ask for a node's attributes again. It takes no
// lock that a request may hold.
func (s *Server) notifyAttr(node uint64) { s.notifyInode(node, -1) }

func (s *Server) notifyInode(node uint64, off int64) {
	for _, id := range s.opens.nodeids(node) {
		msg := struct {
			fuse.OutHeader
			fuse.NotifyInvalInodeOut
		}{fuse.OutHeader{Status: -fuse.NOTIFY_INVAL_INODE}, fuse.NotifyInvalInodeOut{Ino: id, Off: off}}
		s.notify(sys.Bytes(&msg))
	}
}

func (s *Server) notifyEntry(parent uint64, name string) {
	msg := struct {
		fuse.OutHeader
		fuse.NotifyInvalEntryOut
	}{fuse.OutHeader{Status: -fuse.NOTIFY_INVAL_ENTRY}, fuse.NotifyInvalEntryOut{Parent: parent, NameLen: uint32(len(name))}}
	s.notify(append(append(sys.Bytes(&msg), name...), 0))
}

func (s *Server) notify(msg []byte) {
	s.notifications.Add(1)
	sys.View[fuse.OutHeader](msg).Length = uint32(len(msg))
	switch errno := s.dev.WriteMessage(msg); errno {
	case 0, syscall.ENOENT, syscall.ENODEV, syscall.ENOTDIR: // the kernel does not know it
	default:
		s.logf("notification: %v", errno)
	}
}
