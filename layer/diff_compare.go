package layer

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"slices"

	"github.com/layerctl/layerctl/internal/sys"
)

// compare says in which aspects two files of one path differ.
func (d *differ) compare(path string, f, t *node) (Aspect, error) {
	a, err := d.compareGroups(path, f, t)
	if err != nil || oneFile(&f.st, &t.st) {
		return a, err
	}
	a |= compareStat(&f.e, &t.e)
	if a&^AspectHardlink == 0 && f.e.Type == TypeReg && d.o.SameFile != nil && d.o.SameFile(&f.st, &t.st) {
		return a, nil
	}
	if err := errors.Join(d.from.fill(f), d.to.fill(t)); err != nil {
		return 0, err
	}
	if !maps.Equal(f.e.Xattrs, t.e.Xattrs) {
		a |= AspectXattr
	}
	if f.e.Type != t.e.Type {
		return a, nil
	}
	content, err := d.compareContent(f, t)
	return a | content, err
}

// oneFile reports whether two stats are of one inode: then nothing about it can
// differ. ctime and btime are asked for as well because a number may be used
// again between the two calls, and no file system lets a program set them.
func oneFile(f, t *sys.Stat) bool {
	return inodeOf(f) == inodeOf(t) && f.Ctime == t.Ctime && f.Btime == t.Btime && f.Mtime == t.Mtime &&
		f.Size == t.Size && f.Mode == t.Mode
}

// compareStat compares what stat says but the size.
func compareStat(f, t *Entry) Aspect {
	var a Aspect
	if f.Type != t.Type {
		a |= AspectType
	} else if f.Major != t.Major || f.Minor != t.Minor {
		a |= AspectRdev
	}
	if f.Mode != t.Mode {
		a |= AspectMode
	}
	if f.UID != t.UID || f.GID != t.GID {
		a |= AspectOwner
	}
	if f.ModTime != t.ModTime {
		a |= AspectTime
	}
	return a
}

func (d *differ) compareContent(f, t *node) (Aspect, error) {
	switch {
	case f.e.Type == TypeSymlink && f.e.Linkname != t.e.Linkname:
		return AspectContent, nil
	case f.e.Type != TypeReg:
		return 0, nil
	case f.e.Size != t.e.Size:
		return AspectContent, nil
	case f.e.Size == 0:
		return 0, nil
	}
	same, err := d.sameContent(f, t)
	if err != nil || same {
		return 0, err
	}
	return AspectContent, nil
}

// sameContent compares bytes, of two inodes once, however many names they have.
func (d *differ) sameContent(f, t *node) (bool, error) {
	key := [2]inode{inodeOf(&f.st), inodeOf(&t.st)}
	named := linkable(&f.st) && linkable(&t.st)
	if same, ok := d.equal[key]; named && ok {
		return same, nil
	}
	same, err := d.sameBytes(f, t)
	if named && err == nil {
		if d.equal == nil {
			d.equal = map[[2]inode]bool{}
		}
		d.equal[key] = same
	}
	return same, err
}

func (d *differ) sameBytes(f, t *node) (bool, error) {
	a, err := d.from.open(f)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := d.to.open(t)
	if err != nil {
		return false, err
	}
	defer b.Close()
	if d.bufs[0] == nil {
		d.bufs = [2][]byte{make([]byte, 128<<10), make([]byte, 128<<10)}
	}
	for left := f.e.Size; left > 0; {
		if err := d.ctx.Err(); err != nil {
			return false, err
		}
		n := min(left, int64(len(d.bufs[0])))
		same, err := sameNext(a, b, d.bufs[0][:n], d.bufs[1][:n])
		if err != nil || !same {
			return false, err
		}
		left -= n
	}
	return true, nil
}

// sameNext compares the next bytes of two files, as many as the buffers take.
func sameNext(a, b io.Reader, p, q []byte) (bool, error) {
	n, err1 := io.ReadFull(a, p)
	m, err2 := io.ReadFull(b, q)
	if err := errors.Join(notEOF(err1), notEOF(err2)); err != nil {
		return false, err
	}
	return bytes.Equal(p[:n], q[:m]), nil
}

func notEOF(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return nil
	}
	return err
}

// compareGroups says whether the path's link group has other members in to than
// in from.
func (d *differ) compareGroups(path string, f, t *node) (Aspect, error) {
	if !linkable(&f.st) && !linkable(&t.st) {
		return 0, nil
	}
	if err := d.links.ready(); err != nil {
		return 0, err
	}
	from, to := d.links.fromIndex.group(path, &f.st), d.links.toIndex.group(path, &t.st)
	if len(from) == len(to) && d.sameNames(inodeOf(&f.st), inodeOf(&t.st), from, to) {
		return 0, nil
	}
	return AspectHardlink, nil
}

// sameNames compares two link groups, once for all their names: a file may have
// 65,000. Both hold the path in question, so the inodes tell the groups, but
// for a group of one name, which may be a part of its inode's names.
func (d *differ) sameNames(f, t inode, from, to []string) bool {
	if len(from) == 1 {
		return from[0] == to[0]
	}
	key := [2]inode{f, t}
	same, known := d.equalNames[key]
	if !known {
		same = slices.Equal(from, to)
		if d.equalNames == nil {
			d.equalNames = map[[2]inode]bool{}
		}
		d.equalNames[key] = same
	}
	return same
}
