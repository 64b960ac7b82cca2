package union

import (
	"crypto/sha256"
	"math/rand/v2"
	"strconv"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// With Config.NFSExport a node comes back by its ID alone when it has been forgotten,
// and in another FS on the same layers. What an ID stands for is the object below that
// the node was first seen as, and always is found by: the lower one where there is one
// (what is copied up has an entry in index, under the lower one's name), else that of
// the upper. A directory is found at its path. Another object comes back without a
// name (byHandle): it is opened by its handle, or entry, for each use, and is the same
// node for who finds it at a name.
//
// While a node comes back nobody takes names away (FS.recalls): else what was just
// found could go, and its inode number be another file's, before the node is known.

// openTable makes the table of handles ready, or says why there is none: handles
// then hold for as long as the kernel remembers what they are of.
func (fs *FS) openTable(asked bool) error {
	if !asked {
		return nil
	}
	fs.generation = rand.Uint32() // another FS's handles are of other nodes
	if !fs.config.NFSExport {
		fs.say("nfs_export: file handles do not outlive the kernel's memory of a file: there is no index")
		return nil
	}
	digest := sha256.New()
	for _, l := range fs.layers {
		if l.data {
			continue
		}
		var id fileID
		if err := identify(l.fd.Int(), "", l.uuid, &id); err != nil {
			return err
		}
		var b [fbHeader + sys.MaxHandle]byte
		digest.Write(id.appendTo(b[:0]))
	}
	var workdir *sys.Fd // without an upper handles hold for as long as the FS is open
	if fs.upper != nil {
		workdir = fs.upper.workdir
	}
	t, err := openHandles(workdir, [16]byte(digest.Sum(nil)), fs.config.Volatile, func(id *fileID) bool {
		fd, err := fs.openObject(id)
		if err == nil {
			sys.CloseBare(fd)
		}
		return err != syscall.ESTALE && err != syscall.ENOENT
	})
	if err != nil {
		return err
	}
	fs.handleTable, fs.generation = t, t.incarnation
	fs.table.last = firstUnlasting
	return nil
}

// mayNumber tells whether what is in the lowers can be found by handles.
func (fs *FS) mayNumber() bool {
	for _, l := range fs.layers {
		var id fileID
		if err := identify(l.fd.Int(), "", l.uuid, &id); err != nil && !l.data {
			fs.say("nfs_export: %s has no file handles: %v", l.path, err)
			return false
		}
	}
	return !fs.ambiguous
}

// Generation tells two nodes apart that have the same ID at different times, or in
// different FSs.
func (n *Node) Generation() uint32 { return n.generation }

// openObject opens (O_PATH) the object below that an id is of; ESTALE where it is
// gone.
func (fs *FS) openObject(id *fileID) (int, error) {
	if id.inUpper {
		if id.uuid != fs.upper.uuid {
			return -1, syscall.ESTALE
		}
		return openID(fs.upper.root.Int(), id)
	}
	for _, r := range fs.roots {
		if r.uuid == id.uuid {
			return openID(r.fd, id)
		}
	}
	return -1, syscall.ESTALE
}

// openByHandle is locate for a node without a name.
func (fs *FS) openByHandle(n *Node, p *place) error {
	var id fileID
	if _, err := fs.handleTable.object(n.id, &id); err != nil {
		return err
	}
	fd, err := fs.openObject(&id)
	if err != nil {
		return syscall.ESTALE
	}
	p.dir = &dirFd{fd: fd, uses: 1, slot: -1} // closed when p is left
	p.fd, p.name = fd, ""
	return nil
}

// numbered gives what was found the number by which it comes back, unless its node
// is in memory and has one.
func (fs *FS) numbered(dir *Node, name string, f *found) {
	if f.numbered {
		return
	}
	key, byName := fs.keyOf(f)
	t := fs.table
	t.mu.Lock()
	n := t.byReal[key]
	// A directory of a lower may be shown at a second place, by a redirect: there it
	// is another node.
	known := n != nil && !byName && (fs.same(n, dir, name, f) || !n.isDir() && n.typ == f.st.Type())
	t.mu.Unlock()
	if known {
		return
	}
	f.numbered = true
	var id fileID
	err := fs.objectOf(dir, name, f, &id)
	if err == nil {
		f.number, f.generation, err = fs.handleTable.number(&id)
	}
	if err != nil && err != syscall.ENOENT && err != syscall.ESTALE {
		fs.say("nfs_export: handles of some files do not last: %v", err)
	}
}

// numberedOpen is numbered for a new file in the upper that has no name: it may get
// one.
func (fs *FS) numberedOpen(fd int, f *found) {
	var id fileID
	if identify(fd, "", fs.upper.uuid, &id) != nil {
		return
	}
	id.inUpper, f.numbered = true, true
	f.number, f.generation, _ = fs.handleTable.number(&id)
}

// objectOf says which object below what was found comes back by.
func (fs *FS) objectOf(dir *Node, name string, f *found, id *fileID) error {
	switch {
	case f.indexed != "":
		_, err := id.parseIndexName(f.indexed)
		return err
	case f.st.IsDir() && len(f.lowers) > 0:
		return fs.identifyDir(f.lowers[0], id)
	case f.upper:
		up, err := fs.upperDir(dir)
		if err != nil {
			return err
		}
		defer fs.dirs.done(up)
		err = identify(up.fd, name, fs.upper.uuid, id)
		id.inUpper = true
		return err
	}
	d, err := fs.real(f.low.dir)
	if err != nil {
		return err
	}
	defer fs.dirs.done(d)
	return identify(d.fd, f.low.name, f.low.dir.layer.uuid, id)
}

// takesNames begins a change that takes names away, and ended ends it.
func (fs *FS) takesNames() (ended func()) {
	if fs.handleTable == nil {
		return func() {}
	}
	fs.recalls.RLock()
	return fs.recalls.RUnlock
}

// Recall finds the node with an ID again, also when it has been forgotten, with
// Config.NFSExport; ESTALE where it is gone. The caller compares the generation.
func (fs *FS) Recall(id uint64) (Entry, error) {
	n, err := fs.recall(id)
	if err != nil {
		return Entry{}, err
	}
	a, err := fs.Getattr(n, nil)
	if err != nil {
		fs.Forget(id, 1)
		return Entry{}, err
	}
	return Entry{n, a}, nil
}

func (fs *FS) recall(id uint64) (*Node, error) {
	if fs.handleTable != nil {
		fs.recalls.Lock()
		defer fs.recalls.Unlock()
	}
	t := fs.table
	t.mu.Lock()
	n := t.byID[id]
	alive := n != nil && !n.has(isDead)
	if alive {
		n.refs++
	}
	t.mu.Unlock()
	switch {
	case alive:
		return n, nil
	case n != nil || fs.handleTable == nil:
		return nil, syscall.ESTALE
	}
	var object fileID
	generation, err := fs.handleTable.object(id, &object)
	if err != nil {
		return nil, err
	}
	for {
		n, err := fs.comeBack(id, generation, &object)
		if n != nil || err != nil {
			return n, wrongHandle(err)
		}
	}
}

// wrongHandle is what is said of a handle where its object is not found.
func wrongHandle(err error) error {
	if err == syscall.ENOENT || err == syscall.ENOTDIR {
		return syscall.ESTALE
	}
	return err
}

// comeBack makes the node of what has a number; nil: something has changed meanwhile.
func (fs *FS) comeBack(id uint64, generation uint32, object *fileID) (*Node, error) {
	ups := fs.indexUps.Load()
	fd, at, err := fs.openAnywhere(object)
	if err != nil {
		return nil, err
	}
	defer func() { sys.CloseBare(fd) }()
	f := found{number: id, generation: generation}
	if err := at.stat(fd, "", &f.st); err != nil {
		return nil, err
	}
	if f.st.IsDir() {
		if !at.upper && fs.upper != nil {
			if up, gone, err := fs.upper.openIndexed(object); err != nil || gone {
				return nil, orStale(err)
			} else if up >= 0 {
				sys.CloseBare(fd)
				fd, at = up, fs.layers[0]
			}
		}
		return fs.backAtPath(id, fd, at)
	}
	if at.upper {
		err = fs.foundInUpper(fd, &f)
	} else {
		err = fs.foundInLower(at, object, &f)
	}
	if err != nil {
		return nil, err
	}
	return fs.internUnnamed(&f, ups)
}

func orStale(err error) error {
	if err == nil {
		return syscall.ESTALE
	}
	return err
}

// openAnywhere opens an object, and tells in which layer it is: of what is no
// directory only on which file system.
func (fs *FS) openAnywhere(id *fileID) (fd int, at *layer, err error) {
	if id.inUpper {
		fd, err = fs.openObject(id)
		return fd, fs.layers[0], err
	}
	for _, l := range fs.layers {
		if l.upper || l.data || l.uuid != id.uuid {
			continue
		}
		fd, err = openID(l.fd.Int(), id)
		if err != syscall.ESTALE && err != syscall.ENOENT {
			return fd, l, err
		}
	}
	return -1, nil, syscall.ESTALE
}

// foundInUpper says what a file of the upper is found as.
func (fs *FS) foundInUpper(fd int, f *found) error {
	if f.st.Nlink == 0 || f.st.IsWhiteout() {
		return syscall.ESTALE
	}
	f.upper = true
	if _, err := fs.upperFacts(nil, fd, "", f, &lowerSearch{fs: fs, name: "."}); err != nil {
		return err
	}
	if !f.upper || f.indexed != "" || f.metacopy { // a whiteout; or another number is its own
		return syscall.ESTALE
	}
	return nil
}

// foundInLower says what a file of a lower, or its copy, is found as.
func (fs *FS) foundInLower(at *layer, object *fileID, f *found) error {
	f.hasLow, f.low, f.lowSt, f.lowFS = true, realPos{dir: at.root}, f.st, at.fsid
	if fs.upper == nil {
		return nil
	}
	entry := object.indexName()
	var st sys.Stat
	if sys.StatBare(fs.upper.index.Int(), entry, &st) == nil && fs.upper.isWhiteout(fs.upper.index.Int(), entry, &st) {
		return syscall.ESTALE
	}
	if err := fs.entryOf(entry, f); err != nil {
		return err
	}
	if f.metacopy || f.upper && f.nlink == 0 {
		return syscall.ESTALE
	}
	return nil
}

// internUnnamed gives the node of what was found by its number, with a reference.
// nil: something was copied up meanwhile, or is just being.
func (fs *FS) internUnnamed(f *found, ups uint32) (*Node, error) {
	key, _ := fs.keyOf(f)
	t := fs.table
	t.mu.Lock()
	defer t.mu.Unlock()
	if fs.indexUps.Load() != ups {
		return nil, nil
	}
	n := t.byReal[key]
	if n == nil && f.indexed != "" {
		if p := fs.copies[indexKey(f.indexed)]; p != nil {
			t.wait(p)
			return nil, nil
		}
	}
	switch {
	case n == nil && t.byID[f.number] == nil:
		n = fs.newNode(nil, "", f)
		n.set(byHandle)
		t.add(n, false)
	case n == nil || n.id != f.number || n.typ != f.st.Type():
		return nil, syscall.ESTALE
	}
	n.refs++
	return n, nil
}

// backAtPath finds a directory at its path in the union. fd is of what shows it.
func (fs *FS) backAtPath(id uint64, fd int, at *layer) (*Node, error) {
	names, err := fs.pathOf(fd, at)
	if err != nil {
		return nil, err
	}
	n := fs.root
	for i := len(names) - 1; i >= 0; i-- {
		if !n.isDir() {
			err = syscall.ESTALE
		}
		var e Entry
		if err == nil {
			e, err = fs.lookup(n, names[i], -1, false)
		}
		fs.Forget(n.id, 1) // the child holds it
		if err != nil {
			return nil, err
		}
		n = e.Node
	}
	if n.id != id {
		fs.Forget(n.id, 1)
		return nil, syscall.ESTALE
	}
	return n, nil
}

// pathOf is the path in the union of a directory of a layer, the last name first:
// its own in the layer, from the nearest parent on that was copied up the copy's.
func (fs *FS) pathOf(fd int, at *layer) (names []string, err error) {
	fd, err = sys.DupBare(fd)
	if err != nil {
		return nil, err
	}
	defer func() { sys.CloseBare(fd) }()
	var st sys.Stat
	if err := sys.StatBare(fd, "", &st); err != nil {
		return nil, err
	}
	for st.Ino != at.root.ino {
		up, err := sys.OpenBare(fd, "..", openDirFlags, 0)
		if err != nil {
			return nil, err
		}
		name, err := nameIn(up, fd, st.Ino)
		sys.CloseBare(fd)
		fd = up
		if err != nil {
			return nil, err
		}
		names = append(names, name)
		if !at.upper {
			if fd, at, err = fs.raisedDir(fd, at); err != nil {
				return nil, err
			}
		}
		if err := sys.StatBare(fd, "", &st); err != nil {
			return nil, err
		}
	}
	return names, nil
}

// raisedDir is the copy of a directory of a lower, if there is one, in the place of
// fd; else fd.
func (fs *FS) raisedDir(fd int, at *layer) (int, *layer, error) {
	if fs.upper == nil {
		return fd, at, nil
	}
	var id fileID
	if err := identify(fd, "", at.uuid, &id); err != nil {
		return fd, at, err
	}
	up, gone, err := fs.upper.openIndexed(&id)
	switch {
	case err != nil || gone:
		return fd, at, orStale(err)
	case up < 0:
		return fd, at, nil
	}
	sys.CloseBare(fd)
	return up, fs.layers[0], nil
}

// nameIn is the name in parent of the directory fd, whose inode number is ino: what
// the kernel says, or else what a search finds.
func nameIn(parent, fd int, ino uint64) (string, error) {
	var st sys.Stat
	if path, err := readlink(-1, "/proc/self/fd/"+strconv.Itoa(fd)); err == nil {
		name := path[strings.LastIndexByte(path, '/')+1:]
		if name != "" && sys.StatBare(parent, name, &st) == nil && st.Ino == ino {
			return name, nil
		}
	}
	n, err := sys.ReopenBare(parent, sys.O_RDONLY|sys.O_DIRECTORY)
	if err != nil {
		return "", err
	}
	dir := sys.NewFd(n, "parent of a handle's directory")
	defer dir.Close()
	all, err := dir.ReadDir()
	if err != nil {
		return "", err
	}
	for _, e := range all {
		if e.Ino == ino {
			return e.Name, nil
		}
	}
	return "", syscall.ESTALE
}
