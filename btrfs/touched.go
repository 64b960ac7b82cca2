package btrfs

import (
	"context"
	"errors"
	"io"
	"os"
	"path"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/btrfs/send"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// touched finds out where two read-only subvolumes may differ.
func touched(ctx context.Context, from, to *sys.Fd) (*layer.Candidates, error) {
	var t *namespace
	err := eachCommand(ctx, from, to, func() func(*send.Command) {
		t = newNamespace()
		return t.do
	})
	if err != nil {
		return nil, err
	}
	c := layer.NewCandidates()
	t.collect(c)
	g := groups{from: from, to: to, c: c, seen: map[uint64]bool{}}
	for _, p := range t.touched {
		if err := g.file(p); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// sendTries is how often a damaged stream is asked for again.
const sendTries = 3

// eachCommand lets the kernel write what turns from into to, without data, and
// reads it. A process that is stopped meanwhile, by SIGSTOP or a freezer, has the kernel
// begin anew in the middle of the stream; then all is read again, by what start
// returns next.
func eachCommand(ctx context.Context, from, to *sys.Fd, start func() func(*send.Command)) error {
	for try := 1; ; try++ {
		err := eachCommandOnce(ctx, from, to, start())
		if try == sendTries || !errdefs.IsInvalidArgument(err) {
			return err
		}
	}
}

func eachCommandOnce(ctx context.Context, from, to *sys.Fd, do func(*send.Command)) error {
	parent, err := ioctl.SubvolID(from)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	sent := make(chan error, 1)
	go func() {
		err := ioctl.Send(to, sys.NewFd(int(w.Fd()), "pipe"), parent, true)
		w.Close()
		sent <- err
	}()
	err = readAll(r, do)
	r.Close() // so that the kernel stops
	if sendErr := <-sent; sendErr != nil && (err == nil || !errors.Is(sendErr, syscall.EPIPE)) {
		err = sendErr
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func readAll(r io.Reader, do func(*send.Command)) error {
	s, err := send.NewReader(r)
	if err != nil {
		return err
	}
	for {
		c, err := s.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		do(&c)
	}
}

// namespace follows what the commands of a stream do to names, from the first
// tree on. A directory's names are looked at only when a command names them: what
// is not in kids is as the first tree has it. So a node knows where it came from,
// whatever it was called meanwhile (SEND moves what is in the way to names of its
// own, o257-7-0).
type namespace struct {
	root    *node
	nodes   []*node // that a command named other than in passing
	gone    map[string]bool
	touched []place
}

// node is a name that a command met.
type node struct {
	parent *node // nil: the root, or gone
	name   string
	origin string // its path in the first tree; "" if it is new
	named  bool
	kids   map[string]*node
	left   map[string]bool // names of the first tree that are not here any more
}

// place is where a file that a command named is in the two trees; "" for nowhere.
type place struct{ from, to string }

func newNamespace() *namespace {
	return &namespace{root: &node{origin: "."}, gone: map[string]bool{}}
}

// kid returns a name of a directory, met for the first time or not.
func (n *node) kid(name string) *node {
	if k := n.kids[name]; k != nil {
		return k
	}
	k := &node{}
	if n.origin != "" && !n.left[name] {
		k.origin = path.Join(n.origin, name)
	}
	n.attach(name, k)
	return k
}

func (n *node) attach(name string, k *node) {
	if n.kids == nil {
		n.kids = map[string]*node{}
	}
	k.parent, k.name = n, name
	n.kids[name] = k
}

func (t *namespace) at(p string) *node {
	n := t.root
	if p == "" {
		return n
	}
	for _, name := range strings.Split(p, "/") {
		n = n.kid(name)
	}
	return n
}

// dirOf splits a path at its last name.
func (t *namespace) dirOf(p string) (*node, string) {
	dir, name := path.Split(p)
	return t.at(strings.TrimSuffix(dir, "/")), name
}

// leave takes a name out of its directory.
func (t *namespace) leave(p string) *node {
	dir, name := t.dirOf(p)
	n := dir.kid(name)
	delete(dir.kids, name)
	t.replaced(dir, name)
	n.parent = nil
	return n
}

// replaced notes that what the first tree has under a name is not there now.
func (t *namespace) replaced(dir *node, name string) {
	if dir.origin == "" || dir.left[name] {
		return
	}
	if dir.left == nil {
		dir.left = map[string]bool{}
	}
	dir.left[name] = true
	t.gone[path.Join(dir.origin, name)] = true
}

func (t *namespace) enter(p string, n *node) {
	dir, name := t.dirOf(p)
	t.replaced(dir, name)
	if old := dir.kids[name]; old != nil {
		old.parent = nil
	}
	dir.attach(name, n)
	t.name(n)
}

func (t *namespace) name(n *node) {
	if !n.named {
		n.named = true
		t.nodes = append(t.nodes, n)
	}
}

// do follows one command.
func (t *namespace) do(c *send.Command) {
	switch c.Verb {
	case send.SUBVOL, send.SNAPSHOT, send.END:
	case send.MKFILE, send.MKDIR, send.MKNOD, send.MKFIFO, send.MKSOCK, send.SYMLINK:
		t.enter(c.Path, &node{})
	case send.LINK:
		t.name(t.at(c.Link))
		t.enter(c.Path, &node{})
	case send.RENAME:
		t.enter(c.To, t.leave(c.Path))
	case send.UNLINK, send.RMDIR:
		t.leave(c.Path)
	default:
		t.name(t.at(c.Path))
	}
}

// path is where a node is in the end; false if it is nowhere.
func (t *namespace) path(n *node) (string, bool) {
	var names []string
	for ; n != t.root; n = n.parent {
		if n.parent == nil {
			return "", false
		}
		names = append(names, n.name)
	}
	if len(names) == 0 {
		return ".", true
	}
	p := names[len(names)-1]
	for i := len(names) - 2; i >= 0; i-- {
		p += "/" + names[i]
	}
	return p, true
}

// collect says where the two trees may differ: at every name that is gone from
// where the first tree has it, and at every name that a command named. What came
// from elsewhere differs whole.
func (t *namespace) collect(c *layer.Candidates) {
	for p := range t.gone {
		c.Add(p)
	}
	for _, n := range t.nodes {
		p, there := t.path(n)
		if there {
			if p == n.origin {
				c.Add(p)
			} else {
				c.AddWhole(p)
			}
		} else {
			p = ""
		}
		t.touched = append(t.touched, place{from: n.origin, to: p})
	}
}

// groups adds the other names of files of several names: SEND names a file that
// changed by one of them.
type groups struct {
	from, to *sys.Fd
	c        *layer.Candidates
	seen     map[uint64]bool // inode numbers; those of one file are the same in both trees
}

func (g *groups) file(p place) error {
	if err := g.one(g.from, p.from); err != nil {
		return err
	}
	return g.one(g.to, p.to)
}

func (g *groups) one(tree *sys.Fd, p string) error {
	if p == "" || p == "." {
		return nil
	}
	f, err := tree.Openat2(p, sys.O_PATH|sys.O_NOFOLLOW, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat("")
	if err != nil || st.IsDir() || st.Nlink < 2 {
		return err
	}
	return g.inode(st.Ino)
}

// inode adds all names of an inode number in both trees.
func (g *groups) inode(ino uint64) error {
	if g.seen[ino] {
		return nil
	}
	g.seen[ino] = true
	for _, tree := range []*sys.Fd{g.from, g.to} {
		if err := g.names(tree, ino); err != nil {
			return err
		}
	}
	return nil
}

func (g *groups) names(tree *sys.Fd, ino uint64) error {
	q := ioctl.Query{
		Min: ioctl.Key{Object: ino, Type: ioctl.BTRFS_INODE_REF_KEY},
		Max: ioctl.Key{Object: ino, Type: ioctl.BTRFS_INODE_EXTREF_KEY, Offset: ^uint64(0)},
	}
	for i, err := range ioctl.Search(tree, q) {
		if err != nil {
			return err
		}
		if i.Type != ioctl.BTRFS_INODE_REF_KEY && i.Type != ioctl.BTRFS_INODE_EXTREF_KEY {
			continue
		}
		names, err := ioctl.DecodeNames(i)
		if err != nil {
			return err
		}
		for _, n := range names {
			dir, err := ioctl.Path(tree, 0, n.Dir)
			if err != nil {
				return err
			}
			g.c.Add(path.Join(dir, n.Name))
		}
	}
	return nil
}
