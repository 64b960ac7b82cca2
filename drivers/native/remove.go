package native

import (
	"errors"
	"slices"
	"sync/atomic"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// remover deletes one tree.
type remover struct {
	*crew
	entries atomic.Int64
}

// remove deletes name in dir with all below it; nil if it is not there.
func (r *remover) remove(dir *sys.Fd, name string) error {
	err := dir.Unlink(name, 0)
	switch {
	case err == nil, errors.Is(err, syscall.ENOENT):
		return nil
	case errors.Is(err, syscall.EISDIR):
		return r.tree(dir, name)
	}
	return err
}

func (r *remover) tree(dir *sys.Fd, name string) error {
	d, err := openForRemoval(dir, name)
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.ReadDir()
	if err != nil {
		return err
	}
	g := r.group()
	for chunk := range slices.Chunk(names, chunkNames) {
		g.do(func() error { return r.names(d, chunk) })
	}
	if err := g.wait(); err != nil {
		return err
	}
	return dir.Unlink(name, sys.AT_REMOVEDIR)
}

// openForRemoval opens a directory whose mode may forbid that to its owner.
func openForRemoval(dir *sys.Fd, name string) (*sys.Fd, error) {
	const flags = sys.O_RDONLY | sys.O_DIRECTORY
	st, err := dir.Stat(name)
	if err != nil {
		return nil, err
	}
	if st.Mode&0o700 != 0o700 {
		if err := dir.ChmodAt(name, 0o700); err != nil {
			return nil, err
		}
	}
	return dir.Openat(name, flags, 0)
}

func (r *remover) names(d *sys.Fd, names []sys.Dirent) error {
	g := r.group()
	for _, e := range names {
		if g.err() != nil {
			break
		}
		g.run(func() error { return r.name(g, d, e) })
	}
	return g.wait()
}

// name removes one name, a directory with a helper if one is free.
func (r *remover) name(g *group, d *sys.Fd, e sys.Dirent) error {
	if n := r.entries.Add(1); n%progressStep == 0 {
		drivers.ReportProgress(r.ctx, drivers.Progress{Step: "remove", Entries: n})
	}
	if e.Type != sys.S_IFDIR {
		return r.remove(d, e.Name)
	}
	g.do(func() error { return r.tree(d, e.Name) })
	return nil
}
