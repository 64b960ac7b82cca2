package upper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// Create makes the layer under a temporary name and renames it last: a crash
// before leaves ID.new, which IDs lists and Remove takes.
func (l *Layers) Create(ctx context.Context, r drivers.Ref, o drivers.CreateOptions) error {
	err := l.create(ctx, r, o)
	if err != nil && !errors.Is(err, errdefs.ErrAlreadyExists) {
		_ = l.removeTree(context.WithoutCancel(ctx), r.ID.String()+newSuffix)
	}
	return l.wrap("create", r.ID, err)
}

func (l *Layers) create(ctx context.Context, r drivers.Ref, o drivers.CreateOptions) error {
	if err := l.checkCreate(r, o); err != nil {
		return err
	}
	if err := l.step(ctx, "create: checked"); err != nil {
		return err
	}
	a := about{View: o.ReadOnly, IDMap: o.IDMap, StoredIDs: l.cfg.StoredIDs && !o.ReadOnly && !o.IDMap.IsZero()}
	if len(r.Parents) > 0 {
		p, err := l.parentState(r)
		if err != nil {
			return err
		}
		a.Parent, a.Metacopy = p.id, p.metacopy()
	}
	tmp := r.ID.String() + newSuffix
	if err := l.removeTree(ctx, tmp); err != nil { // of a crash
		return err
	}
	if err := l.build(ctx, tmp, r, o, a); err != nil {
		return err
	}
	return l.publish(ctx, tmp, r.ID)
}

// checkCreate refuses what cannot be, before anything is made.
func (l *Layers) checkCreate(r drivers.Ref, o drivers.CreateOptions) error {
	if r.ID == 0 {
		return fmt.Errorf("layer 0: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := os.Lstat(l.path(r.ID.String())); err == nil {
		return fmt.Errorf("layer %s: %w", r.ID, errdefs.ErrAlreadyExists)
	}
	if len(r.Parents) > MaxLowers {
		return fmt.Errorf("%d parents, %d lowers are the most: %w", len(r.Parents), MaxLowers, errdefs.ErrInvalidArgument)
	}
	if !o.IDMap.IsZero() && !l.cfg.Capabilities.IDMap {
		return fmt.Errorf("id map: %w: %s", errdefs.ErrInvalidArgument, l.cfg.NoIDMap)
	}
	if o.Quota < 0 {
		return fmt.Errorf("quota %d: %w", o.Quota, errdefs.ErrInvalidArgument)
	}
	if o.Quota > 0 && !l.cfg.Capabilities.Quota {
		return fmt.Errorf("quota: %w: %s", errdefs.ErrInvalidArgument, l.cfg.NoQuota)
	}
	return checkIDMap(o.IDMap)
}

// parentState loads the nearest parent, which must be committed.
func (l *Layers) parentState(r drivers.Ref) (*state, error) {
	p, err := l.load(r.Parents[0])
	if err != nil {
		return nil, fmt.Errorf("parent: %w", err)
	}
	if p.committed == nil {
		return nil, fmt.Errorf("parent %s is not committed: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	return p, nil
}

// build makes the layer's directory under a temporary name.
func (l *Layers) build(ctx context.Context, tmp string, r drivers.Ref, o drivers.CreateOptions, a about) error {
	root, err := sys.OpenDir(l.root)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.Mkdir(tmp, 0o711); err != nil {
		return err
	}
	dir, err := root.Openat(tmp, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := l.step(ctx, "create: made"); err != nil {
		return err
	}
	if err := l.buildDirs(dir, o); err != nil {
		return err
	}
	if err := l.step(ctx, "create: directories"); err != nil {
		return err
	}
	if o.Quota > 0 {
		if a.Project, err = limitProject(dir, r.ID, o.Quota); err != nil {
			return err
		}
	}
	if err := l.dressRoot(dir, r, o, a); err != nil {
		return err
	}
	return writeFileJSON(dir, aboutFile, a)
}

// buildDirs makes fs, and work where there may be an upper.
func (l *Layers) buildDirs(dir *sys.Fd, o drivers.CreateOptions) error {
	if err := dir.Mkdir(fsDir, 0o755); err != nil {
		return err
	}
	if o.ReadOnly {
		return nil
	}
	return dir.Mkdir(workDir, 0o711)
}

// dressRoot makes fs look like the parent's root, whose metadata it hides, or
// as asked for.
func (l *Layers) dressRoot(dir *sys.Fd, r drivers.Ref, o drivers.CreateOptions, a about) error {
	fs, err := dir.Openat(fsDir, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer fs.Close()
	m := a.IDMap
	if o.ReadOnly || a.StoredIDs {
		m = drivers.IDMap{} // a view's own directory is a lower, and mapped as such
	}
	if len(r.Parents) > 0 {
		return l.copyRoot(fs, r.Parents[0], m)
	}
	owner := drivers.Owner{UID: shift(m.UIDs, 0), GID: shift(m.GIDs, 0)}
	if o.RootOwner != nil {
		owner = *o.RootOwner
	}
	err = fs.Chown("", owner.UID, owner.GID)
	if err != nil && !(o.RootOwner == nil && m.IsZero() && l.keepsStat() && errors.Is(err, syscall.EPERM)) {
		return err // an ordinary user's own root, of no owner that was asked for, stays its own
	}
	if err := fs.Chmod(0o755); err != nil { // whatever the umask is
		return err
	}
	// A layer whose archive does not name its root is the same whenever it is unpacked.
	return fs.Utimes("", sys.Time{}, sys.Time{})
}

// copyRoot gives fs the metadata of a parent's root, shifted by m.
func (l *Layers) copyRoot(fs *sys.Fd, parent drivers.ID, m drivers.IDMap) error {
	from, err := sys.OpenDir(l.Dir(parent))
	if err != nil {
		return err
	}
	defer from.Close()
	have, err := readMetadata(from)
	if err != nil {
		return err
	}
	return have.shifted(m).put(fs, func() error { return nil })
}

// publish renames the finished directory; the last step.
func (l *Layers) publish(ctx context.Context, tmp string, id drivers.ID) error {
	if err := l.step(ctx, "create: built"); err != nil {
		return err
	}
	root, err := sys.OpenDir(l.root)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.Rename(tmp, root, id.String(), sys.RENAME_NOREPLACE); err != nil {
		return err
	}
	return nil
}

// writeFileJSON writes a small file of a directory that nobody sees yet.
func writeFileJSON(dir *sys.Fd, name string, v any) error {
	return WriteJSON(dir, name, v, false)
}
