package native

import (
	"errors"
	"strconv"
	"sync"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// linkPool makes hard-link groups: each inode with several names is copied once
// into a directory beside the tree and linked from there to where it belongs,
// whichever helper meets it first. It keeps no path and no descriptor of the tree.
type linkPool struct {
	dir *sys.Fd
	mu  sync.Mutex
	ino map[uint64]*pooled // guarded by mu; by the source's inode: a layer is on one file system
}

type pooled struct {
	once sync.Once
	err  error // immutable after once
}

// link makes name in dst another name of inode ino, which create makes in the
// pool the first time.
func (p *linkPool) link(ino uint64, dst *sys.Fd, name string, create func(pool *sys.Fd, name string) error) error {
	p.mu.Lock()
	e := p.ino[ino]
	if e == nil {
		e = new(pooled)
		p.ino[ino] = e
	}
	p.mu.Unlock()
	inPool := strconv.FormatUint(ino, 36)
	e.once.Do(func() { e.err = create(p.dir, inPool) })
	if e.err != nil {
		return e.err
	}
	err := p.dir.Link(inPool, dst, name)
	if errors.Is(err, syscall.EMLINK) { // the pool's own name was one too many
		return p.dir.Rename(inPool, dst, name, sys.RENAME_NOREPLACE)
	}
	return err
}
