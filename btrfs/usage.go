package btrfs

import (
	"context"
	"encoding/json"
	"errors"
	"syscall"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
)

// Usage counts what the layer's subvolume has that is younger than the snapshot
// that it began as: O(changes). The bytes of a writable layer are those of its
// qgroup, metadata among them, where quota is on: what a limit is held against.
// Figures are those of what has been flushed. A committed layer's are kept. Without
// the right to search trees they are unknown.
func (d *driver) Usage(ctx context.Context, r drivers.Ref) (drivers.Usage, error) {
	u, err := d.usage(ctx, r.ID)
	return u, d.wrap("usage", r.ID, err)
}

func (d *driver) usage(ctx context.Context, id drivers.ID) (drivers.Usage, error) {
	l, err := d.layer(id)
	if err != nil {
		return drivers.Usage{}, err
	}
	defer l.Close()
	if l.kind == committed && d.admin {
		var u drivers.Usage
		if text, err := l.Getxattr("", usageXattr); err == nil && json.Unmarshal([]byte(text), &u) == nil && u.Bytes >= 0 {
			return u, nil
		}
	}
	u, err := d.measure(ctx, l)
	if err != nil || !d.admin {
		return u, err
	}
	// A qgroup says less where something else shares the layer's blocks: a snapshot
	// that a diff or somebody has of it, a reflink of a file.
	if bytes, ok, err := l.counted(); ok || err != nil {
		return drivers.Usage{Bytes: max(bytes, u.Bytes), Inodes: u.Inodes}, err
	}
	return u, nil
}

// counted is what the qgroup of a writable layer has. False where there is none,
// and where a scan is due.
func (l *layerDir) counted() (bytes int64, ok bool, err error) {
	if l.kind != writable {
		return 0, false, nil
	}
	tree, err := l.tree()
	if err != nil {
		return 0, false, err
	}
	defer tree.Close()
	mode, right, err := ioctl.Quota(tree)
	if err != nil || mode == ioctl.QuotaOff || !right {
		return 0, false, err
	}
	id, err := ioctl.SubvolID(tree)
	if err != nil {
		return 0, false, err
	}
	u, err := ioctl.Qgroup(tree, id)
	if errors.Is(err, syscall.ENOENT) { // made before the quota was switched on
		return 0, false, nil
	}
	return int64(u.Exclusive), err == nil, err
}

// measure counts the inodes that the layer made, and the extents that it wrote,
// each once: compressed ones as they are stored, inline ones by their size.
func (d *driver) measure(ctx context.Context, l *layerDir) (drivers.Usage, error) {
	if !d.admin {
		return drivers.Usage{Bytes: -1, Inodes: -1}, nil
	}
	tree, err := l.tree()
	if err != nil {
		return drivers.Usage{}, err
	}
	defer tree.Close()
	c := &census{born: l.about.Born, extents: map[uint64]struct{}{}}
	q := ioctl.Query{
		Min: ioctl.Key{Object: ioctl.BTRFS_FIRST_FREE_OBJECTID},
		Max: ioctl.Key{Object: lastFree, Type: 255, Offset: ^uint64(0)},
	}
	if c.born > 0 {
		q.MinGeneration = c.born + 1
	}
	n := 0
	for i, err := range ioctl.Search(tree, q) {
		if err == nil {
			err = c.item(i)
		}
		if n++; err == nil && n%4096 == 0 {
			err = ctx.Err()
		}
		if err != nil {
			return drivers.Usage{}, err
		}
	}
	return c.usage, nil
}

// lastFree is BTRFS_LAST_FREE_OBJECTID: the numbers above are no inodes.
const lastFree = ^uint64(0) - 255

// census adds up what is younger than born.
type census struct {
	born    uint64
	usage   drivers.Usage
	extents map[uint64]struct{}
}

func (c *census) item(i ioctl.Item) error {
	switch i.Type {
	case ioctl.BTRFS_INODE_ITEM_KEY:
		n, err := ioctl.DecodeInode(i.Data)
		if err != nil {
			return err
		}
		if n.Nlink > 0 && n.Generation > c.born {
			c.usage.Inodes++
		}
	case ioctl.BTRFS_EXTENT_DATA_KEY:
		e, err := ioctl.DecodeExtent(i.Data)
		if err != nil {
			return err
		}
		if e.Generation <= c.born || !e.Inline && e.Disk == 0 {
			return nil
		}
		if !e.Inline {
			if _, twice := c.extents[e.Disk]; twice {
				return nil
			}
			c.extents[e.Disk] = struct{}{}
		}
		c.usage.Bytes += int64(e.DiskBytes)
	}
	return nil
}
