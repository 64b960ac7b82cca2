package btrfs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// Remove renames l/ID to del/ID, so that no half-deleted layer is ever seen as a
// layer, and deletes the subvolumes there: the kernel frees their blocks in the
// background.
func (d *driver) Remove(ctx context.Context, id drivers.ID) error {
	return d.wrap("remove", id, d.remove(ctx, id))
}

func (d *driver) remove(ctx context.Context, id drivers.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	where, err := d.mountedAt(id, func(mount.Info) bool { return true })
	if err != nil {
		return err
	}
	if where != "" {
		return fmt.Errorf("mounted at %s: %w", where, errdefs.ErrFailedPrecondition)
	}
	if err := d.discard(ctx, id); err != nil {
		return err
	}
	if err := drivers.Step(ctx, "btrfs: remove: renamed"); err != nil {
		return err
	}
	for _, name := range []string{newDir, deletedDir} {
		if err := d.empty(ctx, name, id); err != nil {
			return err
		}
	}
	return nil
}

// discard moves l/ID to del/ID. One transaction has the rename or it has it not,
// and no deletion in del/ID is in an older one. A full btrfs has reserves for
// deletions, not for renames: there the layer is deleted where it is, and until that
// is done is one whose subvolume is lost.
func (d *driver) discard(ctx context.Context, id drivers.ID) error {
	layers, err := d.open(layersDir)
	if err != nil {
		return err
	}
	defer layers.Close()
	deleted, err := d.open(deletedDir)
	if err != nil {
		return err
	}
	defer deleted.Close()
	err = layers.Rename(id.String(), deleted, id.String(), sys.RENAME_NOREPLACE)
	switch {
	case errors.Is(err, syscall.ENOENT):
		return nil
	case errors.Is(err, syscall.ENOSPC):
		return d.empty(ctx, layersDir, id)
	}
	return err
}

// empty deletes ID in one of the root's directories, and waits until that is on
// the disk: else a power cut would bring back a layer that the store has
// forgotten.
func (d *driver) empty(ctx context.Context, name string, id drivers.ID) error {
	dir, err := d.open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	there, err := exists(dir, id.String())
	if err != nil || !there {
		return err
	}
	if err := destroyLayer(ctx, dir, id.String()); err != nil {
		return err
	}
	return ioctl.Sync(dir)
}

// destroyLayer deletes the directory of a layer with all its subvolumes; fs before
// ro, without which a committed layer would look writable.
func destroyLayer(ctx context.Context, dir *sys.Fd, name string) error {
	l, err := dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer l.Close()
	names, err := l.ReadDir()
	if err != nil {
		return err
	}
	slices.SortFunc(names, func(a, b sys.Dirent) int { return strings.Compare(a.Name, b.Name) })
	for _, e := range names {
		if strings.HasPrefix(e.Name, diffPrefix) {
			err = destroyLayer(ctx, l, e.Name)
		} else {
			err = destroySubvolume(ctx, l, e.Name)
		}
		if err != nil && !errors.Is(err, syscall.ENOENT) {
			return err
		}
		if err := drivers.Step(ctx, "btrfs: remove: "+stepWord(e.Name)+" deleted"); err != nil {
			return err
		}
	}
	return dir.Unlink(name, sys.AT_REMOVEDIR)
}

func stepWord(name string) string {
	if strings.HasPrefix(name, diffPrefix) {
		return "snapshot"
	}
	return name
}

// destroySubvolume deletes a subvolume, those in it first.
func destroySubvolume(ctx context.Context, dir *sys.Fd, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s, err := dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	children, err := ioctl.Children(s)
	if err != nil {
		return err
	}
	for _, c := range children {
		if err := destroyChild(ctx, s, c); err != nil && !errors.Is(err, syscall.ENOENT) {
			return err
		}
	}
	number, err := ioctl.SubvolID(s)
	if err != nil {
		return err
	}
	err = ioctl.Destroy(dir, name)
	if errors.Is(err, syscall.EROFS) { // with user_subvol_rm_allowed: only root deletes what is read-only
		if err = ioctl.SetReadOnly(s, false); err == nil {
			err = ioctl.Destroy(dir, name)
		}
	}
	if errors.Is(err, syscall.EPERM) {
		err = emptySubvolumeByHand(ctx, dir, s, name)
	}
	if err == nil { // or it stays for ever, before Linux 6.11; without quota there is none
		_ = ioctl.DestroyQgroup(dir, number)
	}
	return err
}

func destroyChild(ctx context.Context, s *sys.Fd, c ioctl.Child) error {
	path, name, err := ioctl.UserPath(s, c)
	if err != nil {
		return err
	}
	if path == "" {
		return destroySubvolume(ctx, s, name)
	}
	in, err := s.Openat2(path, sys.O_RDONLY|sys.O_DIRECTORY, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return err
	}
	defer in.Close()
	return destroySubvolume(ctx, in, name)
}

// emptySubvolumeByHand deletes file by file what this process may not delete at
// once: rmdir(2) takes an empty subvolume (Linux 4.18).
func emptySubvolumeByHand(ctx context.Context, dir, s *sys.Fd, name string) error {
	if ro, err := ioctl.ReadOnly(s); err != nil || ro {
		if err == nil {
			err = ioctl.SetReadOnly(s, false)
		}
		if err != nil {
			return err
		}
	}
	r := &emptier{ctx: ctx}
	if err := r.dir(s); err != nil {
		return err
	}
	return dir.Unlink(name, sys.AT_REMOVEDIR)
}

// emptier deletes trees, one open directory for each level.
type emptier struct {
	ctx     context.Context
	entries int64
}

func (r *emptier) dir(d *sys.Fd) error {
	if err := d.Chmod(0o700); err != nil {
		return err
	}
	names, err := d.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range names {
		if err := r.name(d, e); err != nil && !errors.Is(err, syscall.ENOENT) {
			return err
		}
	}
	return nil
}

func (r *emptier) name(d *sys.Fd, e sys.Dirent) error {
	if r.entries++; r.entries%512 == 0 {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		drivers.ReportProgress(r.ctx, drivers.Progress{Step: "remove", Entries: r.entries})
	}
	if e.Type != sys.S_IFDIR {
		return d.Unlink(e.Name, 0)
	}
	if err := d.ChmodAt(e.Name, 0o700); err != nil { // or it cannot be read
		return err
	}
	sub, err := d.Openat(e.Name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sub.Close()
	if err := r.dir(sub); err != nil {
		return err
	}
	return d.Unlink(e.Name, sys.AT_REMOVEDIR)
}

// refuseNested refuses a tree with subvolumes in it: a snapshot of it shows an
// empty directory for each.
func refuseNested(tree *sys.Fd) error {
	children, err := ioctl.Children(tree)
	if err != nil || len(children) == 0 {
		return err
	}
	path, name, err := ioctl.UserPath(tree, children[0])
	if err != nil {
		return err
	}
	if path != "" {
		name = path + "/" + name
	}
	return fmt.Errorf("%q is a btrfs subvolume, of which a layer can hold none: make a directory in its place, "+
		"with its files (cp -a --reflink), and delete it (btrfs subvolume delete): %w", name, errdefs.ErrFailedPrecondition)
}
