package union

import (
	"sync"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Dir is an open directory.
//
// A directory that one layer alone has is read as it is there, by the file
// system's own cookies. One that several layers have is read into a list when
// reading begins, and the cookies count its entries. In both, names that go or
// come meanwhile move no others. No cookie is 0, 1 or 2: 0 is the start, the
// others are free for "." and "..".
type Dir struct {
	fs   *FS
	node *Node

	mu   sync.Mutex
	fd   int // of the one real directory, for reading; -1
	buf  *[]byte
	rest []byte   // of buf, not looked at yet
	at   uint64   // cookie of rest's beginning
	real *realDir // whose fd that is; nil: the upper
	list *names
	seen uint32 // dirState.changed when the list was made
}

const firstCookie = 3

// OpenDir opens a directory for reading.
func (fs *FS) OpenDir(n *Node) (*Dir, error) {
	if !n.isDir() {
		return nil, syscall.ENOTDIR
	}
	fs.hold(n)
	return &Dir{fs: fs, node: n, fd: -1}, nil
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
	if d.fd >= 0 {
		sys.CloseBare(d.fd)
	}
	if d.buf != nil {
		putDirBuf(d.buf)
	}
	d.fd, d.buf, d.rest, d.list, d.real, d.at = -1, nil, nil, nil, nil, 0
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
	return sys.FsyncBare(fd, false)
}

// dirItem is one name as the walk over a directory yields it.
type dirItem struct {
	name  []byte // valid during the call
	ino   uint64 // as shown; 0: only a lookup tells
	typ   uint32
	next  uint64
	lower int // number of the lower that shows it; -1: not known
}

// Read calls add for each name from offset off on ("." and ".." are the
// caller's), until add returns false: that name comes again next time.
func (d *Dir) Read(off uint64, add func(DirEntry) bool) error {
	return d.walk(off, func(i *dirItem) (bool, error) {
		e := DirEntry{Name: string(i.name), Ino: i.ino, Type: i.typ, Next: i.next}
		if e.Ino == 0 || e.Type == 0 {
			var f found
			if err := d.fs.find(d.node, e.Name, &f, -1); err != nil {
				return true, gone(err)
			}
			e.Ino, e.Type = d.fs.inoOf(&f), f.st.Type()
		}
		return add(e), nil
	})
}

// gone is nil for an error that says that a name is not there any more, or that
// what it leads to cannot be shown: it is left out.
func gone(err error) error {
	switch err {
	case syscall.ENOENT, syscall.ESTALE, syscall.EIO, syscall.EPERM:
		return nil
	}
	return err
}

// ReadPlus is Read with the node behind each name, with a reference for the
// caller if add returns true.
func (d *Dir) ReadPlus(off uint64, add func(DirEntry, Entry) bool) error {
	return d.walk(off, func(i *dirItem) (bool, error) {
		name := string(i.name)
		e, err := d.fs.lookup(d.node, name, i.lower)
		if err != nil {
			return true, gone(err)
		}
		if !add(DirEntry{Name: name, Ino: e.Attr.Ino, Type: e.Attr.Mode & sys.S_IFMT, Next: i.next}, e) {
			d.fs.Forget(e.Node.id, 1)
			return false, nil
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
	if off == 0 && d.at != 0 || d.fd < 0 && d.list == nil {
		d.reset()
		if d.node.has(isDead) {
			return nil
		}
		if err := d.start(); err != nil {
			return err
		}
	}
	if d.list != nil {
		return d.walkList(off, f)
	}
	return d.walkStream(off, f)
}

// start begins reading.
func (d *Dir) start() error {
	n := d.node
	if n.merged() {
		d.seen = n.dir.changed.Load()
		list, err := d.fs.mergedList(n)
		d.list = list
		d.at = firstCookie
		return err
	}
	var dir *dirFd
	var err error
	if n.has(inUpper) {
		dir, err = d.fs.upperDir(n)
	} else {
		d.real = n.dir.lowers[0]
		dir, err = d.fs.real(d.real)
	}
	if err != nil {
		return err
	}
	defer d.fs.dirs.done(dir)
	d.fd, err = sys.OpenBare(dir.fd, ".", sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		d.fd = -1
	}
	return err
}

// walkStream reads the one real directory.
func (d *Dir) walkStream(off uint64, f func(*dirItem) (bool, error)) error {
	if d.buf == nil {
		d.buf = getDirBuf()
	}
	if off != d.at {
		if _, err := sys.SeekBare(d.fd, int64(off), 0); err != nil {
			return err
		}
		d.at, d.rest = off, nil
	}
	for {
		if len(d.rest) == 0 {
			n, err := sys.DirentsBare(d.fd, *d.buf)
			if err != nil || n == 0 {
				return err
			}
			d.rest = (*d.buf)[:n]
		}
		var e sys.BareDirent
		rest, ok := sys.NextDirent(d.rest, &e)
		if !ok {
			d.rest = nil
			continue
		}
		if !e.IsDot() {
			more, err := d.streamItem(&e, f)
			if err != nil || !more {
				return err
			}
		}
		d.rest, d.at = rest, uint64(e.Off)
	}
}

// streamItem yields one entry of the real directory, if it is shown.
func (d *Dir) streamItem(e *sys.BareDirent, f func(*dirItem) (bool, error)) (bool, error) {
	i := dirItem{name: e.Name, typ: e.Type, next: uint64(e.Off), lower: -1}
	fs := d.fs
	hidden, err := fs.hidden(d.real, d.fd, e)
	if hidden || err != nil {
		return true, err
	}
	switch {
	case d.real != nil:
		i.lower = 0
		i.ino = fs.ino(d.real.layer.fsid, e.Ino)
	case !d.node.has(isImpure):
		i.ino = fs.ino(0, e.Ino)
	}
	return f(&i)
}

// hidden tells whether an entry of a real directory (nil: of the upper) is a
// whiteout or a marker.
func (fs *FS) hidden(r *realDir, fd int, e *sys.BareDirent) (bool, error) {
	check := e.Type == sys.S_IFCHR || e.Type == 0
	if r != nil && r.xwhiteouts && e.Type == sys.S_IFREG {
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
	e.Type = st.Type()
	if st.IsWhiteout() {
		return true, nil
	}
	if r != nil && fs.isXWhiteout(&st, r.xwhiteouts) {
		var facts facts
		if err := fs.readFacts(fd, name, &facts); err != nil {
			return false, err
		}
		return facts.whiteout, nil
	}
	return false, nil
}

// walkList yields what the merged list has.
func (d *Dir) walkList(off uint64, f func(*dirItem) (bool, error)) error {
	at := max(off, firstCookie) - firstCookie
	d.at = off
	n := d.node
	for ; at < uint64(len(d.list.items)); at++ {
		e := &d.list.items[at]
		i := dirItem{name: d.list.name(e), ino: e.ino, typ: uint32(e.typ) << 12, next: at + 1 + firstCookie, lower: -1}
		if !n.has(inUpper) || d.seen == n.dir.changed.Load() {
			i.lower = int(e.lower) // the upper has not got the name meanwhile
		}
		more, err := f(&i)
		if err != nil || !more {
			return err
		}
		d.at = i.next
	}
	return nil
}

const dirBufSize = 64 << 10

var dirBufs = sync.Pool{New: func() any { b := make([]byte, dirBufSize); return &b }}

func getDirBuf() *[]byte  { return dirBufs.Get().(*[]byte) }
func putDirBuf(b *[]byte) { dirBufs.Put(b) }
