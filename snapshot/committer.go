package snapshot

import (
	"context"
	"errors"
	"fmt"
	"sync"

	bolt "go.etcd.io/bbolt"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
)

// committer runs the write transactions of a burst as one, with one flush. A
// transaction never waits for others to come: while one batch is being flushed
// the next collects, so a batch is as long as the disk is slow.
type committer struct {
	db      *database
	mu      sync.Mutex // queueMu in the package's lock order
	queue   []*call    // guarded by mu
	running bool       // guarded by mu; a goroutine works the queue off
	batches int        // guarded by mu; for the test that bursts share a flush
}

// maxBatch bounds one transaction, and so the memory of its dirty pages.
const maxBatch = 512

// call is one write transaction. fn may run several times; err is set before
// done is closed.
type call struct {
	fn      func(*txn) error
	done    chan struct{}
	err     error
	frees   bool // it makes room: see free
	started bool // guarded by committer.mu
}

// update runs fn in a write transaction and returns when it is durable. fn may
// be called more than once and must set what it returns anew each time; if it
// returns an error, nothing that it did is kept. A ctx that ends before fn has
// run takes it back; later, update waits for the outcome.
func (d *database) update(ctx context.Context, fn func(*txn) error) error {
	return d.submit(ctx, &call{fn: fn, done: make(chan struct{})})
}

func (d *database) submit(ctx context.Context, c *call) error {
	if d.readOnly {
		return errReadOnly
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	d.group.add(c)
	word := newNagger(d.log, d.waitingFor)
	defer word.stop()
	for {
		select {
		case <-c.done:
			return c.err
		case <-word.c():
			word.say()
		case <-ctx.Done():
			if d.group.takeBack(c) {
				return ctx.Err()
			}
			<-c.done
			return c.err
		}
	}
}

func (g *committer) add(c *call) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.queue = append(g.queue, c)
	if !g.running {
		g.running = true
		go g.run()
	}
}

// takeBack removes a call that has not begun.
func (g *committer) takeBack(c *call) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.started {
		return false
	}
	for i, q := range g.queue {
		if q == c {
			g.queue = append(g.queue[:i], g.queue[i+1:]...)
			break
		}
	}
	return true
}

// next takes a batch off the queue; nil ends the run.
func (g *committer) next() []*call {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := min(len(g.queue), maxBatch)
	if n == 0 {
		g.running = false
		return nil
	}
	g.batches++
	batch := g.queue[:n:n]
	g.queue = g.queue[n:]
	for _, c := range batch {
		c.started = true
	}
	return batch
}

// empty ends the run if nobody is left who wants something.
func (g *committer) empty() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.queue) == 0 {
		g.running = false
		return true
	}
	return false
}

func (g *committer) run() {
	for !g.empty() {
		// Entering may take long; callers can take their calls back meanwhile.
		db, err := g.db.enter(context.Background())
		batch := g.next()
		if err == nil {
			if batch != nil {
				err = commitBatch(db, batch)
			}
			if err != nil {
				g.db.spoil()
			}
			g.db.leave()
		}
		for _, c := range batch {
			if c.err == nil { // else its own: it has written nothing
				c.err = err
			}
		}
		if drivers.IsFull(err) {
			g.again(batch, err)
		}
		for _, c := range batch {
			close(c.done)
		}
		if batch == nil {
			return // next has ended the run
		}
	}
}

// errAgain rolls a batch back of which one call failed after it had written.
var errAgain = errors.New("run the batch again")

// errUnsure says that nobody knows whether a transaction took place: writing or
// flushing it failed.
var errUnsure = errors.New("whether the record was written is not known")

// commitBatch runs the calls in one transaction and sets their errors. Its own
// error is that of the database and everybody's.
func commitBatch(db *bolt.DB, batch []*call) error {
	for {
		err := guard("write", func() error { return tryBatch(db, batch) })
		if !errors.Is(err, errAgain) {
			return err
		}
		rest := batch[:0:0]
		for _, c := range batch {
			if c.fn != nil {
				rest = append(rest, c)
			}
		}
		batch = rest
	}
}

// tryBatch runs each call. One that fails before it has written anything is
// left out and harms nobody; after one that had written, the transaction is
// rolled back, and the others run again without it.
func tryBatch(db *bolt.DB, batch []*call) error {
	tx, err := db.Begin(true)
	if err != nil {
		return dbError("begin", err)
	}
	defer func() { _ = tx.Rollback() }() // ErrTxClosed after Commit
	wrote := false
	for _, c := range batch {
		t := &txn{tx: tx}
		c.err = c.fn(t)
		if c.err != nil && t.dirty {
			c.fn = nil
			return errAgain
		}
		wrote = wrote || t.dirty
	}
	if !wrote {
		return nil
	}
	// These belong to no call, so only who asks for the steps of the process sees them.
	_ = faults.Point(context.Background(), "store: records: to be written")
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("%w: %w", errUnsure, dbError("commit", err))
	}
	_ = faults.Point(context.Background(), "store: records: written")
	return nil
}
