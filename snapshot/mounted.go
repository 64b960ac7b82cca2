package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/mount"
)

// Mounted is one mount of a layer of the store.
type Mounted struct {
	View   string     `json:"view,omitempty"` // of the first name; "" if the snapshot was removed
	Key    string     `json:"key,omitempty"`
	Driver string     `json:"driver"`
	ID     drivers.ID `json:"id"`
	Target string     `json:"target"`
	// ReadOnly says that nothing can be written through it: the mount is
	// read-only, or its file system.
	ReadOnly bool     `json:"readOnly"`
	Options  []string `json:"options,omitempty"` // of the mount
}

// Mounted returns where layers of the store are mounted in this process's mount
// namespace, in the order of the mount table. A layer with several names appears
// once, by one of them; one that was removed has none.
func (s *Store) Mounted(ctx context.Context) ([]Mounted, error) {
	infos, err := mount.List()
	if err != nil {
		return nil, fmt.Errorf("snapshot: mounted: %w", err)
	}
	var all []Mounted
	ds, err := s.driversInUse(ctx)
	if err != nil {
		return nil, fmt.Errorf("snapshot: mounted: %w", err)
	}
	for _, i := range infos {
		for name, d := range ds {
			if id, ok := d.Owner([]mount.Mount{i.Mount()}); ok {
				all = append(all, Mounted{Driver: name, ID: id, Target: i.Target, ReadOnly: i.ReadOnly(), Options: i.Options})
				break
			}
		}
	}
	return all, s.nameMounted(ctx, all)
}

// driversInUse opens every driver that has a directory in the store. One that
// does not work here cannot have mounts here.
func (s *Store) driversInUse(ctx context.Context) (map[string]drivers.Driver, error) {
	known, _, err := s.driversOnDisk()
	if err != nil {
		return nil, err
	}
	ds := map[string]drivers.Driver{}
	for _, name := range known {
		d, err := s.driver(ctx, name)
		switch {
		case err == nil:
			ds[name] = d
		case ctx.Err() != nil || errors.Is(err, errClosed):
			return nil, err
		}
	}
	return ds, nil
}

func (s *Store) nameMounted(ctx context.Context, all []Mounted) error {
	return s.db.view(ctx, func(t *txn) error {
		for i := range all {
			if names := t.namesOf(all[i].ID); len(names) > 0 {
				all[i].View, all[i].Key = names[0].View, names[0].Key
			}
		}
		return nil
	})
}
