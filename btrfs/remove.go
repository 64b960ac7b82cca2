package btrfs

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// Remove renames l/ID to del/ID, so that no half-deleted layer is ever seen as a
// layer, and deletes the subvolumes there: the kernel frees their blocks in the
// background.
func (d *driver) Remove(ctx context.Context, id drivers.ID) error {
	return d.wrap("remove", id, d.remove(ctx, id))
}

// InUse implements drivers.UseTeller.
func (d *driver) InUse(_ context.Context, id drivers.ID) error {
	return d.wrap("in use", id, d.refuseMounted(id))
}

func (d *driver) refuseMounted(id drivers.ID) error {
	where, err := d.mountedAt(id, func(mount.Info) bool { return true })
	if err != nil {
		return err
	}
	if where != "" {
		return fmt.Errorf("mounted at %s: %w", where, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (d *driver) remove(ctx context.Context, id drivers.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.refuseMounted(id); err != nil {
		return err
	}
	if err := d.discard(ctx, id); err != nil {
		return err
	}
	if err := drivers.Step(ctx, "btrfs: remove: renamed"); err != nil {
		return err
	}
	for _, name := range []string{roots.New, roots.Deleted} {
		if err := d.empty(ctx, name, id); err != nil {
			return err
		}
	}
	_ = d.dropQgroups(someQgroups) // of earlier ones
	return nil
}

// discard moves l/ID to del/ID. One transaction has the rename or it has it not,
// and no deletion in del/ID is in an older one. A full btrfs has reserves for
// deletions, not for renames: there the layer is deleted where it is, and until that
// is done is one whose subvolume is lost.
func (d *driver) discard(ctx context.Context, id drivers.ID) error {
	layers, err := d.open(roots.Layers)
	if err != nil {
		return err
	}
	defer layers.Close()
	deleted, err := d.open(roots.Deleted)
	if err != nil {
		return err
	}
	defer deleted.Close()
	if err := refuseForeign(layers, id.String()); err != nil {
		return err
	}
	err = layers.Rename(id.String(), deleted, id.String(), sys.RENAME_NOREPLACE)
	switch {
	case errors.Is(err, syscall.ENOENT):
		return nil
	case drivers.IsFull(err):
		return d.empty(ctx, roots.Layers, id)
	}
	return err
}

// empty deletes ID in one of the root's directories, and waits until that is on
// the disk: else a power cut would bring back a layer that the store has
// forgotten. An fsync of a directory in which a subvolume, or the directory of one,
// was deleted commits the transaction, here and now. START_SYNC leaves that to a
// kernel thread, which sleeps for 30 s if it was woken a moment too early.
func (d *driver) empty(ctx context.Context, name string, id drivers.ID) error {
	dir, err := d.open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	there, err := dir.Exists(id.String())
	if err != nil || !there {
		return err
	}
	if err := d.destroyer(ctx).layer(dir, id.String()); err != nil {
		return err
	}
	return dir.Sync()
}
