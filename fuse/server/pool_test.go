package server

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
)

// Under load a mount was gone all of a sudden ("Transport endpoint is not
// connected"), its server ended as if it had been unmounted: threads that were told
// to leave, and had not yet, counted as idle, so the others were told to leave, too.
func TestLastThreadStays(t *testing.T) {
	var p pool
	p.init(64, 4)
	for range 10 {
		p.add()
		p.take()
	}
	staying := 0
	for range 10 {
		if p.give() {
			staying++
		}
	}
	if staying != 4 {
		t.Fatalf("%d of 10 stay, not 4", staying)
	}
	// The six are still answering; the four take a request each and are done first.
	for range 4 {
		if p.take(); !p.give() {
			t.Error("a thread leaves though only three others wait")
		}
	}
	if n := p.threads.Load(); n != 4 {
		t.Errorf("%d threads are counted, not 4", n)
	}
}

// However threads come and go, one waits or may be started.
func TestThreadsNeverRunOut(t *testing.T) {
	var p pool
	p.init(16, 1)
	var wg sync.WaitGroup
	work := make(chan struct{})
	var start func()
	start = func() {
		p.add()
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range work {
				if p.take() {
					start()
				}
				if rand.IntN(2) == 0 {
					runtime.Gosched()
				}
				stays := p.give()
				for range rand.IntN(3) { // as it answers
					runtime.Gosched()
				}
				if !stays {
					return
				}
			}
			p.drop()
		}()
	}
	start()
	for range 100_000 { // a send that nobody takes ends the test by the deadlock
		work <- struct{}{}
	}
	close(work)
	wg.Wait()
	if p.threads.Load() != 0 || p.idle.Load() != 0 {
		t.Errorf("%d threads and %d idle ones are left", p.threads.Load(), p.idle.Load())
	}
}
