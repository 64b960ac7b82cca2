package snapshot

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
)

// maxLease bounds a block of IDs. The first is of one, so that a program that
// makes one snapshot writes no more than the counter and the record; from the
// second on the record of a block's last ID takes the next block with it.
const maxLease = 64

// ids hands out IDs from blocks that it leases from the counter in the
// database. A lease ends in the transaction after its last ID got a record.
type ids struct {
	s *Store

	turn   chan struct{} // holds one token: one goroutine takes a block at a time
	mu     sync.Mutex    // idsMu in the package's lock order
	blocks map[drivers.ID]*block
	now    *block // guarded by mu; the block that IDs are taken from, nil at first
}

// block is one lease: the IDs first .. end-1. All but the constants is guarded
// by ids.mu.
type block struct {
	first, end drivers.ID // immutable
	release    func()     // immutable; frees the lease's lock
	next       drivers.ID
	open       int // IDs handed out that have no record yet
}

func (b *block) done() bool { return b.next == b.end && b.open == 0 }

func newIDs(s *Store) *ids {
	i := &ids{s: s, turn: make(chan struct{}, 1), blocks: map[drivers.ID]*block{}}
	i.turn <- struct{}{}
	return i
}

// take returns an ID that was never used, and its block.
func (i *ids) take(ctx context.Context) (drivers.ID, *block, error) {
	if id, b := i.fromBlock(); b != nil {
		return id, b, nil
	}
	select {
	case <-i.turn:
		defer func() { i.turn <- struct{}{} }()
	case <-ctx.Done():
		return 0, nil, ctx.Err()
	}
	for {
		if id, b := i.fromBlock(); b != nil {
			return id, b, nil
		}
		if err := i.lease(ctx); err != nil {
			return 0, nil, err
		}
	}
}

func (i *ids) fromBlock() (drivers.ID, *block) {
	i.mu.Lock()
	defer i.mu.Unlock()
	b := i.now
	if b == nil || b.next == b.end {
		return 0, nil
	}
	b.next++
	b.open++
	return b.next - 1, b
}

// lease takes the next block, in a transaction of its own.
func (i *ids) lease(ctx context.Context) error {
	l := &leasing{i: i, n: i.nextSize()}
	return l.end(i.s.db.update(ctx, l.in))
}

// ahead is a leasing for the transaction that records an ID, so that the next
// snapshot needs none of its own; nil if there are IDs left, if somebody is about
// it, or if it is the first block: a program may want no second snapshot. Who has
// one must end it.
func (i *ids) ahead() *leasing {
	select {
	case <-i.turn:
	default:
		return nil
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if b := i.now; b == nil || b.first+1 == b.end || b.next < b.end {
		i.turn <- struct{}{}
		return nil
	}
	return &leasing{i: i, n: i.sizeAfter(i.now), ahead: true}
}

// leasing is a block being taken from the counter. What was handed out of it is,
// after a crash, behind the counter: the block is used when the transaction is
// durable.
type leasing struct {
	i     *ids
	n     drivers.ID // how many
	b     *block     // of the last try
	ahead bool       // holds the turn
}

// in takes the block within a transaction, which may be tried again.
func (l *leasing) in(t *txn) error {
	l.drop()
	first := t.nextID()
	release, ok, err := l.i.s.locks.try(leasePlace(first))
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("IDs from %s are leased to a process, and the counter does not know: %w", first, errdefs.ErrDataLoss)
	}
	l.b = &block{first: first, end: first + l.n, next: first, release: release}
	return t.putLease(l.b, l.i.s.owner())
}

func (l *leasing) drop() {
	if l.b != nil {
		l.b.release()
		l.b = nil
	}
}

// end makes the block the present one, if err, the transaction's outcome, is nil.
func (l *leasing) end(err error) error {
	if l.ahead {
		defer func() { l.i.turn <- struct{}{} }()
	}
	if err != nil {
		l.drop()
		return fmt.Errorf("lease IDs: %w", err)
	}
	l.i.mu.Lock()
	defer l.i.mu.Unlock()
	l.i.blocks[l.b.first], l.i.now = l.b, l.b
	return nil
}

func (i *ids) nextSize() drivers.ID {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.sizeAfter(i.now)
}

func (i *ids) sizeAfter(b *block) drivers.ID {
	if b == nil {
		return 1
	}
	return min(4*(b.end-b.first), maxLease)
}

// record writes the record of an ID of a block, in one transaction with the end of
// the leases that nobody needs after it.
func (i *ids) record(ctx context.Context, of *block, write func(t *txn) error) error {
	var ended []drivers.ID
	err := i.s.db.update(ctx, func(t *txn) (err error) {
		if err := write(t); err != nil {
			return err
		}
		ended, err = i.settle(t, of)
		return err
	})
	if err == nil {
		i.settled(of, ended)
	}
	return err
}

// settle is called within the transaction that writes the record of an ID of
// block of: it ends the leases that nobody needs after it, and returns them for
// settled.
func (i *ids) settle(t *txn, of *block) (ended []drivers.ID, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for first, b := range i.blocks {
		last := b == of && b.next == b.end && b.open == 1
		if !last && !b.done() {
			continue
		}
		if err := t.delete(bucketLeases, idKey(first)); err != nil {
			return nil, err
		}
		ended = append(ended, first)
	}
	return ended, nil
}

// settled is called when that transaction is durable, or (without ended) when
// nothing of the ID is on disk.
func (i *ids) settled(of *block, ended []drivers.ID) {
	i.mu.Lock()
	defer i.mu.Unlock()
	of.open--
	for _, first := range ended {
		if b := i.blocks[first]; b != nil && b.done() {
			b.release()
			delete(i.blocks, first)
		}
	}
}

// close gives up all leases. One with an ID that may have left something on
// disk stays in the database for the next recovery.
func (i *ids) close(ctx context.Context) error {
	ended := i.ended()
	if len(ended) == 0 {
		return nil
	}
	return i.s.db.update(ctx, func(t *txn) error {
		for _, first := range ended {
			if err := t.delete(bucketLeases, idKey(first)); err != nil {
				return err
			}
		}
		return nil
	})
}

// ended returns the leases of which every ID handed out has a record.
func (i *ids) ended() (firsts []drivers.ID) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for first, b := range i.blocks {
		b.next = b.end
		if b.open == 0 {
			firsts = append(firsts, first)
		}
	}
	return firsts
}

// nextID is the counter: the first ID that was never leased. A counter behind
// a record, as after a restored copy, is put right.
func (t *txn) nextID() drivers.ID {
	next := max(keyID(t.get(bucketMeta, metaNext)), 1)
	if b := t.tx.Bucket(bucketLayers); b != nil {
		if k, _ := b.Cursor().Last(); k != nil {
			next = max(next, keyID(k)+1)
		}
	}
	return next
}

func (t *txn) putLease(b *block, o owner) error {
	if err := t.put(bucketMeta, metaNext, binary.BigEndian.AppendUint64(nil, uint64(b.end))); err != nil {
		return err
	}
	return t.putJSON(bucketLeases, idKey(b.first), lease{End: b.end, Owner: o})
}

// bootID names this run of the kernel.
var bootID = sync.OnceValue(func() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
})

func (s *Store) owner() owner {
	return owner{PID: os.Getpid(), Comm: comm(), Boot: bootID(), Since: time.Now().UTC()}
}
