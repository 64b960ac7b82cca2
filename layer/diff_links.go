package layer

import (
	"context"
	"errors"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
	"golang.org/x/sync/errgroup"
)

// links knows which names of each tree are of one file. Membership of a group
// must be known in both trees before the first of its names is decided about.
//
// Without pruning, both trees are read once more, when the first file with
// several names in both trees is met: stats only, side by side. With pruning,
// the names of such files among the candidates are read first, and where the
// link count says that there are more, the directories that hold them are
// searched, then the whole tree.
type links struct {
	ctx                context.Context
	from, to           string
	fromIndex, toIndex *linkIndex
	candidates         map[string]bool            // pruning: names of files with several names that Candidates gave
	extras             map[string]map[string]bool // pruning: dir -> name -> is a member (not only passed through)
}

// ready reads what is not known yet.
func (l *links) ready() error {
	if l.fromIndex != nil {
		return nil
	}
	l.fromIndex, l.toIndex = newLinkIndex(), newLinkIndex()
	var g errgroup.Group
	g.Go(func() error { return l.fromIndex.scanTree(l.ctx, l.from) })
	g.Go(func() error { return l.toIndex.scanTree(l.ctx, l.to) })
	return g.Wait()
}

// linkIndex holds the names of the files of one tree that have several.
type linkIndex struct {
	names    map[inode][]string // in path order once sorted
	nlink    map[inode]uint32
	seen     map[string]bool // dir -> read whole
	complete bool
}

func newLinkIndex() *linkIndex {
	return &linkIndex{names: map[inode][]string{}, nlink: map[inode]uint32{}, seen: map[string]bool{}}
}

// group is the set of names that share the file of path, in path order.
func (x *linkIndex) group(path string, st *sys.Stat) []string {
	if linkable(st) {
		names := x.names[inodeOf(st)]
		if _, found := slices.BinarySearchFunc(names, path, ComparePaths); found {
			return names
		}
	}
	return []string{path}
}

// add takes a name; one of a whiteout name is no member of a layer's group.
func (x *linkIndex) add(path string, st *sys.Stat) {
	if !linkable(st) || hasWhiteoutName(path) {
		return
	}
	k := inodeOf(st)
	x.nlink[k] = st.Nlink
	names := x.names[k]
	if n := len(names); n == 0 || ComparePaths(names[n-1], path) < 0 {
		x.names[k] = append(names, path)
		return
	}
	if i, found := slices.BinarySearchFunc(names, path, ComparePaths); !found {
		x.names[k] = slices.Insert(names, i, path)
	}
}

func hasWhiteoutName(path string) bool {
	return strings.HasPrefix(path, WhiteoutPrefix) || strings.Contains(path, "/"+WhiteoutPrefix)
}

func (x *linkIndex) scanTree(ctx context.Context, dir string) error {
	if x.complete || dir == "" {
		return nil
	}
	c, err := newChain(dir)
	if err != nil {
		return err
	}
	defer c.close()
	x.complete = true
	return x.scan(ctx, c, ".")
}

// scan adds every name at and below the directory that c stands in.
func (x *linkIndex) scan(ctx context.Context, c *chain, dir string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	fd, err := c.fd()
	if err != nil {
		return err
	}
	entries, err := fd.ReadDir()
	if err != nil {
		return err
	}
	// In path order a name goes to the end of its group, which may have 65,000.
	slices.SortFunc(entries, func(a, b sys.Dirent) int { return strings.Compare(a.Name, b.Name) })
	for i := range entries {
		if err := x.scanName(ctx, c, dir, &entries[i]); err != nil && !errors.Is(err, syscall.ENOENT) {
			return err
		}
	}
	return nil
}

func (x *linkIndex) scanName(ctx context.Context, c *chain, dir string, n *sys.Dirent) error {
	isDir := n.Type == sys.S_IFDIR
	if !isDir {
		fd, err := c.fd()
		if err != nil {
			return err
		}
		st, err := fd.Stat(n.Name)
		if err != nil {
			return err
		}
		if isDir = st.IsDir(); !isDir {
			if linkable(&st) {
				x.add(join(dir, n.Name), &st)
			}
			return nil
		}
	}
	if err := c.enter(n.Name); err != nil {
		return err
	}
	defer c.leave()
	return x.scan(ctx, c, join(dir, n.Name))
}

// scanDir adds the names of one directory, not of those below it.
func (x *linkIndex) scanDir(root *sys.Fd, dir string) error {
	if x.seen[dir] || x.complete {
		return nil
	}
	x.seen[dir] = true
	fd, err := openPath(root, dir)
	if err != nil {
		return err
	}
	defer fd.Close()
	entries, err := fd.ReadDir()
	if err != nil {
		return err
	}
	for _, n := range entries {
		if n.Type == sys.S_IFDIR {
			continue
		}
		st, err := fd.Stat(n.Name)
		if err != nil && !errors.Is(err, syscall.ENOENT) {
			return err
		}
		if err == nil {
			x.add(join(dir, n.Name), &st)
		}
	}
	return nil
}

// openPath opens a directory of a tree that the caller closes.
func openPath(root *sys.Fd, dir string) (*sys.Fd, error) {
	if dir == "." {
		return root.Openat(".", sys.O_RDONLY|sys.O_DIRECTORY, 0)
	}
	return openBelow(root, strings.Split(dir, "/"))
}

// finish finds the names that the link counts say are missing: beside the known
// ones first, then everywhere. A count that is never reached (names outside the
// tree, or hidden by a layer above) costs the whole walk.
func (x *linkIndex) finish(ctx context.Context, c *chain, tree string) error {
	if !x.incomplete() {
		return nil
	}
	dirs := map[string]bool{}
	for k, names := range x.names {
		if uint32(len(names)) < x.nlink[k] {
			for _, n := range names {
				dirs[path.Dir(n)] = true
			}
		}
	}
	for d := range dirs {
		if err := x.scanDir(c.root, d); err != nil {
			return err
		}
	}
	if !x.incomplete() {
		return nil
	}
	return x.scanTree(ctx, tree)
}

func (x *linkIndex) incomplete() bool {
	for k, names := range x.names {
		if uint32(len(names)) < x.nlink[k] {
			return true
		}
	}
	return false
}

// prune reads the candidates' files with several names, and finds the names
// outside the candidates whose group changed with them.
func (d *differ) prune() error {
	l := d.links
	l.fromIndex, l.toIndex = newLinkIndex(), newLinkIndex()
	l.candidates, l.extras = map[string]bool{}, map[string]map[string]bool{}
	if err := d.collect("."); err != nil {
		return err
	}
	// Only the groups that hold a candidate matter: the searches below may add others.
	fromGroups, toGroups := l.keys(l.fromIndex), l.keys(l.toIndex)
	if err := l.fromIndex.finish(d.ctx, d.from.chain, l.from); err != nil {
		return err
	}
	if err := l.toIndex.finish(d.ctx, d.to.chain, l.to); err != nil {
		return err
	}
	l.outside(l.fromIndex, fromGroups)
	l.outside(l.toIndex, toGroups)
	return nil
}

func (l *links) keys(x *linkIndex) []inode {
	keys := make([]inode, 0, len(x.names))
	for k := range x.names {
		keys = append(keys, k)
	}
	return keys
}

// collect indexes the candidates in and below a directory of both trees, where
// both chains stand.
func (d *differ) collect(dir string) error {
	names, all, err := d.o.Candidates(dir)
	if err != nil {
		return err
	}
	if all {
		return errors.Join(d.collectTree(d.from, d.links.fromIndex, dir), d.collectTree(d.to, d.links.toIndex, dir))
	}
	for _, name := range sortedUnique(names) {
		if err := d.collectName(dir, name); err != nil {
			return err
		}
	}
	return nil
}

func (d *differ) collectName(dir, name string) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	f, t, err := d.loadBoth(name, true, true)
	if err != nil {
		return err
	}
	p := join(dir, name)
	fromDir, toDir := f != nil && f.st.IsDir(), t != nil && t.st.IsDir()
	if f != nil && !fromDir {
		d.candidate(d.links.fromIndex, p, &f.st)
	}
	if t != nil && !toDir {
		d.candidate(d.links.toIndex, p, &t.st)
	}
	enter := func(s *side) error { return s.chain.enter(name) }
	switch {
	case fromDir && toDir:
		if err := enter(d.from); err != nil {
			return err
		}
		defer d.from.chain.leave()
		if err := enter(d.to); err != nil {
			return err
		}
		defer d.to.chain.leave()
		return d.collect(p)
	case fromDir:
		if err := enter(d.from); err != nil {
			return err
		}
		defer d.from.chain.leave()
		return d.collectTree(d.from, d.links.fromIndex, p)
	case toDir:
		if err := enter(d.to); err != nil {
			return err
		}
		defer d.to.chain.leave()
		return d.collectTree(d.to, d.links.toIndex, p)
	}
	return nil
}

func (d *differ) candidate(x *linkIndex, path string, st *sys.Stat) {
	if linkable(st) {
		d.links.candidates[path] = true
		x.add(path, st)
	}
}

// collectTree indexes a whole subtree, each name of which is a candidate.
func (d *differ) collectTree(s *side, x *linkIndex, dir string) error {
	part := newLinkIndex()
	if err := part.scan(d.ctx, s.chain, dir); err != nil {
		return err
	}
	for k, names := range part.names {
		for _, n := range names {
			st := sys.Stat{Mode: sys.S_IFREG, Nlink: part.nlink[k], Dev: k.dev, Ino: k.ino}
			d.candidate(x, n, &st)
		}
	}
	return nil
}

// outside makes the walk visit the members of x's groups that are no candidates.
// That their groups changed needs no further search: a group of the other tree is
// the same only if it holds the same candidates, and then it was found whole.
func (l *links) outside(x *linkIndex, groups []inode) {
	for _, k := range groups {
		for _, n := range x.names[k] {
			if !l.candidates[n] {
				l.addExtra(n)
			}
		}
	}
}

// addExtra makes the walk visit a name and pass through its directories.
func (l *links) addExtra(p string) {
	member := true
	for p != "." {
		dir := path.Dir(p)
		if l.extras[dir] == nil {
			l.extras[dir] = map[string]bool{}
		}
		l.extras[dir][path.Base(p)] = member || l.extras[dir][path.Base(p)]
		p, member = dir, false
	}
}

// withExtras joins a directory's candidates and the names of changed groups.
func (l *links) withExtras(dir string, candidates []string) []named {
	byName := map[string]named{}
	for _, n := range sortedUnique(candidates) {
		byName[n] = named{name: n, inFrom: true, inTo: true, candidate: true}
	}
	for n, member := range l.extras[dir] {
		e := byName[n]
		byName[n] = named{name: n, inFrom: true, inTo: true, candidate: e.candidate, extra: member}
	}
	all := make([]named, 0, len(byName))
	for _, n := range byName {
		all = append(all, n)
	}
	slices.SortFunc(all, func(a, b named) int { return strings.Compare(a.name, b.name) })
	return all
}
