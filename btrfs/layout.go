package btrfs

import (
	"encoding/json"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
)

// diffPrefix begins the names, in a layer, of what a Diff shows it by.
const diffPrefix = "diff."

// kind is what a layer is, and the name of its subvolume.
type kind string

const (
	writable  kind = "fs"
	view      kind = "view"
	committed kind = "ro"
)

func (k kind) String() string {
	return map[kind]string{writable: "writable", view: "a view", committed: "committed"}[k]
}

const (
	aboutXattr = "user.layerctl"
	usageXattr = "user.layerctl.usage"
)

// about describes a layer, in an xattr of its directory: written in the
// transaction that makes the layer, or an earlier one.
type about struct {
	Parent string `json:"parent,omitempty"` // as Create was told
	// Born is the transaction that the subvolume was made in; 0 without a parent.
	// What the layer holds itself is younger.
	Born  uint64         `json:"born,omitempty"`
	IDMap *drivers.IDMap `json:"idmap,omitempty"`
}

// layerDir is an open directory of a layer. It has one owner, who closes it.
type layerDir struct {
	*sys.Fd
	id    drivers.ID
	kind  kind
	about about
}

// layer opens a layer.
func (d *driver) layer(id drivers.ID) (*layerDir, error) {
	all, err := d.open(roots.Layers)
	if err != nil {
		return nil, err
	}
	defer all.Close()
	fd, err := all.Openat(id.String(), sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	l := &layerDir{Fd: fd, id: id}
	if err := l.read(); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// read finds out what a layer is. One whose subvolume or description is missing
// was changed by somebody else.
func (l *layerDir) read() error {
	if err := l.findTree(); err != nil {
		return err
	}
	text, err := l.Getxattr("", aboutXattr)
	if err == nil {
		err = json.Unmarshal([]byte(text), &l.about)
	}
	if err != nil {
		return fmt.Errorf("xattr %s: %w: %w", aboutXattr, errdefs.ErrDataLoss, err)
	}
	if l.kind != writable {
		return nil
	}
	switch _, err := l.Getxattr("", usageXattr); {
	case err == nil: // what its source would show now is not what was committed
		return fmt.Errorf("has no committed subvolume any more: it was deleted behind our back: %w", errdefs.ErrDataLoss)
	case !errors.Is(err, syscall.ENODATA):
		return err
	}
	return nil
}

// findTree finds the layer's subvolume, whose name says what the layer is.
func (l *layerDir) findTree() error {
	for _, k := range []kind{committed, view, writable} { // a committed one may still have the other
		st, err := l.Stat(string(k))
		if errors.Is(err, syscall.ENOENT) {
			continue
		}
		if err == nil && st.Ino != ioctl.BTRFS_FIRST_FREE_OBJECTID {
			err = fmt.Errorf("%s is a directory and no subvolume: the store was copied file by file, or stands in a snapshot of what was around it: %w", string(k), errdefs.ErrDataLoss)
		}
		l.kind = k
		return err
	}
	return fmt.Errorf("has no subvolume: it was deleted behind our back: %w", errdefs.ErrDataLoss)
}

func (a *about) write(dir *sys.Fd) error {
	text, err := json.Marshal(a)
	if err != nil {
		return err
	}
	return dir.Setxattr("", aboutXattr, string(text))
}

// tree opens the layer's subvolume.
func (l *layerDir) tree() (*sys.Fd, error) {
	return l.Openat(string(l.kind), sys.O_RDONLY|sys.O_DIRECTORY, 0)
}

// treePath is where a layer's tree is.
func (d *driver) treePath(id drivers.ID, k kind) string {
	return d.root + "/" + roots.Layers + "/" + id.String() + "/" + string(k)
}
