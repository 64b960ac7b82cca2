package union

import (
	"cmp"
	"hash/maphash"
	"slices"
	"sort"
	"sync"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Dir is an open directory.
//
// All names are read when reading begins, and come in the order of a hash of
// theirs, which is their cookie: so a cookie stays good for as long as the FS is
// open, whatever comes, goes or is copied up meanwhile, and for another Dir of
// the same directory, too. No cookie is 0, 1 or 2: 0 is the start, the others are
// free for "." and "..".
type Dir struct {
	fs   *FS
	node *Node

	mu    sync.Mutex
	list  *names
	order []hashed // of list.items; nil: nothing was read yet
	read  bool     // something was: offset 0 begins anew
	seen  uint32   // dirState.changed when the list was made
	pure  int      // how many items, from the first on, do not come from a lower
	ended bool     // reading came to the end, which was behind offset end
	end   uint64
	told  uint64 // names up to this offset were given with their nodes
}

// hashed is an item of a list, and where it stands.
type hashed struct {
	cookie uint64
	item   uint32
}

const firstCookie = 3

// cookie is where a name stands. The seed is the FS's own, so that nobody can
// make names that stand at one place; of a million names two do by chance once in
// ten million times.
func (fs *FS) cookie(name []byte) uint64 {
	return max(maphash.Bytes(fs.seed, name)>>2, firstCookie)
}

// OpenDir opens a directory for reading.
func (fs *FS) OpenDir(n *Node) (*Dir, error) {
	if !n.isDir() {
		return nil, syscall.ENOTDIR
	}
	fs.hold(n)
	return &Dir{fs: fs, node: n}, nil
}

// DirNumbers returns the inode numbers that "." and ".." of a directory have.
func (fs *FS) DirNumbers(n *Node) (self, parent uint64) {
	n.mu.Lock()
	up := n.parent
	n.mu.Unlock()
	if up == nil {
		up = n
	}
	return n.ino.Load(), up.ino.Load()
}

// Close closes the directory.
func (d *Dir) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.node == nil {
		return nil
	}
	d.reset()
	d.fs.release(d.node)
	d.node = nil
	return nil
}

func (d *Dir) reset() {
	d.list, d.order, d.read, d.pure, d.ended, d.told = nil, nil, false, 0, false, 0
}

// keptNames is how many names a Dir that was read to the end keeps (Again).
const keptNames = 512

// Ended reports whether the last Read came to the end. Many names are given up
// then: who asks what comes behind the end, as all do who read a directory, is told
// without another look, unless names have changed.
func (d *Dir) Ended() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended && len(d.order) > keptNames {
		d.list, d.order = nil, nil
	}
	return d.ended
}

// Again reports whether what was read is still what the directory shows; then
// reading begins anew with it. Names that came with their nodes come without: who
// asked has them.
func (d *Dir) Again() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.list == nil || d.node.has(isDead) || d.seen != d.node.dir.changed.Load() {
		return false
	}
	d.read, d.ended = false, false
	return true
}

// Fsync flushes the directory's names.
func (d *Dir) Fsync() error {
	if d.fs.config.Volatile || !d.node.has(inUpper) {
		return nil
	}
	up, err := d.fs.upperDir(d.node)
	if err != nil {
		return err
	}
	defer d.fs.dirs.done(up)
	fd, err := sys.OpenBare(up.fd, ".", sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sys.CloseBare(fd)
	if err := d.fs.handleTable.sync(); err != nil {
		return err
	}
	return sys.FsyncBare(fd, false)
}

// dirItem is one name as the walk over a directory yields it.
type dirItem struct {
	name  []byte // valid during the call
	ino   uint64 // as shown; 0: only a lookup tells
	typ   uint32
	next  uint64
	lower int  // number of the lower that shows it; -1: not known
	below bool // set by who is told: it comes from a lower, or may do so
}

// Read calls add for each name from offset off on ("." and ".." are the
// caller's), until add returns false: that name comes again next time.
func (d *Dir) Read(off uint64, add func(DirEntry) bool) error {
	defer d.purify()
	return d.walk(off, func(i *dirItem) (bool, error) {
		e, err := d.plain(i)
		if err != nil {
			return true, gone(err)
		}
		return add(e), nil
	})
}

// plain is a name without its node.
func (d *Dir) plain(i *dirItem) (DirEntry, error) {
	e := DirEntry{Name: string(i.name), Ino: i.ino, Type: i.typ, Next: i.next}
	if e.Ino != 0 && e.Type != 0 {
		return e, nil
	}
	var f found
	switch err := d.fs.find(d.node, e.Name, &f, -1); {
	case err == nil:
		e.Ino, e.Type = d.fs.shownIno(d.node, e.Name, &f), f.st.Type()
		i.below = !f.upper || f.hasLow || len(f.lowers) > 0 || e.Ino != d.fs.ino(0, f.st.Ino)
	case broken(err):
		i.below = true
		e.Ino = max(e.Ino, 1) // with 0 it would not be seen
	default:
		return e, err
	}
	return e, nil
}

// gone is nil for an error that says that a name is not there any more.
func gone(err error) error {
	if err == syscall.ENOENT || err == syscall.ESTALE {
		return nil
	}
	return err
}

// broken reports whether an error says that a name is there, though what it leads
// to cannot be shown: data that a metacopy file lacks, a redirect that is nonsense.
// The kernel lists it all the same: a directory with it is not empty.
func broken(err error) bool {
	return err == syscall.EIO || err == syscall.EPERM || err == syscall.EINVAL || err == syscall.ELOOP
}

// ReadPlus is Read with the node behind each name, with a reference for the
// caller if add returns true; no node where what the name leads to is broken, or
// where the caller has it already (Again).
func (d *Dir) ReadPlus(off uint64, add func(DirEntry, Entry) bool) error {
	defer d.purify()
	return d.walk(off, func(i *dirItem) (bool, error) {
		if i.next <= d.told {
			e, err := d.plain(i)
			if err != nil {
				return true, gone(err)
			}
			return add(e, Entry{}), nil
		}
		name := string(i.name)
		e, err := d.fs.lookup(d.node, name, i.lower, false)
		if broken(err) {
			i.below = true
			return add(DirEntry{Name: name, Ino: max(i.ino, 1), Type: i.typ, Next: i.next}, Entry{}), nil
		}
		if err != nil {
			return true, gone(err)
		}
		i.below = d.fs.comesFromBelow(e.Node)
		if !add(DirEntry{Name: name, Ino: e.Attr.Ino, Type: e.Attr.Mode & sys.S_IFMT, Next: i.next}, e) {
			d.fs.Forget(e.Node.id, 1)
			return false, nil
		}
		if off <= d.told {
			d.told, off = i.next, i.next
		}
		return true, nil
	})
}

// walk calls f for each name from off on until it returns false.
func (d *Dir) walk(off uint64, f func(*dirItem) (bool, error)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.node == nil {
		return syscall.EBADF
	}
	if d.ended && off >= d.end {
		if d.seen == d.node.dir.changed.Load() {
			return nil
		}
		d.reset()
	}
	if off == 0 && (d.read || d.ended) || d.list == nil {
		d.reset()
		if d.node.has(isDead) {
			return nil
		}
		if err := d.start(); err != nil {
			d.reset()
			return err
		}
	}
	n := d.node
	d.ended = false
	at := sort.Search(len(d.order), func(i int) bool { return d.order[i].cookie >= off })
	for ; at < len(d.order); at++ {
		e := &d.list.items[d.order[at].item]
		i := dirItem{name: d.list.name(e), ino: e.ino, typ: uint32(e.typ) << 12, next: d.order[at].cookie + 1, lower: -1}
		if !n.has(inUpper) || d.seen == n.dir.changed.Load() {
			i.lower = int(e.lower) // the upper has not got the name meanwhile
		}
		d.read = true
		more, err := f(&i)
		if err != nil || !more {
			return err
		}
		if at == d.pure && !i.below {
			d.pure++
		}
	}
	d.ended, d.end = true, 0
	if len(d.order) > 0 {
		d.end = d.order[len(d.order)-1].cookie + 1
	}
	return nil
}

// comesFromBelow tells whether a node is not the upper's alone.
func (fs *FS) comesFromBelow(n *Node) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.upIno == 0 || n.lowIno != 0 || n.ino.Load() != fs.ino(0, n.upIno)
}

// purify takes the mark from a directory of the upper of which all names were
// read, and nothing in it comes from a lower any more: then the numbers on disk are
// those that are shown. The kernel does it when it reads such a directory, too. d
// is not locked.
func (d *Dir) purify() {
	fs := d.fs
	d.mu.Lock()
	n, seen, pure := d.node, d.seen, d.list != nil && d.pure == len(d.order)
	d.mu.Unlock()
	if !pure || n == nil || !n.has(isImpure) || n.merged() || fs.writable() != nil {
		return
	}
	n.change.Lock()
	defer n.change.Unlock()
	if n.dir.changed.Load() != seen || n.has(isDead) {
		return
	}
	up, err := fs.upperDir(n)
	if err != nil {
		return
	}
	defer fs.dirs.done(up)
	if err := sys.RemovexattrBare(up.fd, "", fs.names.impure); err == nil || err == syscall.ENODATA {
		n.clear(isImpure)
	}
}

// start reads the names.
func (d *Dir) start() (err error) {
	n := d.node
	d.seen = n.dir.changed.Load()
	if n.merged() {
		d.list, err = d.fs.mergedList(n)
	} else {
		d.list, err = d.fs.plainList(n)
	}
	if err != nil {
		return err
	}
	d.order = make([]hashed, len(d.list.items))
	for i := range d.order {
		d.order[i] = hashed{d.fs.cookie(d.list.name(&d.list.items[i])), uint32(i)}
	}
	slices.SortFunc(d.order, func(a, b hashed) int { return cmp.Compare(a.cookie, b.cookie) })
	return nil
}

// plainList is what a directory that one layer alone has shows.
func (fs *FS) plainList(n *Node) (*names, error) {
	var real *realDir // nil: the upper
	var dir *dirFd
	var err error
	if n.has(inUpper) {
		dir, err = fs.upperDir(n)
	} else {
		real = n.dir.lowers[0]
		dir, err = fs.real(real)
	}
	if err != nil {
		return nil, err
	}
	defer fs.dirs.done(dir)
	l := &names{}
	layer, xwhites := fs.layers[0], false
	if real != nil {
		layer, xwhites = real.layer, real.xwhiteouts
	} else {
		xwhites = fs.hasXWhiteouts(n)
	}
	return l, fs.eachName(dir.fd, func(fd int, e *sys.BareDirent) error {
		hidden, err := fs.hidden(layer, xwhites, fd, e)
		if hidden || err != nil {
			return err
		}
		i := listItem{typ: uint8(e.Type >> 12), lower: -1}
		switch {
		case real != nil:
			i.lower = 0
			i.ino = fs.ino(real.layer.fsid, e.Ino)
		case !n.has(isImpure):
			i.ino = fs.ino(0, e.Ino)
		}
		l.add(e.Name, i)
		return nil
	})
}

// hidden tells whether an entry of a directory in layer l is a whiteout or a marker;
// xwhites: files in it that have xattr whiteout are whiteouts.
func (fs *FS) hidden(l *layer, xwhites bool, fd int, e *sys.BareDirent) (bool, error) {
	check := e.Type == sys.S_IFCHR || e.Type == 0
	if e.Type == sys.S_IFREG && (l.stored != "" || xwhites) { // which may stand for something else
		check = true
	}
	if fs.config.AUFSWhiteouts && hasPrefix(e.Name, aufsPrefix) {
		return true, nil
	}
	if !check {
		return false, nil
	}
	var st sys.Stat
	name := string(e.Name)
	if err := sys.StatBare(fd, name, &st); err != nil {
		if err == syscall.ENOENT {
			return true, nil
		}
		return false, err
	}
	if st.IsWhiteout() {
		return true, nil
	}
	_ = l.show(fd, name, &st) // what is not valid is listed as it is
	e.Type = st.Type()
	if isXWhiteout(&st, xwhites) {
		var facts facts
		if err := fs.readFacts(fd, name, &facts); err != nil {
			return false, err
		}
		return facts.whiteout, nil
	}
	return false, nil
}

const dirBufSize = 64 << 10

var dirBufs = sync.Pool{New: func() any { b := make([]byte, dirBufSize); return &b }}

func getDirBuf() *[]byte  { return dirBufs.Get().(*[]byte) }
func putDirBuf(b *[]byte) { dirBufs.Put(b) }
