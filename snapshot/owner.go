package snapshot

import (
	"context"
	"fmt"
	"io"
	"iter"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

// Owner returns what the store knows of the snapshot that mounts show, which
// Prepare, View or Mounts handed out. ErrNotFound if they are not this store's, or
// the snapshot was removed. A snapshot with several names is described by one.
//
// Only the layer's ID is taken from the mounts: none of their paths is followed.
func (s *Store) Owner(ctx context.Context, ms []mount.Mount) (Record, error) {
	driver, id, err := s.ownerOf(ctx, ms)
	if err != nil {
		return Record{}, fmt.Errorf("snapshot: owner: %w", err)
	}
	n, view, err := s.named(ctx, driver, id)
	if err != nil {
		return Record{}, fmt.Errorf("snapshot: owner: %w", err)
	}
	return view.record(n), nil
}

// ownerOf asks the drivers whose mounts these are.
func (s *Store) ownerOf(ctx context.Context, ms []mount.Mount) (string, drivers.ID, error) {
	if len(ms) == 0 {
		return "", 0, fmt.Errorf("no mounts: %w", errdefs.ErrNotFound)
	}
	find := func(ds map[string]drivers.Driver) (string, drivers.ID, bool) {
		for name, d := range ds {
			if id, ok := d.Owner(ms); ok {
				return name, id, true
			}
		}
		return "", 0, false
	}
	// Who handed the mounts out is open, but after a restart; to try those that do
	// not open, each time, would cost a probe.
	if name, id, ok := find(s.openDrivers()); ok {
		return name, id, nil
	}
	ds, err := s.driversInUse(ctx)
	if err != nil {
		return "", 0, err
	}
	if name, id, ok := find(ds); ok {
		return name, id, nil
	}
	return "", 0, fmt.Errorf("a mount of %s on %q is no layer of this store: %w", ms[0].Type, ms[0].Source, errdefs.ErrNotFound)
}

// named returns a layer by one of its names.
func (s *Store) named(ctx context.Context, driver string, id drivers.ID) (n *node, v *View, err error) {
	err = s.db.view(ctx, func(t *txn) error {
		names := t.namesOf(id)
		if len(names) == 0 {
			return fmt.Errorf("layer %s of driver %s was removed: %w", id, driver, errdefs.ErrNotFound)
		}
		v = &View{s: s, name: names[0].View}
		if n, err = t.node(v.name, names[0].Key); err != nil {
			return err
		}
		if n.layer.Driver != driver {
			return fmt.Errorf("layer %s is driver %s's, not %s's: %w", id, n.layer.Driver, driver, errdefs.ErrNotFound)
		}
		return nil
	})
	return n, v, err
}

// pinOwner is pin by mounts.
func (s *Store) pinOwner(ctx context.Context, ms []mount.Mount, lock lockFunc) (*node, func(), error) {
	driver, id, err := s.ownerOf(ctx, ms)
	if err != nil {
		return nil, nil, err
	}
	release, err := lock(ctx, layerPlace(id), "layer "+id.String())
	if err != nil {
		return nil, nil, err
	}
	n, _, err := s.named(ctx, driver, id)
	if err != nil {
		release()
		return nil, nil, err
	}
	return n, release, nil
}

// DiffMounts is View.Diff of the snapshots that two sets of mounts show, whatever
// views they are in; no mounts at all are the empty tree as from. ErrNotFound if
// one is not this store's.
func (s *Store) DiffMounts(ctx context.Context, from, to []mount.Mount) iter.Seq2[layer.Change, error] {
	return failing("diff of mounts", func(yield func(layer.Change, error) bool) error {
		t, release, err := s.pinOwner(ctx, to, s.locks.shared)
		if err != nil {
			return err
		}
		defer release()
		var f *node
		if len(from) > 0 {
			var releaseFrom func()
			if f, releaseFrom, err = s.pinOwner(ctx, from, s.locks.shared); err != nil {
				return err
			}
			defer releaseFrom()
		}
		return s.diff(ctx, f, t, yield)
	})
}

// ApplyMounts is View.Apply onto the active snapshot that mounts show. ErrNotFound
// if they are not this store's.
func (s *Store) ApplyMounts(ctx context.Context, ms []mount.Mount, tar io.Reader, o layer.ApplyOptions) error {
	if s.o.ReadOnly {
		return fmt.Errorf("snapshot: apply to mounts: %w", errReadOnly)
	}
	n, release, err := s.pinOwner(ctx, ms, s.locks.exclusive)
	if err == nil {
		defer release()
		err = s.applyTo(ctx, n, tar, o)
	}
	if err != nil {
		return fmt.Errorf("snapshot: apply to mounts: %w", err)
	}
	return nil
}
