package union

import (
	"errors"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// found is what a name leads to.
type found struct {
	st       sys.Stat // of what is shown
	upper    bool     // there is something in the upper
	covered  bool     // nothing is: a whiteout in the upper
	beside   bool     // which is a file .wh.NAME: nothing is at the name itself
	impure   bool     // of an upper directory
	opaque   bool
	xwhites  bool // files in it that have xattr whiteout are whiteouts
	metacopy bool // the upper's file, or the first lower's, has no data
	meta     metacopy
	redirect string // of what is in the upper

	low    realPos // of what is no directory: what is shown, or the upper's origin
	lowSt  sys.Stat
	lowFS  uint32
	hasLow bool

	data   realPos // where a metacopy file's data are
	dataSt dataInfo

	indexed  string // the entry in index of a file in the upper
	unlinked bool   // it is in the upper through index alone, and not at this name
	nlink    uint32 // what an indexed file shows

	lowers   []*realDir // of a directory
	lowerIno uint64     // the first one's

	numbered   bool   // Config.NFSExport: it was looked which number it has
	number     uint64 // by which it comes back; 0: none
	generation uint32
}

// Lookup finds a name; ENOENT where there is none. ".." is for file handles, as
// Recall is.
func (fs *FS) Lookup(dir *Node, name string) (Entry, error) {
	if !dir.isDir() {
		return Entry{}, syscall.ENOTDIR
	}
	switch {
	case name == "..":
		dir.mu.Lock()
		parent := dir.parent
		dir.mu.Unlock()
		if parent == nil {
			parent = dir
		}
		return fs.entry(parent)
	case len(name) > nameMax:
		return Entry{}, syscall.ENAMETOOLONG
	}
	return fs.lookup(dir, name, -1, false)
}

// nameMax is the longest name of a file.
const nameMax = 255

// entry is a node that exists as an Entry, with a reference for the caller.
func (fs *FS) entry(n *Node) (Entry, error) {
	a, err := fs.Getattr(n, nil)
	if err != nil {
		return Entry{}, err
	}
	fs.table.mu.Lock()
	n.refs++
	fs.table.mu.Unlock()
	return Entry{n, a}, nil
}

// lookup finds a name and gives the caller a reference. from is where the name
// is known to be: the number of a lower of dir; -1: not known. mine: the caller
// has locked dir.
func (fs *FS) lookup(dir *Node, name string, from int, mine bool) (Entry, error) {
	for {
		epoch := fs.epoch(dir)
		var f found
		if err := fs.find(dir, name, &f, from); err != nil {
			return Entry{}, err
		}
		n := fs.intern(dir, name, &f, epoch, mine)
		if n == nil {
			from = -1
			continue // something has changed meanwhile
		}
		fs.renew(n, dir, name, &f, epoch, mine)
		e := Entry{Node: n}
		if n.has(inUpper) != f.upper {
			// Known under its identity, and copied up since.
			a, err := fs.Getattr(n, nil)
			if err != nil {
				fs.Forget(n.id, 1)
				return Entry{}, err
			}
			e.Attr = a
			return e, nil
		}
		fs.show(n, &f.st, &e.Attr)
		return e, nil
	}
}

// find looks a name up in all layers; ENOENT where it is not. dir is a
// directory; name is one component.
func (fs *FS) find(dir *Node, name string, f *found, from int) error {
	d := lowerSearch{fs: fs, name: name}
	if fs.aufsName(name) {
		return syscall.ENOENT
	}
	if from < 0 && dir.has(inUpper) {
		stop, err := fs.findUpper(dir, name, f, &d)
		if err != nil {
			return err
		}
		if stop {
			return fs.finishFind(dir, name, f)
		}
	}
	if dir.has(isDead) {
		return syscall.ENOENT
	}
	// An absolute redirect goes on from the roots, whatever dir merges with.
	if len(dir.dir.lowers) > 0 || d.absolute() {
		if from < 0 {
			from = d.start(dir)
		} else if ix := dir.dir.index.Load(); ix != nil {
			e := ix.get(name)
			d.only = e != nil && int(e.lower) == from && e.flags&itemMore == 0
		}
		if err := d.run(dir, f, from); err != nil {
			return err
		}
	}
	return fs.finishFind(dir, name, f)
}

// start is the number of the first lower of dir to look into.
func (d *lowerSearch) start(dir *Node) int {
	if d.absolute() {
		return 0
	}
	ix := d.fs.indexOf(dir)
	if ix == nil {
		return 0
	}
	e := ix.get(d.name)
	if e == nil || e.flags&itemHidden != 0 {
		return len(dir.dir.lowers)
	}
	d.only = e.flags&itemMore == 0
	return int(e.lower)
}

// finishFind says what the result is.
func (fs *FS) finishFind(dir *Node, name string, f *found) error {
	switch {
	case f.metacopy && f.data.dir == nil && f.dataSt.lazy == "":
		fs.say("metacopy file %q without its data", name)
		return syscall.EIO
	case f.upper:
		return nil
	case f.hasLow:
		f.st = f.lowSt
		return fs.fromIndex(f)
	case len(f.lowers) > 0:
		return nil
	}
	if !f.covered && len(dir.dir.lowers) > 0 && dir.dir.index.Load() == nil && !dir.has(isDead) {
		fs.missed(dir, name)
	}
	return syscall.ENOENT
}

// findUpper looks in the upper; stop: what is below does not matter.
func (fs *FS) findUpper(dir *Node, name string, f *found, d *lowerSearch) (stop bool, err error) {
	up, err := fs.upperDir(dir)
	if err != nil {
		if err == syscall.ESTALE && dir.has(isDead) {
			err = syscall.ENOENT
		}
		return false, err
	}
	defer fs.dirs.done(up)
	err = sys.StatBare(up.fd, name, &f.st)
	switch {
	case err == syscall.ENOENT || err == syscall.ENAMETOOLONG:
		f.beside = fs.hiddenBeside(dir, up.fd, name)
		f.covered = f.beside
		return f.covered, nil
	case err != nil:
		return false, err
	case fs.whiteoutInUpper(dir, up.fd, name, &f.st):
		f.covered = true
		return true, nil
	}
	if err := fs.layers[0].show(up.fd, name, &f.st); err != nil {
		return false, err
	}
	f.upper = true
	if !f.st.IsDir() && !fs.mayHaveFacts(dir, &f.st) {
		return true, nil
	}
	return fs.upperFacts(dir, up.fd, name, f, d)
}

// mayHaveFacts tells whether something in the upper that is not a directory may
// have xattrs of overlayfs: only copied-up objects do, and they make their
// directory impure; or a metacopy file that is seen to lack data.
func (fs *FS) mayHaveFacts(dir *Node, st *sys.Stat) bool {
	return dir.has(isImpure) || fs.lacksData(st)
}

// lacksData tells whether a regular file may be one without its data. A file
// system may count blocks of xattrs with those of data, so that with metacopy
// on, or layers of data, all are asked.
func (fs *FS) lacksData(st *sys.Stat) bool {
	return st.IsReg() && (fs.config.Metacopy || fs.hasData() || st.Blocks*512 < st.Size)
}

func (fs *FS) upperFacts(dir *Node, up int, name string, f *found, d *lowerSearch) (stop bool, err error) {
	var facts facts
	if err := fs.readFacts(up, name, &facts); err != nil {
		return false, err
	}
	if f.st.IsDir() {
		f.impure, f.opaque, f.redirect, f.xwhites = facts.impure, facts.opaque, facts.redirect, facts.xwhiteouts
		if !f.opaque && dir != nil && (len(dir.dir.lowers) > 0 || f.redirect != "") {
			f.opaque = fs.aufsOpaque(up, name)
		}
		d.isDir = true
		if f.opaque {
			return true, nil
		}
		return false, d.redirect(facts.redirect)
	}
	if f.st.IsReg() && facts.metacopy {
		if !fs.config.Metacopy {
			fs.say("metacopy file %q is not followed: metacopy is off", name)
			return true, syscall.EPERM
		}
		f.metacopy, f.meta, f.redirect, d.metacopy = true, facts.meta, facts.redirect, true
		if fs.config.Index && facts.originKnown {
			fs.findOrigin(&facts.origin, f)
			fs.upperIndexed(f, &facts)
			f.hasLow = false // what it goes on from is found by its name
		}
		return false, d.redirect(facts.redirect)
	}
	if facts.originKnown {
		fs.findOrigin(&facts.origin, f)
		fs.upperIndexed(f, &facts)
	}
	return true, nil
}

// readFacts reads the overlay xattrs of name below dir. One that is not valid is
// said, and taken as the kernel takes it.
func (fs *FS) readFacts(dir int, name string, f *facts) error {
	err := fs.names.readFacts(dir, name, f)
	var bad *corruptError
	if errors.As(err, &bad) {
		fs.say("%q: %v", name, bad)
		if bad.errno == 0 {
			return nil
		}
		return bad.errno
	}
	if err == syscall.EOPNOTSUPP || err == syscall.EPERM {
		return nil
	}
	return err
}

// isXWhiteout tells whether a file may be a whiteout by its xattr.
func isXWhiteout(st *sys.Stat, inXDir bool) bool { return inXDir && st.IsReg() && st.Size == 0 }

// lowerSearch is a look into the lowers, one after the other.
type lowerSearch struct {
	fs       *FS
	name     string // what is looked for: a name, or from a redirect on an absolute path
	redir    bool   // name is from a redirect
	isDir    bool   // a directory was found: only directories merge with it
	metacopy bool   // a file without data was found: only a regular file goes on from it
	stop     bool
	only     bool // no further lower of this directory has the name
	final    bool // no further lower is looked into, whatever hides the name there
}

// redirect sets what is looked for from here on; "": as before.
func (d *lowerSearch) redirect(to string) error {
	if to == "" {
		return nil
	}
	d.redir = true
	if to[0] == '/' {
		d.name = to
		return nil
	}
	// A relative redirect is another name in the same directory.
	if i := strings.LastIndexByte(d.name, '/'); i >= 0 {
		to = d.name[:i+1] + to
	}
	d.name = to
	return nil
}

// run looks through dir's lowers from number from on. An absolute redirect goes
// on from the roots of the layers below the one that it was found in.
func (d *lowerSearch) run(dir *Node, f *found, from int) error {
	stack := dir.dir.lowers
	atRoot := dir == d.fs.root
	if d.absolute() {
		stack, atRoot = d.fs.root.dir.lowers, true
	}
	for i := from; i < len(stack) && !d.stop; i++ {
		if d.redir && d.fs.config.Redirect == RedirectNoFollow {
			d.fs.say("redirect to %q is not followed: redirect_dir is nofollow", d.name)
			return syscall.EPERM
		}
		base := stack[i]
		if err := d.mayGoOn(base); err != nil {
			return err
		}
		was := d.redir
		d.final = !d.redir && !d.metacopy && !d.absolute() && (d.only || i == len(stack)-1)
		if err := d.one(base, f); err != nil {
			return err
		}
		if d.only && !d.redir && !d.metacopy {
			break
		}
		if d.absolute() && !atRoot && (!was || d.redir) {
			stack, atRoot = d.fs.root.dir.lowers, true
			i = d.fs.after(base.layer) - 1
		}
	}
	if f.metacopy && f.data.dir == nil && d.absolute() && d.fs.hasData() {
		f.dataSt = dataInfo{lazy: d.name, blocks: guessedBlocks(f)}
		return nil // whatever metacopy and redirect_dir say, as the kernel
	}
	return d.mayGoOn(nil)
}

// mayGoOn is EPERM where metacopy is off and the data of a file would have to be in a
// further lower: base, or none.
func (d *lowerSearch) mayGoOn(base *realDir) error {
	if !d.metacopy || d.fs.config.Metacopy {
		return nil
	}
	in := ""
	if base != nil {
		in = " into " + base.layer.path
	}
	d.fs.say("metacopy file %q is not followed%s: metacopy is off", d.name, in)
	return syscall.EPERM
}

// guessedBlocks is how many blocks a file shows before its data are looked for.
func guessedBlocks(f *found) int64 {
	st := &f.lowSt
	if f.upper {
		st = &f.st
	}
	const page = 4096
	return (st.Size + page - 1) / page * (page / 512)
}

func (d *lowerSearch) absolute() bool { return d.name[0] == '/' }

// after is the number among the root's lowers of the first one below l.
func (fs *FS) after(l *layer) int {
	for i, r := range fs.root.dir.lowers {
		if r.layer.index > l.index {
			return i
		}
	}
	return len(fs.root.dir.lowers)
}

// one looks into one lower: at d.name below base, or below base's root.
func (d *lowerSearch) one(base *realDir, f *found) error {
	if !d.absolute() {
		_, err := d.single(base, d.name, "", "", f)
		return err
	}
	base = base.layer.root
	at := 1
	for base != nil {
		end := strings.IndexByte(d.name[at:], '/')
		if end < 0 {
			_, err := d.single(base, d.name[at:], d.name[:at], "", f)
			return err
		}
		end += at
		rest := len(d.name) - end
		next, err := d.single(base, d.name[at:end], d.name[:at], d.name[end:], f)
		if err != nil {
			return err
		}
		base = next
		at = len(d.name) - rest + 1 // a redirect on the way may have changed what is before
	}
	return nil
}

// single looks at one component in one lower. before and after are the rest of
// an absolute path; the directory is returned where after goes on.
func (d *lowerSearch) single(base *realDir, name, before, after string, f *found) (*realDir, error) {
	fd, err := d.fs.real(base)
	if err != nil {
		return nil, err
	}
	defer d.fs.dirs.done(fd)
	var st sys.Stat
	err = sys.StatBare(fd.fd, name, &st)
	if err == syscall.ENOENT || err == syscall.ENAMETOOLONG {
		return nil, d.whiteoutFile(base, fd.fd, name)
	}
	if err != nil {
		return nil, err
	}
	if st.IsWhiteout() || d.fs.aufsName(name) {
		d.stop = true
		return nil, nil
	}
	if err := base.layer.show(fd.fd, name, &st); err != nil {
		return nil, err
	}
	last := after == ""
	if !st.IsDir() {
		if d.isDir || !last || d.metacopy && !st.IsReg() {
			d.stop = true
			return nil, nil
		}
		return nil, d.file(base, fd.fd, name, &st, f)
	}
	if d.metacopy && last {
		d.stop = true
		return nil, nil
	}
	return d.directory(base, fd.fd, name, before, after, &st, f)
}

// whiteoutFile is for a name that is not there: an AUFS whiteout may be.
func (d *lowerSearch) whiteoutFile(base *realDir, fd int, name string) error {
	if d.final || !d.fs.config.AUFSWhiteouts || len(name) > nameMax-len(aufsPrefix) {
		return nil
	}
	var st sys.Stat
	err := sys.StatBare(fd, aufsPrefix+name, &st)
	if err == nil || err == syscall.ENOENT {
		d.stop = d.stop || err == nil
		return nil
	}
	return err
}

// file takes a lower's file into account.
func (d *lowerSearch) file(base *realDir, fd int, name string, st *sys.Stat, f *found) error {
	var facts facts
	if st.IsReg() && (st.Size == 0 && base.xwhiteouts || d.fs.lacksData(st)) {
		if err := d.fs.readFacts(fd, name, &facts); err != nil {
			return err
		}
	}
	if facts.whiteout && isXWhiteout(st, base.xwhiteouts) {
		d.stop = true
		return nil
	}
	pos := realPos{base, name}
	first := !f.hasLow
	if first {
		f.hasLow, f.low, f.lowSt, f.lowFS = true, pos, *st, base.layer.fsid
	}
	if !facts.metacopy {
		if d.metacopy {
			f.data, f.dataSt = pos, dataInfo{blocks: st.Blocks}
		}
		d.stop = true
		return nil
	}
	if first && !f.upper {
		f.metacopy, f.meta = true, facts.meta
	}
	// A directory on the way that is opaque does not keep the data from being
	// looked for further down.
	d.metacopy, d.stop = true, false
	return d.redirect(facts.redirect)
}

// directory takes a lower's directory into account.
func (d *lowerSearch) directory(base *realDir, fd int, name, before, after string, st *sys.Stat, f *found) (*realDir, error) {
	r := &realDir{layer: base.layer, parent: base, name: name, ino: st.Ino}
	last := after == ""
	if last {
		d.isDir = true
		if len(f.lowers) == 0 && !f.upper {
			f.st, f.lowFS = *st, base.layer.fsid
		}
		if len(f.lowers) == 0 {
			f.lowerIno, f.lowFS = st.Ino, base.layer.fsid
		}
		f.lowers = append(f.lowers, r)
	}
	var facts facts
	if err := d.fs.readFacts(fd, name, &facts); err != nil {
		return nil, err
	}
	r.xwhiteouts = facts.xwhiteouts
	if facts.opaque || !(d.final && facts.redirect == "") && d.fs.aufsOpaque(fd, name) {
		d.stop = true
		return r, nil
	}
	switch to := facts.redirect; {
	case to == "":
	case to[0] == '/': // leads away from below what was opaque on the way
		d.name, d.redir, d.stop = to+after, true, false
	case before == "":
		d.name, d.redir = to, true
	default:
		d.name, d.redir = before+to+after, true
	}
	return r, nil
}

const (
	aufsPrefix = ".wh."
	aufsMarker = ".wh..wh..opq"
)

// aufsName tells whether a name is a marker that is never shown.
func (fs *FS) aufsName(name string) bool {
	return fs.config.AUFSWhiteouts && strings.HasPrefix(name, aufsPrefix)
}

// aufsOpaque tells whether the directory name below fd has AUFS's opaque marker.
func (fs *FS) aufsOpaque(fd int, name string) bool {
	if !fs.config.AUFSWhiteouts {
		return false
	}
	found, err := sys.ExistsBelowBare(fd, name, aufsMarker)
	if err == nil {
		return found
	}
	dir, err := sys.OpenBare(fd, name, openDirFlags, 0)
	if err != nil {
		return false
	}
	defer sys.CloseBare(dir)
	var st sys.Stat
	return sys.StatBare(dir, aufsMarker, &st) == nil
}

// hasData tells whether there are layers of data alone.
func (fs *FS) hasData() bool { return len(fs.config.DataLowers) > 0 }

// lowerHas tells whether a lower of dir shows name, whatever the upper has.
func (fs *FS) lowerHas(dir *Node, name string) (bool, error) {
	if len(dir.dir.lowers) == 0 {
		return false, nil
	}
	if ix := fs.indexOf(dir); ix != nil {
		e := ix.get(name)
		return e != nil && e.flags&itemHidden == 0, nil
	}
	dir.dir.mu.Lock()
	missed := dir.dir.miss == name
	dir.dir.mu.Unlock()
	if missed {
		return false, nil
	}
	for i, r := range dir.dir.lowers {
		found, hidden, err := fs.realHas(r, name, i == len(dir.dir.lowers)-1)
		if found || hidden || err != nil {
			return found && !hidden, err
		}
	}
	fs.missed(dir, name)
	return false, nil
}

// missed remembers that no lower of dir has a name: whoever looks for one that is
// not there may be about to make it.
func (fs *FS) missed(dir *Node, name string) {
	dir.dir.mu.Lock()
	dir.dir.miss = name
	dir.dir.mu.Unlock()
}

// realHas tells whether a lower directory has a name, and whether it is hidden
// there and below; last: it does not matter whether a name that is not there is hidden.
func (fs *FS) realHas(r *realDir, name string, last bool) (found, hidden bool, err error) {
	d, err := fs.real(r)
	if err != nil {
		return false, false, err
	}
	defer fs.dirs.done(d)
	var st sys.Stat
	err = sys.StatBare(d.fd, name, &st)
	switch {
	case err == syscall.ENOENT || err == syscall.ENAMETOOLONG:
		if !last && fs.config.AUFSWhiteouts && len(name) <= nameMax-len(aufsPrefix) {
			hidden = sys.StatBare(d.fd, aufsPrefix+name, &st) == nil
		}
		return false, hidden, nil
	case err != nil:
		return false, false, err
	case st.IsWhiteout() || fs.aufsName(name):
		return false, true, nil
	case isXWhiteout(&st, r.xwhiteouts):
		var facts facts
		err = fs.readFacts(d.fd, name, &facts)
		return !facts.whiteout, facts.whiteout, err
	}
	return true, false, nil
}
