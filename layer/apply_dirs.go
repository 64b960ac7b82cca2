package layer

import (
	"cmp"
	"container/list"
	"errors"
	"fmt"
	"hash/maphash"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// dir is a directory of the tree as it is seen, by its resolved path.
type dir struct {
	path string // no symlink, no ".."; "." is the root
	// up is the directory in the target; nil if it is only below.
	up *sys.Fd
	// below says what of the lower tree is seen through it; low is that directory
	// if it is merged, else nil.
	below below
	low   *sys.Fd
	// own: all that up holds was put there by this layer.
	own bool
	// What new names in it inherit; valid if up is set.
	gid        uint32
	setgid     bool
	defaultACL bool
	// mtime is what the directory shall have, and is written by settle if dirty.
	mtime sys.Time
	dirty bool
	// mode is written by settle if relaxed: an unprivileged process needs
	// permission to work in a directory that gives none.
	mode    uint32
	relaxed bool
	pins    int // uses that forbid to close it
	place   *list.Element
}

// below is what is seen through a directory of an overlay upper.
type below byte

const (
	nothing below = iota // a complete tree, an opaque directory, or nothing there
	merged               // dir.low
	unknown              // an upper whose lower is not known
)

// describe reads what d.up has.
func (u *unpacker) describe(d *dir) error {
	st, err := d.up.Stat("")
	if err != nil {
		return err
	}
	d.mtime, d.gid, d.setgid, d.mode = st.Mtime, st.GID, st.Mode&0o2000 != 0, st.Mode&0o7777
	_, err = d.up.Getxattr("", "system.posix_acl_default")
	d.defaultACL = err == nil
	if err := noXattr(err); err != nil {
		return err
	}
	return u.relax(d)
}

// relax gives an unprivileged process what it needs to work in its own directory.
func (u *unpacker) relax(d *dir) error {
	if u.privileged || d.mode&0o700 == 0o700 {
		return nil
	}
	d.relaxed = true
	return d.up.Chmod(d.mode | 0o700)
}

// settle writes what had to wait until nothing more happens in the directory.
func (d *dir) settle() error {
	if d.up == nil {
		return nil
	}
	if d.relaxed {
		if err := d.up.Chmod(d.mode); err != nil {
			return err
		}
	}
	if !d.dirty {
		return nil
	}
	d.dirty = false
	return d.up.Utimes("", sys.TimeOmit, d.mtime)
}

// cache keeps directories open, the most recently used ones. The zero value is
// empty. The root is not in it.
type cache struct {
	byPath  map[string]*dir
	order   list.List // of *dir, most recently used first
	lowOnly int       // how many are only below
	most    int       // 0 means cacheSize
}

// cacheSize bounds open directories; each may have two descriptors.
const cacheSize = 128

func (c *cache) get(path string) *dir {
	d := c.byPath[path]
	if d != nil {
		c.order.MoveToFront(d.place)
	}
	return d
}

// add takes a directory in and closes the least recently used one.
func (c *cache) add(d *dir) error {
	if c.byPath == nil {
		c.byPath = map[string]*dir{}
	}
	c.byPath[d.path] = d
	if d.up == nil {
		c.lowOnly++
	}
	d.place = c.order.PushFront(d)
	most := cmp.Or(c.most, cacheSize)
	for e := c.order.Back(); len(c.byPath) > most && e != nil && e.Value != d; {
		old := e.Value.(*dir)
		e = e.Prev()
		if old.pins > 0 {
			continue
		}
		if err := c.drop(old, true); err != nil {
			return err
		}
	}
	return nil
}

// drop closes d; settle is false if the directory is about to be removed.
func (c *cache) drop(d *dir, settle bool) error {
	delete(c.byPath, d.path)
	c.order.Remove(d.place)
	if d.up == nil {
		c.lowOnly--
	}
	var err error
	if settle {
		err = d.settle()
	}
	d.up.Close()
	d.low.Close()
	return err
}

// forget drops path, if self, and all below it.
func (c *cache) forget(path string, self, settle bool) error {
	var errs []error
	for p, d := range c.byPath {
		if p == path && self || path == "." || strings.HasPrefix(p, path) && len(p) > len(path) && p[len(path)] == '/' {
			errs = append(errs, c.drop(d, settle))
		}
	}
	return errors.Join(errs...)
}

// forgetLow drops what is known of a lower directory at path, which something
// new in the target hides or is merged with.
func (c *cache) forgetLow(path string) error {
	if c.lowOnly == 0 {
		return nil
	}
	return c.forget(path, true, true)
}

func (c *cache) clear(settle bool) error { return c.forget(".", true, settle) }

// mark is what this layer did at a path. A path without a mark was there before,
// unless its directory is the layer's own (dir.own): then it is the layer's,
// unless it is marked passed.
//
// Paths are kept as 64-bit hashes with a random seed: of four million entries
// two collide with a probability of one in two million.
type mark byte

const (
	markMine   mark = 1 << iota // the archive brings this path, or implies it and nothing was there
	markOwn                     // a directory: dir.own
	markPassed                  // in an own directory: copied up, not brought by the archive
	markListed                  // a file that was there before and is in the listing since a link names it
)

func (u *unpacker) hash(path string) uint64 { return maphash.String(u.seed, path) }

func (u *unpacker) markOf(path string) mark {
	if len(u.marks) == 0 {
		return 0
	}
	return u.marks[u.hash(path)]
}

func (u *unpacker) setMark(path string, m mark) {
	h := u.hash(path)
	if m == 0 {
		delete(u.marks, h)
		return
	}
	u.marks[h] = m
	u.passed = u.passed || m&markPassed != 0
}

// noteMine records that the archive brings path, in a directory that is own or not;
// made says that it is a new directory.
func (u *unpacker) noteMine(path string, own, made bool) {
	u.implied.named(path)
	switch {
	case own && (!u.passed || u.markOf(path) == 0):
	case own:
		u.setMark(path, 0)
	case made:
		u.setMark(path, markMine|markOwn)
	default:
		u.setMark(path, u.markOf(path)|markMine)
	}
}

// isMine reports whether this layer brings path; own is its directory's.
func (u *unpacker) isMine(path string, own bool) bool {
	if own {
		return !u.passed || u.markOf(path)&markPassed == 0
	}
	return u.markOf(path)&markMine != 0
}

// isOwn is dir.own of the directory path; parent is that of its parent.
func (u *unpacker) isOwn(path string, parent bool) bool {
	return parent || u.markOf(path)&markOwn != 0
}

// maxLinks is how many symlinks one path may go through, as in the kernel
// (include/linux/namei.h: MAXSYMLINKS).
const maxLinks = 40

// resolver walks one path of the archive.
type resolver struct {
	u     *unpacker
	build bool // make what is missing, in the target
	todo  []string
	links int
}

// resolve finds the directory that path leads to. With build, what is missing
// is made and the directory is in the target; else a directory that is not there
// wraps ENOENT. It is in the cache, valid until the next resolve unless pinned.
func (u *unpacker) resolve(path string, build bool) (*dir, error) {
	if d := u.cached(path, build); d != nil {
		return d, nil
	}
	from, rest := u.nearest(path, build)
	r := resolver{u: u, build: build, todo: strings.Split(rest, "/")}
	return r.walk(from)
}

// cached finds a directory by its path as it is spelled. A path that is a key of
// the cache has neither symlink nor "..": it is its own resolution.
func (u *unpacker) cached(path string, build bool) *dir {
	if path == "" || path == "." {
		return u.root
	}
	if d := u.dirs.get(path); d != nil && (d.up != nil || !build) {
		return d
	}
	return nil
}

// nearest is the deepest open directory on the way to path, and the rest of the way.
func (u *unpacker) nearest(path string, build bool) (*dir, string) {
	for i := len(path); ; {
		i = strings.LastIndexByte(path[:i], '/')
		if i < 0 {
			return u.root, path
		}
		if d := u.cached(path[:i], build); d != nil && i > 0 {
			return d, path[i+1:]
		}
	}
}

func (r *resolver) walk(cur *dir) (*dir, error) {
	for len(r.todo) > 0 {
		name := r.todo[0]
		r.todo = r.todo[1:]
		var err error
		switch name {
		case "", ".":
		case "..":
			cur, err = r.u.parent(cur, r.build)
		default:
			cur, err = r.step(cur, name)
		}
		if err != nil {
			return nil, err
		}
	}
	return cur, nil
}

// parent is the directory above d; the root's is the root.
func (u *unpacker) parent(d *dir, build bool) (*dir, error) {
	i := strings.LastIndexByte(d.path, '/')
	if i < 0 {
		return u.root, nil
	}
	return u.resolve(d.path[:i], build)
}

// step goes from cur to name, or where the symlink name leads.
func (r *resolver) step(cur *dir, name string) (*dir, error) {
	path, target := join(cur.path, name), ""
	cur.pins++ // what is opened next must not close it
	defer func() { cur.pins-- }()
	d := r.u.dirs.get(path)
	var err error
	if d == nil {
		d, target, err = r.u.lookup(cur, name, path)
	}
	switch {
	case err != nil:
		return nil, err
	case target != "":
		return r.follow(cur, name, target)
	case d == nil && !r.build:
		return nil, fmt.Errorf("directory %s: %w", quoteName(path), syscall.ENOENT)
	case d == nil:
		return r.u.implyDir(cur, name)
	case d.up == nil && r.build:
		return d, r.u.copyUpDir(cur, name, d)
	}
	return d, nil
}

func (r *resolver) follow(cur *dir, name, target string) (*dir, error) {
	if r.links++; r.links > maxLinks {
		return nil, fmt.Errorf("symlink %s: %w: %w", quoteName(join(cur.path, name)), syscall.ELOOP, errdefs.ErrInvalidArgument)
	}
	r.todo = append(strings.Split(target, "/"), r.todo...)
	if target[0] == '/' {
		return r.u.root, nil
	}
	return cur, nil
}

// lookup finds name in cur: an open directory, which it puts into the cache, or
// the target of a symlink, or neither if nothing is there.
func (u *unpacker) lookup(cur *dir, name, path string) (d *dir, target string, err error) {
	if cur.up != nil {
		d, target, found, err := u.lookupUp(cur, name, path)
		if found || err != nil {
			return d, target, err
		}
	}
	if cur.below != merged {
		return nil, "", nil
	}
	return u.lookupLow(cur, name, path)
}

// lookupUp looks in the target alone. found without d and target is a whiteout.
func (u *unpacker) lookupUp(cur *dir, name, path string) (d *dir, target string, found bool, err error) {
	fd, err := u.openDir(cur.up, name)
	switch {
	case err == nil:
		d, err := u.openedDir(cur, name, path, fd)
		return d, "", true, err
	case notThere(err):
		return nil, "", false, nil
	case !errors.Is(err, syscall.ENOTDIR) && !errors.Is(err, syscall.ELOOP):
		return nil, "", false, err
	}
	st, err := cur.up.Stat(name)
	if err != nil {
		return nil, "", false, err
	}
	if white, err := u.o.Whiteouts.IsWhiteout(cur.up, name, &st); white || err != nil {
		return nil, "", true, err
	}
	target, err = symlinkTarget(cur.up, name, path, &st)
	return nil, target, true, err
}

// openDir opens one directory, with permission that its owner may lack.
func (u *unpacker) openDir(in *sys.Fd, name string) (*sys.Fd, error) {
	fd, err := in.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if u.privileged || !errors.Is(err, syscall.EACCES) {
		return fd, err
	}
	path, perr := in.Openat(name, sys.O_PATH|sys.O_DIRECTORY, 0)
	if perr != nil {
		return nil, err
	}
	defer path.Close()
	st, perr := path.Stat("")
	if perr != nil {
		return nil, err
	}
	if perr := in.ChmodAt(name, st.Mode&0o7777|0o700); perr != nil {
		return nil, err
	}
	defer in.ChmodAt(name, st.Mode&0o7777) // describe relaxes it again and remembers
	return in.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
}

// symlinkTarget reads a symlink in the way of a path; anything else is refused.
func symlinkTarget(in *sys.Fd, name, path string, st *sys.Stat) (string, error) {
	if st.Type() != sys.S_IFLNK {
		return "", fmt.Errorf("%s is in the way: %w: %w", quoteName(path), syscall.ENOTDIR, errdefs.ErrInvalidArgument)
	}
	return in.Readlink(name)
}

// openedDir describes a directory that is in the target and caches it.
func (u *unpacker) openedDir(cur *dir, name, path string, fd *sys.Fd) (*dir, error) {
	d := &dir{path: path, up: fd, own: u.isOwn(path, cur.own)}
	if err := u.findBelow(cur, name, d); err != nil {
		fd.Close()
		return nil, err
	}
	if err := u.describe(d); err != nil {
		fd.Close()
		d.low.Close()
		return nil, err
	}
	return d, u.dirs.add(d)
}

// findBelow finds what is seen through d, an upper directory named name in cur.
func (u *unpacker) findBelow(cur *dir, name string, d *dir) error {
	if cur.below == nothing {
		return nil
	}
	if opaque, err := u.o.Whiteouts.IsOpaque(d.up); opaque || err != nil {
		return err
	}
	if err := u.refuseRedirect(d); err != nil {
		return err
	}
	d.below = cur.below
	if cur.below == merged {
		return u.mergeLow(cur, name, d)
	}
	return nil
}

// mergeLow opens the lower directory that d, a directory of the target, is merged
// with; a lower file is hidden by it.
func (u *unpacker) mergeLow(cur *dir, name string, d *dir) error {
	low, err := cur.low.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	switch {
	case err == nil:
		d.low, d.below = low, merged
		return nil
	case notThere(err) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP):
		d.below = nothing
		return nil
	}
	return err
}

// refuseRedirect: an upper made with redirect_dir=on has directories whose lower
// is elsewhere. Unpacking into such a one goes through a mount.
func (u *unpacker) refuseRedirect(d *dir) error {
	if d.own {
		return nil
	}
	_, err := d.up.Getxattr("", u.o.Whiteouts.overlayXattr("redirect"))
	if err == nil {
		return fmt.Errorf("directory %s was renamed with redirect_dir: %w", quoteName(d.path), errdefs.ErrFailedPrecondition)
	}
	return noXattr(err)
}

// lookupLow looks in the lower tree, for what the target does not have.
func (u *unpacker) lookupLow(cur *dir, name, path string) (d *dir, target string, err error) {
	low, err := cur.low.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	switch {
	case err == nil:
		d = &dir{path: path, low: low, below: merged}
		return d, "", u.dirs.add(d)
	case notThere(err):
		return nil, "", nil
	case !errors.Is(err, syscall.ENOTDIR) && !errors.Is(err, syscall.ELOOP):
		return nil, "", err
	}
	st, err := cur.low.Stat(name)
	if err != nil || st.IsWhiteout() {
		return nil, "", err
	}
	target, err = symlinkTarget(cur.low, name, path, &st)
	return nil, target, err
}

// fromRoot takes off what means the root, as it begins many archives' paths.
func fromRoot(path string) string {
	for {
		if rest, ok := strings.CutPrefix(path, "./"); ok {
			path = rest
		} else if rest, ok := strings.CutPrefix(path, "/"); ok {
			path = rest
		} else {
			return path
		}
	}
}

// spot is where an entry goes: a name in a directory. name "" is the directory
// itself.
type spot struct {
	d    *dir
	name string
	path string
}

// find resolves the path of an entry but for its last component, which is never
// followed.
func (u *unpacker) find(path string, build bool) (spot, error) {
	parent, base := splitPath(fromRoot(path))
	if base == "" || base == ".." {
		d, err := u.resolve(path, build)
		if err != nil {
			return spot{}, err
		}
		return spot{d: d, path: d.path}, nil
	}
	d, err := u.resolve(parent, build)
	if err != nil {
		return spot{}, err
	}
	return spot{d, base, join(d.path, base)}, nil
}
