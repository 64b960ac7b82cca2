package thin

import (
	"context"
	"time"

	"github.com/layerctl/layerctl/devmapper/dm"
)

// lookEvery is how long a pool may be suspended that nobody tells of.
const lookEvery = 2 * time.Second

// watchAgain is how long a watch that failed is left alone.
const watchAgain = time.Second

// watch begins to make the pool larger when it runs low, and to resume it when a process has
// died that had it suspended.
func (p *Pool) watch() error {
	e, err := dm.Watch()
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	p.watching.Go(func() { p.follow(ctx, e) })
	p.watching.Go(func() { p.lookAfter(ctx) })
	return nil
}

// follow looks after the pool's size at every event of any device until ctx ends, and closes e. A
// watch that fails is begun again, with a look at what it may have missed.
func (p *Pool) follow(ctx context.Context, e *dm.Events) {
	for {
		err := e.Wait(ctx)
		if err != nil {
			e.Close()
			e = watchLater(ctx)
		}
		if e == nil {
			return
		}
		_ = p.grow(context.WithoutCancel(ctx)) // what cannot be done shows in the pool's status
	}
}

// watchLater begins a watch again; nil when ctx ends before it can.
func watchLater(ctx context.Context) *dm.Events {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(watchAgain):
		}
		if e, err := dm.Watch(); err == nil {
			return e
		}
	}
}

// lookAfter resumes the pool if a process died that had it suspended: there is no event of that.
func (p *Pool) lookAfter(ctx context.Context) {
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			_ = p.goOn() // or the next time
		}
	}
}

// suspended reports whether the pool is: for its growth, or because the process died that
// did that.
func (p *Pool) suspended() bool {
	i, err := p.ctl.Info(p.name)
	return err == nil && i.Suspended && i.ActiveTable
}

// goOn has the pool not suspended: it waits for who grows it, and resumes what nobody alive
// has suspended.
func (p *Pool) goOn() error {
	if !p.suspended() {
		return nil
	}
	lock, err := p.growing()
	if err != nil {
		return err
	}
	defer lock.Close()
	return p.resumeLeft()
}

// resumeLeft is goOn for who has the lock of those who grow the pool. Two that resume it at
// once would not do: the kernel refuses the second, and may drop the table of the first.
func (p *Pool) resumeLeft() error {
	if !p.suspended() {
		return nil
	}
	err := p.ctl.Resume(p.name)
	if err != nil && !p.suspended() {
		return nil // dmsetup was quicker
	}
	return err
}
