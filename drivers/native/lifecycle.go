package native

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
)

// Create copies the nearest parent's tree under new/ID and renames it to l/ID.
// It flushes the copy first, unless o.Volatile: a cut must not leave a layer that
// looks whole and has empty files.
func (d *driver) Create(ctx context.Context, r drivers.Ref, o drivers.CreateOptions) error {
	err := d.checkCreate(r, o)
	if err == nil {
		err = d.create(ctx, r, o)
	}
	return d.wrap("create", r.ID, err)
}

func (d *driver) checkCreate(r drivers.Ref, o drivers.CreateOptions) error {
	switch {
	case r.ID == 0:
		return fmt.Errorf("0 is not a layer: %w", errdefs.ErrInvalidArgument)
	case o.Quota != 0:
		return fmt.Errorf("native has no quota: %w", errdefs.ErrInvalidArgument)
	case !o.IDMap.IsZero() && !d.caps.IDMap:
		return fmt.Errorf("no id-mapped mounts of %s here: %w", d.root, errdefs.ErrInvalidArgument)
	}
	if len(r.Parents) == 0 {
		return nil
	}
	s, err := d.check(r.Parents[0])
	if err != nil {
		return fmt.Errorf("parent %s: %w", r.Parents[0], err)
	}
	if s.Kind != committed {
		return fmt.Errorf("parent %s is %s, not committed: %w", r.Parents[0], s.Kind, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (d *driver) create(ctx context.Context, r drivers.Ref, o drivers.CreateOptions) (err error) {
	layers, err := d.open(roots.Layers)
	if err != nil {
		return err
	}
	defer layers.Close()
	if err := d.refuseExisting(layers, r.ID); err != nil {
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
			_ = deleteTree(context.WithoutCancel(ctx), making, name)
		}
	}()
	if err := d.build(ctx, making, r, o); err != nil {
		return err
	}
	if err := making.Rename(name, layers, name, sys.RENAME_NOREPLACE); err != nil {
		return err
	}
	return nil
}

// refuseExisting refuses an ID that is there, in whatever state.
func (d *driver) refuseExisting(layers *sys.Fd, id drivers.ID) error {
	there, err := layers.Exists(id.String())
	if err != nil {
		return err
	}
	if !there {
		deleted, err := d.open(roots.Deleted)
		if err != nil {
			return err
		}
		defer deleted.Close()
		if there, err = deleted.Exists(id.String()); err != nil {
			return err
		}
	}
	if there {
		return fmt.Errorf("%w", errdefs.ErrAlreadyExists)
	}
	return nil
}

// build fills new/ID: the tree, then the marker.
func (d *driver) build(ctx context.Context, making *sys.Fd, r drivers.Ref, o drivers.CreateOptions) error {
	if err := drivers.Step(ctx, "native: create: directory made"); err != nil {
		return err
	}
	l, err := making.Openat(r.ID.String(), sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer l.Close()
	if len(r.Parents) == 0 {
		err = emptyTree(l, o.RootOwner)
	} else {
		err = d.copyTree(ctx, r.Parents[0], l)
	}
	if err != nil {
		return err
	}
	if err := drivers.Step(ctx, "native: create: tree made"); err != nil {
		return err
	}
	if err := writeState(l, newState(r, o), false); err != nil {
		return err
	}
	if err := drivers.Step(ctx, "native: create: marker written"); err != nil {
		return err
	}
	if o.Volatile || len(r.Parents) == 0 { // nothing but names, which a journal keeps in order
		return nil
	}
	return l.SyncFS()
}

// emptyTree makes a root directory of mode 0755 for owner; nil means 0:0. An
// unprivileged process's own root stays its own.
func emptyTree(l *sys.Fd, owner *drivers.Owner) error {
	if err := l.Mkdir(treeDir, 0o755); err != nil {
		return err
	}
	if err := l.ChmodAt(treeDir, 0o755); err != nil { // whatever the umask
		return err
	}
	if owner == nil {
		owner = &drivers.Owner{}
	}
	err := l.Chown(treeDir, owner.UID, owner.GID)
	if err != nil && *owner != (drivers.Owner{}) {
		return err
	}
	// A layer whose archive does not name its root is the same whenever it is unpacked.
	return l.Utimes(treeDir, sys.Time{}, sys.Time{})
}

// copyTree copies the tree of a committed layer into the layer directory l.
func (d *driver) copyTree(ctx context.Context, parent drivers.ID, l *sys.Fd) error {
	src, err := sys.OpenDir(d.treePath(parent))
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := mkdirOpen(l, treeDir)
	if err != nil {
		return err
	}
	defer dst.Close()
	links, err := mkdirOpen(l, linksDir)
	if err != nil {
		return err
	}
	defer links.Close()
	c := &copier{crew: newCrew(ctx), links: &linkPool{dir: links, ino: map[uint64]*pooled{}}, keepsStat: d.keepsStat()}
	c.noClone.Store(!d.caps.Reflink)
	defer c.close()
	if err := c.tree(src, dst); err != nil {
		return err
	}
	if err := drivers.Step(ctx, "native: create: tree copied"); err != nil {
		return err
	}
	return deleteTree(ctx, l, linksDir)
}

func mkdirOpen(dir *sys.Fd, name string) (*sys.Fd, error) {
	if err := dir.Mkdir(name, 0o700); err != nil {
		return nil, err
	}
	return dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
}

// Commit flushes the tree and then replaces the marker.
func (d *driver) Commit(ctx context.Context, r drivers.Ref, o drivers.CommitOptions) (drivers.Usage, error) {
	u, err := d.commit(ctx, r, o)
	return u, d.wrap("commit", r.ID, err)
}

func (d *driver) commit(ctx context.Context, r drivers.Ref, o drivers.CommitOptions) (drivers.Usage, error) {
	var none drivers.Usage
	l, s, err := d.layer(r.ID)
	if err != nil {
		return none, err
	}
	defer l.Close()
	if err := d.checkCommit(r, s); err != nil {
		return none, err
	}
	if !o.Volatile { // first the data and every name below and above it, l/ID among them
		if err := l.SyncFS(); err != nil {
			return none, err
		}
	}
	if err := drivers.Step(ctx, "native: commit: flushed"); err != nil {
		return none, err
	}
	u, err := measure(ctx, l)
	if err != nil {
		return none, err
	}
	if err := drivers.Step(ctx, "native: commit: measured"); err != nil {
		return none, err
	}
	s.Kind = committed
	return u, writeState(l, s, !o.Volatile)
}

func (d *driver) checkCommit(r drivers.Ref, s state) error {
	if s.Kind != writable {
		return fmt.Errorf("is %s, not writable: %w", s.Kind, errdefs.ErrFailedPrecondition)
	}
	if err := s.sameParents(r.Parents); err != nil {
		return err
	}
	return d.refuseMounted(r.ID, mountedForWriting)
}

// Remove renames l/ID to del/ID, or on a full disk takes its marker away, so that
// no half-deleted layer is ever seen as a layer, and deletes it.
func (d *driver) Remove(ctx context.Context, id drivers.ID) error {
	return d.wrap("remove", id, d.remove(ctx, id))
}

func (d *driver) remove(ctx context.Context, id drivers.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.refuseMounted(id, mountedAtAll); err != nil {
		return err
	}
	if err := d.discard(id); err != nil {
		return err
	}
	if err := drivers.Step(ctx, "native: remove: renamed"); err != nil {
		return err
	}
	for _, name := range []string{roots.New, roots.Deleted, roots.Layers} {
		if err := d.empty(ctx, name, id); err != nil {
			return err
		}
	}
	return nil
}

// discard moves l/ID to del/ID and flushes both directories before anything in it
// is deleted. del/ID is there only if a removal was cut short, and then l/ID is
// not; IDs are never used again.
func (d *driver) discard(id drivers.ID) error {
	layers, err := d.open(roots.Layers)
	if err != nil {
		return err
	}
	defer layers.Close()
	there, err := layers.Exists(id.String())
	if err != nil || !there {
		return err
	}
	deleted, err := d.open(roots.Deleted)
	if err != nil {
		return err
	}
	defer deleted.Close()
	err = layers.Rename(id.String(), deleted, id.String(), sys.RENAME_NOREPLACE)
	if drivers.IsFull(err) {
		return unmark(layers, id)
	}
	if err != nil {
		return err
	}
	if err := deleted.Sync(); err != nil {
		return err
	}
	return layers.Sync()
}

// unmark makes l/ID nobody's layer where it stands, by deleting its marker: on a
// full btrfs a rename has no room, where a removal always has.
func unmark(layers *sys.Fd, id drivers.ID) error {
	l, err := layers.Openat(id.String(), sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := l.Unlink(stateFile, 0); err != nil && !errors.Is(err, syscall.ENOENT) {
		return err
	}
	return l.SyncFS() // an fsync writes a log, which needs room, too
}

// empty deletes ID in one of the root's directories.
func (d *driver) empty(ctx context.Context, name string, id drivers.ID) error {
	dir, err := d.open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	return deleteTree(ctx, dir, id.String())
}

// deleteTree deletes name in dir with all below it; nil if it is not there.
func deleteTree(ctx context.Context, dir *sys.Fd, name string) error {
	r := &remover{crew: newCrew(ctx)}
	defer r.close()
	return r.remove(dir, name, 0)
}
