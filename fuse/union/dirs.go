package union

import (
	"sync"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// dirFd is an open directory (O_PATH) in the cache.
type dirFd struct {
	fd    int
	uses  int32
	hot   bool
	slot  int        // in dirCache.all; -1: not in the cache any more
	owner *dirHandle // nil: nobody's, closed after the last use
}

// dirHandle is where a directory keeps its cached descriptor. It is guarded by
// dirCache.mu.
type dirHandle struct{ open *dirFd }

// dirCache bounds the directory descriptors that are open. Which one goes is
// found by a clock hand: one that was used since the hand passed stays.
type dirCache struct {
	mu   sync.Mutex
	all  []*dirFd
	hand int
	max  int
}

// get returns h's descriptor, in use until done; nil if none is open.
func (c *dirCache) get(h *dirHandle) *dirFd {
	c.mu.Lock()
	d := h.open
	if d != nil {
		d.uses++
		d.hot = true
	}
	c.mu.Unlock()
	return d
}

// put gives fd to h and returns it, in use; or what another has put there
// meanwhile.
func (c *dirCache) put(h *dirHandle, fd int) *dirFd {
	c.mu.Lock()
	if d := h.open; d != nil {
		d.uses++
		c.mu.Unlock()
		sys.CloseBare(fd)
		return d
	}
	d := &dirFd{fd: fd, uses: 1, slot: len(c.all), owner: h}
	h.open = d
	c.all = append(c.all, d)
	victim := -1
	if len(c.all) > c.max {
		victim = c.evict()
	}
	c.mu.Unlock()
	if victim >= 0 {
		sys.CloseBare(victim)
	}
	return d
}

// evict takes one descriptor that nobody uses out, for the caller to close; -1
// if all are in use.
func (c *dirCache) evict() int {
	for range 2 * len(c.all) {
		if c.hand >= len(c.all) {
			c.hand = 0
		}
		d := c.all[c.hand]
		switch {
		case d.uses > 0:
			c.hand++
		case d.hot:
			d.hot = false
			c.hand++
		default:
			c.remove(d)
			return d.fd
		}
	}
	return -1
}

func (c *dirCache) remove(d *dirFd) {
	last := c.all[len(c.all)-1]
	c.all[d.slot], last.slot = last, d.slot
	c.all[len(c.all)-1] = nil
	c.all = c.all[:len(c.all)-1]
	d.owner.open, d.owner, d.slot = nil, nil, -1
}

// done ends one use.
func (c *dirCache) done(d *dirFd) {
	if d == nil {
		return
	}
	c.mu.Lock()
	d.uses--
	gone := d.uses == 0 && d.owner == nil
	c.mu.Unlock()
	if gone {
		sys.CloseBare(d.fd)
	}
}

// drop closes h's descriptor, once nobody uses it.
func (c *dirCache) drop(h *dirHandle) {
	c.mu.Lock()
	d := h.open
	closeNow := false
	if d != nil {
		c.remove(d)
		closeNow = d.uses == 0
	}
	c.mu.Unlock()
	if closeNow {
		sys.CloseBare(d.fd)
	}
}

// close closes all.
func (c *dirCache) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.all) > 0 {
		d := c.all[len(c.all)-1]
		c.remove(d)
		sys.CloseBare(d.fd)
	}
}

const openDirFlags = sys.O_PATH | sys.O_DIRECTORY

// real opens a lower directory, from the cache or by its names. A directory that
// is not what was there before is ESTALE: somebody changes the lower.
func (fs *FS) real(r *realDir) (*dirFd, error) {
	if d := fs.dirs.get(&r.fd); d != nil {
		return d, nil
	}
	if r.parent == nil {
		fd, err := sys.DupBare(r.layer.fd.Int())
		if err != nil {
			return nil, err
		}
		return fs.dirs.put(&r.fd, fd), nil
	}
	parent, err := fs.real(r.parent)
	if err != nil {
		return nil, err
	}
	fd, err := openSame(parent.fd, r.name, r.ino)
	fs.dirs.done(parent)
	if err != nil {
		if err == syscall.ESTALE {
			fs.say("%s: directory %q changed while it was in use", r.layer.path, r.name)
		}
		return nil, err
	}
	return fs.dirs.put(&r.fd, fd), nil
}

// openSame opens the directory name below dir if its inode is ino.
func openSame(dir int, name string, ino uint64) (int, error) {
	fd, err := sys.OpenBare(dir, name, openDirFlags, 0)
	if err != nil {
		if err == syscall.ENOENT || err == syscall.ENOTDIR || err == syscall.ELOOP {
			err = syscall.ESTALE
		}
		return -1, err
	}
	var st sys.Stat
	if err = sys.StatBare(fd, "", &st); err == nil && st.Ino != ino {
		err = syscall.ESTALE
	}
	if err != nil {
		sys.CloseBare(fd)
		return -1, err
	}
	return fd, nil
}

// upperDir opens a directory's part in the upper, which it must have.
func (fs *FS) upperDir(n *Node) (*dirFd, error) {
	if d := fs.dirs.get(&n.dir.up); d != nil {
		return d, nil
	}
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	return fs.reopenUpper(n)
}

// reopenUpper opens n by the names from the root down; fs.tree is held.
func (fs *FS) reopenUpper(n *Node) (*dirFd, error) {
	if d := fs.dirs.get(&n.dir.up); d != nil {
		return d, nil
	}
	n.mu.Lock()
	parent, name, ino := n.parent, n.name, n.upIno
	n.mu.Unlock()
	if ino == 0 || n.has(isDead) {
		return nil, syscall.ESTALE
	}
	if parent == nil {
		fd, err := sys.DupBare(fs.layers[0].fd.Int())
		if err != nil {
			return nil, err
		}
		return fs.dirs.put(&n.dir.up, fd), nil
	}
	p, err := fs.reopenUpper(parent)
	if err != nil {
		return nil, err
	}
	fd, err := openSame(p.fd, name, ino)
	fs.dirs.done(p)
	if err != nil {
		return nil, err
	}
	return fs.dirs.put(&n.dir.up, fd), nil
}
