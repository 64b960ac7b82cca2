package union

import (
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// names is a list of names of a directory, without an allocation for each.
type names struct {
	items []listItem
	bytes []byte // all of them, one after the other
}

type listItem struct {
	ino   uint64 // as shown; 0: a lookup tells
	at    uint32 // in names.bytes
	len   uint8
	typ   uint8 // S_IFMT>>12, 0: a lookup tells
	lower int16 // the first lower that has it; -1: the upper
	flags uint8
}

// Flags of listItem.
const (
	itemHidden uint8 = 1 << iota // a whiteout: the name is not there
	itemMore                     // a directory that lowers further down have too
)

func (l *names) name(i *listItem) []byte { return l.bytes[i.at : i.at+uint32(i.len)] }

func (l *names) add(name []byte, i listItem) {
	i.at, i.len = uint32(len(l.bytes)), uint8(len(name))
	l.items = append(l.items, i)
	l.bytes = append(l.bytes, name...)
}

// lowerIndex has the names that the lowers of a directory show together, and
// those that whiteouts hide. Lowers do not change, so that it stays right until
// it is dropped to save memory; nobody writes to it once it is there.
type lowerIndex struct {
	names
	byName map[string]uint32 // keys share the memory of names.bytes
	used   atomic.Bool       // since the clock hand passed
}

// get finds a name; nil where no lower has it.
func (ix *lowerIndex) get(name string) *listItem {
	i, ok := ix.byName[name]
	if !ok {
		return nil
	}
	return &ix.items[i]
}

// indexes bounds the names in all lowerIndexes.
type indexes struct {
	mu    sync.Mutex
	nodes []*Node
	names int
	hand  int
}

// maxIndexed is how many names the indexes may have together, the last one made
// not counted.
const maxIndexed = 50_000

func (fs *FS) keepIndex(n *Node, ix *lowerIndex) {
	x := &fs.indexes
	x.mu.Lock()
	defer x.mu.Unlock()
	if !n.dir.index.CompareAndSwap(nil, ix) {
		return
	}
	for tries := 2 * len(x.nodes); x.names > maxIndexed && len(x.nodes) > 0 && tries > 0; tries-- {
		x.hand %= len(x.nodes)
		old := x.nodes[x.hand]
		if old.dir.index.Load().used.Swap(false) {
			x.hand++
			continue
		}
		x.remove(x.hand)
	}
	x.nodes = append(x.nodes, n)
	x.names += len(ix.items)
}

func (x *indexes) remove(at int) {
	n := x.nodes[at]
	x.names -= len(n.dir.index.Load().items)
	n.dir.index.Store(nil)
	last := len(x.nodes) - 1
	x.nodes[at] = x.nodes[last]
	x.nodes[last] = nil
	x.nodes = x.nodes[:last]
}

// dropIndex is for a node that goes from memory.
func (fs *FS) dropIndex(n *Node) {
	if n.dir.index.Load() == nil {
		return
	}
	x := &fs.indexes
	x.mu.Lock()
	defer x.mu.Unlock()
	for i := range x.nodes {
		if x.nodes[i] == n {
			x.remove(i)
			return
		}
	}
}

// indexAfter is how many looks into lowers it takes until a directory gets an
// index: reading a lower costs about that many.
const indexAfter = 32

// indexOf is the index of a directory's lowers, if there is one, or should be.
func (fs *FS) indexOf(n *Node) *lowerIndex {
	ix := n.dir.index.Load()
	if ix != nil {
		if !ix.used.Load() {
			ix.used.Store(true)
		}
		return ix
	}
	if len(n.dir.lowers) < 2 || n.dir.looks.Add(1) < indexAfter {
		return nil
	}
	ix, err := fs.makeIndex(n)
	if err != nil {
		return nil
	}
	return ix
}

// makeIndex reads the lowers of a directory.
func (fs *FS) makeIndex(n *Node) (*lowerIndex, error) {
	if ix := n.dir.index.Load(); ix != nil {
		return ix, nil
	}
	ix := &lowerIndex{byName: map[string]uint32{}}
	for at, r := range n.dir.lowers {
		d, err := fs.real(r)
		if err != nil {
			return nil, err
		}
		err = fs.indexOne(ix, at, r, d.fd)
		fs.dirs.done(d)
		if err != nil {
			return nil, err
		}
	}
	ix.share()
	fs.keepIndex(n, ix)
	return ix, nil
}

// share makes the keys of the map parts of one string.
func (ix *lowerIndex) share() {
	all := string(ix.bytes)
	ix.byName = make(map[string]uint32, len(ix.items))
	for i := range ix.items {
		e := &ix.items[i]
		ix.byName[all[e.at:e.at+uint32(e.len)]] = uint32(i)
	}
}

// indexOne adds the names of lower number at.
func (fs *FS) indexOne(ix *lowerIndex, at int, r *realDir, dir int) error {
	var marked []string // what AUFS whiteouts hide in the lowers further down
	err := fs.eachName(dir, func(fd int, e *sys.BareDirent) error {
		if fs.config.AUFSWhiteouts && hasPrefix(e.Name, aufsPrefix) {
			marked = append(marked, string(e.Name[len(aufsPrefix):]))
			return nil
		}
		if i, ok := ix.byName[string(e.Name)]; ok {
			if e.Type == sys.S_IFDIR || e.Type == 0 {
				ix.items[i].flags |= itemMore
			}
			return nil
		}
		hidden, err := fs.hidden(r.layer, r.xwhiteouts, fd, e)
		if err != nil {
			return err
		}
		i := listItem{ino: fs.ino(r.layer.fsid, e.Ino), typ: uint8(e.Type >> 12), lower: int16(at)}
		if hidden {
			i.flags = itemHidden
		}
		ix.byName[string(e.Name)] = uint32(len(ix.items))
		ix.add(e.Name, i)
		return nil
	})
	for _, name := range marked {
		if _, ok := ix.byName[name]; !ok {
			ix.byName[name] = uint32(len(ix.items))
			ix.add([]byte(name), listItem{lower: int16(at), flags: itemHidden})
		}
	}
	return err
}

// eachName calls f for each name of the directory dir but "." and "..".
func (fs *FS) eachName(dir int, f func(fd int, e *sys.BareDirent) error) error {
	fd, err := sys.OpenBare(dir, ".", sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sys.CloseBare(fd)
	buf := getDirBuf()
	defer putDirBuf(buf)
	for {
		n, err := sys.DirentsBare(fd, *buf)
		if err != nil || n == 0 {
			return err
		}
		rest := (*buf)[:n]
		for {
			var e sys.BareDirent
			var ok bool
			if rest, ok = sys.NextDirent(rest, &e); !ok {
				break
			}
			if e.IsDot() {
				continue
			}
			if err := f(fd, &e); err != nil {
				return err
			}
		}
	}
}

// mergedList is what a directory that several layers have shows: the upper's
// names, then those of the lowers that the upper neither has nor hides.
func (fs *FS) mergedList(n *Node) (*names, error) {
	ix, err := fs.makeIndex(n)
	if err != nil {
		return nil, err
	}
	l := &names{}
	seen := map[string]struct{}{}
	if n.has(inUpper) {
		up, err := fs.upperDir(n)
		if err != nil {
			return nil, err
		}
		err = fs.listUpper(n, ix, l, seen, up.fd)
		fs.dirs.done(up)
		if err != nil {
			return nil, err
		}
	}
	for i := range ix.items {
		e := &ix.items[i]
		if e.flags&itemHidden != 0 {
			continue
		}
		name := ix.name(e)
		if _, ok := seen[string(name)]; !ok {
			l.add(name, *e)
		}
	}
	return l, nil
}

// listUpper adds the upper's names to l, and to seen those that a lower has too.
func (fs *FS) listUpper(n *Node, ix *lowerIndex, l *names, seen map[string]struct{}, up int) error {
	impure, xwhites := n.has(isImpure), fs.hasXWhiteouts(n)
	return fs.eachName(up, func(fd int, e *sys.BareDirent) error {
		if fs.config.AUFSWhiteouts && hasPrefix(e.Name, aufsPrefix) {
			seen[string(e.Name[len(aufsPrefix):])] = struct{}{}
			return nil
		}
		below := ix.get(string(e.Name))
		if below != nil {
			seen[string(e.Name)] = struct{}{}
		}
		hidden, err := fs.hidden(fs.layers[0], xwhites, fd, e)
		if hidden || err != nil {
			return err
		}
		i := listItem{ino: fs.ino(0, e.Ino), typ: uint8(e.Type >> 12), lower: -1}
		// What was copied up, and a directory that goes on below, show the number
		// of what is there.
		if impure || e.Type == sys.S_IFDIR && below != nil && below.typ == sys.S_IFDIR>>12 {
			i.ino = 0
		}
		l.add(e.Name, i)
		return nil
	})
}

// mustBeEmpty is nil if a directory shows no names.
func (fs *FS) mustBeEmpty(n *Node) error {
	d := &Dir{fs: fs, node: n}
	defer d.reset()
	empty := true
	err := d.walk(0, func(*dirItem) (bool, error) {
		empty = false
		return false, nil
	})
	if err == nil && !empty {
		err = syscall.ENOTEMPTY
	}
	return err
}
