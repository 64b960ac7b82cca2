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

// Remove renames the layer away, or on a full disk takes its marker away, so that
// no half-deleted one is ever seen as a layer, and deletes it. What a crash leaves
// IDs lists, and Remove again takes.
func (l *Layers) Remove(ctx context.Context, id drivers.ID) error {
	return l.wrap("remove", id, l.remove(ctx, id))
}

func (l *Layers) remove(ctx context.Context, id drivers.ID) error {
	if id == 0 {
		return fmt.Errorf("layer 0: %w", errdefs.ErrInvalidArgument)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := l.refuseMounted(ctx, id); err != nil {
		return err
	}
	project, err := l.trash(id)
	if err != nil {
		return err
	}
	if err := l.step(ctx, "remove: renamed"); err != nil {
		return err
	}
	for _, n := range []string{id.String() + newSuffix, id.String() + delSuffix, id.String()} {
		if p := l.projectOf(n); p != 0 {
			project = p
		}
		if err := l.removeTree(ctx, n); err != nil {
			return err
		}
	}
	return l.unlimit(project)
}

// trash renames ID to ID.del and returns its quota's project. Where ID.del
// stands already, an earlier Remove has come that far.
func (l *Layers) trash(id drivers.ID) (project uint32, err error) {
	root, err := sys.OpenDir(l.root)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	project = l.projectOf(id.String())
	err = root.Rename(id.String(), root, id.String()+delSuffix, sys.RENAME_NOREPLACE)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return project, nil
	case drivers.IsFull(err):
		return project, unmark(root, id)
	}
	return project, err
}

// unmark makes ROOT/ID nobody's layer where it stands: without about.json every
// call but Remove refuses it. On a full btrfs a rename has no room, where a
// removal always has.
func unmark(root *sys.Fd, id drivers.ID) error {
	dir, err := root.Openat(id.String(), sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Unlink(aboutFile, 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return dir.SyncFS() // an fsync writes a log, which needs room, too
}

// removeTree deletes ROOT/name with all below it; nil if it is not there.
func (l *Layers) removeTree(ctx context.Context, name string) error {
	root, err := sys.OpenDir(l.root)
	if err != nil {
		return err
	}
	defer root.Close()
	r := remover{ctx: ctx, top: root, base: name, step: func() error { return l.step(ctx, "remove: some files gone") }}
	return r.all()
}

// removeTree deletes name in dir with all below it; nil if it is not there.
func removeTree(ctx context.Context, dir *sys.Fd, name string) error {
	r := remover{ctx: ctx, top: dir, base: name}
	return r.all()
}

// all deletes the tree.
func (r *remover) all() error {
	err := r.remove(r.top, r.base, 0)
	if errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("a read-only btrfs subvolume is in the layer, or the file system is read-only: "+
			"delete the subvolume (btrfs subvolume delete), then remove the layer again: %w", err)
	}
	return err
}

// maxOpen bounds the descriptors that a removal holds: one for each level.
const maxOpen = 200

// remover deletes one tree.
type remover struct {
	ctx     context.Context
	top     *sys.Fd // where base is
	base    string
	step    func() error // after some files; nil: nobody asks
	entries int64
	moved   int
	gone    int64 // names that went from their directory: a damaged one may show more
}

// remove deletes name in dir, a directory after its content. A tree that is
// deeper than maxOpen is taken apart: what is below is moved up to the top.
func (r *remover) remove(dir *sys.Fd, name string, depth int) error {
	err := dir.UnlinkProtected(name)
	switch {
	case errors.Is(err, syscall.ENOENT):
		return nil
	case err == nil:
		return r.count()
	case !errors.Is(err, syscall.EISDIR):
		return err
	case depth >= maxOpen:
		return r.moveUp(dir, name)
	}
	if err := r.content(dir, name, depth); err != nil {
		return err
	}
	err = dir.Unlink(name, sys.AT_REMOVEDIR)
	switch {
	case errors.Is(err, syscall.ENOENT):
		return nil
	case err == nil:
		r.gone++
	}
	return err
}

func (r *remover) content(dir *sys.Fd, name string, depth int) error {
	if err := dir.AllowOwner(name); err != nil { // overlayfs makes work/work with mode 000
		return err
	}
	sub, err := dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sub.Close()
	for { // what was moved up stands in the top directory: until nothing goes any more
		before := r.gone
		err := sub.EachDirents(func(some []sys.Dirent) error {
			for _, e := range some {
				if err := r.remove(sub, e.Name, depth+1); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil || r.gone == before {
			return err
		}
	}
}

// moveUp renames a directory into the tree's top, whose content loop meets it.
func (r *remover) moveUp(dir *sys.Fd, name string) error {
	top, err := r.top.Openat(r.base, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer top.Close()
	r.gone++
	opened := false
	for {
		r.moved++
		err := dir.Rename(name, top, fmt.Sprintf("deep.%d", r.moved), sys.RENAME_NOREPLACE)
		switch {
		case errors.Is(err, syscall.EEXIST):
		case errors.Is(err, syscall.EXDEV): // a subvolume is in between: take it apart where it is
			inner := remover{ctx: r.ctx, top: dir, base: name, step: r.step}
			return inner.remove(dir, name, 0)
		case errors.Is(err, syscall.EACCES) && !opened: // its ".." changes, so it must be writable itself
			opened = true
			if err := dir.ChmodAt(name, 0o700); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// count tells the progress, and heeds the context, every few hundred files.
func (r *remover) count() error {
	r.gone++
	r.entries++
	if r.entries%512 != 0 {
		return nil
	}
	drivers.ReportProgress(r.ctx, drivers.Progress{Step: "remove", Entries: r.entries})
	if r.step == nil {
		return r.ctx.Err()
	}
	return r.step()
}
