package server

import (
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/layerctl/layerctl/internal/sys"
)

// handler is what a transport gives messages to: see Server.handle. The device
// is the only transport now; FUSE over io_uring would be another.
type handler interface {
	handle(r *request, in, out []byte) int
}

// loop reads requests off the device and answers them, each on the thread that
// read it. When the last thread that waits gets one it starts another, so that
// a slow request (a copy-up, an fsync) keeps nobody waiting; what is more than
// idle ones enough ends.
type loop struct {
	dev *sys.Fd
	s   *Server
	h   handler

	pool
	wg   sync.WaitGroup
	once sync.Once
	err  error
}

// room is what a message or an answer takes at most: the data, and their fixed
// part, which an own page keeps the data aligned behind.
const room = maxWrite + pageSize

func (l *loop) run() error {
	l.h = l.s
	l.init(l.s.o.MaxThreads, l.s.o.MaxIdle)
	l.s.loop.Store(l)
	l.start()
	l.wg.Wait()
	return l.err
}

// start adds a thread.
func (l *loop) start() {
	l.add()
	l.wg.Go(l.thread)
}

// turn is how long a goroutine of the loop runs before it gives way. To one that is
// seen to run for 10 ms the runtime gives no more such time: its monitor takes the
// processor away from under the next system call, and then looks again every 20 us,
// for whom else it can take from. With a few of these goroutines that never ends and
// was half of what a walk of a tree cost. One that gives way in time is left alone,
// and stays on its thread unless it is locked to it: a locked one is handed from
// thread to thread for each turn.
const turn = 4 * time.Millisecond

func (l *loop) thread() {
	// Pages that no message reached are no memory; in the heap they might be.
	buffers, err := sys.MapAnonymous(2 * room)
	if err != nil {
		l.fail(err)
		l.drop()
		return
	}
	defer sys.Unmap(buffers)
	in, out := buffers[:room:room], buffers[room:]
	r := &request{}
	var turned time.Time
	for {
		if now := time.Now(); now.Sub(turned) > turn {
			turned = now
			runtime.Gosched()
		}
		n, errno := l.dev.ReadMessage(in)
		switch errno {
		case 0:
		case syscall.EINTR, syscall.EAGAIN, syscall.ENOENT: // ENOENT: the request was interrupted before it was read
			continue
		default:
			if errno != syscall.ENODEV && errno != syscall.ECONNABORTED { // unmounted, aborted
				l.fail(errno)
			}
			l.drop()
			return
		}
		if l.take() {
			l.start()
		}
		n = l.h.handle(r, in[:n], out)
		// Whoever gets the answer may send its next request before write(2) returns:
		// this thread is as good as idle.
		stays := l.give()
		if n > 0 {
			l.answer(out[:n])
		}
		if !stays {
			return
		}
	}
}

func (l *loop) fail(err error) { l.once.Do(func() { l.err = err }) }

func (l *loop) answer(out []byte) {
	switch errno := l.dev.WriteMessage(out); errno {
	case 0, syscall.ENOENT, syscall.ENODEV: // nobody waits for it any more
	default:
		l.s.logf("answer of %d bytes: %v", len(out), errno)
	}
}
