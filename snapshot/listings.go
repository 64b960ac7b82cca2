package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

func (s *Store) listingPath(id drivers.ID) string {
	return filepath.Join(s.root, "listings", id.String())
}

// removeListing removes a layer's listing and what is there of a new one.
func (s *Store) removeListing(id drivers.ID) error {
	for _, suffix := range []string{"", ".part"} {
		if err := os.Remove(s.listingPath(id) + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			return rootError(err)
		}
	}
	return nil
}

// writeListing makes listings/ID of what fill puts into the writer, whole and
// durable or not at all, and returns its digest. An error of accept, if there
// is one, keeps the file from being replaced.
func (s *Store) writeListing(id drivers.ID, volatile bool, fill func(*layer.ListingWriter) error, accept ...func(digest.Digest) error) (digest.Digest, error) {
	dir, err := s.makeDir("listings")
	if err != nil {
		return "", err
	}
	part := filepath.Join(dir, id.String()+".part")
	f, err := sys.Open(part, sys.O_RDWR|sys.O_CREAT|sys.O_TRUNC|sys.O_NOFOLLOW, 0o600)
	if err != nil {
		return "", rootError(err)
	}
	defer f.Close()
	d, err := fillListing(f, fill)
	for _, ok := range accept {
		if err == nil {
			err = ok(d)
		}
	}
	sync := !volatile && !s.o.Volatile
	if err == nil && sync {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(part, s.listingPath(id))
	}
	if err != nil {
		_ = os.Remove(part)
		if errors.As(err, new(syscall.Errno)) { // of the file, that is; errors of fill have their own sentinel
			err = rootError(err)
		}
		return d, err
	}
	if sync {
		err = syncDir(dir)
	}
	return d, err
}

func fillListing(f io.Writer, fill func(*layer.ListingWriter) error) (digest.Digest, error) {
	w := layer.NewListingWriter(f)
	err := fill(w)
	d, cerr := w.Close() // in any case: it frees what the writer holds
	return d, errors.Join(err, cerr)
}

// lister computes, one after the other and in the background, the listings of
// layers that were committed with changes made by hand.
type lister struct {
	s *Store

	mu      sync.Mutex
	own     []drivers.ID  // guarded by mu; committed through this Store: Close waits for them
	old     []drivers.ID  // guarded by mu; found at Open: Close does not wait
	running bool          // guarded by mu
	closing bool          // guarded by mu; old ones are dropped
	idle    chan struct{} // guarded by mu; closed when not running
	isOld   bool          // guarded by mu; the one in work is of old
	work    drivers.ID    // guarded by mu; the one in work, 0 if none
	done    chan struct{} // guarded by mu; closed when that is done
	cancel  context.CancelFunc
	ctx     context.Context
	stop    context.CancelFunc
}

// newLister returns a lister that works in ctx without its end.
func newLister(ctx context.Context, s *Store) *lister {
	l := &lister{s: s, idle: make(chan struct{})}
	close(l.idle)
	l.ctx, l.stop = context.WithCancel(context.WithoutCancel(ctx))
	return l
}

// add queues a layer that was just committed.
func (l *lister) add(id drivers.ID) { l.queue(&l.own, id) }

// resume queues what earlier Stores left.
func (l *lister) resume(ids []drivers.ID) { l.queue(&l.old, ids...) }

func (l *lister) queue(q *[]drivers.ID, ids ...drivers.ID) {
	if l.s.o.NoListings || l.s.o.ReadOnly || len(ids) == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return
	}
	*q = append(*q, ids...)
	if !l.running {
		l.running, l.idle = true, make(chan struct{})
		go l.run()
	}
}

// next returns the next layer with the context to work in.
func (l *lister) next() (id drivers.ID, isOld bool, ctx context.Context) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closing {
		l.old = nil
	}
	q := &l.own
	if len(*q) == 0 {
		q = &l.old
	}
	if len(*q) == 0 || l.ctx.Err() != nil {
		l.running = false
		close(l.idle)
		return 0, false, nil
	}
	id = (*q)[0]
	*q = (*q)[1:]
	l.isOld = q == &l.old
	l.work, l.done = id, make(chan struct{})
	ctx, l.cancel = context.WithCancel(l.ctx)
	return id, l.isOld, ctx
}

func (l *lister) run() {
	for {
		id, isOld, ctx := l.next()
		if ctx == nil {
			return
		}
		lock := l.s.locks.exclusive
		if isOld {
			lock = l.s.locks.unlessHeld
		}
		if err := l.s.list(ctx, id, lock); err != nil && !errors.Is(err, errHeld) && ctx.Err() == nil {
			l.s.o.Log(fmt.Sprintf("listing of layer %s: %v", id, err))
		}
		l.cancel()
		l.mu.Lock()
		l.work = 0
		close(l.done)
		l.mu.Unlock()
	}
}

// drop makes sure that no listing of a layer is computed: it is to be removed.
func (l *lister) drop(ctx context.Context, id drivers.ID) {
	l.mu.Lock()
	it := func(queued drivers.ID) bool { return queued == id }
	l.own, l.old = slices.DeleteFunc(l.own, it), slices.DeleteFunc(l.old, it)
	var done chan struct{}
	if l.work == id {
		l.cancel()
		done = l.done
	}
	l.mu.Unlock()
	if done != nil {
		select {
		case <-done:
		case <-ctx.Done():
		}
	}
}

// close waits for the layers of this Store's own commits until ctx ends, and
// leaves the others to the next Open.
func (l *lister) close(ctx context.Context) {
	l.mu.Lock()
	l.closing = true
	if l.running && l.isOld && l.cancel != nil {
		l.cancel()
	}
	idle := l.idle
	l.mu.Unlock()
	select {
	case <-idle:
	case <-ctx.Done():
	}
	l.stop()
	<-idle
}

// wait returns when nothing is queued.
func (l *lister) wait(ctx context.Context) error {
	l.mu.Lock()
	idle := l.idle
	l.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// FinishListings waits for the listings that are being computed, those that Open
// found unfinished among them.
func (s *Store) FinishListings(ctx context.Context) error { return s.listings.wait(ctx) }

// list computes the listing of a committed layer, unless another has. lock says
// what to do while another does: it may give up, when its store is closed.
func (s *Store) list(ctx context.Context, id drivers.ID, lock lockFunc) error {
	release, err := lock(ctx, listingPlace(id), "the listing of layer "+id.String())
	if err != nil {
		return err
	}
	defer release()
	unpin, err := s.locks.shared(ctx, layerPlace(id), "a layer to be listed")
	if err != nil {
		return err
	}
	defer unpin()
	to, from, err := s.unlisted(ctx, id)
	if err != nil || to == nil {
		return err
	}
	d, err := s.writeListing(id, to.layer.Volatile, func(w *layer.ListingWriter) error {
		return s.listChanges(ctx, w, from, to)
	})
	if err != nil {
		return err
	}
	if err := faults.Point(ctx, "store: list: written"); err != nil {
		return err
	}
	return s.db.update(ctx, func(t *txn) error { return t.setDigest(id, d) })
}

// unlisted returns a layer whose listing is pending, and its parent; nil if it
// is not.
func (s *Store) unlisted(ctx context.Context, id drivers.ID) (to, from *node, err error) {
	err = s.db.view(ctx, func(t *txn) error {
		to, from = nil, nil
		if t.get(bucketPending, idKey(id)) == nil {
			return nil
		}
		n, err := t.layerNode(id)
		if err != nil || n == nil {
			return err
		}
		if len(n.ref.Parents) > 0 {
			if from, err = t.layerNode(n.ref.Parents[0]); err != nil {
				return err
			}
		}
		to = n
		return nil
	})
	return to, from, err
}

// layerNode is a node by ID, without a name; nil if there is no record.
func (t *txn) layerNode(id drivers.ID) (*node, error) {
	l, err := t.layer(id)
	if err != nil || l == nil {
		return nil, err
	}
	ref, err := t.ref(id)
	return &node{name: &name{ID: id}, layer: l, ref: ref}, err
}

func (t *txn) setDigest(id drivers.ID, d digest.Digest) error {
	l, err := t.layer(id)
	if err != nil || l == nil || t.get(bucketPending, idKey(id)) == nil {
		return err // removed meanwhile
	}
	l.Digest = d
	if err := t.putLayer(id, l); err != nil {
		return err
	}
	return t.delete(bucketPending, idKey(id))
}

// listChanges lists what a layer changed.
func (s *Store) listChanges(ctx context.Context, w *layer.ListingWriter, from, to *node) error {
	changes, done, err := s.changes(ctx, from, to)
	if err != nil {
		return err
	}
	defer done()
	return layer.ListChanges(ctx, changes, w)
}
