package native

import (
	"errors"
	"slices"
	"sync"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// meter adds up what a tree holds. Shared blocks of a reflink count in every
// file that has them, as st_blocks does.
type meter struct {
	*crew
	mu    sync.Mutex
	usage drivers.Usage       // guarded by mu
	seen  map[uint64]struct{} // guarded by mu: inodes of several names, by number: a layer is on one file system
}

// add counts the files of one directory that stand in sts, at once, to take the
// lock once.
func (m *meter) add(sts []sys.Stat) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range sts {
		st := &sts[i]
		if st.Nlink > 1 && !st.IsDir() {
			if _, twice := m.seen[st.Ino]; twice {
				continue
			}
			m.seen[st.Ino] = struct{}{}
		}
		m.usage.Inodes++
		m.usage.Bytes += st.Blocks * 512
	}
}

// tree counts the directory d and all below it.
func (m *meter) tree(d *sys.Fd) error {
	st, err := d.Stat("")
	if err != nil {
		return err
	}
	m.add([]sys.Stat{st})
	names, err := d.ReadDir()
	if err != nil {
		return err
	}
	g := m.group()
	for chunk := range slices.Chunk(names, chunkNames) {
		g.do(func() error { return m.names(d, chunk) })
	}
	return g.wait()
}

func (m *meter) names(d *sys.Fd, names []sys.Dirent) error {
	g := m.group()
	sts := make([]sys.Stat, 0, len(names))
	for _, e := range names {
		if g.err() != nil {
			break
		}
		st, err := d.Stat(e.Name)
		switch {
		case err == nil && st.IsDir():
			err = m.subdir(g, d, e.Name)
		case err == nil:
			sts = append(sts, st)
		}
		g.run(func() error { return unlessGone(err) })
	}
	m.add(sts)
	return g.wait()
}

// unlessGone forgives a name that went away meanwhile: the layer may be active.
func unlessGone(err error) error {
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	return err
}

func (m *meter) subdir(g *group, d *sys.Fd, name string) error {
	sub, err := d.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	g.do(func() error {
		defer sub.Close()
		return m.tree(sub)
	})
	return nil
}
