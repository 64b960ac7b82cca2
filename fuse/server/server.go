package server

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
)

// Options say how a union is served. The zero value is a sensible mount of an
// ordinary user.
type Options struct {
	// Timeout is how long the kernel may keep names and attributes; 0: a day,
	// below 0: not at all.
	Timeout time.Duration
	// Passthrough says which files the kernel reads and writes by itself.
	Passthrough Passthrough
	// StackDepth is how many file systems lie below at most (Passthrough): 1
	// for a plain one, 2 above an overlayfs. 0: 1.
	StackDepth int
	// Writeback lets the kernel collect writes in its page cache where there is no
	// passthrough, which it excludes: what makes writes cheap then.
	Writeback bool
	// ReadOnly: nobody can write, so nothing is ever copied up.
	ReadOnly bool
	// Export lets file handles outlive the kernel's memory of a file (nfs_export), as
	// far as the union keeps them. An inode has one nodeid then, PassthroughAll is
	// PassthroughUppers.
	Export bool
	// NoACL has no POSIX ACLs, NoXattrs no xattrs at all.
	NoACL, NoXattrs bool
	// Fsync passes fsync(2) on; without it (volatile) it does nothing.
	NoFsync bool
	// MaxBackground is how many requests nobody waits for may be under way; 0: 64.
	MaxBackground int
	// MaxThreads bounds the threads that answer requests, MaxIdle those that are
	// kept waiting for one while many come at once. 0: 64 and 4.
	MaxThreads, MaxIdle int
	// Debug logs every request.
	Debug bool
	// Log is told what goes wrong, and each request with Debug; nil: nobody.
	Log func(format string, args ...any)
}

func (o *Options) setDefaults() {
	if o.Timeout == 0 {
		o.Timeout = 24 * time.Hour
	}
	o.Timeout = max(o.Timeout, 0)
	if o.MaxBackground == 0 {
		o.MaxBackground = 64
	}
	if o.MaxThreads == 0 {
		o.MaxThreads = 64
	}
	if o.MaxIdle == 0 {
		o.MaxIdle = 4
	}
	if o.StackDepth == 0 {
		o.StackDepth = 1
	}
	if o.Export && o.Passthrough == PassthroughAll {
		o.Passthrough = PassthroughUppers
	}
}

// Server answers the requests of one mount.
type Server struct {
	o     Options
	union *union.FS
	dev   *sys.Fd
	valid validity

	// What INIT agreed on; constant after it.
	passthrough bool
	writeback   bool
	setxattrExt bool

	files handles[file]
	half  halfRead
	opens openTable
	stale staleQueue

	loop                    atomic.Pointer[loop]
	requests, notifications atomic.Uint64
	failed                  atomic.Pointer[error]
	ready                   chan struct{}
	readyOnce               sync.Once
	memory                  memory
}

// validity is a timeout as the wire has it.
type validity struct {
	sec  uint64
	nsec uint32
}

// New returns a server that serves nothing yet.
func New(o Options) *Server {
	o.setDefaults()
	s := &Server{o: o, valid: validity{uint64(o.Timeout / time.Second), uint32(o.Timeout % time.Second)}}
	s.ready = make(chan struct{})
	s.opens.init()
	s.stale.init()
	return s
}

// Serve answers the requests of dev, a mounted /dev/fuse, out of u until the
// mount is gone, which is no error. It owns dev and closes it; u stays open.
func (s *Server) Serve(u *union.FS, dev *sys.Fd) error {
	s.union, s.dev = u, dev
	notifier := make(chan struct{})
	go func() { s.notifyStale(); close(notifier) }()
	err := (&loop{dev: dev, s: s}).run()
	s.stale.stop()
	<-notifier
	s.closeAll()
	if failed := s.failed.Load(); failed != nil {
		err = errors.Join(*failed, err)
	}
	return errors.Join(err, dev.Close())
}

// Ready is closed when the kernel and Serve have agreed on how to talk: calls on
// the mount are answered from then on.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// closeAll closes what the kernel, or a kill of the connection, left open.
func (s *Server) closeAll() {
	s.files.each(func(f *file) { _ = f.f.Close() })
	s.half.drop(0)
}

// fail keeps the reason for which the mount cannot work.
func (s *Server) fail(err error) { s.failed.CompareAndSwap(nil, &err) }

func (s *Server) logf(format string, args ...any) {
	if s.o.Log != nil {
		s.o.Log(format, args...)
	}
}

// Counts is what a server has to do now, and what it did.
type Counts struct {
	Files         int    // open now
	HalfRead      int    // directories that are being read
	Passthrough   int    // nodes that are open in passthrough now
	Threads, Idle int    // of the loop
	Requests      uint64 // taken since the start
	Notifications uint64
	CachedOpens   uint64 // of files through the page cache
	ThroughOpens  uint64 // of files in passthrough
}

// Counts counts.
func (s *Server) Counts() Counts {
	c := Counts{Files: s.files.count(), HalfRead: int(s.half.some.Load()), Passthrough: int(s.opens.through.Load()), Requests: s.requests.Load(),
		Notifications: s.notifications.Load(), CachedOpens: s.opens.cachedOpens.Load(), ThroughOpens: s.opens.throughOpens.Load()}
	if l := s.loop.Load(); l != nil {
		c.Threads, c.Idle = int(l.threads.Load()), int(l.idle.Load())
	}
	return c
}

// String is one line for people.
func (c Counts) String() string {
	return fmt.Sprintf("open files %d, directories being read %d, nodes in passthrough %d, threads %d (%d idle), requests %d, "+
		"notifications %d, opens in passthrough %d, others %d",
		c.Files, c.HalfRead, c.Passthrough, c.Threads, c.Idle, c.Requests, c.Notifications, c.ThroughOpens, c.CachedOpens)
}
