package devmapper

import (
	"context"
	"errors"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
)

// Creates that wait for the pool at the same time are one transaction, for sixteen of them;
// one of them that fails or is given up is nothing to the others.
func TestCreatesOfABurstShareATransaction(t *testing.T) {
	b := newBench(t, 768*mib, nil)
	base := b.create(1)
	b.write(base, "base", "base")
	b.commit(base)
	before, err := b.pool.Status()
	b.check(err)
	const (
		all     = mostAtOnce + 8
		fails   = 3 // an error at a step
		ends    = 7 // its context ends while it waits
		twice   = 9 // another is of the same ID
		shorter = 2 // that are not made
	)
	injected := &os.PathError{Op: "injected", Path: "step", Err: syscall.EIO}
	ended, end := context.WithCancel(t.Context())
	errs := make([]error, all)
	var wg sync.WaitGroup
	b.check(b.pool.Exclusive(t.Context(), func(*thin.Change) error { // so that they all wait
		for i := range errs {
			ctx, r := t.Context(), drivers.Ref{ID: drivers.ID(100 + i), Parents: []drivers.ID{1}}
			switch i {
			case fails:
				ctx = faults.With(ctx, func(step string) error {
					if step == "devmapper: create: snapshot made" {
						return injected
					}
					return nil
				})
			case ends:
				ctx = ended
			case twice:
				r.ID--
			}
			wg.Go(func() { errs[i] = b.Create(ctx, r, drivers.CreateOptions{}) })
		}
		for limit := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			b.burst.mu.Lock()
			n := len(b.burst.waiting)
			b.burst.mu.Unlock()
			if n == all {
				break
			}
			if time.Now().After(limit) {
				return errors.New("they do not come")
			}
		}
		end()
		return nil
	}))
	wg.Wait()
	after, err := b.pool.Status()
	b.check(err)
	if n := after.Transaction - before.Transaction; n != 2 {
		t.Errorf("%d Creates in %d transactions, want 2", all, n)
	}
	made := 0
	for i, err := range errs {
		switch {
		case i == fails && errors.Is(err, injected), i == ends && errors.Is(err, context.Canceled):
		case (i == twice || i == twice-1) && errdefs.IsAlreadyExists(err):
		case err == nil:
			made++
		default:
			t.Errorf("create %d: %v", i, err)
		}
	}
	if made != all-shorter-1 {
		t.Errorf("%d layers made, want %d", made, all-shorter-1)
	}
	b.nothingLoose("a burst")
	for id, err := range b.IDs(t.Context()) {
		b.check(err)
		if id != 1 {
			b.file(drivers.Ref{ID: id, Parents: []drivers.ID{1}}, "base", "base")
			b.remove(id)
		}
	}
	b.nothingLoose("removing what it made")
	b.remove(1)
}
