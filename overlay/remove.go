package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// Remove renames the layer away, so that no half-deleted one is ever seen as a
// layer, and deletes it. What a crash leaves IDs lists, and Remove again takes.
func (d *Driver) Remove(ctx context.Context, id drivers.ID) error {
	return drivers.Wrap(driverName, "remove", id, d.remove(ctx, id))
}

func (d *Driver) remove(ctx context.Context, id drivers.ID) error {
	if id == 0 {
		return fmt.Errorf("layer 0: %w", errdefs.ErrInvalidArgument)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.refuseMounted(ctx, id); err != nil {
		return err
	}
	project, err := d.trash(id)
	if err != nil {
		return err
	}
	if err := drivers.Step(ctx, "overlay: remove: renamed"); err != nil {
		return err
	}
	for _, n := range []string{id.String() + newSuffix, id.String() + delSuffix} {
		if p := d.projectOf(n); p != 0 {
			project = p
		}
		if err := d.removeTree(ctx, n); err != nil {
			return err
		}
	}
	return d.unlimit(project)
}

// trash renames ID to ID.del and returns its quota's project. Where ID.del
// stands already, an earlier Remove has come that far.
func (d *Driver) trash(id drivers.ID) (project uint32, err error) {
	root, err := sys.OpenDir(d.root)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	project = d.projectOf(id.String())
	err = root.Rename(id.String(), root, id.String()+delSuffix, sys.RENAME_NOREPLACE)
	if errors.Is(err, os.ErrNotExist) {
		return project, nil
	}
	return project, err
}

// removeTree deletes ROOT/name with all below it; nil if it is not there.
func (d *Driver) removeTree(ctx context.Context, name string) error {
	root, err := sys.OpenDir(d.root)
	if err != nil {
		return err
	}
	defer root.Close()
	return removeTree(ctx, root, name)
}

// removeTree deletes name in dir with all below it; nil if it is not there.
func removeTree(ctx context.Context, dir *sys.Fd, name string) error {
	r := remover{ctx: ctx, top: dir, base: name}
	err := r.remove(dir, name, 0)
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
	entries int64
	moved   int
}

// remove deletes name in dir, a directory after its content. A tree that is
// deeper than maxOpen is taken apart: what is below is moved up to the top.
func (r *remover) remove(dir *sys.Fd, name string, depth int) error {
	err := dir.Unlink(name, 0)
	switch {
	case err == nil, errors.Is(err, syscall.ENOENT):
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
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	return err
}

func (r *remover) content(dir *sys.Fd, name string, depth int) error {
	sub, err := openForRemoval(dir, name)
	if err != nil {
		return err
	}
	defer sub.Close()
	for {
		ents, err := sub.ReadDir()
		if err != nil || len(ents) == 0 {
			return err
		}
		for _, e := range ents {
			if err := r.remove(sub, e.Name, depth+1); err != nil {
				return err
			}
		}
		if depth > 0 {
			return nil
		}
		// What was moved up stands in the top directory: look again.
	}
}

// moveUp renames a directory into the tree's top, whose content loop meets it.
func (r *remover) moveUp(dir *sys.Fd, name string) error {
	top, err := r.top.Openat(r.base, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer top.Close()
	for {
		r.moved++
		err := dir.Rename(name, top, fmt.Sprintf("deep.%d", r.moved), sys.RENAME_NOREPLACE)
		if errors.Is(err, syscall.EXDEV) { // a subvolume is in between: take it apart where it is
			inner := remover{ctx: r.ctx, top: dir, base: name}
			return inner.remove(dir, name, 0)
		}
		if !errors.Is(err, syscall.EEXIST) {
			return err
		}
	}
}

// count tells the progress, and heeds the context, every few hundred files.
func (r *remover) count() error {
	r.entries++
	if r.entries%512 != 0 {
		return nil
	}
	drivers.ReportProgress(r.ctx, drivers.Progress{Step: "remove", Entries: r.entries})
	return drivers.Step(r.ctx, "overlay: remove: some files gone")
}

// openForRemoval opens a directory whose mode may forbid that to its owner:
// overlayfs makes work/work with mode 000.
func openForRemoval(dir *sys.Fd, name string) (*sys.Fd, error) {
	const flags = sys.O_RDONLY | sys.O_DIRECTORY
	sub, err := dir.Openat(name, flags, 0)
	if err == nil {
		s, err := sub.Stat("")
		if err != nil || s.Mode&0o300 == 0o300 {
			return sub, err
		}
		return sub, sub.Chmod(0o700)
	}
	if !errors.Is(err, syscall.EACCES) {
		return nil, err
	}
	if err := dir.ChmodAt(name, 0o700); err != nil {
		return nil, err
	}
	return dir.Openat(name, flags, 0)
}

// sweepProbes deletes scratch directories of probes that were killed: those that
// nobody holds locked.
func sweepProbes(root string) error {
	dir, err := sys.OpenDir(root)
	if err != nil {
		return err
	}
	defer dir.Close()
	ents, err := dir.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range ents {
		if !strings.HasPrefix(e.Name, probePrefix) {
			continue
		}
		if err := sweepProbe(dir, e.Name); err != nil {
			return err
		}
	}
	return nil
}

func sweepProbe(dir *sys.Fd, name string) error {
	p, err := dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	l, err := p.TryLock(sys.LockExclusive)
	if sys.IsLocked(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	return removeTree(context.Background(), dir, name)
}
