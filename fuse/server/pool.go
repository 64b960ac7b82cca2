package server

import "sync/atomic"

// pool counts the threads of a loop. What it counts as idle waits for a request, or
// will: one that leaves is not among them from the moment it is told to.
//
// The kernel wakes the thread that has waited longest, so every one that waits has
// its turn, and each turn of another thread costs more than one of the same. Few are
// kept: fewIdle, and more only for some requests after there were too few.
type pool struct {
	maxThreads, maxIdle int32

	threads, idle atomic.Int32
	busy          atomic.Int32 // requests until few threads are enough again
}

const (
	fewIdle  = 2
	busyTime = 64
)

func (p *pool) init(maxThreads, maxIdle int) {
	p.maxThreads, p.maxIdle = int32(maxThreads), max(int32(maxIdle), 1)
}

// add counts a new thread, which waits.
func (p *pool) add() {
	p.threads.Add(1)
	p.idle.Add(1)
}

// take counts a thread as busy, and reports whether nobody waits now and one more may.
func (p *pool) take() bool {
	// Loaded in any case: what a thread did that has left comes before what is asked
	// for now, which the kernel knows and the race detector must see.
	threads := p.threads.Load()
	if p.idle.Add(-1) != 0 || threads >= p.maxThreads {
		return false
	}
	p.busy.Store(busyTime)
	return true
}

// give counts a busy thread as idle, or, where enough are, not at all: then it
// leaves. The two are one step: when every thread was counted as idle first, those on
// their way out kept the others from staying, until none was left and the mount gone.
func (p *pool) give() (stays bool) {
	most := p.maxIdle
	if p.busy.Load() <= 0 {
		most = min(most, fewIdle)
	} else {
		p.busy.Add(-1)
	}
	for {
		n := p.idle.Load()
		if n >= most {
			p.threads.Add(-1)
			return false
		}
		if p.idle.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// drop takes an idle thread out.
func (p *pool) drop() {
	p.idle.Add(-1)
	p.threads.Add(-1)
}
