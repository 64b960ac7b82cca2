package server

import (
	"sync"
	"sync/atomic"
)

const handleChunk = 256

// handles gives open things the numbers by which the kernel knows them. Reading
// takes no lock. Numbers start at 1 and are used again.
type handles[T any] struct {
	chunks atomic.Pointer[[]*[handleChunk]atomic.Pointer[T]]

	mu   sync.Mutex
	free []uint64
	open int
}

func (h *handles[T]) add(v *T) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.free) == 0 {
		h.grow()
	}
	n := h.free[len(h.free)-1]
	h.free = h.free[:len(h.free)-1]
	h.open++
	(*h.chunks.Load())[n/handleChunk][n%handleChunk].Store(v)
	return n
}

func (h *handles[T]) grow() {
	var chunks []*[handleChunk]atomic.Pointer[T]
	if old := h.chunks.Load(); old != nil {
		chunks = append(chunks, *old...)
	}
	first := uint64(len(chunks)) * handleChunk
	chunks = append(chunks, new([handleChunk]atomic.Pointer[T]))
	h.chunks.Store(&chunks)
	for n := first + handleChunk - 1; n >= first && n > 0; n-- {
		h.free = append(h.free, n)
	}
}

// get returns what has number n, nil if nothing has.
func (h *handles[T]) get(n uint64) *T {
	chunks := h.chunks.Load()
	if chunks == nil || n/handleChunk >= uint64(len(*chunks)) {
		return nil
	}
	return (*chunks)[n/handleChunk][n%handleChunk].Load()
}

// remove frees number n and returns what had it.
func (h *handles[T]) remove(n uint64) *T {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.get(n)
	if v == nil {
		return nil
	}
	(*h.chunks.Load())[n/handleChunk][n%handleChunk].Store(nil)
	h.free = append(h.free, n)
	h.open--
	return v
}

func (h *handles[T]) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.open
}

// each calls f for everything that is there.
func (h *handles[T]) each(f func(*T)) {
	chunks := h.chunks.Load()
	if chunks == nil {
		return
	}
	for _, c := range *chunks {
		for i := range c {
			if v := c[i].Load(); v != nil {
				f(v)
			}
		}
	}
}
