package server

import (
	"runtime/debug"
	"sync/atomic"
	"time"
)

// memory gives memory back to the kernel some time after it told us to forget
// many nodes, which it does when it is short of memory itself: Go alone would
// keep it for minutes.
type memory struct {
	forgets atomic.Int64 // since memory was given back
	armed   atomic.Bool
}

const (
	manyForgets = 4096
	settle      = 300 * time.Millisecond
)

func (m *memory) forgot() {
	if m.forgets.Add(1) >= manyForgets && m.armed.CompareAndSwap(false, true) {
		m.wait(0)
	}
}

// wait gives memory back as soon as no more forgets come.
func (m *memory) wait(seen int64) {
	time.AfterFunc(settle, func() {
		if now := m.forgets.Load(); now != seen {
			m.wait(now)
			return
		}
		m.forgets.Store(0)
		m.armed.Store(false)
		debug.FreeOSMemory()
	})
}
