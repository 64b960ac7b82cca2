package devmapper

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// Mounts activates the layer's device and says how to mount it.
func (d *driver) Mounts(ctx context.Context, r drivers.Ref, o drivers.MountOptions) ([]mount.Mount, error) {
	ms, err := d.mounts(ctx, r.ID, o)
	return ms, d.wrap("mounts", r.ID, err)
}

func (d *driver) mounts(ctx context.Context, id drivers.ID, o drivers.MountOptions) ([]mount.Mount, error) {
	l, err := d.layer(id)
	if err != nil {
		return nil, err
	}
	if o.IDMap.IsZero() && l.IDMap != nil {
		o.IDMap = *l.IDMap
	}
	if !o.IDMap.IsZero() && !d.caps.IDMap {
		return nil, fmt.Errorf("no id-mapped mounts of %s here: %w", l.FS, errdefs.ErrInvalidArgument)
	}
	v := d.volume(id, l)
	if err := d.activate(ctx, id, v); err != nil {
		return nil, err
	}
	if err := d.unsuspend(ctx, id, v.Name); err != nil {
		return nil, err
	}
	d.dropIdle(ctx)
	return []mount.Mount{l.fs.mount(v, o)}, nil
}

// A device that nobody has open goes when no Mounts has named it for idleAfter. The
// record's mtime says when one did, to keepEvery.
const (
	idleAfter = 10 * time.Minute
	keepEvery = idleAfter / 2
)

// activate has the device ready and its record's mtime young. Only who has the lock
// may make it young: dropIdle, which looks at it, has it, too.
func (d *driver) activate(ctx context.Context, id drivers.ID, v thin.Volume) error {
	path := d.root + "/" + roots.Layers + "/" + id.String()
	st, err := sys.LstatPath(path)
	if err != nil {
		return err
	}
	if time.Since(time.Unix(st.Mtime.Sec, 0)) < keepEvery && d.pool.Ready(v.Name) {
		return nil
	}
	return d.pool.Exclusive(ctx, func(c *thin.Change) error {
		dir, err := d.open(roots.Layers)
		if err != nil {
			return err
		}
		defer dir.Close()
		now := sys.Time{Sec: time.Now().Unix()}
		if err := dir.Utimes(id.String(), now, now); err != nil {
			return err
		}
		return c.Activate(v)
	})
}

// dropIdle is DropIdle, now and then.
func (d *driver) dropIdle(ctx context.Context) {
	now, last := time.Now().Unix(), d.swept.Load()
	if now-last < int64(keepEvery/time.Second) || !d.swept.CompareAndSwap(last, now) || last == 0 {
		return
	}
	_ = d.DropIdle(ctx) // the next one sees what this cannot
}

// DropIdle implements drivers.Idler: a device goes that nobody has open and that no Mounts
// has named of late.
func (d *driver) DropIdle(ctx context.Context) error {
	err := d.pool.Exclusive(ctx, func(c *thin.Change) error {
		names, err := d.pool.Devices()
		if err != nil {
			return err
		}
		for _, name := range names {
			if d.isIdle(name) {
				_ = c.Deactivate(name) // the kernel refuses one that is open
			}
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("devmapper: idle devices: %w", err)
	}
	return err
}

func (d *driver) isIdle(name string) bool {
	id, ok := d.layerOf(name)
	if !ok {
		return false
	}
	st, err := sys.LstatPath(d.root + "/" + roots.Layers + "/" + id.String())
	if err == nil && time.Since(time.Unix(st.Mtime.Sec, 0)) < idleAfter {
		return false
	}
	i, err := d.pool.Info(name)
	return err == nil && !i.Suspended && i.Open == 0 // suspended: a Commit or Diff is at work with it
}

// lockLayer excludes others that suspend the layer's device, whichever process they
// are of.
func (d *driver) lockLayer(id drivers.ID) (*sys.Lock, error) {
	return sys.WaitLock(d.root+"/"+roots.Layers+"/"+id.String(), sys.O_RDONLY, sys.LockExclusive)
}

// unsuspend resumes a device that a process left suspended that died.
func (d *driver) unsuspend(ctx context.Context, id drivers.ID, name string) error {
	if i, err := d.pool.Info(name); err != nil || !i.Suspended {
		return nil
	}
	lock, err := d.lockLayer(id) // or its owner is at work, and then it is not suspended any more
	if err != nil {
		return err
	}
	defer lock.Close()
	return d.resumeLeft(ctx, name)
}

// resumeLeft is called with the layer's lock.
func (d *driver) resumeLeft(ctx context.Context, name string) error {
	if i, err := d.pool.Info(name); err != nil || !i.Suspended {
		return nil
	}
	return d.pool.Resume(name)
}

// Owner takes what Mounts made and what mountinfo shows of it.
func (d *driver) Owner(ms []mount.Mount) (drivers.ID, bool) {
	if len(ms) != 1 {
		return 0, false
	}
	name, ok := strings.CutPrefix(ms[0].Source, thin.Node(""))
	if !ok {
		return 0, false
	}
	return d.layerOf(name)
}

// mountedHere returns where this mount namespace shows a device mounted, "" if
// nowhere.
func mountedHere(name string) (string, error) {
	infos, err := mount.List()
	if err != nil {
		return "", err
	}
	for _, i := range infos {
		if i.Source == thin.Node(name) {
			return i.Target, nil
		}
	}
	return "", nil
}
