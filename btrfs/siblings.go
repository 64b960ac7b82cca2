package btrfs

import (
	"fmt"
	"slices"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// SEND takes two files for one if their number and generation are the same, and then
// for unchanged if all of their inode items is: times, size, the transaction of the
// last change. So it is, between a layer and what stands on it. Two layers that stand
// beside each other can each have changed a file, or made one of the same number, in
// one transaction, even in one tick of the clock: then SEND says nothing of content,
// fails over names and xattrs, or over a directory that is a file in the other.
// takenForOne finds such files.

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

// changedInode is an inode that a tree changed since a transaction.
type changedInode struct {
	made uint64 // the transaction
	item string // all that its inode item says
}

// takenForOne reports whether two trees have files of one number that SEND would take
// for one: both made since a transaction, in the same one, or both changed since and of
// the same inode item.
func takenForOne(from, to *sys.Fd, since uint64) (bool, error) {
	changed := map[uint64]changedInode{}
	err := eachChanged(from, since, func(number uint64, i changedInode) bool {
		changed[number] = i
		return true
	})
	one := false
	if err == nil && len(changed) > 0 {
		err = eachChanged(to, since, func(number uint64, i changedInode) bool {
			other, both := changed[number]
			one = both && (other == i || other.made == i.made && i.made > since)
			return !one
		})
	}
	return one, err
}

// eachChanged yields what a tree changed since a transaction, by its inode number.
func eachChanged(tree *sys.Fd, since uint64, yield func(uint64, changedInode) bool) error {
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
		if n.Transid > since && !yield(i.Object, changedInode{n.Generation, string(i.Data)}) {
			return nil
		}
	}
	return nil
}
