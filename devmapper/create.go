package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// Create takes a snapshot of the nearest parent's device, or of the template. A view
// shows its parent's, and costs a record.
func (d *driver) Create(ctx context.Context, r drivers.Ref, o drivers.CreateOptions) error {
	return d.wrap("create", r.ID, d.create(ctx, r, o))
}

func (d *driver) create(ctx context.Context, r drivers.Ref, o drivers.CreateOptions) error {
	l, origin, err := d.planCreate(r, o)
	if err != nil {
		return err
	}
	if l.Shared {
		if err := d.refuseExisting(r.ID); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		l.Thin = origin
		return d.write(roots.Layers, r.ID, l)
	}
	recorded, err := d.snapshot(ctx, r.ID, l, origin)
	if err == nil {
		err = drivers.Step(ctx, "devmapper: create: transaction set")
	}
	if owner, ok := rootOwner(r, o); err == nil && (ok || l.grown) {
		err = d.prepare(ctx, l, owner, o.Volatile)
	}
	if err == nil {
		err = d.move(r.ID, roots.New, roots.Layers) // a cut may lose the layer whole
	}
	if err != nil && recorded { // what this cannot delete Remove can
		_ = d.destroy(context.WithoutCancel(ctx), roots.New, r.ID)
	}
	return err
}

// planCreate checks what is asked for and returns the record, and the device to take
// a snapshot of.
func (d *driver) planCreate(r drivers.Ref, o drivers.CreateOptions) (*record, uint32, error) {
	switch {
	case r.ID == 0:
		return nil, 0, fmt.Errorf("0 is not a layer: %w", errdefs.ErrInvalidArgument)
	case o.Quota < 0 || o.Quota > mostBytes:
		return nil, 0, fmt.Errorf("a quota of %d bytes: %w", o.Quota, errdefs.ErrInvalidArgument)
	case o.Quota > 0 && !d.caps.Quota:
		return nil, 0, fmt.Errorf("a quota: %w: %w", errdefs.ErrInvalidArgument, words{d.noQuota})
	case !o.IDMap.IsZero() && !d.caps.IDMap:
		return nil, 0, fmt.Errorf("no id-mapped mounts of %s here: %w", d.template.FS, errdefs.ErrInvalidArgument)
	}
	t := &d.template
	l := &record{Kind: writable, Sectors: t.sectors(), FS: t.FS, UUID: t.UUID, Parents: idStrings(r.Parents)}
	if !o.IDMap.IsZero() {
		l.IDMap = &o.IDMap
	}
	if o.ReadOnly {
		_, own := rootOwner(r, o)
		l.Kind, l.Shared = view, !own
	}
	if len(r.Parents) == 0 {
		return l, t.Thin, d.size(l, o)
	}
	p, err := d.parent(r)
	if err != nil {
		return nil, 0, err
	}
	l.Sectors, l.FS, l.UUID = p.Sectors, p.FS, p.UUID
	return l, p.Thin, d.size(l, o)
}

// size has a record, of its parent's size so far, have the one of its quota. A view's
// says nothing: it is not written to.
func (d *driver) size(l *record, o drivers.CreateOptions) error {
	if err := l.known(); err != nil || o.Quota == 0 || o.ReadOnly {
		return err
	}
	quota := o.Quota / d.pool.BlockBytes() * d.pool.BlockBytes()
	switch parent := int64(l.Sectors) * 512; {
	case quota < parent:
		return fmt.Errorf("a quota of %d bytes: the layer begins as a snapshot of a file system of %d bytes, which can only get larger (the driver's option size is that of layers without parent): %w",
			o.Quota, parent, errdefs.ErrInvalidArgument)
	case quota > parent:
		l.Sectors, l.grown = uint64(quota)/512, true
	}
	return nil
}

// rootOwner is the owner that an empty layer's root is to have; false if it is that of
// the template's root.
func rootOwner(r drivers.Ref, o drivers.CreateOptions) (drivers.Owner, bool) {
	if len(r.Parents) > 0 || o.RootOwner == nil {
		return drivers.Owner{}, false
	}
	return *o.RootOwner, *o.RootOwner != drivers.Owner{}
}

// parent is the record of the nearest parent.
func (d *driver) parent(r drivers.Ref) (*record, error) {
	p, err := d.layer(r.Parents[0])
	if err != nil {
		return nil, fmt.Errorf("parent %s: %w", r.Parents[0], err)
	}
	if p.Kind != committed {
		return nil, fmt.Errorf("parent %s is %s, not committed: %w", r.Parents[0], p.Kind, errdefs.ErrFailedPrecondition)
	}
	return p, nil
}

// refuseExisting refuses an ID that is there, in whatever state.
func (d *driver) refuseExisting(id drivers.ID) error {
	for _, name := range roots.All {
		there, err := d.dir.Exists(name + "/" + id.String())
		if err != nil {
			return err
		}
		if there {
			return fmt.Errorf("is in %s: %w", name, errdefs.ErrAlreadyExists)
		}
	}
	return nil
}

// prepare makes a new layer's file system as large as its device, if that has grown, and
// gives the root of an empty one its owner: the cases in which Create mounts. It is on
// the disk before the layer is one, unless volatile.
func (d *driver) prepare(ctx context.Context, l *record, owner drivers.Owner, volatile bool) error {
	v := d.private(l.Thin, l.Sectors, false)
	return d.shown(ctx, v, func() error {
		dev, err := sys.Open(thin.Node(v.Name), sys.O_RDONLY, 0)
		if err != nil {
			return err
		}
		defer dev.Close()
		t, err := mount.Detached(ctx, []mount.Mount{l.fs.mountToGrow(v)})
		if err != nil {
			return err
		}
		root, err := sys.OpenDir(t.Path())
		if err == nil {
			err = l.prepare(root, dev, owner)
			root.Close()
		}
		err = errors.Join(err, t.Close())
		if err == nil && !volatile {
			err = dev.Sync()
		}
		if err == nil {
			err = drivers.Step(ctx, "devmapper: create: prepared")
		}
		return err
	})
}

func (r *record) prepare(root, dev *sys.Fd, owner drivers.Owner) error {
	if r.grown {
		if err := r.fs.grow(root, dev, int64(r.Sectors)*512); err != nil {
			return fmt.Errorf("to %d bytes: %w", r.Sectors*512, err)
		}
	}
	if len(r.Parents) > 0 {
		return nil
	}
	return emptyRoot(root, owner)
}

// destroy deletes the thin device of a record in new or del, and the record.
func (d *driver) destroy(ctx context.Context, name string, id drivers.ID) error {
	l, err := d.read(name, id)
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	if err != nil && !errdefs.IsDataLoss(err) {
		return err
	}
	return d.pool.Exclusive(ctx, func(c *thin.Change) error {
		if l != nil && !l.Shared {
			if err := d.deleteThin(c, id, l); err != nil {
				return err
			}
		}
		if err := drivers.Step(ctx, "devmapper: remove: thin device deleted"); err != nil {
			return err
		}
		if err := d.unlink(name, id); err != nil {
			return err
		}
		if l != nil && !l.Shared {
			delete(d.used, l.Thin)
		}
		_ = d.sweepTemps(c) // done is done
		return nil
	})
}

// unlink deletes a record, in all of the directories that it was in, before the thin
// id may be another's.
func (d *driver) unlink(name string, id drivers.ID) error {
	err := os.Remove(d.root + "/" + name + "/" + id.String())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if name == roots.Deleted {
		if err := d.sync(roots.Layers); err != nil {
			return err
		}
	}
	return d.sync(name)
}

// deleteThin deletes a layer's thin device. A pool that has not reached the layer's
// transaction may have the id for another.
func (d *driver) deleteThin(c *thin.Change, id drivers.ID, l *record) error {
	s, err := d.pool.Status()
	if err != nil {
		return err
	}
	if l.Tx > s.Transaction {
		others, err := d.othersWith(l.Thin, id)
		if err != nil || others {
			return err
		}
	}
	return d.deleteID(c, l.Thin)
}

// othersWith reports whether another layer has, or may have, a thin id.
func (d *driver) othersWith(thinID uint32, but drivers.ID) (bool, error) {
	templates, err := d.templateThins()
	if err != nil {
		return false, err
	}
	others := templates[thinID]
	err = d.records(func(id drivers.ID, r *record, err error) error {
		if id != but && (err != nil || r.Thin == thinID) { // one that cannot be read may have it
			others = true
		}
		return nil
	})
	return others, err
}
