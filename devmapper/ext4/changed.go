package ext4

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/layer"
)

// ErrCannotTell says that the answer has to come from a walk of both trees. The
// error that wraps it says why.
var ErrCannotTell = fmt.Errorf("what changed cannot be told from the blocks: %w", errdefs.ErrNotImplemented)

// Range is a range of bytes of the two devices that may differ.
type Range struct{ Offset, Length int64 }

// Changed finds the paths at which two ext4 file systems may differ, from the
// ranges of bytes outside of which the devices are the same. See the package comment for
// what it relies on. An error that wraps ErrCannotTell asks for the exact walk; others are
// those of ctx and of the readers.
func Changed(ctx context.Context, from, to io.ReaderAt, ranges []Range) (*layer.Candidates, error) {
	c := &comparison{ctx: ctx, inodes: map[uint32]*pair{}, paths: layer.NewCandidates(), dirs: map[uint32]map[uint32]string{}, known: map[uint32]string{rootInode: "."}, read: map[uint32]bool{}, least: map[uint32]uint32{}}
	var err error
	if c.from, err = open(from, "the first file system"); err != nil {
		return nil, err
	}
	if c.to, err = open(to, "the second file system"); err != nil {
		return nil, err
	}
	if c.from.grown() != c.to.grown() {
		return nil, fmt.Errorf("ext4: the file systems differ in identity or features: %w", ErrCannotTell)
	}
	if err := c.setRanges(ranges); err != nil {
		return nil, err
	}
	for _, step := range []func() error{c.records, c.bitmaps, c.explain, c.directories, c.names} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return c.paths, nil
}

// comparison is the work on two file systems.
type comparison struct {
	ctx      context.Context
	from, to *volume
	changed  spans // blocks that may differ
	fixed    spans
	inodes   map[uint32]*pair // whose records differ
	paths    *layer.Candidates
	sought   map[uint32]*sought           // files whose names are to be found
	dirs     map[uint32]map[uint32]string // directory -> inode of a directory in it -> name
	known    map[uint32]string            // paths of directories
	read     map[uint32]bool              // directories that were searched for names
	least    map[uint32]uint32            // what visit returned of them
	missing  int                          // files of which not all names are known
}

// pair is an inode in both file systems.
type pair struct{ from, to *inode }

func (c *comparison) setRanges(ranges []Range) error {
	bs := int64(c.to.blockSize)
	for _, r := range ranges {
		if r.Offset < 0 || r.Length < 0 || r.Offset > r.Offset+r.Length {
			return fmt.Errorf("ext4: range %+v: %w", r, errdefs.ErrInvalidArgument)
		}
		start, end := uint64(r.Offset/bs), uint64(r.Offset+r.Length+bs-1)/uint64(bs)
		if end = min(end, c.to.blocks); start < end {
			c.changed.add(start, end-start)
		}
	}
	c.changed = c.changed.normal()
	c.fixed = c.to.fixed()
	return nil
}

// chunk is how many blocks are compared at a time.
const chunk = 16

// differing calls do for each block of the spans whose bytes differ. What the first file
// system is too small to have is zeros there.
func (c *comparison) differing(s spans, do func(block uint64, from, to []byte) error) error {
	bs := uint64(c.to.blockSize)
	for _, p := range s {
		for at := p.start; at < p.end; at += chunk {
			if err := c.ctx.Err(); err != nil {
				return err
			}
			n := min(chunk, p.end-at)
			from, err := c.from.runIfAny(at, n)
			if err != nil {
				return err
			}
			to, err := c.to.run(at, n)
			if err != nil {
				return err
			}
			for i := range n {
				f, t := from[i*bs:(i+1)*bs], to[i*bs:(i+1)*bs]
				if at+i < c.from.blocks && bytes.Equal(f, t) {
					continue
				}
				if err := do(at+i, f, t); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// records finds the inodes whose records differ.
func (c *comparison) records() error {
	size := c.to.inodeSize
	per := uint32(c.to.blockSize / size)
	for n := range min(len(c.from.groups), len(c.to.groups)) {
		table := c.to.groups[n].inodeTable
		if table != c.from.groups[n].inodeTable {
			if err := c.movedTable(uint64(n)); err != nil {
				return err
			}
			continue
		}
		err := c.differing(c.changed.within(table, table+c.to.tableBlocks()), func(block uint64, from, to []byte) error {
			first := uint32(n)*c.to.inodesPerGroup + uint32(block-table)*per + 1
			for i := range per {
				at := int(i) * size
				f, t := from[at:at+size], to[at:at+size]
				if bytes.Equal(f, t) {
					continue
				}
				if err := c.differ(first+i, f, t); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// movedTable compares the inodes of a group that has its table elsewhere, as it may in two file
// systems that became larger each for itself.
func (c *comparison) movedTable(n uint64) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	for i := range max(c.from.mostInUse(n), c.to.mostInUse(n)) {
		ino := uint32(n)*c.to.inodesPerGroup + i + 1
		f, err := c.from.inodeRecord(ino)
		if err != nil {
			return err
		}
		t, err := c.to.inodeRecord(ino)
		if err != nil {
			return err
		}
		if bytes.Equal(f, t) {
			continue
		}
		if err := c.differ(ino, f, t); err != nil {
			return err
		}
	}
	return nil
}

// differ takes an inode for changed, unless neither file system has it in use.
func (c *comparison) differ(ino uint32, from, to []byte) error {
	f, err := c.from.parse(ino, from)
	if err != nil {
		return err
	}
	t, err := c.to.parse(ino, to)
	if err == nil && (f.used || t.used) {
		c.inodes[ino] = &pair{f, t}
	}
	return err
}

// bitmaps adds the inodes that only one file system has in use, whatever their
// records are.
func (c *comparison) bitmaps() error {
	for n := range max(len(c.from.groups), len(c.to.groups)) {
		if c.sameInUse(n) {
			continue
		}
		if err := c.ctx.Err(); err != nil {
			return err
		}
		for i := range c.to.inodesPerGroup {
			if err := c.inUse(uint32(n)*c.to.inodesPerGroup + i + 1); err != nil {
				return err
			}
		}
	}
	return nil
}

// sameInUse reports whether a group is seen, without a look at its inodes, to have the same
// ones in use in both file systems.
func (c *comparison) sameInUse(n int) bool {
	if n >= len(c.from.groups) {
		return c.to.groups[n].flags&groupInodeUninit != 0
	}
	if n >= len(c.to.groups) {
		return c.from.groups[n].flags&groupInodeUninit != 0
	}
	f, t := &c.from.groups[n], &c.to.groups[n]
	return f.flags == t.flags && f.unused == t.unused && f.inodeBitmap == t.inodeBitmap && !c.changed.has(t.inodeBitmap)
}

func (c *comparison) inUse(ino uint32) error {
	f, err := c.from.used(ino)
	if err != nil {
		return err
	}
	t, err := c.to.used(ino)
	if err != nil || f == t || c.inodes[ino] != nil {
		return err
	}
	p := &pair{}
	if p.from, err = c.from.inodeIfAny(ino); err != nil {
		return err
	}
	p.to, err = c.to.inodeIfAny(ino)
	c.inodes[ino] = p
	return err
}

// sorted are the changed inodes by number.
func (c *comparison) sorted() []uint32 { return slices.Sorted(maps.Keys(c.inodes)) }

// explain sees to it that every changed block that is in use belongs to a changed
// inode, or to none at all.
func (c *comparison) explain() error {
	own, err := c.system()
	if err != nil {
		return err
	}
	acls := map[uint64]int{} // block of xattrs -> changed inodes of the second file system that have it
	for _, ino := range c.sorted() {
		p := c.inodes[ino]
		if p.from.used && p.from.acl != 0 {
			acls[p.from.acl] += 0
		}
		if !p.to.used {
			continue
		}
		if p.to.acl != 0 {
			acls[p.to.acl]++
		}
		if err := own.take(c.to, p.to); err != nil {
			return err
		}
	}
	rest := c.changed.without(c.fixed).without(spans(own).normal())
	if rest, err = c.allocated(rest); err != nil {
		return err
	}
	return c.differing(rest, func(block uint64, from, to []byte) error {
		before, err := c.from.allocated(block)
		if err != nil {
			return err
		}
		owners, acl := acls[block]
		if acl && (!before || sameXattrs(from, to) || owners == xattrOwners(to)) {
			return nil
		}
		return c.to.cannot("block %d has changed, and belongs to no file that has", block)
	})
}

// The inode that has the blocks that are reserved for more descriptors, by a map as ext3
// has it: the block that lists them is no fixed one, those that are listed are.
const (
	resizeInode    = 7
	doubleIndirect = 13 * 4 // where its record has the number of that block
)

// owned are blocks of inodes.
type owned spans

func (o *owned) take(v *volume, n *inode) error {
	if n.ino == resizeInode && n.flags&flagExtents == 0 {
		if b := le.Uint32(n.tree[doubleIndirect:]); b != 0 {
			(*spans)(o).add(uint64(b), 1)
		}
		return nil
	}
	extents, nodes, err := v.mapped(n)
	if err != nil {
		return err
	}
	for _, e := range extents {
		(*spans)(o).add(e.physical, e.count)
	}
	for _, b := range nodes {
		(*spans)(o).add(b, 1)
	}
	return nil
}

// system are the blocks of the inodes that no name leads to: journal, quotas,
// orphans.
func (c *comparison) system() (owned, error) {
	var own owned
	for _, v := range []*volume{c.from, c.to} {
		for _, ino := range c.to.systemInodes {
			if ino == 0 {
				continue
			}
			n, err := v.inode(ino)
			if err != nil {
				return nil, err
			}
			if n.used {
				err = own.take(v, n)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return own, nil
}

// allocated is the part of s that is in use in the second file system.
func (c *comparison) allocated(s spans) (spans, error) {
	var out spans
	for _, p := range s {
		for at := p.start; at < p.end; at++ {
			if n := (at - c.to.firstData) / c.to.blocksPerGroup; c.to.groups[n].flags&groupBlockUninit != 0 {
				at = min(p.end, c.to.groupStart(n+1)) - 1
				continue
			}
			used, err := c.to.allocated(at)
			if err != nil {
				return nil, err
			}
			if n := len(out); used && n > 0 && out[n-1].end == at {
				out[n-1].end++
			} else if used {
				out = append(out, span{at, at + 1})
			}
		}
	}
	return out, c.ctx.Err()
}

// The header of a block of xattrs.
const (
	xattrMagic = 0xEA020000
	xattrRefs  = 4
	xattrCsum  = 16
)

// sameXattrs: the two blocks differ in nothing but how many inodes share them.
func sameXattrs(a, b []byte) bool {
	return le.Uint32(a) == xattrMagic && le.Uint32(b) == xattrMagic && bytes.Equal(a[xattrRefs+4:xattrCsum], b[xattrRefs+4:xattrCsum]) && bytes.Equal(a[xattrCsum+4:], b[xattrCsum+4:])
}

func xattrOwners(b []byte) int {
	if le.Uint32(b) != xattrMagic {
		return -1
	}
	return int(le.Uint32(b[xattrRefs:]))
}

// directories compares the changed directories' names.
func (c *comparison) directories() error {
	c.sought = map[uint32]*sought{}
	for ino, p := range c.inodes {
		if !c.hidden(ino) && p.from.used && p.to.used && !p.to.isDir() && p.to.links > 0 {
			c.sought[ino] = &sought{left: int(p.to.links)}
		}
	}
	c.missing = len(c.sought)
	for _, ino := range c.sorted() {
		if p := c.inodes[ino]; !c.hidden(ino) && p.to.isDir() && p.to.links > 0 {
			if err := c.directory(ino, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// hidden inodes have no name.
func (c *comparison) hidden(ino uint32) bool {
	return ino < c.to.firstInode && ino != rootInode || slices.Contains(c.to.systemInodes[:], ino)
}

func (c *comparison) directory(ino uint32, p *pair) error {
	dir, err := c.path(ino)
	if err != nil {
		return err
	}
	if !p.from.isDir() {
		c.paths.AddWhole(dir)
		return nil
	}
	c.paths.Add(dir)
	from, to, err := c.changedEntries(p)
	if err != nil {
		return err
	}
	for name, i := range to {
		c.found(ino, name, i)
		if from[name] != i {
			c.paths.AddWhole(path.Join(dir, name))
		}
	}
	for name := range from {
		if to[name] == 0 {
			c.paths.AddWhole(path.Join(dir, name))
		}
	}
	return nil
}

// changedEntries reads the blocks of a directory that are not the same in both.
func (c *comparison) changedEntries(p *pair) (from, to map[string]uint32, err error) {
	fe, fn, err := c.from.dirExtents(p.from)
	if err != nil {
		return nil, nil, err
	}
	te, tn, err := c.to.dirExtents(p.to)
	if err != nil {
		return nil, nil, err
	}
	from, to = map[string]uint32{}, map[string]uint32{}
	fi, ti := 0, 0
	for l := range max(fn, tn) {
		var f, t uint64
		if l < fn {
			f = blockOf(fe, &fi, l)
		}
		if l < tn {
			t = blockOf(te, &ti, l)
		}
		if f == t && !c.changed.has(f) {
			continue
		}
		if err := c.from.collect(p.from, l, f, from); err != nil {
			return nil, nil, err
		}
		if err := c.to.collect(p.to, l, t, to); err != nil {
			return nil, nil, err
		}
	}
	return from, to, c.ctx.Err()
}

// collect adds the names in a block of a directory.
func (v *volume) collect(n *inode, logical, at uint64, names map[string]uint32) error {
	if at == 0 {
		return nil
	}
	_, err := v.entries(n, logical, at, func(e entry) bool {
		if !e.special() {
			names[string(e.name)] = e.ino
		}
		return true
	})
	return err
}
