package btrfs

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
)

// Create makes a snapshot of the nearest parent under new/ID and renames it to
// l/ID.
func (d *driver) Create(ctx context.Context, r drivers.Ref, o drivers.CreateOptions) error {
	return d.wrap("create", r.ID, d.create(ctx, r, o))
}

func (d *driver) checkCreate(r drivers.Ref, o drivers.CreateOptions) error {
	switch {
	case r.ID == 0:
		return fmt.Errorf("0 is not a layer: %w", errdefs.ErrInvalidArgument)
	case o.Quota < 0, o.Quota > 0 && o.ReadOnly:
		return fmt.Errorf("a quota of %d: %w", o.Quota, errdefs.ErrInvalidArgument)
	case o.Quota > 0 && !d.caps.Quota:
		return fmt.Errorf("quota is off here: `btrfs quota enable` switches it on, for the whole file system: %w", errdefs.ErrInvalidArgument)
	case !o.IDMap.IsZero() && !d.caps.IDMap:
		return fmt.Errorf("no id-mapped mounts of %s here: %w", d.root, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (d *driver) create(ctx context.Context, r drivers.Ref, o drivers.CreateOptions) (err error) {
	if err := d.checkCreate(r, o); err != nil {
		return err
	}
	parent, err := d.parent(r)
	if err != nil {
		return err
	}
	if parent != nil {
		defer parent.Close()
	}
	if err := d.refuseExisting(r.ID); err != nil {
		return err
	}
	making, err := d.open(roots.New)
	if err != nil {
		return err
	}
	defer making.Close()
	name := r.ID.String()
	if err := making.Mkdir(name, 0o700); err != nil { // ErrAlreadyExists: half-made, for Remove
		return err
	}
	defer func() {
		if err != nil { // what this cannot delete Remove can
			_ = d.destroyer(context.WithoutCancel(ctx)).layer(making, name)
		}
	}()
	if err := d.build(ctx, making, parent, r, o); err != nil {
		return err
	}
	layers, err := d.open(roots.Layers)
	if err != nil {
		return err
	}
	defer layers.Close()
	return making.Rename(name, layers, name, sys.RENAME_NOREPLACE)
}

// parent opens the nearest parent, which must be committed; nil without one.
func (d *driver) parent(r drivers.Ref) (*layerDir, error) {
	if len(r.Parents) == 0 {
		return nil, nil
	}
	p, err := d.layer(r.Parents[0])
	if err != nil {
		return nil, fmt.Errorf("parent %s: %w", r.Parents[0], err)
	}
	if p.kind != committed {
		p.Close()
		return nil, fmt.Errorf("parent %s is %s, not committed: %w", r.Parents[0], p.kind, errdefs.ErrFailedPrecondition)
	}
	d.dropSource(p)
	return p, nil
}

// refuseExisting refuses an ID that is there, in whatever state.
func (d *driver) refuseExisting(id drivers.ID) error {
	for _, name := range []string{roots.Layers, roots.Deleted} {
		dir, err := d.open(name)
		if err != nil {
			return err
		}
		there, err := dir.Exists(id.String())
		dir.Close()
		if err != nil {
			return err
		}
		if there {
			return fmt.Errorf("%w", errdefs.ErrAlreadyExists)
		}
	}
	return nil
}

// build fills new/ID: the subvolume, then the description.
func (d *driver) build(ctx context.Context, making *sys.Fd, parent *layerDir, r drivers.Ref, o drivers.CreateOptions) error {
	if err := drivers.Step(ctx, "btrfs: create: directory made"); err != nil {
		return err
	}
	l, err := making.Openat(r.ID.String(), sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer l.Close()
	k := writable
	if o.ReadOnly {
		k = view
	}
	var a about
	if !o.IDMap.IsZero() {
		a.IDMap = &o.IDMap
	}
	if parent == nil {
		err = emptySubvolume(l, string(k), o.RootOwner)
	} else {
		a.Parent = r.Parents[0].String()
		a.Born, err = snapshotOf(parent, l, k)
	}
	if err == nil {
		err = d.limit(l, k, parent != nil, o.Quota)
	}
	if err != nil {
		return err
	}
	if err := drivers.Step(ctx, "btrfs: create: subvolume made"); err != nil {
		return err
	}
	if err := a.write(l); err != nil {
		return err
	}
	return drivers.Step(ctx, "btrfs: create: described")
}

// limit bounds what the subvolume itself may hold; 0 is no bound: with qgroups a
// snapshot has its source's until that is lifted.
func (d *driver) limit(l *sys.Fd, k kind, snapshot bool, bytes int64) error {
	if inherits := snapshot && k == writable && d.quota == ioctl.QuotaFull; bytes == 0 && !inherits {
		return nil
	}
	tree, err := l.Openat(string(k), sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer tree.Close()
	most, err := bounds(tree, bytes)
	if err != nil {
		return err
	}
	err = ioctl.Limit(tree, most)
	if bytes == 0 && errors.Is(err, syscall.ENOTCONN) { // somebody switched the quota off
		return nil
	}
	return err
}

// bounds are what a new subvolume may count to hold no more than so many bytes itself.
// With qgroups what a snapshot shares with it, a Diff's too, is not exclusive to it:
// so it may not refer to more than that beyond what it begins with, either.
func bounds(tree *sys.Fd, bytes int64) (ioctl.QgroupUsage, error) {
	most := ioctl.QgroupUsage{Exclusive: uint64(bytes)}
	if bytes == 0 {
		return most, nil
	}
	mode, right, err := ioctl.Quota(tree)
	if err != nil || mode != ioctl.QuotaFull || !right {
		return most, err
	}
	id, err := ioctl.SubvolID(tree)
	if err != nil {
		return most, err
	}
	begins, err := ioctl.Qgroup(tree, id)
	most.Referenced = begins.Referenced + uint64(bytes)
	return most, err
}

// snapshotOf makes the subvolume of a layer that has a parent, and returns the
// transaction that it was made in.
func snapshotOf(parent *layerDir, l *sys.Fd, k kind) (born uint64, err error) {
	source, err := parent.tree()
	if err != nil {
		return 0, err
	}
	defer source.Close()
	if err := ioctl.Snapshot(source, l, string(k), k == view); err != nil {
		return 0, err
	}
	tree, err := l.Openat(string(k), sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return 0, err
	}
	defer tree.Close()
	info, err := ioctl.SubvolInfo(tree)
	return info.Born, err
}

// emptySubvolume makes a subvolume whose root has mode 0755, belongs to owner
// (nil means 0:0) and is dated 0: a layer whose archive does not name its root is
// the same whenever it is unpacked.
func emptySubvolume(l *sys.Fd, name string, owner *drivers.Owner) error {
	if err := ioctl.Create(l, name); err != nil {
		return err
	}
	if err := l.ChmodAt(name, 0o755); err != nil { // whatever the umask
		return err
	}
	if owner == nil {
		owner = &drivers.Owner{}
	}
	err := l.Chown(name, owner.UID, owner.GID)
	if err != nil && *owner != (drivers.Owner{}) { // an unprivileged process's own root stays its own
		return err
	}
	return l.Utimes(name, sys.Time{}, sys.Time{})
}
