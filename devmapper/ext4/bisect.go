package ext4

// shelf is the inode tables of a flex group that have directories, one behind the
// other. As both directories and files get the lowest free inodes there, directories
// that are further on have files that are further on, unless inodes were used again.
type shelf struct {
	groups []uint64
	ends   []uint32 // the place behind each table's last inode
}

func (s *shelf) len() uint32 {
	if len(s.ends) == 0 {
		return 0
	}
	return s.ends[len(s.ends)-1]
}

// at is the group and the index in its table of a place.
func (s *shelf) at(place uint32) (group uint64, index uint32) {
	start := uint32(0)
	for i, end := range s.ends {
		if place < end {
			return s.groups[i], place - start
		}
		start = end
	}
	return 0, 0
}

func (c *comparison) shelfOf(ino uint32) *shelf {
	s := &shelf{}
	first, last := c.sameFlexGroup(ino)
	for n := first; n <= last; n++ {
		if g := &c.to.groups[n]; g.dirs > 0 && g.flags&groupInodeUninit == 0 {
			s.groups = append(s.groups, n)
			s.ends = append(s.ends, s.len()+c.to.inodesPerGroup-g.unused)
		}
	}
	return s
}

// fewEmpty is how many directories without a file are passed over in a row.
const fewEmpty = 8

// bisect searches the directories of a file's flex group, and if that does not find it those
// of each group in it. What it does not find is left to the scan.
func (c *comparison) bisect(ino uint32) error {
	s, all := c.sought[ino], c.shelfOf(ino)
	if s.left <= 0 {
		return nil
	}
	if err := c.bisectOn(all, ino); err != nil {
		return err
	}
	for i, n := range all.groups {
		g := &c.to.groups[n]
		if s.left <= 0 {
			break
		}
		if err := c.bisectOn(&shelf{all.groups[i : i+1], []uint32{c.to.inodesPerGroup - g.unused}}, ino); err != nil {
			return err
		}
	}
	return nil
}

// bisectOn looks for the last directory whose files begin before a file, and reads it, all
// that it meets on the way, and the directories above it (whose further files may come
// behind those of a directory in them).
func (c *comparison) bisectOn(tables *shelf, ino uint32) error {
	s := c.sought[ino]
	var last *inode
	empty := 0
	for low, high, from := uint32(0), tables.len(), uint32(0); low < high && s.left > 0 && empty < fewEmpty; {
		if empty == 0 {
			from = (low + high) / 2
		}
		d, place, err := c.dirBefore(tables, low, from)
		if err != nil {
			return err
		}
		if d == nil {
			low, empty = (low+high)/2+1, 0
			continue
		}
		least, err := c.visit(d)
		switch {
		case err != nil:
			return err
		case least == 0 && place > low:
			from = place - 1
			empty++
		case least == 0 || least <= ino:
			if least != 0 {
				last = d
			}
			low, empty = (low+high)/2+1, 0
		default:
			high, empty = place, 0
		}
	}
	return c.visitAbove(last, s)
}

// visitAbove reads the directories above one.
func (c *comparison) visitAbove(d *inode, s *sought) error {
	for depth := 0; d != nil && d.ino != rootInode && s.left > 0 && depth < 256; depth++ {
		parent, err := c.parent(d.ino)
		if err != nil {
			return err
		}
		if d, err = c.dir(parent); err != nil {
			return err
		}
		if _, err := c.visit(d); err != nil {
			return err
		}
	}
	return c.ctx.Err()
}

// dirBefore finds the last directory between two places, both included; nil if there is
// none, or none in the last few blocks.
func (c *comparison) dirBefore(tables *shelf, low, from uint32) (d *inode, place uint32, err error) {
	per := uint32(c.to.blockSize / c.to.inodeSize)
	var b []byte
	blocks, held := 0, uint64(0)
	for at := int64(from); at >= int64(low); at-- {
		n, i := tables.at(uint32(at))
		if block := c.to.groups[n].inodeTable + uint64(i/per); b == nil || block != held {
			if blocks++; blocks > fewBlocks {
				return nil, 0, nil
			}
			if b, err = c.to.block(block); err != nil {
				return nil, 0, err
			}
			held = block
		}
		off := int(i%per) * c.to.inodeSize
		record := b[off : off+c.to.inodeSize]
		if le.Uint16(record)&typeMask != typeDir {
			continue
		}
		d, err := c.to.parse(uint32(n)*c.to.inodesPerGroup+i+1, record)
		if err != nil {
			return nil, 0, err
		}
		if d.isDir() && d.links > 0 {
			return d, uint32(at), nil
		}
	}
	return nil, 0, nil
}
