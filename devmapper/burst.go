package devmapper

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
)

// burst holds the Creates that wait for the pool. Whoever gets it makes the snapshots of
// several: their records are flushed at the same time, and they are one transaction.
type burst struct {
	mu      sync.Mutex
	waiting []*making
}

// mostAtOnce bounds how long others, who want the pool for something short, wait for it.
const mostAtOnce = 16

// making is a layer whose snapshot is to be made.
type making struct {
	ctx    context.Context
	id     drivers.ID
	record *record
	origin uint32

	// Valid once done is closed.
	err      error
	recorded bool // there may be something to clean up
	done     chan struct{}
}

func (b *burst) add(m *making) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting = append(b.waiting, m)
}

// take takes m and others that wait, nil if somebody else has taken m.
func (b *burst) take(m *making) []*making {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.remove(m) {
		return nil
	}
	n := min(len(b.waiting), mostAtOnce-1)
	batch := append([]*making{m}, b.waiting[:n]...)
	b.waiting = slices.Clone(b.waiting[n:])
	return batch
}

func (b *burst) remove(m *making) bool {
	i := slices.Index(b.waiting, m)
	if i >= 0 {
		b.waiting = slices.Delete(b.waiting, i, i+1)
	}
	return i >= 0
}

// withdraw takes m away unless somebody has taken it.
func (b *burst) withdraw(m *making) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.remove(m)
}

// snapshot records a layer in new, takes its snapshot and sets the pool's transaction,
// maybe together with others. It reports whether there is something to clean up.
func (d *driver) snapshot(ctx context.Context, id drivers.ID, l *record, origin uint32) (recorded bool, err error) {
	m := &making{ctx: ctx, id: id, record: l, origin: origin, done: make(chan struct{})}
	d.burst.add(m)
	err = d.pool.Exclusive(ctx, func(c *thin.Change) error {
		if batch := d.burst.take(m); batch != nil {
			d.makeAll(c, batch)
			for _, m := range batch {
				close(m.done)
			}
		}
		return nil
	})
	if err != nil && d.burst.withdraw(m) {
		return false, err
	}
	<-m.done
	if err == nil {
		err = m.err
	}
	return m.recorded, err
}

// makeAll makes the snapshots of a batch; each has its own error.
func (d *driver) makeAll(c *thin.Change, batch []*making) {
	s, err := d.pool.Status()
	ids := map[drivers.ID]bool{}
	alive := failed(batch, func(m *making) error {
		if err != nil {
			return err
		}
		if ids[m.id] {
			return fmt.Errorf("is being made: %w", errdefs.ErrAlreadyExists)
		}
		ids[m.id] = true
		m.record.Tx = s.Transaction + 1
		return d.chooseID(c, m)
	})
	alive = d.recordAll(alive)
	alive = failed(alive, func(m *making) error {
		if err := drivers.Step(m.ctx, "devmapper: create: recorded"); err != nil {
			return err
		}
		err := lost(c.CreateSnap(m.record.Thin, m.origin))
		if errdefs.IsAlreadyExists(err) {
			err = d.snapElsewhere(c, m)
		}
		if err == nil {
			err = drivers.Step(m.ctx, "devmapper: create: snapshot made")
		}
		return err
	})
	if len(alive) == 0 {
		return
	}
	err = c.SetTransaction(s.Transaction, s.Transaction+1)
	if err == nil {
		d.reached(s.Transaction + 1)
	}
	failed(alive, func(*making) error { return err })
}

// failed calls do for each, and returns those for which that was no error.
func failed(batch []*making, do func(m *making) error) (alive []*making) {
	for _, m := range batch {
		if m.err = do(m); m.err == nil {
			alive = append(alive, m)
		}
	}
	return alive
}

// chooseID takes a free id for a layer that is not there.
func (d *driver) chooseID(c *thin.Change, m *making) error {
	if err := m.ctx.Err(); err != nil {
		return err
	}
	if err := d.refuseExisting(m.id); err != nil {
		return err
	}
	id, err := d.freeID(c)
	if err == nil {
		m.record.Thin, d.used[id] = id, true
	}
	return err
}

// recordAll writes the records, at the same time, so that the file system flushes them
// together.
func (d *driver) recordAll(batch []*making) (alive []*making) {
	dir, err := d.open(roots.New)
	if err != nil {
		return failed(batch, func(*making) error { return err })
	}
	defer dir.Close()
	var wg sync.WaitGroup
	for _, m := range batch {
		m.recorded = true
		wg.Go(func() { m.err = thin.ReplaceJSON(dir, m.id.String(), m.record) })
	}
	wg.Wait()
	err = dir.Sync()
	return failed(batch, func(m *making) error {
		if m.err != nil {
			delete(d.used, m.record.Thin) // no record names it
			return m.err
		}
		return err
	})
}

// snapElsewhere is for an id that the pool has, although no record names it.
func (d *driver) snapElsewhere(c *thin.Change, m *making) error {
	return d.takeID(c, func(thinID uint32) error {
		m.record.Thin = thinID
		if err := d.write(roots.New, m.id, m.record); err != nil {
			return err
		}
		return lost(c.CreateSnap(thinID, m.origin))
	})
}
