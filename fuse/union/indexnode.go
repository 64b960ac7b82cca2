package union

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

// With Config.Index the names of a lower file stay names of one file when it is
// copied up. All of them lead to one Node. Once it is in the upper it is reached
// through its entry in index, whatever names it has there: a name that only the
// lower has is in the upper "unlinked". Before such a name is removed or renamed
// it is linked in the upper, so that the link count on disk follows by itself.

// indexed is what the node of an indexed file has more. Under Node.mu.
type indexed struct {
	name string // of its entry
	diff int32  // shown links less those of the inode in the upper
}

// openIndex makes index ready, or says why there is none: index=off is as good,
// but for hard links.
func (fs *FS) openIndex() error {
	fs.findRoots()
	u := fs.upper
	if u == nil {
		fs.config.NFSExport = fs.config.NFSExport && fs.mayNumber()
		return nil
	}
	if u.work == nil || !fs.config.Index {
		fs.config.Index, fs.config.NFSExport = false, false
		return nil
	}
	var lowers []layerRoot
	for _, l := range fs.layers {
		if l.upper || l.data {
			continue
		}
		r, err := sys.Open(l.fd.ProcPath(), sys.O_RDONLY|sys.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer r.Close()
		lowers = append(lowers, layerRoot{r.Int(), l.uuid})
	}
	if len(lowers) == 0 {
		fs.noIndex(errors.New("there is no lower"))
		return nil
	}
	if err := u.mayIndex(lowers); err != nil {
		fs.noIndex(err)
		return nil
	}
	if fs.ambiguous {
		fs.noIndex(errors.New("lowers on different file systems have the same UUID, or none"))
		return nil
	}
	if err := u.verifyOrigins(lowers[0]); err != nil {
		return err
	}
	if err := u.cleanIndex(lowers); err != nil {
		return fmt.Errorf("cleaning index: %w", err)
	}
	return nil
}

func (fs *FS) noIndex(why error) {
	fs.say("index is off: %v", why)
	fs.config.Index, fs.config.NFSExport = false, false
	fs.upper.index.Close()
	fs.upper.index, fs.upper.exportAll = nil, false
}

// findRoots finds out by which layers origins can be found: the first on each file
// system whose UUID no other has. A file system without a UUID can be told only if
// it is the one such, and then only where a lower that was changed is no matter.
func (fs *FS) findRoots() {
	type system struct {
		at    int
		fsid  uint32
		twice bool
	}
	byUUID := map[[16]byte]*system{}
	strict := fs.config.Index || fs.config.Metacopy || fs.config.Redirect == RedirectOn
	for i, l := range fs.layers {
		if l.upper || l.data {
			continue
		}
		s := byUUID[l.uuid]
		if s == nil {
			s = &system{at: i, fsid: l.fsid}
			byUUID[l.uuid] = s
		}
		s.twice = s.twice || s.fsid != l.fsid
	}
	for uuid, s := range byUUID {
		if s.twice || uuid == [16]byte{} && !strict {
			fs.ambiguous = fs.ambiguous || s.twice
			continue
		}
		l := fs.layers[s.at]
		if r, err := sys.Open(l.fd.ProcPath(), sys.O_RDONLY|sys.O_DIRECTORY, 0); err == nil {
			fs.roots = append(fs.roots, originRoot{layerRoot{r.Int(), uuid}, r, l.fsid})
		}
	}
	fs.handles = fs.upper != nil && fs.upper.can.handles == kprobe.Yes
}

// originRoot is a layer by which origins on its file system are opened.
type originRoot struct {
	layerRoot
	own  *sys.Fd
	fsid uint32
}

// findOrigin finds the lower file that one in the upper was copied from, whose
// number it keeps.
func (fs *FS) findOrigin(id *fileID, f *found) {
	if !fs.handles {
		return
	}
	for _, r := range fs.roots {
		if r.uuid != id.uuid {
			continue
		}
		fd, _, err := resolve(id, []layerRoot{r.layerRoot})
		if err != nil || fd < 0 {
			return
		}
		var st sys.Stat
		if sys.StatBare(fd, "", &st) == nil && st.Type() == f.st.Type() {
			f.hasLow, f.lowFS, f.lowSt = true, r.fsid, st
		}
		sys.CloseBare(fd)
		return
	}
}

// needsIndex tells whether something in a lower goes by way of index when it is
// copied up.
func (fs *FS) needsIndex(low *sys.Stat) bool {
	if fs.upper == nil || fs.upper.index == nil {
		return false
	}
	return fs.upper.exportAll || !low.IsDir() && low.Nlink > 1
}

// upperIndexed finds out whether a file in the upper is the one that index has for
// its origin. f.lowSt is of the origin.
func (fs *FS) upperIndexed(f *found, facts *facts) {
	if !facts.originKnown || !f.hasLow || !fs.needsIndex(&f.lowSt) {
		return
	}
	name := facts.origin.indexName()
	var st sys.Stat
	if sys.StatBare(fs.upper.index.Int(), name, &st) != nil || st.Ino != f.st.Ino {
		return // copied up without index, or index was deleted since
	}
	f.setIndexed(name, facts)
}

func (f *found) setIndexed(name string, facts *facts) {
	f.indexed = name
	f.nlink = f.st.Nlink
	if facts.hasNlink {
		if n, ok := facts.nlink.shown(f.st.Nlink, f.lowSt.Nlink); ok {
			f.nlink = n
		}
	}
}

// fromIndex looks whether a file that was found in a lower was copied up under
// another name.
func (fs *FS) fromIndex(f *found) error {
	if !fs.needsIndex(&f.lowSt) || f.low.dir == nil {
		return nil
	}
	d, err := fs.real(f.low.dir)
	if err != nil {
		return err
	}
	defer fs.dirs.done(d)
	var id fileID
	if err := identify(d.fd, f.low.name, f.low.dir.layer.uuid, &id); err != nil {
		return nil // mayIndex found handles: this is of the one file
	}
	return fs.entryOf(id.indexName(), f)
}

// entryOf takes an index entry into account; none is fine.
func (fs *FS) entryOf(name string, f *found) error {
	index := fs.upper.index.Int()
	var st sys.Stat
	err := sys.StatBare(index, name, &st)
	if err == syscall.ENOENT {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Type() != f.lowSt.Type() {
		fs.say("index entry %s is of another type than the file in a lower", name)
		return syscall.EIO
	}
	var facts facts
	if err := fs.readFacts(index, name, &facts); err != nil {
		return err
	}
	f.upper, f.unlinked, f.st = true, true, st
	f.setIndexed(name, &facts)
	f.redirect = facts.redirect
	if facts.metacopy && !f.metacopy {
		f.metacopy, f.meta = true, facts.meta
		f.data, f.dataSt = f.low, dataInfo{blocks: f.lowSt.Blocks}
	} else if !facts.metacopy {
		f.metacopy = false
	}
	return nil
}

// epoch changes whenever something was copied up, or has changed in dir, that a
// look into dir may have missed.
func (fs *FS) epoch(dir *Node) uint32 {
	return dir.dir.copied.Load() + dir.dir.changed.Load() + fs.indexUps.Load()
}

// indexKey is where a node stands in FS.copies while it is copied up into index.
func indexKey(name string) nameKey { return nameKey{0, name} }

// becomeIndexed tells a node that it is in index; n.mu is held. shown is what the
// union shows, st of the inode.
func (n *Node) becomeIndexed(name string, shown uint32, st *sys.Stat) {
	n.extra().index = indexed{name, int32(shown) - int32(st.Nlink)}
	n.set(isIndexed)
}

// shownLinks is how many links an indexed file shows whose inode has real.
func (n *Node) shownLinks(real uint32) uint32 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return uint32(max(int32(real)+n.more.index.diff, 0))
}

// linkName makes sure that a name that is about to go or to move is in the upper,
// if what it leads to is indexed or has to be. dir and the node are locked.
func (fs *FS) linkName(dir *Node, name string, v *victim) error {
	n := v.node
	switch {
	case n == nil || fs.upper.index == nil:
		return nil
	case v.f.upper && !v.f.unlinked:
		if n.isDir() || !n.has(isIndexed) {
			return nil
		}
		// Another of its names may have gone since it was found.
		return fs.statUpper(dir, name, &v.f.st)
	case !n.has(inUpper):
		if !fs.needsIndex(&v.f.st) {
			return nil
		}
		if err := fs.copyUpAt(0, dir, name, n, copyMeta, nil); err != nil {
			return err
		}
	case v.f.unlinked:
		if err := fs.linkUnlinked(dir, name, v); err != nil {
			return err
		}
	default:
		// Copied up since it was found, by another name, or it would be here.
		var again victim
		if err := fs.findVictim(dir, name, &again); err != nil {
			return err
		}
		fs.release(again.node)
		v.f = again.f
		if !v.f.unlinked {
			return nil
		}
		if err := fs.linkUnlinked(dir, name, v); err != nil {
			return err
		}
	}
	v.upper, v.below, v.f.upper, v.f.unlinked = true, true, true, false
	return fs.statUpper(dir, name, &v.f.st)
}

// linkUnlinked links an indexed file under a name that only the lower has.
func (fs *FS) linkUnlinked(dir *Node, name string, v *victim) error {
	n := v.node
	up, err := fs.upperDir(dir)
	if err != nil {
		return err
	}
	defer fs.dirs.done(up)
	n.mu.Lock()
	entry := n.more.index.name
	n.mu.Unlock()
	id := new(fileID)
	if known, err := id.parseIndexName(entry); err != nil || !known {
		return syscall.EIO
	}
	var st sys.Stat
	if err := sys.StatBare(fs.upper.index.Int(), entry, &st); err != nil {
		return err
	}
	r := copyRequest{src: copySource{id: id, stat: v.f.lowSt, data: -1}, dir: up.fd, name: name, shared: true,
		nlink: n.shownLinks(st.Nlink), impure: dir.has(isImpure)}
	if err := fs.upper.copyUp(context.Background(), &r); err != nil {
		return err
	}
	n.mu.Lock()
	n.more.index.diff--
	n.mu.Unlock()
	dir.set(isImpure)
	dir.dir.copied.Add(1)
	dir.dir.changed.Add(1)
	return nil
}

// statUpper describes a name in the upper.
func (fs *FS) statUpper(dir *Node, name string, st *sys.Stat) error {
	up, err := fs.upperDir(dir)
	if err != nil {
		return err
	}
	defer fs.dirs.done(up)
	return sys.StatBare(up.fd, name, st)
}

// countLinks writes the link count of an indexed file relative to the upper's,
// before that changes.
func (fs *FS) countLinks(n *Node) error {
	if n == nil || !n.has(isIndexed) || n.isDir() {
		return nil
	}
	n.mu.Lock()
	entry, diff := n.more.index.name, n.more.index.diff
	n.mu.Unlock()
	var b [16]byte
	return sys.SetxattrBare(fs.upper.index.Int(), entry, fs.names.nlink, linkCount{'U', diff}.appendTo(b[:0]), 0)
}

// lastName tells whether the victim's name is the last one that is shown.
func (fs *FS) lastName(v *victim) bool {
	if n := v.node; n != nil && n.has(isIndexed) && !n.isDir() {
		// The upper knows better than a count which a link in a lower, made behind
		// this mount's back, has put out of step.
		return n.shownLinks(v.f.st.Nlink) <= 1 && v.f.st.Nlink <= indexAndName
	}
	return v.f.st.IsDir() || !v.upper || v.f.st.Nlink == 1
}

// indexAndName are the links of an indexed file that has one name in the upper.
const indexAndName = 2

// keepCount corrects the count of an indexed file that has lost a name, has others in
// the upper, and would show none: nobody could link it then.
func (n *Node) keepCount(real uint32) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if ix := &n.more.index; real >= indexAndName && int32(real)+ix.diff < 1 {
		ix.diff = 1 - int32(real)
	}
}

// leaveIndex is called when the last name of something indexed is gone.
func (fs *FS) leaveIndex(n *Node) {
	var id fileID
	var err error
	known := false
	switch {
	case n == nil || fs.upper.index == nil:
	case n.isDir():
		known = fs.upper.exportAll && len(n.dir.lowers) > 0 && fs.identifyDir(n.dir.lowers[0], &id) == nil
	case n.has(isIndexed):
		n.mu.Lock()
		entry := n.more.index.name
		n.mu.Unlock()
		known, err = id.parseIndexName(entry)
	}
	if known && err == nil {
		err = fs.upper.dropIndexed(&id)
	}
	if err != nil {
		fs.say("an index entry cannot be removed: %v", err)
	}
}

func (fs *FS) identifyDir(r *realDir, id *fileID) error {
	d, err := fs.real(r)
	if err != nil {
		return err
	}
	defer fs.dirs.done(d)
	return identify(d.fd, "", r.layer.uuid, id)
}

// goesByIndex tells whether what was found changes its names by way of index.
func (fs *FS) goesByIndex(f *found) bool {
	return f.indexed != "" || !f.upper && fs.needsIndex(&f.st)
}

// originPath is where an indexed file goes on in the layers.
func (fs *FS) originPath(n *Node) string {
	n.mu.Lock()
	at := n.low
	if at.dir == nil && n.more != nil {
		at = n.more.data
	}
	n.mu.Unlock()
	path := "/" + at.name
	for d := at.dir; d != nil && d.parent != nil; d = d.parent {
		path = "/" + d.name + path
	}
	return path
}
