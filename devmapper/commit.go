package devmapper

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// Commit freezes a layer: with a clean journal, all on the pool, its device gone. What
// somebody still has open stays theirs: then the layer is a snapshot of it.
func (d *driver) Commit(ctx context.Context, r drivers.Ref, o drivers.CommitOptions) (drivers.Usage, error) {
	u, err := d.commit(ctx, r, o)
	return u, d.wrap("commit", r.ID, err)
}

func (d *driver) commit(ctx context.Context, r drivers.Ref, o drivers.CommitOptions) (drivers.Usage, error) {
	var none drivers.Usage
	l, err := d.layer(r.ID)
	if err != nil {
		return none, err
	}
	if l.Kind != writable {
		return none, fmt.Errorf("is %s, not writable: %w", l.Kind, errdefs.ErrFailedPrecondition)
	}
	if err := l.sameParents(r.Parents); err != nil {
		return none, err
	}
	v := d.volume(r.ID, l)
	if err := d.unsuspend(ctx, r.ID, v.Name); err != nil {
		return none, err
	}
	if err := drivers.Step(ctx, "devmapper: commit: checked"); err != nil {
		return none, err
	}
	if err := d.activate(ctx, r.ID, v); err != nil { // young, or it may be taken for idle
		return none, err
	}
	err = d.settle(ctx, l.fs, v, o.Volatile)
	if errors.Is(err, errInUse) {
		return d.commitOpen(ctx, r, l, v, o)
	}
	if err != nil {
		return none, err
	}
	if err := drivers.Step(ctx, "devmapper: commit: flushed"); err != nil {
		return none, err
	}
	u, err := d.measure(ctx, r, l.fs, l.Thin)
	if err != nil {
		return none, err
	}
	l.Kind, l.Usage = committed, &u
	if err := d.replace(r.ID, l); err != nil {
		return none, err
	}
	return u, drivers.Step(ctx, "devmapper: commit: record replaced")
}

// replace is the commit point. Where Create left the layer's name unsynced, it is on
// the disk now, too.
func (d *driver) replace(id drivers.ID, l *record) error {
	if err := d.write(roots.Layers, id, l); err != nil {
		return err
	}
	d.kept.drop(id)
	return d.sync(roots.New)
}

var errInUse = fmt.Errorf("somebody has it open: %w", errdefs.ErrFailedPrecondition)

// settle leaves the file system of a device with an empty log, on the pool unless
// volatile, and takes the device away. errInUse if somebody has it open.
func (d *driver) settle(ctx context.Context, fs *fileSystem, v thin.Volume, volatile bool) error {
	if err := d.pool.Activate(ctx, v); err != nil {
		return err
	}
	log, err := d.flushOwn(fs, v, volatile)
	if err == nil && log != logEmpty {
		if err = d.replayLog(ctx, fs, v); err == nil {
			log, err = d.flushOwn(fs, v, volatile)
		}
		if err == nil && log == logFull {
			err = fmt.Errorf("the journal of %s is not empty after a mount: `e2fsck -f %s`: %w", v.Name, thin.Node(v.Name), errdefs.ErrDataLoss)
		}
	}
	if err != nil {
		return err
	}
	err = d.pool.Exclusive(ctx, func(c *thin.Change) error { return c.Deactivate(v.Name) })
	if errdefs.IsFailedPrecondition(err) {
		return errInUse
	}
	return err
}

// flushOwn flushes a device that nobody has mounted, and reports whether its log is
// to be replayed.
func (d *driver) flushOwn(fs *fileSystem, v thin.Volume, volatile bool) (logState, error) {
	f, err := sys.Open(thin.Node(v.Name), sys.O_RDWR|sys.O_EXCL, 0)
	if errors.Is(err, syscall.EBUSY) {
		return logUnknown, errInUse
	}
	if err != nil {
		return logUnknown, err
	}
	defer f.Close()
	i, err := fs.identify(f)
	if err == nil && !volatile {
		err = f.Sync()
	}
	return i.log, err
}

// replayLog has the kernel do it.
func (d *driver) replayLog(ctx context.Context, fs *fileSystem, v thin.Volume) error {
	t, err := mount.Detached(ctx, []mount.Mount{fs.mount(v, drivers.MountOptions{})})
	if errors.Is(err, syscall.EBUSY) {
		return errInUse
	}
	if err != nil {
		return err
	}
	return t.Close()
}

// commitOpen commits a layer whose device somebody has open, mounted or not.
func (d *driver) commitOpen(ctx context.Context, r drivers.Ref, l *record, v thin.Volume, o drivers.CommitOptions) (drivers.Usage, error) {
	var none drivers.Usage
	t, err := d.snapshotOf(ctx, r.ID, l)
	if err != nil {
		return none, err
	}
	u, err := d.commitSnapshot(ctx, r, l, v, t, o)
	if err != nil {
		dropErr := d.pool.Exclusive(context.WithoutCancel(ctx), func(c *thin.Change) error {
			now, readErr := d.read(roots.Layers, r.ID)
			if readErr != nil || now.Thin == t.id { // committed: an error of the last step
				d.forget(t)
				return nil
			}
			return d.drop(c, t)
		})
		return none, errors.Join(err, dropErr)
	}
	return u, nil
}

func (d *driver) commitSnapshot(ctx context.Context, r drivers.Ref, l *record, v thin.Volume, t temp, o drivers.CommitOptions) (drivers.Usage, error) {
	var none drivers.Usage
	if err := drivers.Step(ctx, "devmapper: commit: snapshot made"); err != nil {
		return none, err
	}
	mine := d.private(t.id, l.Sectors, false)
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		err := d.settle(ctx, l.fs, mine, o.Volatile)
		if err == nil {
			break
		}
		if !errors.Is(err, errInUse) || time.Now().After(end) { // udev looks at it
			return none, err
		}
	}
	u, err := d.measure(ctx, r, l.fs, t.id)
	if err != nil {
		return none, err
	}
	old := l.Thin
	l.Kind, l.Usage, l.Thin = committed, &u, t.id
	err = d.pool.Exclusive(ctx, func(c *thin.Change) error {
		if err := d.trash(old); err != nil {
			return err
		}
		if err := d.replace(r.ID, l); err != nil {
			return err
		}
		_ = c.RemoveLater(v.Name) // done is done: Remove, Close and the next sweep do what this cannot
		_ = d.sweepTemps(c)
		return nil
	})
	if err != nil {
		return none, err
	}
	d.forget(t)
	return u, drivers.Step(ctx, "devmapper: commit: record replaced")
}

// snapshotOf takes a snapshot of a writable layer, whoever has it mounted: its file
// system is frozen for that moment, so that the snapshot's is clean.
func (d *driver) snapshotOf(ctx context.Context, id drivers.ID, l *record) (t temp, err error) {
	lock, err := d.lockLayer(id)
	if err != nil {
		return t, err
	}
	defer lock.Close()
	name := d.deviceName(id, l.Thin)
	if err := d.resumeLeft(ctx, name); err != nil {
		return t, err
	}
	suspended := false
	if i, err := d.pool.Info(name); err == nil && i.ActiveTable {
		// Outside the pool's lock: it waits for what is being written.
		if suspended, err = d.suspend(ctx, l.fs, d.volume(id, l)); err != nil {
			return t, err
		}
	}
	defer func() {
		if !suspended {
			return
		}
		resumeErr := d.pool.Resume(name)
		if errdefs.IsNotFound(resumeErr) { // removed, by somebody who found it idle: what was written is in the snapshot
			resumeErr = nil
		}
		if err == nil && resumeErr != nil {
			err = errors.Join(resumeErr, d.pool.Exclusive(context.WithoutCancel(ctx), func(c *thin.Change) error { return d.drop(c, t) }))
		}
	}()
	if err := drivers.Step(ctx, "devmapper: suspended"); err != nil {
		return t, err
	}
	err = d.pool.Exclusive(ctx, func(c *thin.Change) error {
		if i, err := d.pool.Info(name); err == nil && i.ActiveTable && !i.Suspended { // what is written to it would be in both
			return fmt.Errorf("%s was activated meanwhile, try again: %w", name, errdefs.ErrUnavailable)
		}
		t, err = d.reserve(c, func(thinID uint32) error { return lost(c.CreateSnap(thinID, l.Thin)) })
		return err
	})
	return t, err
}
