package devmapper

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
)

// Remove takes the layer's devices away, renames its record, so that no half-removed
// layer is ever seen as a layer, and deletes the thin device.
func (d *driver) Remove(ctx context.Context, id drivers.ID) error {
	return d.wrap("remove", id, d.remove(ctx, id))
}

func (d *driver) remove(ctx context.Context, id drivers.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.releaseAll(ctx, id); err != nil {
		return err
	}
	d.kept.drop(id)
	err := d.move(id, roots.Layers, roots.Deleted)
	if err != nil && !errors.Is(err, syscall.ENOENT) {
		return err
	}
	if err := drivers.Step(ctx, "devmapper: remove: renamed"); err != nil {
		return err
	}
	if err := d.destroy(ctx, roots.New, id); err != nil {
		return err
	}
	if l, err := d.read(roots.Deleted, id); err == nil && d.worthDiscard(l) && d.checkTransaction(l.Tx) == nil { // or the device may be another's
		d.discard(ctx, l)
	}
	return d.destroy(ctx, roots.Deleted, id)
}

// InUse implements drivers.UseTeller. The kernel counts who has a device open in
// whatever namespace; udev may, for a moment.
func (d *driver) InUse(ctx context.Context, id drivers.ID) error {
	return d.wrap("in use", id, d.inUse(ctx, id))
}

func (d *driver) inUse(ctx context.Context, id drivers.ID) error {
	names, err := d.devicesOf(id)
	if err != nil {
		return err
	}
	end := time.Now().Add(patience)
	for _, name := range names {
		for d.isOpen(name) {
			where, err := mountedHere(name)
			switch {
			case err != nil:
				return err
			case where != "":
				return fmt.Errorf("mounted at %s: %w", where, errdefs.ErrFailedPrecondition)
			case time.Now().After(end):
				return errInUse
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	return nil
}

// devicesOf lists the devices of a layer: the one that shows it, and those of thin
// devices that it had before.
func (d *driver) devicesOf(id drivers.ID) ([]string, error) {
	names, err := d.pool.Devices()
	return slices.DeleteFunc(names, func(name string) bool { return !strings.HasPrefix(name, d.pool.Prefix()+id.String()+".") }), err
}

func (d *driver) isOpen(name string) bool {
	i, err := d.pool.Info(name)
	return err == nil && i.Open > 0
}

// releaseAll takes away every device of a layer. One that is open is waited for a
// moment, without a lock, unless our mount namespace says why.
func (d *driver) releaseAll(ctx context.Context, id drivers.ID) error {
	names, err := d.devicesOf(id)
	if err != nil {
		return err
	}
	end := time.Now().Add(patience)
	for _, name := range names {
		err := d.pool.Release(ctx, name, 0)
		if errdefs.IsFailedPrecondition(err) {
			where, listErr := mountedHere(name)
			if listErr != nil {
				return listErr
			}
			if where != "" {
				return fmt.Errorf("mounted at %s: %w", where, errdefs.ErrFailedPrecondition)
			}
			err = d.pool.Release(ctx, name, time.Until(end))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// leastDiscard is how much a layer must hold for its blocks to be given back to the
// file system that the pool's files are on: less than that the pool's next layers take.
const leastDiscard = 16 << 20

func (d *driver) worthDiscard(l *record) bool {
	return d.pool.OnFiles() && !l.Shared && (l.Usage == nil || l.Usage.Bytes >= leastDiscard)
}

// discard gives the blocks that are the layer's alone back to that
// file system, as far as that can be done.
func (d *driver) discard(ctx context.Context, l *record) {
	v := d.private(l.Thin, l.Sectors, false)
	_ = d.shown(ctx, v, func() error {
		f, err := sys.Open(thin.Node(v.Name), sys.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		return f.Discard(0, int64(l.Sectors)*512)
	})
}
