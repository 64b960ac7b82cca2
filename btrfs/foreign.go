package btrfs

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
)

// Inspect names what somebody put beside a layer's subvolumes, which Remove refuses
// to delete, or made a subvolume of in it, which Commit and Diff refuse to lose.
func (d *driver) Inspect(_ context.Context, id drivers.ID) error {
	err := d.inspect(id)
	if errors.Is(err, syscall.ENOENT) || errdefs.IsDataLoss(err) { // gone, or lost: Mounts says so
		return nil
	}
	return d.wrap("inspect", id, err)
}

func (d *driver) inspect(id drivers.ID) error {
	layers, err := d.open(roots.Layers)
	if err != nil {
		return err
	}
	defer layers.Close()
	if err := refuseForeign(layers, id.String()); err != nil {
		return err
	}
	l, err := d.layer(id)
	if err != nil {
		return err
	}
	defer l.Close()
	if l.kind != writable {
		return nil
	}
	tree, err := l.tree()
	if err != nil {
		return err
	}
	defer tree.Close()
	return refuseNested(tree)
}

// refuseForeign refuses to delete what somebody put beside the subvolumes of a
// layer: a snapshot of his own, say.
func refuseForeign(layers *sys.Fd, name string) error {
	l, err := layers.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	names, err := l.ReadDir()
	for _, e := range names {
		switch kind(e.Name) {
		case writable, view, committed:
		default:
			if !strings.HasPrefix(e.Name, diffPrefix) {
				return fmt.Errorf("%q in %s is not this driver's: move it away: %w", e.Name, l.Name(), errdefs.ErrFailedPrecondition)
			}
		}
	}
	return err
}

// refuseNested refuses a tree with subvolumes in it: a snapshot of it shows an
// empty directory for each.
func refuseNested(tree *sys.Fd) error {
	children, err := ioctl.Children(tree)
	if err != nil || len(children) == 0 {
		return err
	}
	path, name, err := ioctl.UserPath(tree, children[0])
	switch {
	case errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.EACCES):
		name = fmt.Sprintf("subvolume %d, whose path is too long to be told, or not readable", children[0].ID)
	case err != nil:
		return err
	case path != "":
		name = path + "/" + name
	}
	return fmt.Errorf("%q is a btrfs subvolume, of which a layer can hold none: make a directory in its place, "+
		"with its files (cp -a --reflink), and delete it (btrfs subvolume delete): %w", name, errdefs.ErrFailedPrecondition)
}
