package ioctl

import (
	"errors"
	"fmt"
	"iter"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// BTRFS_IOC_TREE_SEARCH_V2 is _IOWR 17, struct btrfs_ioctl_search_args_v2; Linux 3.16.
const BTRFS_IOC_TREE_SEARCH_V2 = 0xc0709411

// Item types and trees of include/uapi/linux/btrfs_tree.h.
const (
	BTRFS_INODE_ITEM_KEY    = 1
	BTRFS_INODE_REF_KEY     = 12
	BTRFS_INODE_EXTREF_KEY  = 13
	BTRFS_EXTENT_DATA_KEY   = 108
	BTRFS_ORPHAN_ITEM_KEY   = 48
	BTRFS_QGROUP_STATUS_KEY = 240
	BTRFS_QGROUP_INFO_KEY   = 242
	BTRFS_QGROUP_LIMIT_KEY  = 244

	BTRFS_ORPHAN_OBJECTID     = ^uint64(4) // -5
	BTRFS_ROOT_TREE_OBJECTID  = 1
	BTRFS_QUOTA_TREE_OBJECTID = 8

	BTRFS_FILE_EXTENT_INLINE = 0
)

// Key names an item of a tree.
type Key struct {
	Object uint64
	Type   uint32
	Offset uint64
}

// Query says what Search looks for: the items between two keys, both among
// them, in leaves that are not older than MinGeneration. The leaf's generation is
// that of its last change, so a young leaf has old items, too.
type Query struct {
	Tree          uint64 // 0: the subvolume that fd is in
	Min, Max      Key
	MinGeneration uint64
}

// Item is what Search finds. Data is valid until the next one is asked for.
type Item struct {
	Key
	Generation uint64 // of the leaf
	Data       []byte
}

const (
	searchKeyLen    = 104
	searchHeaderLen = 32
	searchBuffer    = 256 << 10
)

// maxSearchBuffer bounds what an item that is larger than searchBuffer may ask
// for: an item fits a node, which is 64 KiB at most.
const maxSearchBuffer = 1 << 20

// Search finds items. ENOENT if there is no such tree.
func Search(fd *sys.Fd, q Query) iter.Seq2[Item, error] {
	return func(yield func(Item, error) bool) {
		b := make([]byte, searchKeyLen+8+searchBuffer)
		for {
			clear(b[:searchKeyLen+8])
			encodeSearch(b, q)
			err := fd.Ioctl("BTRFS_IOC_TREE_SEARCH_V2", BTRFS_IOC_TREE_SEARCH_V2, b)
			if isErrno(err, syscall.EOVERFLOW) && len(b) < maxSearchBuffer {
				b = make([]byte, 2*len(b))
				continue
			}
			if err != nil {
				yield(Item{}, err)
				return
			}
			n := int(le.Uint32(b[64:]))
			if n == 0 {
				return
			}
			last, err := eachItem(b[searchKeyLen+8:], n, yield)
			if err != nil {
				if err != errStopped {
					yield(Item{}, err)
				}
				return
			}
			var more bool
			if q.Min, more = after(last); !more {
				return
			}
		}
	}
}

var errStopped = errors.New("stopped")

// encodeSearch writes struct btrfs_ioctl_search_key and the buffer's size.
func encodeSearch(b []byte, q Query) {
	for i, v := range []uint64{q.Tree, q.Min.Object, q.Max.Object, q.Min.Offset, q.Max.Offset, q.MinGeneration, ^uint64(0)} {
		le.PutUint64(b[8*i:], v)
	}
	le.PutUint32(b[56:], q.Min.Type)
	le.PutUint32(b[60:], q.Max.Type)
	le.PutUint32(b[64:], ^uint32(0)) // nr_items: as many as fit
	le.PutUint64(b[searchKeyLen:], uint64(len(b)-searchKeyLen-8))
}

// eachItem yields the items that the kernel put into a buffer, each after a
// struct btrfs_ioctl_search_header.
func eachItem(b []byte, n int, yield func(Item, error) bool) (last Key, err error) {
	for range n {
		if len(b) < searchHeaderLen {
			return last, fmt.Errorf("tree search: the answer ends in a header: %w", syscall.EBADMSG)
		}
		i := Item{
			Generation: le.Uint64(b),
			Key:        Key{Object: le.Uint64(b[8:]), Offset: le.Uint64(b[16:]), Type: le.Uint32(b[24:])},
		}
		size := uint64(le.Uint32(b[28:]))
		if b = b[searchHeaderLen:]; uint64(len(b)) < size {
			return last, fmt.Errorf("tree search: the answer ends in an item: %w", syscall.EBADMSG)
		}
		i.Data, b, last = b[:size:size], b[size:], i.Key
		if !yield(i, nil) {
			return last, errStopped
		}
	}
	return last, nil
}

// after returns the key that follows k; false if k is the last one.
func after(k Key) (Key, bool) {
	switch {
	case k.Offset != ^uint64(0):
		k.Offset++
	case k.Type < 255:
		k.Type, k.Offset = k.Type+1, 0
	case k.Object != ^uint64(0):
		k = Key{Object: k.Object + 1}
	default:
		return k, false
	}
	return k, true
}

// InodeItem is what struct btrfs_inode_item says of a file.
type InodeItem struct {
	Generation uint64 // the transaction that made the inode
	Transid    uint64 // of the last change
	Size       uint64
	Bytes      uint64 // nbytes: allocated
	Nlink      uint32
	Mode       uint32
}

// DecodeInode reads a BTRFS_INODE_ITEM_KEY item.
func DecodeInode(b []byte) (InodeItem, error) {
	if len(b) < 160 {
		return InodeItem{}, short("btrfs_inode_item", b)
	}
	return InodeItem{
		Generation: le.Uint64(b), Transid: le.Uint64(b[8:]), Size: le.Uint64(b[16:]), Bytes: le.Uint64(b[24:]),
		Nlink: le.Uint32(b[40:]), Mode: le.Uint32(b[52:]),
	}, nil
}

// Extent is what struct btrfs_file_extent_item says of a part of a file.
type Extent struct {
	Generation uint64 // the transaction that wrote it
	Inline     bool
	// Disk is where the extent is, 0 for a hole; DiskBytes is its size there,
	// compressed if it is, whole even if the file shows a part. Of an inline one
	// DiskBytes is the size in the tree.
	Disk, DiskBytes uint64
	Offset          uint64 // where in the extent, unpacked, the file's part begins
}

// DecodeExtent reads a BTRFS_EXTENT_DATA_KEY item.
func DecodeExtent(b []byte) (Extent, error) {
	const inlineHeader = 21
	if len(b) < inlineHeader {
		return Extent{}, short("btrfs_file_extent_item", b)
	}
	e := Extent{Generation: le.Uint64(b)}
	if b[20] == BTRFS_FILE_EXTENT_INLINE {
		e.Inline, e.DiskBytes = true, uint64(len(b)-inlineHeader)
		return e, nil
	}
	if len(b) < 53 {
		return Extent{}, short("btrfs_file_extent_item", b)
	}
	e.Disk, e.DiskBytes, e.Offset = le.Uint64(b[21:]), le.Uint64(b[29:]), le.Uint64(b[37:])
	return e, nil
}

// FileName is a name of an inode.
type FileName struct {
	Dir  uint64 // the inode of the directory
	Name string
}

// DecodeNames reads a BTRFS_INODE_REF_KEY or BTRFS_INODE_EXTREF_KEY item.
func DecodeNames(i Item) ([]FileName, error) {
	var all []FileName
	for b := i.Data; len(b) > 0; {
		// struct btrfs_inode_ref: u64 index, u16 name_len; btrfs_inode_extref has u64
		// parent_objectid before that.
		head, dir := 10, i.Offset
		if i.Type == BTRFS_INODE_EXTREF_KEY {
			head = 18
		}
		if len(b) < head {
			return nil, short("btrfs_inode_ref", b)
		}
		if i.Type == BTRFS_INODE_EXTREF_KEY {
			dir = le.Uint64(b)
		}
		n := int(le.Uint16(b[head-2:]))
		if len(b) < head+n {
			return nil, short("btrfs_inode_ref", b)
		}
		all = append(all, FileName{Dir: dir, Name: string(b[head : head+n])})
		b = b[head+n:]
	}
	return all, nil
}

func short(what string, b []byte) error {
	return fmt.Errorf("%s of %d bytes: %w", what, len(b), syscall.EBADMSG)
}

func isErrno(err error, want syscall.Errno) bool { return errors.Is(err, want) }
