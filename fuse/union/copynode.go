package union

import (
	"context"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// copyUp makes sure that a node is in the upper, its parents first, with its
// data unless what says that they are not needed. It is the first change that a
// call makes, and nobody sees it, so that it may end with EINTR when thread pid,
// which waits for the call, is killed; 0: it may not.
func (fs *FS) copyUp(pid uint32, n *Node, what copyWhat) error {
	what = fs.needs(n, what)
	if n.has(inUpper) {
		if what == copyMeta || !n.has(isMetacopy) {
			return nil
		}
		n.change.Lock()
		defer n.change.Unlock()
		return fs.fillIn(pid, n)
	}
	if err := fs.writable(); err != nil {
		return err
	}
	if n.has(byHandle) {
		return fs.copyUpUnnamed(pid, n)
	}
	n.mu.Lock()
	parent := n.parent // of what is in a lower this does not change
	n.mu.Unlock()
	if n.isDir() || !n.has(isDead) {
		if err := fs.copyUp(pid, parent, copyMeta); err != nil {
			return err
		}
	}
	b, err := fs.buildFirst(pid, n, what)
	if err != nil {
		return err
	}
	defer fs.endBuild(n, b)
	parent.change.Lock()
	defer parent.change.Unlock()
	n.change.Lock()
	defer n.change.Unlock()
	return fs.copyUpAt(pid, parent, n.name, n, what, b)
}

// building is a copy-up of which the data are copied before the locks are taken under
// which the copy gets its name: nobody who changes something in that directory waits
// for them.
type building struct {
	r     copyRequest
	close func()        // the source
	done  chan struct{} // closed at the end; nil where nobody waits for it
}

// largeFile is the size from which on data are copied so.
const largeFile = 1 << 20

// buildFirst opens a file that is to be copied up, and copies its data if they are
// many; nil where there is nothing to do before the locks are taken. Who comes for the
// same file meanwhile waits here.
func (fs *FS) buildFirst(pid uint32, n *Node, what copyWhat) (*building, error) {
	for n.typ == sys.S_IFREG && what == copyAll && !n.has(inUpper|isDead) {
		src, done, err := fs.copySource(n)
		if err != nil {
			return nil, err
		}
		b := &building{r: fs.requestFor(pid, n, src, what), close: done}
		if src.stat.Size < fs.large {
			return b, nil
		}
		if other := fs.beginBuild(n, b); other != nil {
			done()
			<-other
			continue
		}
		if err := fs.upper.make(context.Background(), &b.r); err != nil {
			fs.endBuild(n, b)
			return nil, err
		}
		return b, nil
	}
	return nil, nil
}

// beginBuild enters b, or returns what to wait for: another one of n.
func (fs *FS) beginBuild(n *Node, b *building) (other chan struct{}) {
	fs.table.mu.Lock()
	defer fs.table.mu.Unlock()
	if other = fs.builds[n]; other == nil {
		b.done = make(chan struct{})
		fs.builds[n] = b.done
	}
	return other
}

func (fs *FS) endBuild(n *Node, b *building) {
	if b == nil {
		return
	}
	fs.upper.unmake(&b.r)
	b.close()
	if b.done != nil {
		fs.table.mu.Lock()
		delete(fs.builds, n)
		fs.table.mu.Unlock()
		close(b.done)
	}
}

// requestFor is the copy-up of n from src, but where to.
func (fs *FS) requestFor(pid uint32, n *Node, src copySource, what copyWhat) copyRequest {
	r := copyRequest{src: src, what: what, shared: fs.needsIndex(&src.stat), nlink: src.stat.Nlink, waiter: pid}
	if fs.stores() {
		r.setStat = fs.upper.storeStat
	}
	return r
}

// needs is how much is copied of what could do with metadata alone.
func (fs *FS) needs(n *Node, what copyWhat) copyWhat {
	if what == copyMeta && (!fs.config.Metacopy || n.typ != sys.S_IFREG) {
		return copyAll
	}
	return what
}

// copyUpAt copies n up at one of its names. The parent is in the upper, and both
// are locked. b, when not nil, is how far it is.
func (fs *FS) copyUpAt(pid uint32, parent *Node, name string, n *Node, what copyWhat, b *building) error {
	what = fs.needs(n, what)
	if n.has(inUpper) {
		if what != copyMeta {
			return fs.fillIn(pid, n)
		}
		return nil
	}
	if b == nil {
		src, done, err := fs.copySource(n)
		if err != nil {
			return err
		}
		defer done()
		b = &building{r: fs.requestFor(pid, n, src, what)}
	}
	r := &b.r
	if n.has(isDead) || parent.has(isDead) {
		fs.upper.unmake(r)
		return fs.copyUpGone(n, r)
	}
	r.impure = parent.has(isImpure)
	up, err := fs.upperDir(parent)
	if err != nil {
		return err
	}
	defer fs.dirs.done(up)
	r.dir, r.name = up.fd, name
	keys := []nameKey{{parent.id, name}}
	if r.shared && r.src.id != nil {
		keys = append(keys, indexKey(r.src.id.indexName()))
	}
	fs.table.mu.Lock()
	for _, k := range keys {
		fs.copies[k] = n
	}
	fs.table.mu.Unlock()
	var st sys.Stat
	err = fs.upper.copyUp(context.Background(), r)
	if err == nil {
		err = sys.StatBare(up.fd, name, &st)
	}
	fs.table.mu.Lock()
	for _, k := range keys {
		delete(fs.copies, k)
	}
	fs.table.mu.Unlock()
	if err != nil {
		return err
	}
	parent.set(isImpure)
	if parted := fs.raised(parent, n, r, &st); parted {
		fs.stale(Stale{Node: parent.id, Names: true}) // it has the number, too
	}
	// The time of change is another one, a directory's link count too, and what
	// lost its other names has another number.
	fs.stale(Stale{Node: n.id})
	return nil
}

// copyUpUnnamed copies up what came back by its number: into index alone, where all
// its names find it.
func (fs *FS) copyUpUnnamed(pid uint32, n *Node) error {
	n.change.Lock()
	defer n.change.Unlock()
	if n.has(inUpper) {
		return nil
	}
	src, done, err := fs.copySource(n)
	if err != nil {
		return err
	}
	defer done()
	if src.id == nil {
		return syscall.EIO
	}
	r := copyRequest{src: src, what: copyAll, dir: -1, shared: true, nlink: src.stat.Nlink, waiter: pid}
	entry := src.id.indexName()
	key, t := indexKey(entry), fs.table
	t.mu.Lock()
	fs.copies[key] = n
	t.mu.Unlock()
	var st sys.Stat
	if err = fs.upper.copyUpIndexed(context.Background(), &r); err == nil {
		err = sys.StatBare(fs.upper.index.Int(), entry, &st)
	}
	t.mu.Lock()
	delete(fs.copies, key)
	t.mu.Unlock()
	if err != nil {
		return err
	}
	fs.raised(nil, n, &r, &st)
	fs.stale(Stale{Node: n.id})
	return nil
}

// stale tells the kernel's side that it remembers what is not so any more.
func (fs *FS) stale(s Stale) {
	if fs.config.Invalidate != nil {
		fs.config.Invalidate(s)
	}
}

// raised tells a node that it is in the upper now; st is of the new inode. parted
// says that the file has lost its other names, and so has another number. parent is
// nil where the node was copied up without a name.
func (fs *FS) raised(parent, n *Node, r *copyRequest, st *sys.Stat) (parted bool) {
	fs.copyUps.Add(1)
	parted = !n.isDir() && r.src.stat.Nlink > 1 && !r.shared
	n.mu.Lock()
	defer n.mu.Unlock()
	fs.table.mu.Lock()
	defer fs.table.mu.Unlock()
	fs.table.unkey(n)
	n.upIno = st.Ino
	var flags uint32 = inUpper
	if r.what == copyMeta && n.typ == sys.S_IFREG {
		flags |= isMetacopy
		m := n.extra()
		if m.data.dir == nil {
			m.data, m.dataSt.blocks = n.low, r.src.stat.Blocks
		}
	} else {
		n.clear(isMetacopy)
	}
	if n.isDir() {
		n.dir.beside.Store(&nothingBeside)
	}
	if parted {
		n.ino.Store(fs.ino(0, st.Ino))
	}
	if r.shared && !n.isDir() {
		n.becomeIndexed(r.src.id.indexName(), r.nlink, st)
		fs.indexUps.Add(1)
	}
	n.set(flags)
	if !n.has(isDead) {
		fs.table.link(n, false)
	}
	if parent != nil {
		parent.dir.copied.Add(1)
		parent.dir.changed.Add(1)
	}
	return parted
}

// copySource opens what is copied up.
func (fs *FS) copySource(n *Node) (src copySource, done func(), err error) {
	var p place
	if err := fs.locate(n, &p); err != nil {
		return src, nil, err
	}
	defer fs.leave(&p)
	if p.name == "" {
		src.fd, err = sys.DupBare(p.fd)
	} else {
		src.fd, err = sys.OpenBare(p.fd, p.name, sys.O_PATH, 0)
	}
	if err != nil {
		return src, nil, err
	}
	src.data = -1
	done = func() {
		sys.CloseBare(src.fd)
		if src.data >= 0 {
			sys.CloseBare(src.data)
		}
	}
	err = fs.shownBy(n, &p).stat(src.fd, "", &src.stat)
	if err == nil && src.stat.Type() != n.typ {
		err = syscall.ESTALE
	}
	if err == nil && n.has(isMetacopy) {
		src.data, err = fs.openData(n, sys.O_PATH)
	}
	if err != nil {
		done()
		return src, nil, err
	}
	if fs.handles {
		id := new(fileID)
		if identify(src.fd, "", fs.layerOf(n).uuid, id) == nil {
			src.id = id
		} // else an empty origin says: unknown
	}
	return src, done, nil
}

// layerOf is the lower that shows a node.
func (fs *FS) layerOf(n *Node) *layer {
	if n.isDir() {
		return n.dir.lowers[0].layer
	}
	return n.low.dir.layer
}

// copyUpGone copies up a file without a name: it gets none there either.
func (fs *FS) copyUpGone(n *Node, r *copyRequest) error {
	if n.isDir() {
		return syscall.ENOENT
	}
	r.dir, r.name, r.noOrigin, r.shared = fs.upper.work.Int(), fs.upper.tempName(), true, false
	if err := fs.upper.copyUp(context.Background(), r); err != nil {
		return err
	}
	defer fs.upper.discard(r.name)
	fd, err := sys.OpenBare(r.dir, r.name, sys.O_PATH, 0)
	if err != nil {
		return err
	}
	var st sys.Stat
	if err := sys.StatBare(fd, "", &st); err != nil {
		sys.CloseBare(fd)
		return err
	}
	n.mu.Lock()
	n.extra().fd = fd
	n.mu.Unlock()
	n.set(isDead)
	fs.raised(n.parent, n, r, &st)
	return nil
}

// fillIn gives a metacopy file in the upper its data; n.change is held.
func (fs *FS) fillIn(pid uint32, n *Node) error {
	if !n.has(isMetacopy) {
		return nil
	}
	data, err := fs.openData(n, sys.O_PATH)
	if err != nil {
		return err
	}
	defer sys.CloseBare(data)
	fd, err := fs.openUpper(n, sys.O_PATH)
	if err != nil {
		return err
	}
	defer sys.CloseBare(fd)
	if err := fs.upper.copyUpData(context.Background(), fd, data, pid); err != nil {
		return err
	}
	n.clear(isMetacopy)
	return nil
}

// openUpper opens a file in the upper; n.change is held.
func (fs *FS) openUpper(n *Node, flags int) (int, error) {
	var p place
	if err := fs.locate(n, &p); err != nil {
		return -1, err
	}
	defer fs.leave(&p)
	if p.name == "" {
		if flags == sys.O_PATH {
			return sys.DupBare(p.fd)
		}
		return sys.ReopenBare(p.fd, flags)
	}
	return sys.OpenBare(p.fd, p.name, flags, 0)
}

// openData opens the lower file that has a metacopy file's data.
func (fs *FS) openData(n *Node, flags int) (int, error) {
	n.mu.Lock()
	data, lazy := n.more.data, n.more.dataSt.lazy
	n.mu.Unlock()
	if data.dir == nil {
		var err error
		if data, err = fs.findData(n, lazy); err != nil {
			return -1, err
		}
	}
	d, err := fs.real(data.dir)
	if err != nil {
		return -1, err
	}
	defer fs.dirs.done(d)
	return sys.OpenBare(d.fd, data.name, flags, 0)
}
