package devmapper

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
)

// examineDevices finds devices in the kernel that no layer has, and with Repair removes
// those that nobody has open: the kernel refuses to remove another.
func (d *driver) examineDevices(ctx context.Context, e *examination) error {
	err := d.pool.Exclusive(ctx, func(c *thin.Change) error {
		names, err := d.pool.Devices()
		if err != nil {
			return err
		}
		for _, name := range names {
			why, err := d.whyOrphan(name)
			if err != nil {
				return err
			}
			if why != "" {
				d.orphan(e, c, name, why)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return d.pool.Exclusive(ctx, func(c *thin.Change) error {
		gone, err := d.pool.GonePools()
		for _, g := range gone {
			d.orphan(e, c, g.Name, g.Why)
		}
		return err
	})
}

// whyOrphan says why a device of this pool is nobody's, "" if it is somebody's. It is called
// with the pool's lock: who makes a device for a layer, or gives a layer another device, has it.
func (d *driver) whyOrphan(name string) (string, error) {
	if i, err := d.pool.Info(name); err != nil || i.DeferredRemove { // it goes with its last user
		return "", nil
	}
	id, ok := d.layerOf(name)
	if !ok {
		if d.ownerDied(name) {
			return "the process that looked at a layer by it is dead", nil
		}
		if _, private := d.privateOwner(name); private {
			return "", nil // its owner is alive, or cannot be seen
		}
		return "no layer has a device of this name", nil
	}
	l, err := d.read(roots.Layers, id)
	switch {
	case errors.Is(err, syscall.ENOENT):
		return fmt.Sprintf("there is no layer %s", id), nil
	case errdefs.IsDataLoss(err): // its record may have named it
		return "", nil
	case err != nil:
		return "", err
	case d.deviceName(id, l.Thin) != name:
		return fmt.Sprintf("layer %s has thin device %d", id, l.Thin), nil
	}
	return "", nil
}

// orphan reports a device, and removes it with Repair.
func (d *driver) orphan(e *examination, c *thin.Change, name, why string) {
	f := drivers.Finding{Fault: drivers.OrphanDevice, Object: "device " + name, Detail: why, Suggestion: "check with repair removes it"}
	i, err := d.pool.Info(name)
	switch {
	case errdefs.IsNotFound(err):
		return // it went meanwhile
	case err != nil:
		f.Detail += ": " + err.Error()
	case !d.pool.Ours(name):
		f.Suggestion = fmt.Sprintf("its UUID %q is not that of a device of layerctl's: `dmsetup remove %s` if nobody needs it", i.UUID, name)
	case i.Open > 0 && !e.o.Repair:
		f.Detail += "; somebody has it open"
		f.Suggestion = fmt.Sprintf("unmount it (`grep -l %s /proc/[0-9]*/mountinfo` says where), then check with repair removes it", name)
	case e.o.Repair:
		err := c.Deactivate(name)
		if err == nil {
			f.Done = "removed"
			break
		}
		f.Detail += ": " + err.Error()
		f.Suggestion = fmt.Sprintf("unmount it (`grep -l %s /proc/[0-9]*/mountinfo` says where), then check again", name)
	}
	e.add(f)
}
