package union

import (
	"github.com/layerctl/layerctl/internal/sys"
)

// dirList has the names of a merged directory.
type dirList struct {
	items []listItem
	names []byte // all of them, one after the other
	upper int    // how many of items are the upper's
}

type listItem struct {
	at  uint32 // in names
	len uint8
	ino uint64 // as shown; 0: a lookup tells
	typ uint32
}

func (l *dirList) name(i *listItem) []byte { return l.names[i.at : i.at+uint32(i.len)] }

func (l *dirList) add(name []byte, ino uint64, typ uint32) {
	l.items = append(l.items, listItem{at: uint32(len(l.names)), len: uint8(len(name)), ino: ino, typ: typ})
	l.names = append(l.names, name...)
}

// lowerIndex has the names that the lowers of a merged directory show. Lowers do
// not change, so that it stays right.
type lowerIndex struct{}

func (fs *FS) dropIndex(n *Node) {}

// mergedList reads all layers of a directory, nearest first.
func (fs *FS) mergedList(n *Node) (*dirList, error) {
	l := &dirList{}
	seen := map[string]int{} // to the number in items; -1: hidden
	if n.has(inUpper) {
		up, err := fs.upperDir(n)
		if err != nil {
			return nil, err
		}
		err = fs.mergeOne(l, seen, nil, up.fd, n.has(isImpure))
		fs.dirs.done(up)
		if err != nil {
			return nil, err
		}
		l.upper = len(l.items)
	}
	for _, r := range n.dir.lowers {
		d, err := fs.real(r)
		if err != nil {
			return nil, err
		}
		err = fs.mergeOne(l, seen, r, d.fd, false)
		fs.dirs.done(d)
		if err != nil {
			return nil, err
		}
	}
	return l, nil
}

// mergeOne adds the names of one layer's directory (r; nil: the upper).
func (fs *FS) mergeOne(l *dirList, seen map[string]int, r *realDir, dir int, impure bool) error {
	fd, err := sys.OpenBare(dir, ".", sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sys.CloseBare(fd)
	buf := getDirBuf()
	defer putDirBuf(buf)
	fsid := uint32(0)
	if r != nil {
		fsid = r.layer.fsid
	}
	var marked []string // what AUFS whiteouts hide in the layers below
	defer func() {
		for _, name := range marked {
			if _, ok := seen[name]; !ok {
				seen[name] = -1
			}
		}
	}()
	for {
		n, err := sys.DirentsBare(fd, buf)
		if err != nil || n == 0 {
			return err
		}
		for rest, ok := buf[:n], true; ok; {
			var e sys.BareDirent
			if rest, ok = sys.NextDirent(rest, &e); !ok || e.IsDot() {
				continue
			}
			if at, ok := seen[string(e.Name)]; ok {
				// A directory in the upper that goes on here shows the lower's number.
				if at >= 0 && at < l.upper && e.Type == sys.S_IFDIR && l.items[at].typ == sys.S_IFDIR {
					l.items[at].ino = 0
				}
				continue
			}
			if fs.config.AUFSWhiteouts && hasPrefix(e.Name, aufsPrefix) {
				if r != nil {
					marked = append(marked, string(e.Name[len(aufsPrefix):]))
				}
				continue
			}
			if err := fs.mergeItem(l, seen, r, fd, fsid, impure, &e); err != nil {
				return err
			}
		}
	}
}

func (fs *FS) mergeItem(l *dirList, seen map[string]int, r *realDir, fd int, fsid uint32, impure bool, e *sys.BareDirent) error {
	name := string(e.Name)
	hidden, err := fs.hidden(r, fd, e)
	if err != nil {
		return err
	}
	if hidden {
		seen[name] = -1
		return nil
	}
	seen[name] = len(l.items)
	ino := fs.ino(fsid, e.Ino)
	if impure {
		ino = 0
	}
	l.add(e.Name, ino, e.Type)
	return nil
}

// mustBeEmpty is nil if a directory shows no names.
func (fs *FS) mustBeEmpty(n *Node) error {
	d := &Dir{fs: fs, node: n, fd: -1}
	defer func() { d.mu.Lock(); d.reset(); d.mu.Unlock() }()
	empty := true
	err := d.walk(0, func(*dirItem) (bool, error) {
		empty = false
		return false, nil
	})
	if err == nil && !empty {
		err = errNotEmpty
	}
	return err
}
