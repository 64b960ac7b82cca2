package ext4

import (
	"maps"
	"path"
	"slices"
)

// sought is a file of which not all names are known.
type sought struct {
	left  int
	names map[link]bool
}

// link is a name in a directory.
type link struct {
	dir  uint32
	name string
}

// found takes a name of an inode.
func (c *comparison) found(dir uint32, name string, ino uint32) {
	s := c.sought[ino]
	l := link{dir, name}
	if s == nil || s.names[l] {
		return
	}
	if s.names == nil {
		s.names = map[link]bool{}
	}
	s.names[l] = true
	if s.left--; s.left == 0 {
		c.missing--
	}
}

// names finds the names of the changed files. ext4 records none in an inode, but puts
// an inode into the group of its directory, mostly a little behind it, or, if there is no room,
// into a group nearby. So the directories a little before a file are read first; then the one
// that a search among those of the flex group leads to; and then others, from the
// groups nearby on, until the count of links is reached.
func (c *comparison) names() error {
	for _, ino := range slices.Sorted(maps.Keys(c.sought)) {
		if err := c.before(ino); err != nil {
			return err
		}
	}
	for _, ino := range slices.Sorted(maps.Keys(c.sought)) {
		if err := c.bisect(ino); err != nil {
			return err
		}
	}
	scanned := map[uint64]bool{}
	for _, near := range []func(ino uint32) (first, last uint64){c.sameGroup, c.sameFlexGroup, c.anyGroup} {
		for _, n := range slices.Sorted(maps.Keys(c.groupsOf(near))) {
			if scanned[n] {
				continue
			}
			scanned[n] = true
			if err := c.scan(n); err != nil {
				return err
			}
		}
	}
	return c.addNames()
}

// groupsOf are the groups near the inodes of which names are missing.
func (c *comparison) groupsOf(near func(ino uint32) (first, last uint64)) map[uint64]bool {
	groups := map[uint64]bool{}
	for ino, s := range c.sought {
		if s.left <= 0 {
			continue
		}
		first, last := near(ino)
		for n := first; n <= last; n++ {
			groups[n] = true
		}
		if uint64(len(groups)) == c.to.groupCount() {
			break
		}
	}
	return groups
}

// fewBlocks of an inode table are searched for the directory before an inode.
const fewBlocks = 32

// before reads the directories whose inodes are a little before that of a file.
func (c *comparison) before(ino uint32) error {
	s := c.sought[ino]
	n, i := c.to.place(ino)
	if c.to.groups[n].dirs == 0 {
		return nil
	}
	per := uint32(c.to.blockSize / c.to.inodeSize)
	for at, end := int64(i/per), max(0, int64(i/per)-fewBlocks+1); at >= end && s.left > 0; at-- {
		b, err := c.to.block(c.to.groups[n].inodeTable + uint64(at))
		if err != nil {
			return err
		}
		first := uint32(n)*c.to.inodesPerGroup + uint32(at)*per + 1
		for j := int(per) - 1; j >= 0 && s.left > 0; j-- {
			if err := c.scanDir(first+uint32(j), b[j*c.to.inodeSize:(j+1)*c.to.inodeSize]); err != nil {
				return err
			}
		}
	}
	return c.ctx.Err()
}

func (c *comparison) sameGroup(ino uint32) (first, last uint64) {
	n, _ := c.to.place(ino)
	return n, n
}

func (c *comparison) sameFlexGroup(ino uint32) (first, last uint64) {
	n, _ := c.to.place(ino)
	flex := uint64(c.to.flexGroups)
	first = c.flexGroup(n) * flex
	return first, min(first+flex, c.to.groupCount()) - 1
}

func (c *comparison) flexGroup(group uint64) uint64 { return group / uint64(c.to.flexGroups) }

func (c *comparison) anyGroup(uint32) (first, last uint64) { return 0, c.to.groupCount() - 1 }

// addNames makes candidates of the names that were found.
func (c *comparison) addNames() error {
	for ino, s := range c.sought {
		if s.left > 0 {
			return c.to.cannot("inode %d has %d names more than were found", ino, s.left)
		}
		for l := range s.names {
			dir, err := c.path(l.dir)
			if err != nil {
				return err
			}
			c.paths.Add(path.Join(dir, l.name))
		}
	}
	return nil
}

// scan reads the directories whose inodes are in a group.
func (c *comparison) scan(n uint64) error {
	g := &c.to.groups[n]
	if g.dirs == 0 || g.flags&groupInodeUninit != 0 {
		return nil
	}
	size := c.to.inodeSize
	count := c.to.inodesPerGroup - g.unused
	per := uint32(chunk * c.to.blockSize / size)
	for i := uint32(0); i < count && c.missing > 0; i += per {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		at := uint64(i) * uint64(size) / uint64(c.to.blockSize)
		b, err := c.to.run(g.inodeTable+at, min(chunk, c.to.tableBlocks()-at))
		if err != nil {
			return err
		}
		for j := uint32(0); j < per && i+j < count; j++ {
			record := b[int(j)*size : int(j+1)*size]
			if err := c.scanDir(uint32(n)*c.to.inodesPerGroup+i+j+1, record); err != nil {
				return err
			}
		}
	}
	return nil
}

// scanDir looks for names in the directory that a record is of, once.
func (c *comparison) scanDir(ino uint32, record []byte) error {
	if le.Uint16(record)&typeMask != typeDir || c.read[ino] {
		return nil
	}
	d, err := c.to.parse(ino, record)
	if err != nil || !d.isDir() || d.links == 0 {
		return err
	}
	_, err = c.visit(d)
	return err
}

// visit looks for names in a directory. least is the lowest inode that it has in its own flex
// group, 0 if there is none.
func (c *comparison) visit(d *inode) (least uint32, err error) {
	if l, ok := c.least[d.ino]; ok {
		return l, nil
	}
	c.read[d.ino] = true
	own, _ := c.to.place(d.ino)
	err = c.to.eachEntry(d, func(e entry) bool {
		if e.special() {
			return true
		}
		if c.sought[e.ino] != nil {
			c.found(d.ino, string(e.name), e.ino)
		}
		if n, _ := c.to.place(e.ino); c.flexGroup(n) == c.flexGroup(own) && (least == 0 || e.ino < least) {
			least = e.ino
		}
		return true
	})
	c.least[d.ino] = least
	return least, err
}

// path is where a directory is in the second file system.
func (c *comparison) path(ino uint32) (string, error) {
	var below []link // from ino upwards
	for at := ino; ; {
		if p, ok := c.known[at]; ok {
			for i := len(below) - 1; i >= 0; i-- {
				p = path.Join(p, below[i].name)
				c.known[below[i].dir] = p
			}
			return p, nil
		}
		parent, err := c.parent(at)
		if err != nil {
			return "", err
		}
		subdirs, err := c.subdirs(parent)
		if err != nil {
			return "", err
		}
		name, ok := subdirs[at]
		if !ok || len(below) > int(c.to.inodes) {
			return "", c.to.cannot("directory %d is not in its parent, %d", at, parent)
		}
		below = append(below, link{at, name})
		at = parent
	}
}

// parent is the inode that .. names.
func (c *comparison) parent(ino uint32) (uint32, error) {
	d, err := c.dir(ino)
	if err != nil {
		return 0, err
	}
	parent := uint32(0)
	err = c.to.eachEntry(d, func(e entry) bool {
		if string(e.name) == ".." {
			parent = e.ino
		}
		return parent == 0
	})
	if err == nil && parent == 0 {
		err = c.to.cannot("directory %d has no parent", ino)
	}
	return parent, err
}

func (c *comparison) dir(ino uint32) (*inode, error) {
	d, err := c.to.inode(ino)
	if err == nil && !d.isDir() {
		err = c.to.cannot("inode %d is a parent and no directory", ino)
	}
	return d, err
}

// subdirs are the names of the directories in a directory.
func (c *comparison) subdirs(ino uint32) (map[uint32]string, error) {
	if s := c.dirs[ino]; s != nil {
		return s, nil
	}
	d, err := c.dir(ino)
	if err != nil {
		return nil, err
	}
	s := map[uint32]string{}
	err = c.to.eachEntry(d, func(e entry) bool {
		if e.kind == kindDir && !e.special() {
			s[e.ino] = string(e.name)
		}
		return true
	})
	c.dirs[ino] = s
	return s, err
}
