package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

const (
	// linger is how long an idle database stays open: opening costs some 0.1 ms
	// (BenchmarkGate), so it is worth a few of those and no more.
	linger = 2 * time.Millisecond
	// turn is how long a process whose transactions never pause keeps the
	// database when another waits.
	turn = 10 * time.Millisecond
	// leastPages is the size of bbolt's two meta pages, without which it opens no
	// file and does not say that it is damaged.
	leastPages = 2 * 4096
	// patience is how long a wait goes on without a word.
	patience = 2 * time.Second
)

// database is the gate to db.bolt, which one process has open at a time.
//
// Two flocks decide whose turn it is. db.lock is held by whoever has the
// database open. Whoever wants it takes db.wait first and keeps that until it
// has db.lock: so at most one waits for db.lock and gets it as soon as it is
// free, the others queue on db.wait, and the holder sees by a look at db.wait
// that somebody waits.
type database struct {
	dir      string
	readOnly bool
	noSync   bool
	log      func(string)

	mu      sync.Mutex // gateMu in the package's lock order
	bolt    *bolt.DB   // guarded by mu; nil while closed
	lock    *sys.Lock  // guarded by mu; db.lock, held while bolt is open
	wait    *sys.Fd    // guarded by mu; db.wait, open while bolt is
	users   int        // guarded by mu; transactions in progress
	since   time.Time  // guarded by mu; when it was opened
	looked  time.Time  // guarded by mu; when it was last asked whether others wait
	yield   bool       // guarded by mu; no new users until it was closed
	bad     bool       // guarded by mu; a commit failed: the handle is not to be used again
	shut    bool       // guarded by mu
	attempt *attempt   // guarded by mu; an opening in progress
	closed  chan struct{}
	idle    *time.Timer // guarded by mu

	reserveMu sync.Mutex
	reserved  sync.Once // the reserve was looked for
	group     committer
}

// attempt is one opening of the database; err is set before done is closed.
type attempt struct {
	done chan struct{}
	err  error
}

func newDatabase(dir string, readOnly, noSync bool, log func(string)) *database {
	d := &database{dir: dir, readOnly: readOnly, noSync: noSync, log: log, closed: make(chan struct{})}
	d.group.db = d
	return d
}

var errClosed = fmt.Errorf("store is closed: %w", errdefs.ErrUnavailable)

// enter waits until the database is open here and returns it; leave must
// follow. It says after patience what it waits for, and gives up with ctx.
func (d *database) enter(ctx context.Context) (*bolt.DB, error) {
	word := newNagger(d.log, d.waitingFor)
	defer word.stop()
	for {
		db, a, closed := d.tryEnter()
		switch {
		case db != nil:
			return db, nil
		case a == nil && closed == nil:
			return nil, errClosed
		}
		var opened chan struct{}
		if a != nil {
			opened = a.done
		}
		select {
		case <-opened:
			if a.err != nil {
				return nil, a.err
			}
		case <-closed:
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: %w", d.waitingFor(), ctx.Err())
		case <-word.c():
			word.say()
		}
	}
}

// tryEnter returns the open database, or what to wait for: an opening, or (when
// the database is being given to others) its closing. All nil after shutdown.
func (d *database) tryEnter() (*bolt.DB, *attempt, chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.shut:
		return nil, nil, nil
	case d.bolt != nil && (d.yield || d.bad):
		return nil, nil, d.closed
	case d.bolt != nil:
		d.users++
		if d.idle != nil {
			d.idle.Stop()
		}
		return d.bolt, nil, nil
	}
	if d.attempt == nil {
		d.attempt = &attempt{done: make(chan struct{})}
		go d.open(d.attempt)
	}
	return nil, d.attempt, nil
}

// leave ends what enter began.
func (d *database) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.users--
	now := time.Now()
	if d.users > 0 {
		if now.Sub(d.since) > turn && now.Sub(d.looked) > time.Millisecond {
			d.looked = now
			d.yield = d.yield || d.wanted()
		}
		return
	}
	if d.shut || d.yield || d.bad || d.wanted() {
		d.release()
		return
	}
	if d.idle == nil {
		d.idle = time.AfterFunc(linger, d.timeout)
		return
	}
	d.idle.Reset(linger)
}

func (d *database) timeout() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.users == 0 && d.bolt != nil {
		d.release()
	}
}

// release closes the database; mu is held and there are no users.
func (d *database) release() {
	if d.bolt == nil {
		return
	}
	if err := d.bolt.Close(); err != nil {
		d.log(fmt.Sprintf("closing the database: %v", err))
	}
	d.bolt, d.yield, d.bad = nil, false, false
	d.lock.Close()
	d.wait.Close()
	d.lock, d.wait = nil, nil
	close(d.closed)
	d.closed = make(chan struct{})
}

// spoil keeps the open handle from being used again: after a failed write
// nobody knows what the page cache holds.
func (d *database) spoil() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.bad = true
}

// shutdown closes the database once its users have left. Idempotent.
func (d *database) shutdown() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.shut = true
	if d.users == 0 {
		d.release()
	}
}

// wanted reports whether another open file holds db.wait; mu is held. Finding
// out delays a waiter by no more than a moment.
func (d *database) wanted() bool {
	if d.wait == nil {
		return false // read-only, and nobody ever wrote here
	}
	held, err := d.wait.FlockHeld()
	return held || err != nil
}

func (d *database) path(name string) string { return filepath.Join(d.dir, name) }

// open runs one attempt. It cannot be cancelled while it waits for a lock; if
// nobody is interested any more, the database closes after linger.
func (d *database) open(a *attempt) {
	lock, db, err := d.openFiles()
	var wait *sys.Fd
	if err == nil && lock != nil {
		wait, err = sys.Open(d.path("db.wait"), sys.O_RDONLY, 0)
		if err != nil {
			err = errors.Join(dbError("lock", err), db.Close(), lock.Close())
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.attempt = nil
	a.err = err
	close(a.done)
	if err != nil {
		return
	}
	d.lock, d.wait, d.bolt, d.since = lock, wait, db, time.Now()
	if d.shut {
		d.release()
		return
	}
	if d.idle != nil {
		d.idle.Stop()
	}
	d.idle = time.AfterFunc(linger, d.timeout)
}

func (d *database) openFiles() (*sys.Lock, *bolt.DB, error) {
	lock, err := d.takeTurn()
	if err != nil {
		return nil, nil, err
	}
	db, err := d.openBolt()
	if err != nil {
		lock.Close()
		return nil, nil, err
	}
	if !d.readOnly {
		d.signHolder(lock)
		d.reserved.Do(d.keepReserve)
	}
	return lock, db, nil
}

// takeTurn takes db.lock by way of db.wait.
func (d *database) takeTurn() (*sys.Lock, error) {
	flags, kind := sys.O_RDWR|sys.O_CREAT, sys.LockExclusive
	if d.readOnly {
		flags, kind = sys.O_RDONLY, sys.LockShared
	}
	wait, err := sys.WaitLock(d.path("db.wait"), flags, sys.LockExclusive)
	if d.readOnly && errors.Is(err, os.ErrNotExist) {
		return nil, nil // never opened for writing, or copied without: nobody to exclude
	}
	if err != nil {
		return nil, dbError("lock", err)
	}
	defer wait.Close()
	lock, err := sys.WaitLock(d.path("db.lock"), flags, kind)
	return lock, dbError("lock", err)
}

// openBolt opens the file itself. Its own flock is ours at once, unless a
// foreign program has the file open.
func (d *database) openBolt() (*bolt.DB, error) {
	fresh, err := d.isNew()
	if err != nil {
		return nil, err
	}
	var db *bolt.DB
	var file *os.File
	err = guard("open", func() (err error) {
		db, err = bolt.Open(d.path("db.bolt"), 0o600, &bolt.Options{
			Timeout:         time.Second,
			ReadOnly:        d.readOnly,
			NoSync:          d.noSync,
			NoStatistics:    true,
			FreelistType:    bolt.FreelistMapType,
			InitialMmapSize: 1 << 20,
			OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
				file, err = os.OpenFile(name, flag, mode)
				return file, err
			},
		})
		return err
	})
	if db == nil && file != nil {
		// A panic left it open and mapped; the mapping keeps the flock unless it is
		// dropped by itself. After an error these do nothing.
		_ = syscall.Flock(int(file.Fd()), syscall.LOCK_UN)
		file.Close()
	}
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("database %s is open in a program that is not layerctl: %w", d.path("db.bolt"), errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, dbError("open", err)
	}
	if err := wholeFile(db, file); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	if fresh && !d.noSync { // its name must last, too
		if err := syncDir(d.dir); err != nil {
			return nil, errors.Join(dbError("open", err), db.Close())
		}
	}
	return db, nil
}

// isNew reports whether the database is yet to be made: it is absent, or a crash
// came before its first page. Where there are drivers there was a database: an
// empty one in its place would make every layer an orphan.
func (d *database) isNew() (bool, error) {
	i, err := os.Stat(d.path("db.bolt"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, dbError("open", err)
	}
	if err == nil && i.Size() >= leastPages {
		return false, nil
	}
	if err == nil && i.Size() > 0 {
		return false, fmt.Errorf("database: open: damaged: %d bytes are left of %s: %w", i.Size(), d.path("db.bolt"), errdefs.ErrDataLoss)
	}
	if _, err := os.Stat(d.path("drivers")); err == nil {
		return false, fmt.Errorf("database %s is missing or empty, and drivers/ is not: restore it from a copy, or move drivers/ away for a new store: %w", d.path("db.bolt"), errdefs.ErrDataLoss)
	}
	return true, nil
}

// wholeFile refuses a file that is shorter than its own pages say: reading the
// missing ones would end the process, in goroutines that guard does not reach.
func wholeFile(db *bolt.DB, file *os.File) error {
	return guard("open", func() error {
		i, err := file.Stat()
		if err != nil {
			return dbError("open", err)
		}
		return db.View(func(tx *bolt.Tx) error {
			if i.Size() < tx.Size() {
				return fmt.Errorf("database: open: damaged: %d bytes are left of %d: %w", i.Size(), tx.Size(), errdefs.ErrDataLoss)
			}
			return nil
		})
	})
}

// syncDir flushes the names in a directory.
func syncDir(path string) error {
	dir, err := sys.OpenDir(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// holder is what db.lock says of the process that has it.
type holder struct {
	PID   int       `json:"pid"`
	Comm  string    `json:"comm"`
	Since time.Time `json:"since"`
}

// signHolder writes who holds the lock, for those who wait. Nobody relies on it.
func (d *database) signHolder(lock *sys.Lock) {
	b, err := json.Marshal(holder{os.Getpid(), comm(), time.Now().UTC()})
	if err != nil {
		return
	}
	b = fmt.Appendf(nil, "%-160s\n", b) // one length: a shorter text leaves no rest of a longer one
	_, _ = lock.Fd().WriteAt(b, 0)
}

// waitingFor says in words what a wait for the database is about.
func (d *database) waitingFor() string {
	where := "waiting for the database of " + d.dir
	b, err := os.ReadFile(d.path("db.lock"))
	var h holder
	if err != nil || json.Unmarshal(b, &h) != nil {
		return where
	}
	if err := syscall.Kill(h.PID, 0); errors.Is(err, syscall.ESRCH) {
		return where
	}
	return fmt.Sprintf("%s: process %d (%s) has had it for %s", where, h.PID, h.Comm, time.Since(h.Since).Round(time.Millisecond))
}

// view runs fn in a read transaction. What fn keeps must be copied.
func (d *database) view(ctx context.Context, fn func(*txn) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	db, err := d.enter(ctx)
	if err != nil {
		return err
	}
	defer d.leave()
	return guard("read", func() error {
		tx, err := db.Begin(false)
		if err != nil {
			return dbError("read", err)
		}
		defer func() { _ = tx.Rollback() }() // the end of every read transaction
		return fn(&txn{tx: tx})
	})
}

// guard turns the panic with which bbolt meets a damaged file into an error, and
// the fault with which it reads beyond the end of one cut short. A panic of
// another origin goes on.
func guard(op string, f func() error) (err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		p := recover()
		if p == nil {
			return
		}
		if !strings.Contains(string(debug.Stack()), "go.etcd.io/bbolt") {
			panic(p)
		}
		err = fmt.Errorf("database: %s: damaged: %v: %w", op, p, errdefs.ErrDataLoss)
	}()
	return f()
}

// dbError gives an error of the database a sentinel: full disks, read-only
// file systems and damaged files are told apart.
func dbError(op string, err error) error {
	if err == nil || errdefs.Resolve(err) != errdefs.ErrUnknown {
		return err
	}
	var s error = errdefs.ErrInternal
	switch {
	case drivers.IsFull(err):
		s = errdefs.ErrResourceExhausted
	case errors.Is(err, syscall.EROFS):
		s = errdefs.ErrFailedPrecondition
	case errors.Is(err, os.ErrNotExist):
		s = errdefs.ErrNotFound
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		s = errdefs.ErrPermissionDenied
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch):
		s = errdefs.ErrDataLoss
	}
	return fmt.Errorf("database: %s: %w: %w", op, s, err)
}

// comm is this process's name as ps shows it.
func comm() string { return filepath.Base(os.Args[0]) }

// nagger says something once patience has run out, and again ever more rarely.
type nagger struct {
	log   func(string)
	what  func() string
	timer *time.Timer
	next  time.Duration
}

func newNagger(log func(string), what func() string) *nagger {
	return &nagger{log: log, what: what, next: patience}
}

// c returns the channel that fires when it is time to say something.
func (n *nagger) c() <-chan time.Time {
	if n.timer == nil {
		n.timer = time.NewTimer(n.next)
	}
	return n.timer.C
}

func (n *nagger) say() {
	n.log(n.what())
	n.next *= 2
	n.timer.Reset(n.next)
}

func (n *nagger) stop() {
	if n.timer != nil {
		n.timer.Stop()
	}
}
