package btrfs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/mount"
)

// Commit makes ro, a read-only snapshot of fs: that is the commit point, and on
// the disk when the call returns, with all data. A writer that is still alive has
// fs, and nothing of what it writes from then on is in the layer. A volatile one is
// the same: how much the layer holds is not known before its data is flushed.
func (d *driver) Commit(ctx context.Context, r drivers.Ref, _ drivers.CommitOptions) (drivers.Usage, error) {
	u, err := d.commit(ctx, r)
	return u, d.wrap("commit", r.ID, err)
}

func (d *driver) commit(ctx context.Context, r drivers.Ref) (drivers.Usage, error) {
	var none drivers.Usage
	l, err := d.layer(r.ID)
	if err != nil {
		return none, err
	}
	defer l.Close()
	if err := l.checkCommit(r); err != nil {
		return none, err
	}
	tree, err := l.tree()
	if err != nil {
		return none, err
	}
	defer tree.Close()
	if err := refuseNested(tree); err != nil {
		return none, err
	}
	if err := drivers.Step(ctx, "btrfs: commit: checked"); err != nil {
		return none, err
	}
	if err := ioctl.Snapshot(tree, l.Fd, string(committed), true); err != nil {
		return none, err
	}
	if err := refuseNested(tree); err != nil { // made meanwhile, maybe before the snapshot
		return none, errors.Join(err, d.destroyer(context.WithoutCancel(ctx)).subvolume(l.Fd, string(committed)))
	}
	l.kind = committed
	if err := drivers.Step(ctx, "btrfs: commit: snapshot made"); err != nil {
		return none, err
	}
	u, err := d.measure(ctx, l)
	if err != nil {
		return none, err
	}
	l.keepUsage(u)
	d.dropSource(l)
	return u, nil
}

func (l *layerDir) checkCommit(r drivers.Ref) error {
	if l.kind != writable {
		return fmt.Errorf("is %s, not writable: %w", l.kind, errdefs.ErrFailedPrecondition)
	}
	parent := ""
	if len(r.Parents) > 0 {
		parent = r.Parents[0].String()
	}
	if parent != l.about.Parent {
		return fmt.Errorf("made on %q, committed on %q: a snapshot has its parent for good: %w", l.about.Parent, parent, errdefs.ErrInvalidArgument)
	}
	return nil
}

// dropSource deletes the fs of a committed layer, unless somebody has it mounted:
// a writer in there would meet errors. What cannot be deleted now is deleted by
// the next Create on the layer, or goes with it. So do snapshots that killed diffs
// of it left.
func (d *driver) dropSource(l *layerDir) {
	l.sweepSnapshots(d.destroyer(context.Background()))
	if there, err := l.Fd.Exists(string(writable)); err != nil || !there {
		return
	}
	mounted, err := d.mountedAt(l.id, func(i mount.Info) bool {
		id, k, ok := d.layerAt(i)
		return ok && id == l.id && k == writable
	})
	if err == nil && mounted == "" {
		_ = d.destroyer(context.Background()).subvolume(l.Fd, string(writable))
	}
}

// keepUsage notes what a committed layer holds, so that it is not counted again.
// Without the note it is.
func (l *layerDir) keepUsage(u drivers.Usage) {
	if text, err := json.Marshal(u); err == nil {
		_ = l.Setxattr("", usageXattr, string(text))
	}
}
