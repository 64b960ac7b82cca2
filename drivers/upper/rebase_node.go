package upper

import (
	"errors"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// rebaseNode is a name of the upper as a rebase is to leave it. What it is on
// disk is read by orig, for nothing on disk changes while a plan is made.
type rebaseNode struct {
	b       *rebaser
	up      *rebaseNode // nil: the root
	name    string
	orig    string // its path on disk; "": a directory to be made
	dir     bool
	implied bool // Apply made it up, and nobody has touched it
	mode    uint32
	mtime   sys.Time
	opaque  *string                // value of overlayfs's xattr; nil: not read yet
	known   map[string]*rebaseNode // of a directory; nil: known not to be there
	all     bool                   // known is all

	checked string    // the path at which relocate has looked
	dropped bool      // not in the tree any more
	moved   bool      // in another directory than on disk
	touched bool      // names come or go
	mark    bool      // opaque is to be set
	meta    *metadata // to be set
}

// path is where the node will be.
func (n *rebaseNode) path() string {
	if n.up == nil {
		return "."
	}
	var names []string
	for ; n.up != nil; n = n.up {
		names = append(names, n.name)
	}
	slices.Reverse(names)
	return strings.Join(names, "/")
}

// find is the node of a path on disk that was not dropped; nil if there is none.
func (b *rebaser) find(p string) (*rebaseNode, error) {
	n := b.root
	if p == "." {
		return n, nil
	}
	for _, name := range strings.Split(p, "/") {
		if !n.dir {
			return nil, nil
		}
		next, err := n.kid(name)
		if err != nil || next == nil {
			return nil, err
		}
		n = next
	}
	return n, nil
}

// open opens the directory on disk.
func (n *rebaseNode) open() (*sys.Fd, error) { return openBeneath(n.b.upper, n.orig) }

// kid is a name of a directory; nil if it is not there.
func (n *rebaseNode) kid(name string) (*rebaseNode, error) {
	if k, ok := n.known[name]; ok || n.all || n.orig == "" {
		return k, nil
	}
	dir, err := n.open()
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return n.load(dir, name)
}

// kids are all names of a directory, in order.
func (n *rebaseNode) kids() ([]*rebaseNode, error) {
	if !n.all && n.orig != "" {
		if err := n.loadAll(); err != nil {
			return nil, err
		}
	}
	var kids []*rebaseNode
	for _, k := range n.known {
		if k != nil {
			kids = append(kids, k)
		}
	}
	slices.SortFunc(kids, func(x, y *rebaseNode) int { return strings.Compare(x.name, y.name) })
	return kids, nil
}

func (n *rebaseNode) loadAll() error {
	dir, err := n.open()
	if err != nil {
		return err
	}
	defer dir.Close()
	ents, err := dir.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range ents {
		if _, ok := n.known[e.Name]; ok {
			continue
		}
		if _, err := n.load(dir, e.Name); err != nil {
			return err
		}
	}
	n.all = true
	return nil
}

// load reads one name of the open directory.
func (n *rebaseNode) load(dir *sys.Fd, name string) (*rebaseNode, error) {
	st, err := dir.Stat(name)
	if errors.Is(err, syscall.ENOENT) {
		n.known[name] = nil
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	k := &rebaseNode{b: n.b, up: n, name: name, orig: path.Join(n.orig, name), dir: st.IsDir(), mode: st.Mode & 0o7777, mtime: st.Mtime}
	if k.dir {
		k.known = map[string]*rebaseNode{}
		k.implied = n.b.implied[k.orig] && st.Mtime == sys.Time{}
	}
	n.known[name] = k
	return k, nil
}

// opaqueYes is the value of overlayfs's xattr "opaque" that hides what is below;
// "x" says only that the directory may hold whiteouts that are xattrs.
const opaqueYes = "y"

// opaqueMark is the value of the directory's xattr.
func (n *rebaseNode) opaqueMark() (string, error) {
	if n.opaque != nil {
		return *n.opaque, nil
	}
	var v string
	if n.orig != "" {
		dir, err := n.open()
		if err != nil {
			return "", err
		}
		defer dir.Close()
		if v, err = optionalXattr(dir, "", n.b.opaqueAttr); err != nil {
			return "", err
		}
	}
	n.opaque = &v
	return v, nil
}

// hidden reports whether a directory above is opaque. What is a directory's own
// opaque mark hides its content, and not its metadata.
func (n *rebaseNode) hidden() (bool, error) {
	if n.up == nil {
		return false, nil
	}
	for a := n.up; a.up != nil; a = a.up {
		if v, err := a.opaqueMark(); err != nil || v == opaqueYes {
			return v == opaqueYes, err
		}
	}
	return false, nil
}

// metadata reads what the directory has on disk.
func (n *rebaseNode) metadata() (metadata, error) {
	dir, err := n.open()
	if err != nil {
		return metadata{}, err
	}
	defer dir.Close()
	return readMetadata(dir)
}

func (n *rebaseNode) isWhiteout() (bool, error) {
	if n.dir || n.orig == "" {
		return false, nil
	}
	dir, err := openBeneath(n.b.upper, path.Dir(n.orig))
	if err != nil {
		return false, err
	}
	defer dir.Close()
	st, err := dir.Stat(path.Base(n.orig))
	if err != nil {
		return false, err
	}
	return n.b.w.IsWhiteout(dir, path.Base(n.orig), &st)
}
