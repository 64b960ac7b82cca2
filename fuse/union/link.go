package union

import (
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Link makes name in dir another name of n.
func (fs *FS) Link(n, dir *Node, name string) (Entry, error) {
	if n.isDir() {
		return Entry{}, syscall.EPERM
	}
	if err := fs.mayMake(dir, name); err != nil {
		return Entry{}, err
	}
	if err := fs.copyUp(n, copyAll); err != nil {
		return Entry{}, err
	}
	e, _, err := fs.create(Caller{}, dir, name, &newObject{mode: n.typ, link: n})
	return e, err
}

// linkTo makes name below dir another name of n, which is in the upper.
func (fs *FS) linkTo(n *Node, dir int, name string) error {
	n.change.Lock()
	defer n.change.Unlock()
	var p place
	if err := fs.locate(n, &p); err != nil {
		if err == syscall.ESTALE {
			err = syscall.ENOENT
		}
		return err
	}
	defer fs.leave(&p)
	return sys.LinkBare(p.fd, p.name, dir, name)
}

// Tmpfile makes a file without a name in dir (O_TMPFILE).
func (fs *FS) Tmpfile(c Caller, dir *Node, flags, mode uint32) (Entry, *File, error) {
	return Entry{}, nil, syscall.EOPNOTSUPP
}
