package snapshot

import (
	"context"
	"fmt"
	"hash/fnv"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// A place is one byte of the file "locks". The byte of a layer is its ID; those
// of keys, listings (who computes it), leases (whose they are) and those of
// recovery and migration lie beyond every ID.
type place uint64

const (
	keyPlaces     place = 1 << 62
	listingPlaces place = 1 << 61
	leasePlaces   place = 1 << 60
	recoveryPlace place = leasePlaces - 1
	// migrationPlace keeps migrations apart.
	migrationPlace place = leasePlaces - 2
)

func layerPlace(id drivers.ID) place    { return place(id) }
func listingPlace(id drivers.ID) place  { return listingPlaces + place(id) }
func leasePlace(first drivers.ID) place { return leasePlaces + place(first) }

// keyPlace is by hash: two keys that share a place only wait for each other
// without need.
func keyPlace(view, key string) place {
	h := fnv.New64a()
	h.Write([]byte(view))
	h.Write([]byte{0})
	h.Write([]byte(key))
	return keyPlaces + place(h.Sum64()>>2)&(keyPlaces-1)
}

// locks is the lock table of one Store: among its goroutines in memory, among
// processes by range locks, which the kernel drops with the process.
type locks struct {
	fd  *sys.Fd // nil in a read-only store, which excludes nobody; immutable
	log func(string)

	mu     sync.Mutex
	held   map[place]*holding // guarded by mu
	closed bool               // guarded by mu
}

// holding is a place that is held in this Store.
type holding struct {
	readers int
	writer  bool
	changed chan struct{} // closed when any of this changes
}

func newLocks(path string, readOnly bool, log func(string)) (*locks, error) {
	l := &locks{log: log, held: map[place]*holding{}}
	if readOnly {
		return l, nil
	}
	var err error
	l.fd, err = sys.Open(path, sys.O_RDWR|sys.O_CREAT|sys.O_NOFOLLOW, 0o600)
	return l, err
}

// Close gives no more locks and drops the leases. The locks of calls that are
// still at work stay until each is done, so that nobody else touches what they
// write. Idempotent.
func (l *locks) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for p := range l.held {
		if p >= leasePlaces && p < listingPlaces {
			l.drop(p)
		}
	}
	return l.closeIdle()
}

// closeIdle closes the file of a closed table that nobody holds a place of; mu
// is held.
func (l *locks) closeIdle() error {
	if !l.closed || len(l.held) > 0 {
		return nil
	}
	return l.fd.Close()
}

// drop gives a place back to the kernel; mu is held.
func (l *locks) drop(p place) {
	close(l.held[p].changed)
	delete(l.held, p)
	if l.fd == nil {
		return
	}
	if err := l.fd.UnlockRange(int64(p), 1); err != nil {
		l.log(err.Error())
	}
}

// shared and exclusive wait for a place; the caller must call release once.
func (l *locks) shared(ctx context.Context, p place, what string) (release func(), err error) {
	return l.acquire(ctx, p, sys.LockShared, what)
}

func (l *locks) exclusive(ctx context.Context, p place, what string) (release func(), err error) {
	return l.acquire(ctx, p, sys.LockExclusive, what)
}

// try takes a place exclusively if it is free.
func (l *locks) try(p place) (release func(), ok bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[p] != nil {
		return nil, false, nil
	}
	if err := l.kernel(p, sys.LockExclusive); err != nil {
		if sys.IsLocked(err) {
			err = nil
		}
		return nil, false, err
	}
	l.held[p] = &holding{writer: true, changed: make(chan struct{})}
	return l.releaser(p, sys.LockExclusive), true, nil
}

// free reports whether nobody holds a place, without taking it: a caller who
// tries it at the same time is not turned away.
func (l *locks) free(p place) (bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return false, errClosed
	case l.held[p] != nil:
		return false, nil
	case l.fd == nil:
		return true, nil
	}
	locked, err := l.fd.RangeLocked(int64(p), 1)
	return !locked, err
}

// errHeld is what unlessHeld returns for a place that another holds.
var errHeld = fmt.Errorf("held by another: %w", errdefs.ErrUnavailable)

// unlessHeld is exclusive without the waiting.
func (l *locks) unlessHeld(_ context.Context, p place, _ string) (release func(), err error) {
	release, ok, err := l.try(p)
	if err == nil && !ok {
		err = errHeld
	}
	return release, err
}

// kernel takes a place for this Store; mu is held.
func (l *locks) kernel(p place, kind sys.LockKind) error {
	if l.closed {
		return errClosed
	}
	if l.fd == nil {
		return nil
	}
	return l.fd.LockRange(kind, int64(p), 1)
}

func (l *locks) acquire(ctx context.Context, p place, kind sys.LockKind, what string) (func(), error) {
	word := newNagger(l.log, func() string { return "waiting for " + what + ", which another call or process is working on" })
	defer word.stop()
	pause := 100 * time.Microsecond
	for {
		wait, err := l.attempt(p, kind)
		if err == nil && wait == nil {
			return l.releaser(p, kind), nil
		}
		var poll <-chan time.Time
		if sys.IsLocked(err) { // by another process: the kernel has no wait that ctx could end
			poll = time.After(pause)
			pause = min(pause*2, 10*time.Millisecond)
		} else if err != nil {
			return nil, fmt.Errorf("lock %s: %w", what, err)
		}
		select {
		case <-wait:
		case <-poll:
		case <-word.c():
			word.say()
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for %s: %w", what, ctx.Err())
		}
	}
}

// attempt takes p, or returns what to wait for, or ErrLocked.
func (l *locks) attempt(p place, kind sys.LockKind) (wait chan struct{}, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.held[p]
	switch {
	case l.closed:
		return nil, errClosed
	case h == nil:
		if err := l.kernel(p, kind); err != nil {
			return nil, err
		}
		h = &holding{changed: make(chan struct{})}
		l.held[p] = h
	case h.writer || kind == sys.LockExclusive:
		return h.changed, nil
	}
	if kind == sys.LockExclusive {
		h.writer = true
	} else {
		h.readers++
	}
	return nil, nil
}

func (l *locks) releaser(p place, kind sys.LockKind) func() {
	var once sync.Once
	return func() { once.Do(func() { l.release(p, kind) }) }
}

func (l *locks) release(p place, kind sys.LockKind) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.held[p]
	if h == nil {
		return // a lease that went with Close
	}
	if kind != sys.LockExclusive {
		if h.readers--; h.readers > 0 {
			return
		}
	}
	l.drop(p)
	if err := l.closeIdle(); err != nil {
		l.log(err.Error())
	}
}
