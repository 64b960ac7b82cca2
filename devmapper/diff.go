package devmapper

import (
	"context"
	"errors"
	"iter"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

// errStop ends a walk that nobody asks on.
var errStop = errors.New("stopped")

// Diff walks the two trees, each in a mount of its own that nobody else sees.
func (d *driver) Diff(ctx context.Context, from, to drivers.Ref) iter.Seq2[layer.Change, error] {
	return func(yield func(layer.Change, error) bool) {
		err := d.lookAt(ctx, from, func(below string) error {
			return d.lookAt(ctx, to, func(tree string) error {
				for c, err := range layer.DiffTrees(ctx, below, tree, layer.DiffOptions{}) {
					if err != nil {
						return err
					}
					if !yield(c, nil) {
						return errStop
					}
				}
				return nil
			})
		})
		if err != nil && !errors.Is(err, errStop) {
			yield(layer.Change{}, d.wrap("diff to", to.ID, err))
		}
	}
}

// lookAt calls f with a path to what a layer shows now; "" is nothing.
func (d *driver) lookAt(ctx context.Context, r drivers.Ref, f func(path string) error) error {
	if r.ID == 0 {
		return f("")
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	l, err := d.layer(r.ID)
	if err != nil {
		return err
	}
	if l.Kind != writable {
		return d.mounted(ctx, d.private(l.Thin, true), f)
	}
	// A file system that is mounted for writing cannot be mounted read-only beside it.
	t, err := d.snapshotOf(ctx, r.ID, l)
	if err != nil {
		return err
	}
	err = d.mounted(ctx, d.private(t.id, false), f)
	dropErr := d.pool.Exclusive(context.WithoutCancel(ctx), func(c *thin.Change) error { return d.drop(c, t) })
	if err == nil {
		err = dropErr
	}
	return err
}

// mounted calls f with a read-only mount of a private device. One that may be written
// to has its journal replayed.
func (d *driver) mounted(ctx context.Context, v thin.Volume, f func(path string) error) error {
	return d.shown(ctx, v, func() error {
		t, err := mount.Detached(ctx, []mount.Mount{d.template.mount(v, drivers.MountOptions{ReadOnly: true})})
		if err != nil {
			return err
		}
		err = f(t.Path())
		return errors.Join(err, t.Close())
	})
}
