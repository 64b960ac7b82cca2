package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
)

// Remove implements snapshots.Snapshotter. It forgets the key durably and
// returns; the bytes go with Cleanup or GC. ErrFailedPrecondition, naming them, if
// others depend on the snapshot.
func (v *View) Remove(ctx context.Context, key string) error {
	return v.fail("remove", key, v.remove(ctx, key))
}

func (v *View) remove(ctx context.Context, key string) error {
	if v.s.o.ReadOnly {
		return errReadOnly
	}
	release, err := v.s.locks.exclusive(ctx, keyPlace(v.name, key), fmt.Sprintf("key %q", key))
	if err != nil {
		return err
	}
	defer release()
	return v.s.db.free(ctx, func(t *txn) error {
		n, err := t.node(v.name, key)
		if err != nil {
			return err
		}
		if above := t.dependants(v.name, n.ref.ID); len(above) > 0 {
			return fmt.Errorf("it is the parent of %s: %w", list(above), errdefs.ErrFailedPrecondition)
		}
		if err := t.deleteName(v.name, key, n.ref.ID); err != nil {
			return err
		}
		if len(t.namesOf(n.ref.ID)) > 0 {
			return nil // bytes shared with another view
		}
		return t.addDebt(n.ref.ID, n.layer, n.ref, "removed")
	})
}

// Dependants returns the keys directly above a snapshot, sorted.
func (v *View) Dependants(ctx context.Context, key string) (keys []string, err error) {
	err = v.s.db.view(ctx, func(t *txn) error {
		n, err := t.node(v.name, key)
		if err == nil {
			keys = t.dependants(v.name, n.ref.ID)
		}
		return err
	})
	return keys, v.fail("dependants", key, err)
}

// dependants returns the keys of a view whose parent is the layer id.
func (t *txn) dependants(view string, id drivers.ID) (keys []string) {
	for _, c := range t.children(id) {
		for _, n := range t.namesOf(c) {
			if n.View == view {
				keys = append(keys, n.Key)
			}
		}
	}
	slices.Sort(keys)
	return keys
}

// list names a few of many.
func list(keys []string) string {
	const few = 8
	var quoted []string
	for _, k := range keys[:min(few, len(keys))] {
		quoted = append(quoted, fmt.Sprintf("%q", k))
	}
	if len(keys) > few {
		quoted = append(quoted, fmt.Sprintf("%d more", len(keys)-few))
	}
	return strings.Join(quoted, ", ")
}

// addDebt makes a layer one whose bytes are to be removed, and a copy of it that an
// unfinished migration made. Its parents stay until it is gone, since bytes below
// bytes in use cannot go.
func (t *txn) addDebt(id drivers.ID, l *layerRecord, r drivers.Ref, reason string) error {
	if err := t.dropMove(id); err != nil {
		return err
	}
	if err := t.putLayer(id, l); err != nil {
		return err
	}
	if len(r.Parents) > 0 {
		if err := t.setParent(id, r.Parents[0]); err != nil {
			return err
		}
	}
	for _, b := range [][]byte{bucketPending, bucketIntents} {
		if err := t.delete(b, idKey(id)); err != nil {
			return err
		}
	}
	return t.putJSON(bucketDebts, idKey(id), debt{Since: time.Now().UnixNano(), Reason: reason})
}

// Busy is a removed layer whose bytes could not go yet.
type Busy struct {
	Driver string     `json:"driver"`
	ID     drivers.ID `json:"id"`
	Why    string     `json:"why"`
}

// GCReport is what GC did.
type GCReport struct {
	Layers int64  `json:"layers"` // whose bytes were removed
	Bytes  int64  `json:"bytes"`  // allocated bytes that they held; of drivers that know
	Left   []Busy `json:"left,omitempty"`
}

// Cleanup implements snapshots.Cleaner: it is GC, and layers in use are no
// error.
func (v *View) Cleanup(ctx context.Context) error {
	_, err := v.s.GC(ctx)
	return err
}

// GC removes the bytes of removed snapshots, of every view, several at a time, and has the
// drivers that are open take away what they keep ready for nobody (see DropIdle). A layer that is in use stays for the next time and is in the report.
func (s *Store) GC(ctx context.Context) (GCReport, error) {
	if s.o.ReadOnly {
		return GCReport{}, fmt.Errorf("snapshot: gc: %w", errReadOnly)
	}
	select {
	case <-s.gcTurn: // two at a time would only be in each other's way
		defer func() { s.gcTurn <- struct{}{} }()
	case <-ctx.Done():
		return GCReport{}, fmt.Errorf("snapshot: gc: %w", ctx.Err())
	}
	g := &collector{s: s, left: map[drivers.ID]Busy{}, gone: map[drivers.ID]paid{}}
	err := g.run(ctx)
	_ = dropIdle(ctx, s.openDrivers()) // it is no debt, and the next time does it
	if g.report.Layers > 0 {
		s.db.refill(ctx)
	}
	for _, b := range g.left {
		g.report.Left = append(g.report.Left, b)
	}
	slices.SortFunc(g.report.Left, func(a, b Busy) int { return cmp.Compare(a.ID, b.ID) })
	if err != nil {
		err = fmt.Errorf("snapshot: gc: %w", err)
	}
	return g.report, err
}

// collector works the debts off: first the bytes of many layers go, then the file
// system is flushed once, then their records go. Without the flush a power cut could
// bring bytes back that no record names.
type collector struct {
	s      *Store
	mu     sync.Mutex
	report GCReport            // guarded by mu
	left   map[drivers.ID]Busy // guarded by mu
	gone   map[drivers.ID]paid // guarded by mu; whose records are still there
}

// payable is a debt with no layer above it.
type payable struct {
	ref   drivers.Ref
	layer *layerRecord
}

// paid is a debt whose bytes are gone, and which is locked until its records are.
type paid struct {
	payable
	bytes   int64
	release func()
}

const (
	// workers bounds the layers removed at a time: removal is mostly waiting for
	// the file system's journal.
	workers = 8
	// atOnce bounds the layers whose records go together, and so the locks held.
	atOnce = 256
)

// run goes from the top of each chain down, one level a round.
func (g *collector) run(ctx context.Context) (err error) {
	defer func() { // what could not be forgotten is removed once more, which does no harm
		for _, p := range g.gone {
			p.release()
		}
	}()
	for {
		debts, err := g.payable(ctx)
		if err != nil {
			return err
		}
		if n := len(g.gone); n > 0 && (len(debts) == 0 || n >= atOnce) {
			if err := g.forget(ctx); err != nil {
				return err
			}
			continue
		}
		if len(debts) == 0 {
			return nil
		}
		w, wctx := errgroup.WithContext(ctx)
		w.SetLimit(workers)
		for _, p := range debts[:min(len(debts), atOnce)] {
			w.Go(func() error { return g.pay(wctx, p) })
		}
		if err := w.Wait(); err != nil {
			return err
		}
	}
}

// payable returns the debts that may be tried now and were not yet.
func (g *collector) payable(ctx context.Context) (debts []payable, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	err = g.s.db.view(ctx, func(t *txn) error {
		debts = nil
		return t.each(bucketDebts, func(k, _ []byte) error {
			id := keyID(k)
			_, tried := g.left[id]
			_, done := g.gone[id]
			above := slices.ContainsFunc(t.children(id), func(c drivers.ID) bool { return g.gone[c].release == nil })
			if tried || done || above {
				return nil
			}
			l, err := t.layer(id)
			if err != nil {
				g.left[id] = Busy{ID: id, Why: err.Error()}
			}
			if err != nil || l == nil {
				return nil
			}
			ref, err := t.ref(id)
			debts = append(debts, payable{ref, l})
			return err
		})
	})
	return debts, err
}

// pay removes the bytes of one layer, and its listing. A layer that somebody works on
// or has mounted stays.
func (g *collector) pay(ctx context.Context, p payable) error {
	g.s.listings.drop(ctx, p.ref.ID) // or it would be in use
	release, ok, err := g.s.locks.try(layerPlace(p.ref.ID))
	if err != nil {
		return err
	}
	if !ok {
		g.leave(p, "a call is using it")
		return nil
	}
	defer func() {
		if release != nil {
			release()
		}
	}()
	if ok, err := g.s.isDebt(ctx, p.ref.ID); err != nil || !ok {
		return err // another process was faster
	}
	d, err := g.s.driver(ctx, p.layer.Driver)
	if drivers.IsFull(err) && g.makeRoom(ctx) { // it may need a little to see what works
		d, err = g.s.driver(ctx, p.layer.Driver)
	}
	if err != nil {
		g.leave(p, err.Error())
		return ctx.Err()
	}
	bytes := g.s.bytesOf(ctx, d, p)
	err = d.Remove(ctx, p.ref.ID)
	if drivers.IsFull(err) && g.makeRoom(ctx) {
		err = d.Remove(ctx, p.ref.ID)
	}
	if err != nil {
		g.leave(p, err.Error())
		return ctx.Err()
	}
	if err := faults.Point(ctx, "store: gc: bytes removed"); err != nil {
		return err
	}
	if err := g.s.removeListing(p.ref.ID); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.gone[p.ref.ID] = paid{p, bytes, release}
	release = nil
	return nil
}

// forget drops the records of what is gone, once it is gone for good. What cannot be
// flushed stays a debt.
func (g *collector) forget(ctx context.Context) error {
	gone := g.gone
	g.gone = map[drivers.ID]paid{}
	defer func() {
		for _, p := range gone {
			p.release()
		}
	}()
	var of []string
	for _, p := range gone {
		of = append(of, p.layer.Driver)
	}
	err := g.s.flushRemovals(of...)
	if drivers.IsFull(err) && g.makeRoom(ctx) {
		err = g.s.flushRemovals(of...)
	}
	if err != nil {
		for _, p := range gone {
			g.leave(p.payable, err.Error())
		}
		return ctx.Err()
	}
	if err := faults.Point(ctx, "store: gc: flushed"); err != nil {
		return err
	}
	err = g.s.db.free(ctx, func(t *txn) error {
		for id := range gone {
			if err := t.deleteLayer(id); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, p := range gone {
		g.report.Layers++
		g.report.Bytes += p.bytes
	}
	return nil
}

// flushRemovals makes removals last: those of listings, and of layers, whose drivers may
// be on file systems of their own.
func (s *Store) flushRemovals(of ...string) error {
	if s.o.Volatile {
		return nil
	}
	slices.Sort(of)
	flushed := map[uint64]bool{}
	err := flushOnce(s.root, flushed)
	for _, driver := range slices.Compact(of) {
		if err == nil {
			err = flushOnce(s.driverRoot(driver), flushed)
		}
	}
	return err
}

// flushOnce flushes the file system that a directory is on, unless it was.
func flushOnce(path string, flushed map[uint64]bool) error {
	dir, err := sys.OpenDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a driver with debts alone
	}
	if err != nil {
		return rootError(err)
	}
	defer dir.Close()
	st, err := dir.Stat("")
	if err != nil || flushed[st.Dev] {
		return rootError(err)
	}
	flushed[st.Dev] = true
	return rootError(dir.SyncFS())
}

// makeRoom reports whether there is a little more room now.
func (g *collector) makeRoom(ctx context.Context) bool {
	spent, err := g.s.MakeRoom(ctx)
	return spent && err == nil
}

func (g *collector) leave(p payable, why string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.left[p.ref.ID] = Busy{p.layer.Driver, p.ref.ID, why}
}

func (s *Store) isDebt(ctx context.Context, id drivers.ID) (ok bool, err error) {
	err = s.db.view(ctx, func(t *txn) error {
		ok = t.isDebt(id)
		return nil
	})
	return ok, err
}

// bytesOf is what a layer holds, 0 where nobody knows: half-made, say.
func (s *Store) bytesOf(ctx context.Context, d drivers.Driver, p payable) int64 {
	u := p.layer.usage()
	if !p.layer.Committed {
		var err error
		if u, err = d.Usage(ctx, p.ref); err != nil {
			return 0
		}
	}
	return max(u.Bytes, 0)
}
