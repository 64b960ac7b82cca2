package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// Format is the number of the on-disk format that this package writes. It opens
// stores of this number and lower ones, of which there are none yet.
const Format = 1

// Options say how a store is opened. Registry is required, all else may be zero.
type Options struct {
	// Registry is the drivers that the store may use.
	Registry *drivers.Registry
	// DriverOptions are options of drivers (drivers.Config), by driver name.
	DriverOptions map[string]map[string]string
	// Volatile skips flushing, of records and of layers: a power cut may lose what
	// was done, or the store. For tests and scratch stores.
	Volatile bool
	// ReadOnly opens a store without changing a byte of it; every call that would
	// wraps ErrFailedPrecondition. Others must not change it meanwhile in ways that
	// matter to the reader: nothing that it reads is locked.
	ReadOnly bool
	// NoListings leaves it to other Stores to compute the listings of layers that
	// were committed with changes made by hand.
	NoListings bool
	// Log is told, in one line each, what a user may have to know although nothing
	// failed: long waits, a listing that could not be made. nil: nobody is.
	Log func(string)
}

// Store is an open store. It is safe for concurrent use.
type Store struct {
	root  string
	o     Options
	db    *database
	locks *locks
	ids   *ids

	driversMu sync.Mutex
	open      map[string]*openDriver // guarded by driversMu
	closed    bool                   // guarded by driversMu

	gcTurn    chan struct{} // holds one token: one GC at a time
	recovered []Finding     // immutable after Open
	listings  *lister
	closeOnce sync.Once
	closeErr  error
}

var errReadOnly = fmt.Errorf("store is opened read-only: %w: %w", errdefs.ErrFailedPrecondition, syscall.EROFS)

// Open opens the store at root, or makes one if root is absent or empty. It
// repairs what dead processes left (Recovered). Errors: ErrFailedPrecondition
// where the format is newer, the place holds something else or cannot be
// written; ErrPermissionDenied; ErrResourceExhausted on a full disk.
func Open(ctx context.Context, root string, o Options) (*Store, error) {
	s, err := open(ctx, root, o)
	if err != nil {
		return nil, fmt.Errorf("snapshot: store %s: %w", root, err)
	}
	return s, nil
}

func open(ctx context.Context, root string, o Options) (*Store, error) {
	if o.Registry == nil {
		return nil, fmt.Errorf("no drivers given: %w", errdefs.ErrInvalidArgument)
	}
	if o.Log == nil {
		o.Log = func(string) {}
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	if err := prepareRoot(root, o); err != nil {
		return nil, err
	}
	s := &Store{root: root, o: o, open: map[string]*openDriver{}}
	s.gcTurn = make(chan struct{}, 1)
	s.gcTurn <- struct{}{}
	s.db = newDatabase(root, o.ReadOnly, o.Volatile, o.Log)
	s.ids = newIDs(s)
	s.listings = newLister(ctx, s)
	if s.locks, err = newLocks(filepath.Join(root, "locks"), o.ReadOnly, o.Log); err != nil {
		return nil, rootError(err)
	}
	if err := s.recover(ctx); err != nil {
		ended, cancel := context.WithCancel(ctx)
		cancel()
		s.listings.close(ended)
		s.abandon()
		return nil, err
	}
	return s, nil
}

// Root returns the store's directory, absolute.
func (s *Store) Root() string { return s.root }

// Close waits for the listings that this Store began (CloseContext bounds that),
// gives up its leases and closes the drivers. Mounts stay. Idempotent.
func (s *Store) Close() error { return s.CloseContext(context.Background()) }

// CloseContext is Close that stops waiting when ctx ends: unfinished listings
// are made by whoever opens the store next.
func (s *Store) CloseContext(ctx context.Context) error {
	s.closeOnce.Do(func() {
		s.listings.close(ctx)
		err := s.ids.close(context.WithoutCancel(ctx))
		s.closeErr = errors.Join(err, s.abandon())
	})
	return s.closeErr
}

// abandon closes everything as a crash would.
func (s *Store) abandon() error {
	err := s.closeDrivers()
	s.db.shutdown()
	return errors.Join(err, s.locks.Close())
}

// parts are the names that a store's root may hold.
var parts = []string{
	"store.json", "db.bolt", "db.lock", "db.wait", reserveFile, "locks", "drivers", "listings", "tmp", "images", "mnt", "keeper",
	"lost+found", // a file system of its own
}

type storeFile struct {
	Format int `json:"format"`
}

// prepareRoot makes root a store, or sees that it is one that we can open.
func prepareRoot(root string, o Options) error {
	err := checkFormat(root)
	if !errors.Is(err, fs.ErrNotExist) {
		if err == nil && !o.ReadOnly {
			return checkWritable(root)
		}
		return err
	}
	if o.ReadOnly {
		return fmt.Errorf("no store there: %w", errdefs.ErrNotFound)
	}
	err = makeStore(root, o.Volatile)
	if err == nil || checkFormat(root) == nil {
		return checkFormat(root) // perhaps another made it meanwhile
	}
	return rootError(err)
}

// checkFormat reads store.json; an error that wraps fs.ErrNotExist says that
// there is none.
func checkFormat(root string) error {
	b, err := os.ReadFile(filepath.Join(root, "store.json"))
	if err != nil {
		return rootError(err)
	}
	var f storeFile
	if err := json.Unmarshal(b, &f); err != nil || f.Format < 1 {
		return fmt.Errorf("store.json does not say a format, so this is no store or a damaged one: %w", errdefs.ErrFailedPrecondition)
	}
	if f.Format > Format {
		return fmt.Errorf("the store has format %d, this program knows formats up to %d; use a newer layerctl: %w", f.Format, Format, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// checkWritable tells a read-only place by name before anything half works.
func checkWritable(root string) error {
	f, err := sys.Open(filepath.Join(root, "locks"), sys.O_RDWR|sys.O_CREAT|sys.O_NOFOLLOW, 0o600)
	if err != nil {
		return rootError(err)
	}
	return f.Close()
}

// makeStore makes a store in an absent or empty directory. store.json comes
// first: without it the directory is not ours, with it all else is made when it
// is needed.
func makeStore(root string, volatile bool) error {
	if err := os.MkdirAll(root, 0o711); err != nil {
		return err
	}
	names, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	for _, n := range names {
		if !slices.Contains(parts, n.Name()) && !strings.HasPrefix(n.Name(), "store.json.") {
			return fmt.Errorf("the directory has no store.json but holds %q: give an empty or a new one: %w", n.Name(), errdefs.ErrFailedPrecondition)
		}
		if n.Name() == "db.bolt" {
			return fmt.Errorf("store.json is missing beside db.bolt: %w", errdefs.ErrDataLoss)
		}
	}
	b, err := json.Marshal(storeFile{Format: Format})
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(root, "store.json"), append(b, '\n'), !volatile)
}

// writeFile makes a file whole or not at all, and durable if sync. A file that
// is there already stays.
func writeFile(path string, b []byte, sync bool) error {
	dir, err := sys.OpenDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	base := filepath.Base(path)
	f, err := os.CreateTemp(filepath.Dir(path), base+".*")
	if err != nil {
		return err
	}
	defer f.Close()
	tmp := filepath.Base(f.Name())
	if _, err = f.Write(b); err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil && sync {
		err = f.Sync()
	}
	if err == nil {
		err = dir.Rename(tmp, dir, base, sys.RENAME_NOREPLACE)
	}
	if err != nil {
		_ = dir.Unlink(tmp, 0)
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	if sync {
		return dir.Sync()
	}
	return nil
}

// rootError gives an error about the store's directory a sentinel and says what
// to do.
func rootError(err error) error {
	var s error
	switch {
	case err == nil || errdefs.Resolve(err) != errdefs.ErrUnknown:
		return err
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("read-only file system; it can be opened for reading only: %w: %w", errdefs.ErrFailedPrecondition, err)
	case drivers.IsFull(err):
		s = errdefs.ErrResourceExhausted
	case errors.Is(err, fs.ErrPermission):
		s = errdefs.ErrPermissionDenied
	case errors.Is(err, syscall.ENOTDIR):
		s = errdefs.ErrFailedPrecondition
	case errors.Is(err, fs.ErrNotExist):
		s = errdefs.ErrNotFound
	default:
		s = errdefs.ErrInternal
	}
	return fmt.Errorf("%w: %w", s, err)
}
