package native

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// maxOpen is how deep a removal goes with a descriptor for each level.
const maxOpen = 200

// remover deletes one tree. What is deeper in it than maxOpen is moved up to the top.
type remover struct {
	*crew
	top     *sys.Fd // the tree's own directory, once it is open
	entries atomic.Int64
	moved   atomic.Int64
}

// remove deletes name in dir with all below it; nil if it is not there.
func (r *remover) remove(dir *sys.Fd, name string, depth int) error {
	err := dir.UnlinkProtected(name)
	switch {
	case err == nil, errors.Is(err, syscall.ENOENT):
		return nil
	case errors.Is(err, syscall.EISDIR):
		return r.tree(dir, name, depth)
	}
	return err
}

func (r *remover) tree(dir *sys.Fd, name string, depth int) error {
	if depth == maxOpen {
		return r.moveUp(dir, name)
	}
	if err := dir.AllowOwner(name); err != nil {
		return err
	}
	d, err := dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	if depth == 0 {
		r.top = d
	}
	for {
		moved := r.moved.Load()
		if err := r.content(d, depth); err != nil {
			return err
		}
		if depth > 0 || r.moved.Load() == moved {
			return dir.Unlink(name, sys.AT_REMOVEDIR)
		}
	}
}

func (r *remover) content(d *sys.Fd, depth int) error {
	names, err := d.ReadDir()
	if err != nil {
		return err
	}
	g := r.group()
	for chunk := range slices.Chunk(names, chunkNames) {
		g.do(func() error { return r.names(d, chunk, depth+1) })
	}
	return g.wait()
}

// moveUp renames a directory into the tree's top, which is read again then.
func (r *remover) moveUp(dir *sys.Fd, name string) error {
	if err := dir.AllowOwner(name); err != nil { // its ".." changes, so it must be writable itself
		return err
	}
	for {
		err := dir.Rename(name, r.top, fmt.Sprintf("deep.%d", r.moved.Add(1)), sys.RENAME_NOREPLACE)
		if !errors.Is(err, syscall.EEXIST) {
			return err
		}
	}
}

func (r *remover) names(d *sys.Fd, names []sys.Dirent, depth int) error {
	g := r.group()
	for _, e := range names {
		if g.err() != nil {
			break
		}
		g.run(func() error { return r.name(g, d, e, depth) })
	}
	return g.wait()
}

// name removes one name, a directory with a helper if one is free.
func (r *remover) name(g *group, d *sys.Fd, e sys.Dirent, depth int) error {
	if n := r.entries.Add(1); n%progressStep == 0 {
		drivers.ReportProgress(r.ctx, drivers.Progress{Step: "remove", Entries: n})
	}
	if e.Type != sys.S_IFDIR {
		return r.remove(d, e.Name, depth)
	}
	g.do(func() error { return r.remove(d, e.Name, depth) })
	return nil
}
