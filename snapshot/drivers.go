package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/kprobe"
)

// openDriver is a driver being opened or open; d and err are set before ready
// is closed.
type openDriver struct {
	ready chan struct{}
	d     drivers.Driver
	err   error
}

// DriverInfo says of one driver what works here.
type DriverInfo struct {
	Name    string
	Summary string
	Probe   drivers.Probe
	Default bool  // layers without a parent are made with it where none is named
	Layers  int64 // layers that it keeps in this store, debts among them
	// Capabilities of an open driver; nil where it does not work.
	Capabilities *drivers.Capabilities
}

// Driver returns the driver called name, opened on first use; "" is the store's
// default one. The Store owns it.
func (s *Store) Driver(ctx context.Context, name string) (drivers.Driver, error) {
	if name == "" {
		var err error
		if name, err = s.DefaultDriver(ctx); err != nil {
			return nil, err
		}
	}
	return s.driver(ctx, name)
}

func (s *Store) driver(ctx context.Context, name string) (drivers.Driver, error) {
	o, first, err := s.driverSlot(name)
	if err != nil {
		return nil, err
	}
	if first {
		o.d, o.err = s.openDriver(ctx, name)
		if o.err != nil {
			s.dropSlot(name, o) // another call may fare better: a module was loaded
		}
		close(o.ready)
	}
	select {
	case <-o.ready:
		return o.d, o.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *Store) driverSlot(name string) (o *openDriver, first bool, err error) {
	s.driversMu.Lock()
	defer s.driversMu.Unlock()
	if s.closed {
		return nil, false, errClosed
	}
	if o := s.open[name]; o != nil {
		return o, false, nil
	}
	o = &openDriver{ready: make(chan struct{})}
	s.open[name] = o
	return o, true, nil
}

func (s *Store) dropSlot(name string, o *openDriver) {
	s.driversMu.Lock()
	defer s.driversMu.Unlock()
	if s.open[name] == o {
		delete(s.open, name)
	}
}

// openDrivers returns the drivers that are open, by name.
func (s *Store) openDrivers() map[string]drivers.Driver {
	s.driversMu.Lock()
	defer s.driversMu.Unlock()
	ds := map[string]drivers.Driver{}
	for name, o := range s.open {
		select {
		case <-o.ready:
			if o.d != nil {
				ds[name] = o.d
			}
		default:
		}
	}
	return ds
}

func (s *Store) driverRoot(name string) string { return filepath.Join(s.root, "drivers", name) }

// openDriver opens a driver; where that fails, the driver's own probe says why.
func (s *Store) openDriver(ctx context.Context, name string) (drivers.Driver, error) {
	f, err := s.o.Registry.Lookup(name)
	if err != nil {
		return nil, err
	}
	if s.o.ReadOnly {
		if _, err := os.Stat(s.driverRoot(name)); err != nil {
			return nil, fmt.Errorf("driver %s: %w", name, rootError(err))
		}
	} else if _, err := s.makeDir("drivers"); err != nil {
		return nil, err
	}
	d, err := f.Open(ctx, drivers.Config{Root: s.driverRoot(name), Options: s.o.DriverOptions[name]})
	if err == nil {
		return d, nil
	}
	if ctx.Err() == nil && !s.o.ReadOnly {
		if p := f.Probe(ctx, filepath.Join(s.root, "drivers")); p.Works != kprobe.Yes {
			err = fmt.Errorf("%w (it does not work here: %s)", err, p.Reason)
		}
	}
	return nil, fmt.Errorf("driver %s: %w", name, err)
}

// makeDir makes a directory of the store's root, durably, and returns its path.
func (s *Store) makeDir(name string) (string, error) {
	dir := filepath.Join(s.root, name)
	err := os.Mkdir(dir, 0o711)
	if errors.Is(err, os.ErrExist) {
		return dir, nil
	}
	if err == nil && !s.o.Volatile {
		err = syncDir(s.root)
	}
	return dir, rootError(err)
}

// closeDrivers closes every driver and lets none be opened again.
func (s *Store) closeDrivers() error {
	s.driversMu.Lock()
	s.closed = true
	all := s.open
	s.open = map[string]*openDriver{}
	s.driversMu.Unlock()
	var errs []error
	for _, o := range all {
		<-o.ready
		if o.d != nil {
			errs = append(errs, o.d.Close())
		}
	}
	return errors.Join(errs...)
}

// DefaultDriver returns the driver for layers without a parent where none is
// named: the best that worked when one was first asked for. The choice stays, so
// that a store does not change its driver because of a passing trouble;
// SetDefaultDriver changes it.
func (s *Store) DefaultDriver(ctx context.Context) (string, error) {
	name, err := s.storedDefault(ctx)
	if err != nil || name != "" {
		return name, err
	}
	if s.o.ReadOnly {
		return "", fmt.Errorf("the store has no default driver yet: %w", errReadOnly)
	}
	dir, err := s.makeDir("drivers")
	if err != nil {
		return "", err
	}
	best, err := s.o.Registry.Best(ctx, dir)
	if err != nil {
		return "", err
	}
	return s.setDefault(ctx, best.Factory.Name, false)
}

// SetDefaultDriver changes the driver of future layers without a parent.
func (s *Store) SetDefaultDriver(ctx context.Context, name string) error {
	if _, err := s.o.Registry.Lookup(name); err != nil {
		return err
	}
	_, err := s.setDefault(ctx, name, true)
	return err
}

func (s *Store) storedDefault(ctx context.Context) (name string, err error) {
	err = s.db.view(ctx, func(t *txn) error {
		name = string(t.get(bucketMeta, metaDriver))
		return nil
	})
	return name, err
}

// setDefault stores a choice; without force, one made meanwhile wins.
func (s *Store) setDefault(ctx context.Context, name string, force bool) (string, error) {
	chosen := name
	err := s.db.update(ctx, func(t *txn) error {
		chosen = name
		if old := t.get(bucketMeta, metaDriver); old != nil && !force {
			chosen = string(old)
			return nil
		}
		return t.put(bucketMeta, metaDriver, []byte(name))
	})
	return chosen, err
}

// Drivers probes every driver of the registry and says what it found, best
// first.
func (s *Store) Drivers(ctx context.Context) ([]DriverInfo, error) {
	chosen, err := s.storedDefault(ctx)
	if err != nil {
		return nil, err
	}
	counts, err := s.layerCounts(ctx)
	if err != nil {
		return nil, err
	}
	var all []DriverInfo
	for _, f := range s.o.Registry.Factories() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		i := DriverInfo{Name: f.Name, Summary: f.Summary, Default: f.Name == chosen, Layers: counts[f.Name]}
		i.Probe = f.Probe(ctx, s.root)
		if i.Probe.Works == kprobe.Yes && (i.Layers > 0 || i.Default) {
			if d, err := s.driver(ctx, f.Name); err == nil {
				c := d.Capabilities()
				i.Capabilities = &c
			}
		}
		all = append(all, i)
	}
	return all, nil
}

func (s *Store) layerCounts(ctx context.Context) (map[string]int64, error) {
	counts := map[string]int64{}
	err := s.db.view(ctx, func(t *txn) error {
		return t.eachLayer(func(_ drivers.ID, l *layerRecord) error {
			counts[l.Driver]++
			return nil
		})
	})
	return counts, err
}

// driversOnDisk returns the drivers that have a directory in the store and are
// in the registry, and those that are not, sorted.
func (s *Store) driversOnDisk() (known, unknown []string, err error) {
	entries, err := os.ReadDir(filepath.Join(s.root, "drivers"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, rootError(err)
	}
	for _, e := range entries {
		_, err := s.o.Registry.Lookup(e.Name())
		switch {
		case err == nil:
			known = append(known, e.Name())
		case errdefs.IsNotFound(err) && e.IsDir() && !isScratch(e.Name()):
			unknown = append(unknown, e.Name())
		}
	}
	slices.Sort(known)
	return known, unknown, nil
}

// isScratch reports whether a name is that of a probe's scratch directory, all
// of which begin with a dot or hold one.
func isScratch(name string) bool {
	return len(name) > 0 && (name[0] == '.' || slices.Contains([]byte(name), '.'))
}
