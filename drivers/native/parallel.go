package native

import (
	"context"
	"runtime"
	"sync"
)

// crew does the work of one tree walk with a bounded number of helpers. The
// caller's goroutine always works, too, so that a walk never waits for a helper.
// The first error ends the context that all of them look at.
type crew struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	slots  chan struct{}
}

// newCrew allows two workers for each processor, the caller among them: making
// and removing files waits for the journal as much as for the processor.
func newCrew(ctx context.Context) *crew {
	w := &crew{slots: make(chan struct{}, 2*runtime.GOMAXPROCS(0)-1)}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	return w
}

// close releases the crew's context; every group has been waited for by then.
func (w *crew) close() { w.cancel(nil) }

// err is what ended the work early: the first error, or why the caller's
// context is done; else nil.
func (w *crew) err() error {
	if w.ctx.Err() == nil {
		return nil
	}
	return context.Cause(w.ctx)
}

// group is a set of functions that run at the same time where a slot is free,
// else at once in the caller.
type group struct {
	*crew
	wg sync.WaitGroup
}

func (w *crew) group() *group { return &group{crew: w} }

// do runs f, which owns what it closes, so f runs even after an error.
func (g *group) do(f func() error) {
	select {
	case g.slots <- struct{}{}:
		g.wg.Go(func() {
			defer func() { <-g.slots }()
			g.run(f)
		})
	default:
		g.run(f)
	}
}

func (g *group) run(f func() error) {
	if err := f(); err != nil {
		g.cancel(err) // the first one counts
	}
}

// wait waits for all of the group and returns the crew's error.
func (g *group) wait() error {
	g.wg.Wait()
	return g.err()
}
