package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
)

// SyncUsage makes what Usage tells that of now, for drivers whose figures lag.
func (s *Store) SyncUsage(ctx context.Context) error {
	return s.eachSettler(ctx, "sync usage", drivers.Settler.SyncUsage)
}

// WaitFreed waits until the space of what GC removed is free, for drivers that
// free in the background. ErrUnavailable where this process cannot know.
func (s *Store) WaitFreed(ctx context.Context) error {
	return s.eachSettler(ctx, "wait for free space", drivers.Settler.WaitFreed)
}

func (s *Store) eachSettler(ctx context.Context, op string, do func(drivers.Settler, context.Context) error) error {
	in, err := s.driversInUse(ctx)
	for _, name := range slices.Sorted(maps.Keys(in)) {
		if d, ok := in[name].(drivers.Settler); ok && err == nil {
			err = do(d, ctx)
		}
	}
	if err != nil {
		return fmt.Errorf("snapshot: %s: %w", op, err)
	}
	return nil
}

// DropIdle has every driver of the store take away what it keeps in the kernel for layers that
// nobody uses and that were not asked for of late: Mounts makes it ready again. GC does that for
// drivers that are open.
func (s *Store) DropIdle(ctx context.Context) error {
	in, err := s.driversInUse(ctx)
	if err == nil {
		err = dropIdle(ctx, in)
	}
	if err != nil {
		return fmt.Errorf("snapshot: drop what is idle: %w", err)
	}
	return nil
}

func dropIdle(ctx context.Context, in map[string]drivers.Driver) error {
	for _, name := range slices.Sorted(maps.Keys(in)) {
		if d, ok := in[name].(drivers.Idler); ok {
			if err := d.DropIdle(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// EnableQuota switches the accounting on that a driver's quota needs, for the whole
// file system that the store is on; "" is every driver here that needs one. It
// holds for stores that are opened from then on.
func (s *Store) EnableQuota(ctx context.Context, driver, kind string) error {
	if err := s.enableQuota(ctx, driver, kind); err != nil {
		return fmt.Errorf("snapshot: enable quota: %w", err)
	}
	return nil
}

func (s *Store) enableQuota(ctx context.Context, driver, kind string) error {
	if s.o.ReadOnly {
		return errReadOnly
	}
	in, err := s.driversInUse(ctx)
	if err == nil && driver != "" {
		var d drivers.Driver
		d, err = s.Driver(ctx, driver)
		in = map[string]drivers.Driver{driver: d}
	}
	if err != nil {
		return err
	}
	done := false
	for _, name := range slices.Sorted(maps.Keys(in)) {
		if q, ok := in[name].(drivers.QuotaEnabler); ok {
			if err := q.EnableQuota(ctx, kind); err != nil {
				return err
			}
			done = true
		}
	}
	if !done {
		return fmt.Errorf("no accounting to switch on for %s: %w", strings.Join(slices.Sorted(maps.Keys(in)), ", "), errdefs.ErrInvalidArgument)
	}
	return nil
}

// Deduped is what Dedup did with the layers of one driver.
type Deduped struct {
	Driver string `json:"driver"`
	drivers.DedupReport
}

// Dedup makes equal files of committed layers share their blocks, each driver's
// among themselves. ErrUnavailable if the layers' drivers cannot.
func (s *Store) Dedup(ctx context.Context, o drivers.DedupOptions) ([]Deduped, error) {
	all, err := s.dedup(ctx, o)
	if err != nil {
		return all, fmt.Errorf("snapshot: dedup: %w", err)
	}
	return all, nil
}

func (s *Store) dedup(ctx context.Context, o drivers.DedupOptions) (all []Deduped, err error) {
	if s.o.ReadOnly {
		return nil, errReadOnly
	}
	layers, err := s.committedByDriver(ctx)
	if err != nil {
		return nil, err
	}
	var cannot []error
	for _, name := range slices.Sorted(maps.Keys(layers)) {
		d, err := s.driver(ctx, name)
		if err != nil {
			return all, err
		}
		deduper, ok := d.(drivers.Deduper)
		if !ok {
			cannot = append(cannot, fmt.Errorf("driver %s cannot share blocks of layers: %w", name, errdefs.ErrUnavailable))
			continue
		}
		report, err := deduper.Dedup(ctx, layers[name], o)
		if all = append(all, Deduped{name, report}); err != nil {
			return all, err
		}
	}
	if len(all) == 0 {
		return nil, errors.Join(cannot...)
	}
	return all, nil
}

// committedByDriver returns the committed layers of each driver, the oldest first.
func (s *Store) committedByDriver(ctx context.Context) (map[string][]drivers.Ref, error) {
	ids, err := s.committed(ctx)
	if err != nil {
		return nil, err
	}
	layers := map[string][]drivers.Ref{}
	for _, id := range ids {
		n, _, err := s.committedNode(ctx, id)
		if err != nil {
			return nil, err
		}
		if n != nil { // or it was removed meanwhile
			layers[n.layer.Driver] = append(layers[n.layer.Driver], n.ref)
		}
	}
	for _, refs := range layers {
		slices.SortFunc(refs, func(a, b drivers.Ref) int { return cmp.Compare(a.ID, b.ID) })
	}
	return layers, nil
}
