package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/layerctl/layerctl/internal/sys"
)

// DiffOptions say how two trees are compared. The zero value compares every
// name and the bytes of every pair of files that are not one and the same.
type DiffOptions struct {
	// Candidates, if not nil, prunes: it names what may differ in directory dir
	// (a path as Entry.Path), in any order; all says that every name at every
	// depth below dir may, and then it is not asked again there. It is asked,
	// twice, for "." and for directories of both trees that it named itself. A
	// name that it leaves out must be the same in both trees with all below it,
	// but for membership of link groups, which is always found out; and two names
	// that it leaves out must be of one file in the one tree if they are in the
	// other. An error ends the walk.
	Candidates func(dir string) (names []string, all bool, err error)
	// SameFile, if not nil, is asked about two regular files of the same metadata
	// and reports that they are certain to be one file, content and xattrs, without
	// a look at the bytes. One inode of one file system is known to be the same
	// without it. (An overlayfs keeps the inode number of a file that it copies up,
	// so equal numbers alone prove nothing there.)
	SameFile func(from, to *sys.Stat) bool
	// Parts, if not nil, says of each name but the root how much of it is looked
	// at, in both trees: what it leaves out is taken not to be there.
	Parts func(path string, st *sys.Stat) Part
	// SkipWhiteoutNames leaves out names that begin with ".wh.", which no OCI
	// layer can carry, and reports them; otherwise such a change is an error that
	// names it and wraps ErrInvalidArgument.
	SkipWhiteoutNames bool
	// Skipped, if not nil, is told of each changed path that was left out, and why.
	Skipped func(path, reason string)
	// OverrideStat reads owner, mode and type from the xattr
	// user.containers.override_stat where it is, on both sides, and hides it.
	OverrideStat bool
}

// Part is how much of a name belongs to a tree.
type Part int

// The parts.
const (
	PartWhole  Part = iota // the name and all below it
	PartItself             // the name, a directory as if empty
	PartNone               // nothing
)

// The reasons that DiffOptions.Skipped and TarOptions.Skipped are told.
const (
	SkippedSocket       = "a socket is not in a layer"
	SkippedWhiteoutName = "a name that begins with " + WhiteoutPrefix + " is not in a layer"
)

// DiffTrees compares two directory trees exactly and yields what turns from
// into to, in path order. from "" is the empty tree. Paths are trusted; what is
// below them is opened one component at a time and never through a symlink. An
// error ends the sequence.
//
// A tree may change meanwhile: a name that goes is taken as deleted. The answer
// is exact for trees that stay as they are.
func DiffTrees(ctx context.Context, from, to string, o DiffOptions) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		d := &differ{ctx: ctx, o: o, heads: map[inode]string{}, yield: yield}
		if err := d.run(from, to); err != nil && err != errStop {
			yield(Change{}, fmt.Errorf("layer: diff %s: %w", to, err))
		}
	}
}

// differ walks two trees at once, in path order.
type differ struct {
	ctx   context.Context
	o     DiffOptions
	from  *side
	to    *side
	links *links
	heads map[inode]string  // of the groups of to: the first name that was yielded
	equal map[[2]inode]bool // contents compared already, of files with several names
	// equalNames are the link groups that were compared already.
	equalNames map[[2]inode]bool
	bufs       [2][]byte
	yield      func(Change, error) bool
	// yielded counts changes, so that a name is looked at again only before any.
	yielded int
}

// side is one of the two trees.
type side struct {
	chain *chain
	o     ReadOptions
}

// node is one name of one tree.
type node struct {
	name string
	st   sys.Stat
	e    Entry // without Path and Hardlink
	full bool  // e has its xattrs and link target
	part Part
}

// load describes a name where the side stands; nil if it is not there.
func (s *side) load(name string) (*node, error) {
	fd, err := s.chain.fd()
	if err != nil {
		return nil, err
	}
	st, err := fd.Stat(name)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	n := &node{name: name, st: st, e: statEntry(&st)}
	if s.o.OverrideStat { // the type may be another
		err = s.fill(n)
	}
	return n, err
}

// fill reads what stat does not say.
func (s *side) fill(n *node) error {
	if n.full {
		return nil
	}
	fd, err := s.chain.fd()
	if err != nil {
		return err
	}
	n.e, err = entryOf(fd, n.name, &n.st, s.o)
	n.full = err == nil
	return err
}

func (s *side) open(n *node) (*sys.Fd, error) {
	fd, err := s.chain.fd()
	if err != nil {
		return nil, err
	}
	return openFile(fd, n)
}

// openFile opens the regular file that n described, and nothing else that may
// have taken its name.
func openFile(dir *sys.Fd, n *node) (*sys.Fd, error) {
	f, err := dir.Openat(n.name, sys.O_RDONLY|sys.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat("")
	if err == nil && (!st.IsReg() || inodeOf(&st) != inodeOf(&n.st) || st.Btime != n.st.Btime) {
		err = fmt.Errorf("%s was replaced during the walk: %w", n.name, errdefs.ErrAborted)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (d *differ) run(from, to string) (err error) {
	ro := ReadOptions{OverrideStat: d.o.OverrideStat}
	d.to = &side{o: ro}
	if d.to.chain, err = newChain(to); err != nil {
		return err
	}
	defer d.to.chain.close()
	if from != "" {
		d.from = &side{o: ro}
		if d.from.chain, err = newChain(from); err != nil {
			return err
		}
		defer d.from.chain.close()
	}
	d.links = &links{ctx: d.ctx, from: from, to: to}
	s := scope{all: d.o.Candidates == nil || from == ""}
	if !s.all {
		if err := d.prune(); err != nil {
			return err
		}
	}
	return d.root(s)
}

func (d *differ) root(s scope) error {
	f, t, err := d.loadBoth("", d.from != nil, true)
	if err != nil {
		return err
	}
	s.candidate = true
	return d.pair(".", f, t, s)
}

// scope says which names of a directory are compared.
type scope struct {
	all       bool // every name at every depth
	candidate bool // the directory itself may differ: Candidates is asked for its names
}

// dir compares the directories that both sides stand in; inFrom is false where
// only to has it.
func (d *differ) dir(path string, inFrom bool, s scope) error {
	names, err := d.names(path, inFrom, &s)
	if err != nil {
		return err
	}
	for n := range names {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		if err := d.name(join(path, n.name), &n, s.all); err != nil {
			return err
		}
	}
	return nil
}

// named is a name to be compared, and why.
type named struct {
	name      string
	inFrom    bool // may be there
	inTo      bool
	candidate bool // may differ; else it is only passed through or a link group's
	extra     bool // a name that Candidates left out of a link group that changed
}

// names are what is to be compared in a directory, in order.
func (d *differ) names(path string, inFrom bool, s *scope) (iter.Seq[named], error) {
	if !s.all && s.candidate {
		names, all, err := d.o.Candidates(path)
		if err != nil {
			return nil, err
		}
		if s.all = all; !all {
			return slices.Values(d.links.withExtras(path, names)), nil
		}
	}
	if !s.all {
		return slices.Values(d.links.withExtras(path, nil)), nil
	}
	from := &nameList{}
	if inFrom {
		var err error
		if from, err = d.from.list(); err != nil {
			return nil, err
		}
	}
	to, err := d.to.list()
	if err != nil {
		return nil, err
	}
	return mergeNames(from, to), nil
}

// list reads the directory that the side stands in; one that went is empty.
func (s *side) list() (*nameList, error) {
	fd, err := s.chain.fd()
	if err != nil {
		return nil, err
	}
	return readNames(fd)
}

func mergeNames(from, to *nameList) iter.Seq[named] {
	return func(yield func(named) bool) {
		for i, j := 0, 0; i < from.len() || j < to.len(); {
			c := 0
			switch {
			case j == to.len():
				c = -1
			case i == from.len():
				c = 1
			default:
				c = bytes.Compare(from.bytes(from.at[i]), to.bytes(to.at[j]))
			}
			n := named{inFrom: c <= 0, inTo: c >= 0, candidate: true}
			if n.inFrom {
				n.name = from.name(i)
				i++
			}
			if n.inTo {
				if !n.inFrom {
					n.name = to.name(j)
				}
				j++
			}
			if !yield(n) {
				return
			}
		}
	}
}

func (d *differ) loadBoth(name string, inFrom, inTo bool) (f, t *node, err error) {
	if inFrom {
		if f, err = d.from.load(name); err != nil {
			return nil, nil, err
		}
	}
	if inTo {
		t, err = d.to.load(name)
	}
	return f, t, err
}

// name compares one name. One that goes while it is read is looked at again,
// unless something was said of it already.
func (d *differ) name(path string, n *named, all bool) error {
	for try := 1; ; try++ {
		before := d.yielded
		err := d.nameOnce(path, n, all)
		if !errors.Is(err, syscall.ENOENT) || d.yielded != before || try == 3 {
			return err
		}
	}
}

func (d *differ) nameOnce(path string, n *named, all bool) error {
	f, t, err := d.loadBoth(n.name, n.inFrom, n.inTo)
	if err != nil {
		return err
	}
	f, t = d.parts(path, f), d.parts(path, t)
	s := scope{all: all, candidate: n.candidate}
	if !n.candidate && !n.extra {
		if f == nil || t == nil || !f.e.IsDir() || !t.e.IsDir() {
			return nil // went meanwhile
		}
		return d.descend(path, f, t, s)
	}
	if f, t, err = d.noSockets(path, f, t); err != nil {
		return err
	}
	return d.pair(path, f, t, s)
}

// parts drops a node that does not belong to its tree.
func (d *differ) parts(path string, n *node) *node {
	if d.o.Parts == nil || n == nil {
		return n
	}
	if n.part = d.o.Parts(path, &n.st); n.part == PartNone {
		return nil
	}
	return n
}

func (d *differ) unchanged(path string, f, t *node) (bool, error) {
	a, err := d.compare(path, f, t)
	return a == 0, err
}

func (d *differ) skip(path, reason string) {
	if d.o.Skipped != nil {
		d.o.Skipped(path, reason)
	}
}

// noSockets takes sockets for names that are not there. One that is new or
// another is reported.
func (d *differ) noSockets(path string, f, t *node) (*node, *node, error) {
	fs, ts := f != nil && f.e.Type == TypeSocket, t != nil && t.e.Type == TypeSocket
	if ts {
		same := false
		if fs {
			var err error
			if same, err = d.unchanged(path, f, t); err != nil {
				return nil, nil, err
			}
		}
		if !same {
			d.skip(path, SkippedSocket)
		}
		t = nil
	}
	if fs {
		f = nil
	}
	return f, t, nil
}

// pair decides about a name that is in at least one tree, yields, and goes on
// below it.
func (d *differ) pair(path string, f, t *node, s scope) error {
	var err error
	switch {
	case f == nil && t == nil:
		return nil
	case t == nil:
		err = d.emitDeleted(path)
	case f == nil:
		err = d.emitFile(path, t, Added, 0)
	default:
		var a Aspect
		if a, err = d.compare(path, f, t); err == nil && a != 0 {
			err = d.emitFile(path, t, Modified, a)
		}
	}
	if err != nil || t == nil || !t.e.IsDir() {
		return err
	}
	return d.descend(path, f, t, s)
}

// descend compares what is in the directory t and, if that is one, in f.
func (d *differ) descend(path string, f, t *node, s scope) error {
	inFrom := f != nil && f.e.IsDir() && f.part == PartWhole
	if t.part != PartWhole {
		return d.emptied(path, f, inFrom)
	}
	if !inFrom {
		s.all = true
	}
	if path == "." {
		return d.dir(path, inFrom, s)
	}
	if inFrom {
		if err := d.from.chain.enter(f.name); err != nil {
			return gone(err)
		}
		defer d.from.chain.leave()
	}
	if err := d.to.chain.enter(t.name); err != nil {
		return gone(err)
	}
	defer d.to.chain.leave()
	return d.dir(path, inFrom, s)
}

// emptied deletes all that from has below a directory that has nothing in to.
func (d *differ) emptied(path string, f *node, inFrom bool) error {
	if !inFrom {
		return nil
	}
	if err := d.from.chain.enter(f.name); err != nil {
		return gone(err)
	}
	defer d.from.chain.leave()
	names, err := d.from.list()
	if err != nil {
		return err
	}
	for i := 0; i < names.len() && err == nil; i++ {
		var n *node
		child := join(path, names.name(i))
		if n, err = d.from.load(names.name(i)); err != nil {
			return err
		}
		if n = d.parts(child, n); n != nil && n.e.Type != TypeSocket {
			err = d.emitDeleted(child)
		}
	}
	return err
}

// gone takes a directory that went meanwhile for an empty one.
func gone(err error) error {
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	return err
}

func (d *differ) emitDeleted(path string) error {
	if refused, err := d.refuse(path); refused {
		return err
	}
	return d.emit(Change{Kind: Deleted, Entry: Entry{Path: path}})
}

func (d *differ) emit(c Change) error {
	d.yielded++
	if !d.yield(c, nil) {
		return errStop
	}
	return nil
}

// emitFile yields the new state of a path. Every name of a group is yielded, in
// order, so the first one met here is the group's head.
func (d *differ) emitFile(path string, t *node, k Kind, a Aspect) error {
	if refused, err := d.refuse(path); refused {
		return err
	}
	if err := d.to.fill(t); err != nil {
		return err
	}
	c := Change{Kind: k, Aspects: a, Entry: t.e}
	c.Entry.Path = path
	if linkable(&t.st) {
		if head, ok := d.heads[inodeOf(&t.st)]; ok {
			c.Entry.Hardlink = head
		} else {
			d.heads[inodeOf(&t.st)] = path
		}
	}
	if c.Entry.Type == TypeReg && c.Entry.Hardlink == "" {
		c.Open = func() (io.ReadCloser, error) { return d.to.open(t) }
	}
	return d.emit(c)
}

// refuse skips or refuses a changed path that a tar would say to be a deletion.
func (d *differ) refuse(path string) (bool, error) {
	if !hasWhiteoutName(path) {
		return false, nil
	}
	if d.o.SkipWhiteoutNames {
		d.skip(path, SkippedWhiteoutName)
		return true, nil
	}
	return true, fmt.Errorf("%s: %s: %w", path, SkippedWhiteoutName, errdefs.ErrInvalidArgument)
}

// sortedUnique sorts names and drops repeats and what is not a name.
func sortedUnique(names []string) []string {
	names = slices.DeleteFunc(slices.Clone(names), func(n string) bool {
		return n == "" || n == "." || n == ".." || strings.Contains(n, "/")
	})
	slices.Sort(names)
	return slices.Compact(names)
}
