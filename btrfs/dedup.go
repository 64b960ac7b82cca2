package btrfs

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/fnv"
	"io"
	"maps"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// Dedup finds by tree search the files for which each layer wrote blocks, O(changes);
// reads those of which another has the size, in other blocks; and has the kernel
// compare and share those of one SHA-256. The kernel's comparison decides.
func (d *driver) Dedup(ctx context.Context, layers []drivers.Ref, o drivers.DedupOptions) (drivers.DedupReport, error) {
	r := &dedup{d: d, ctx: ctx, o: o, bySize: map[int64][]dedupFile{}}
	err := r.run(layers)
	return r.report, drivers.Wrap(Name, "dedup", 0, err)
}

// dedup is one run. Where files are is found out when they are opened: a layer of
// them may be gone by then.
type dedup struct {
	d      *driver
	ctx    context.Context
	o      drivers.DedupOptions
	bySize map[int64][]dedupFile
	report drivers.DedupReport
}

// dedupFile is a file for which its layer wrote blocks.
type dedupFile struct {
	layer  drivers.ID
	ino    uint64
	blocks uint64 // a hash of where they are: equal where they are shared
}

// dedupLength is what the kernel takes in one call.
const dedupLength = 16 << 20

func (r *dedup) run(layers []drivers.Ref) error {
	if !r.d.admin {
		return errdefs.ErrPermissionDenied.WithMessage("tree searches need CAP_SYS_ADMIN outside any user namespace")
	}
	for _, l := range layers {
		if err := r.passOver(r.collect(l.ID)); err != nil {
			return err
		}
	}
	for _, size := range slices.Sorted(maps.Keys(r.bySize)) {
		if files := r.bySize[size]; len(files) > 1 {
			if err := r.size(size, files); err != nil {
				return err
			}
		}
	}
	return nil
}

// passed are the errors of one file that are none of the run's: it is gone, or the
// kernel does not share its blocks, for its chattr flags (+i, +C), because it is a
// swap file, or while its layer is being sent.
var passed = []error{
	syscall.ENOENT, errdefs.ErrDataLoss,
	syscall.EPERM, syscall.EINVAL, syscall.ETXTBSY, syscall.EAGAIN, syscall.EOPNOTSUPP,
}

// passOver takes what is wrong with one file for no error.
func (r *dedup) passOver(err error) error {
	if slices.ContainsFunc(passed, func(e error) bool { return errors.Is(err, e) }) {
		err = nil
	}
	if err == nil {
		err = r.ctx.Err()
	}
	return err
}

// collect notes the files for which a committed layer wrote blocks.
func (r *dedup) collect(id drivers.ID) error {
	l, tree, err := r.open(id)
	if err != nil || tree == nil {
		return err
	}
	defer l.Close()
	defer tree.Close()
	r.report.Layers++
	c := &dedupScan{dedup: r, id: id, born: l.about.Born}
	q := ioctl.Query{
		Min: ioctl.Key{Object: ioctl.BTRFS_FIRST_FREE_OBJECTID},
		Max: ioctl.Key{Object: lastFree, Type: ioctl.BTRFS_EXTENT_DATA_KEY, Offset: ^uint64(0)},
	}
	if c.born > 0 {
		q.MinGeneration = c.born + 1
	}
	for i, err := range ioctl.Search(tree, q) {
		if err == nil {
			err = c.item(i)
		}
		if err != nil {
			return err
		}
	}
	c.end()
	return nil
}

// open opens the tree of a committed layer; nil if the layer is not committed.
func (r *dedup) open(id drivers.ID) (*layerDir, *sys.Fd, error) {
	l, err := r.d.layer(id)
	if err != nil {
		return nil, nil, err
	}
	if l.kind != committed {
		return nil, nil, l.Close()
	}
	tree, err := l.tree()
	if err != nil {
		l.Close()
		return nil, nil, err
	}
	return l, tree, nil
}

// dedupScan goes through the items of one tree: an inode, then its extents.
type dedupScan struct {
	*dedup
	id        drivers.ID
	born, ino uint64
	size      int64
	own       bool
	last      [2]uint64 // the extent, and where in the file it would begin
	blocks    []byte
}

func (c *dedupScan) item(i ioctl.Item) error {
	if i.Object != c.ino {
		c.end()
		c.ino = i.Object
	}
	switch i.Type {
	case ioctl.BTRFS_INODE_ITEM_KEY:
		n, err := ioctl.DecodeInode(i.Data)
		c.size = int64(n.Size)
		return err
	case ioctl.BTRFS_EXTENT_DATA_KEY:
		e, err := ioctl.DecodeExtent(i.Data)
		if err != nil || e.Inline || e.Disk == 0 {
			return err
		}
		c.own = c.own || e.Generation > c.born
		// An extent may be in several pieces in one file and in one in the other.
		if at := [2]uint64{e.Disk, i.Offset - e.Offset}; at != c.last {
			c.last = at
			c.blocks = binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(c.blocks, at[0]), at[1])
		}
	}
	return nil
}

// end notes the file whose items are over.
func (c *dedupScan) end() {
	if c.own && c.size > 0 {
		h := fnv.New64a()
		_, _ = h.Write(c.blocks)
		c.report.Files++
		c.bySize[c.size] = append(c.bySize[c.size], dedupFile{layer: c.id, ino: c.ino, blocks: h.Sum64()})
	}
	c.size, c.own, c.last, c.blocks = 0, false, [2]uint64{}, c.blocks[:0]
}

// size works off the files of one size.
func (r *dedup) size(size int64, files []dedupFile) error {
	first := files[0].blocks
	if !slices.ContainsFunc(files, func(f dedupFile) bool { return f.blocks != first }) {
		return nil // all share them
	}
	byDigest := map[[sha256.Size]byte]dedupFile{}
	known := map[uint64][sha256.Size]byte{} // by blocks: what is shared is read once
	for _, f := range files {
		sum, read := known[f.blocks]
		if !read {
			var err error
			if sum, err = r.digest(f); err != nil {
				if err = r.passOver(err); err != nil {
					return err
				}
				continue
			}
			known[f.blocks] = sum
		}
		source, twice := byDigest[sum]
		if !twice {
			byDigest[sum] = f
			continue
		}
		if source.blocks == f.blocks {
			continue
		}
		if err := r.passOver(r.share(source, f, size)); err != nil {
			return err
		}
	}
	drivers.ReportProgress(r.ctx, drivers.Progress{Step: "dedup", Entries: r.report.Equal, Bytes: r.report.Bytes})
	return nil
}

func (r *dedup) digest(f dedupFile) (sum [sha256.Size]byte, err error) {
	fd, err := r.file(f)
	if err != nil {
		return sum, err
	}
	defer fd.Close()
	h := sha256.New()
	if _, err := io.Copy(h, fd); err != nil {
		return sum, err
	}
	h.Sum(sum[:0])
	return sum, nil
}

// file opens a file by its inode number.
func (r *dedup) file(f dedupFile) (*sys.Fd, error) {
	l, tree, err := r.open(f.layer)
	if err != nil {
		return nil, err
	}
	if tree == nil {
		return nil, syscall.ENOENT
	}
	defer l.Close()
	defer tree.Close()
	path, err := ioctl.Path(tree, 0, f.ino)
	if err != nil {
		return nil, err
	}
	return tree.Openat2(path, sys.O_RDONLY|sys.O_NOFOLLOW|sys.O_NONBLOCK, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
}

// share makes a file share the source's blocks, in pieces that the kernel takes.
func (r *dedup) share(source, f dedupFile, size int64) error {
	if r.o.DryRun {
		r.report.Equal++
		r.report.Bytes += size
		return nil
	}
	from, err := r.file(source)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := r.file(f)
	if err != nil {
		return err
	}
	defer to.Close()
	for off := int64(0); off < size; {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		n, equal, err := from.Dedupe(to, off, min(size-off, dedupLength))
		if err != nil {
			return err
		}
		if !equal || n == 0 {
			return nil // somebody changed them by hand: check says so
		}
		off += n
		r.report.Bytes += n
	}
	r.report.Equal++
	return nil
}
