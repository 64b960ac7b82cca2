package btrfs

import (
	"fmt"
	"slices"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// SEND takes a file for the same in both trees if its inode item is: number,
// generation, times, size, the transaction of the last change. So it is, between a
// layer and what stands on it. Two layers that stand beside each other can each
// have changed a file, or made one of the same number, in one transaction and one
// tick of the clock: then SEND says nothing of content and fails over names and
// xattrs. sayAlike finds such files.

// apart is the youngest transaction that two layers may have in common; false if
// one stands on the other.
func (d *driver) apart(from, to drivers.Ref) (since uint64, ok bool, err error) {
	a, b := chain(from), chain(to)
	i := slices.IndexFunc(a, func(id drivers.ID) bool { return slices.Contains(b, id) })
	j := slices.Index(b, a[max(i, 0)])
	if i <= 0 || j <= 0 {
		return 0, false, nil
	}
	for _, id := range []drivers.ID{a[i-1], b[j-1]} {
		l, err := d.layer(id)
		if err != nil {
			return 0, false, fmt.Errorf("%s: %w", id, err)
		}
		l.Close()
		since = max(since, l.about.Born)
	}
	return since, true, nil
}

// chain is a layer and its parents, nearest first.
func chain(r drivers.Ref) []drivers.ID { return append([]drivers.ID{r.ID}, r.Parents...) }

// sayAlike reports whether a file that changed in both trees since a transaction
// has the same inode item in both.
func sayAlike(from, to *sys.Fd, since uint64) (bool, error) {
	items := map[uint64]string{}
	err := eachChanged(from, since, func(i ioctl.Item) bool {
		items[i.Object] = string(i.Data)
		return true
	})
	alike := false
	if err == nil && len(items) > 0 {
		err = eachChanged(to, since, func(i ioctl.Item) bool {
			alike = items[i.Object] == string(i.Data)
			return !alike
		})
	}
	return alike, err
}

// eachChanged yields the inode items that a tree changed since a transaction.
func eachChanged(tree *sys.Fd, since uint64, yield func(ioctl.Item) bool) error {
	q := ioctl.Query{
		Min:           ioctl.Key{Object: ioctl.BTRFS_FIRST_FREE_OBJECTID},
		Max:           ioctl.Key{Object: lastFree, Type: 255, Offset: ^uint64(0)},
		MinGeneration: since + 1,
	}
	for i, err := range ioctl.Search(tree, q) {
		if err != nil {
			return err
		}
		if i.Type != ioctl.BTRFS_INODE_ITEM_KEY {
			continue
		}
		n, err := ioctl.DecodeInode(i.Data)
		if err != nil {
			return err
		}
		if n.Transid > since && !yield(i) {
			return nil
		}
	}
	return nil
}
