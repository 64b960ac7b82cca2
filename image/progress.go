package image

import (
	"sync"

	"github.com/opencontainers/go-digest"
)

// Event says how far long work is.
type Event struct {
	Step  string        // "load", "unpack", "diff" or "save"
	Item  digest.Digest // the layer, in steps that go layer by layer; else ""
	Index int           // its place, from 0
	Count int           // of how many
	Done  int64         // bytes of Total
	Total int64         // 0 where it is not known before the end
}

// Progress is told of long work; calls never overlap. nil is told nothing.
type Progress func(Event)

// meter adds up bytes for a Progress.
type meter struct {
	mu    sync.Mutex
	event Event // guarded by mu
	to    Progress
}

func newMeter(to Progress, e Event) *meter { return &meter{event: e, to: to} }

// add is safe for concurrent use.
func (m *meter) add(n int64) {
	if m.to == nil || n == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.event.Done += n
	m.to(m.event)
}

// set tells an absolute number of bytes.
func (m *meter) set(done int64) {
	if m.to == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.event.Done = done
	m.to(m.event)
}
