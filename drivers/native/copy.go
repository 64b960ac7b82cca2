package native

import (
	"errors"
	"io"
	"slices"
	"sync/atomic"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

const (
	chunkNames   = 256      // names of one directory that a helper takes at a time
	chunkBytes   = 64 << 20 // of one copy_file_range: how late a cancelled context is seen
	progressStep = 512      // files between two reports of progress
)

// copier copies one tree exactly: types, content with its holes, owners, modes,
// times to the nanosecond, xattrs (ACLs and capabilities among them) and hard
// links. Its fields but the counters are immutable.
type copier struct {
	*crew
	links      *linkPool
	keepsStat  bool // what owner and mode cannot be set is kept in an xattr
	noClone    atomic.Bool
	entries    atomic.Int64
	bytes      atomic.Int64
	overridden atomic.Int64 // entries whose owner went into an xattr
}

// tree copies the directory src onto the empty directory dst, the directory
// itself included.
func (c *copier) tree(src, dst *sys.Fd) error {
	names, err := src.ReadDir()
	if err != nil {
		return err
	}
	g := c.group()
	for chunk := range slices.Chunk(names, chunkNames) {
		g.do(func() error { return c.names(src, dst, chunk) })
	}
	if err := g.wait(); err != nil {
		return err
	}
	// Last, as each new name below moved the directory's mtime and a mode
	// without w would have refused it.
	st, err := src.Stat("")
	if err != nil {
		return err
	}
	return c.metadata(src, "", dst, "", &st)
}

func (c *copier) names(src, dst *sys.Fd, names []sys.Dirent) error {
	g := c.group()
	for _, e := range names {
		if g.err() != nil {
			break
		}
		g.run(func() error { return c.name(g, src, dst, e.Name) })
	}
	return g.wait()
}

func (c *copier) name(g *group, src, dst *sys.Fd, name string) error {
	st, err := src.Stat(name)
	if err != nil {
		return err
	}
	if st.IsDir() {
		err = c.subdir(g, src, dst, name)
	} else {
		err = c.nonDir(src, dst, name, &st)
	}
	if err == nil {
		c.count(&st)
	}
	return err
}

// subdir opens both directories here, so that no more than the directories
// being worked on are ever open, and copies below them with a helper if one is free.
func (c *copier) subdir(g *group, src, dst *sys.Fd, name string) error {
	if err := dst.Mkdir(name, 0o700); err != nil {
		return err
	}
	in, err := src.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	out, err := dst.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		in.Close()
		return err
	}
	g.do(func() error {
		defer in.Close()
		defer out.Close()
		return c.tree(in, out)
	})
	return nil
}

// nonDir copies anything but a directory, as another name of what was copied
// already where it is one.
func (c *copier) nonDir(src, dst *sys.Fd, name string, st *sys.Stat) error {
	if st.Nlink < 2 {
		return c.inode(src, name, dst, name, st)
	}
	return c.links.link(st.Ino, dst, name, func(pool *sys.Fd, pooled string) error {
		return c.inode(src, name, pool, pooled, st)
	})
}

// inode makes name to in dst as a copy of from in src.
func (c *copier) inode(src *sys.Fd, from string, dst *sys.Fd, to string, st *sys.Stat) error {
	switch st.Type() {
	case sys.S_IFREG:
		return c.regular(src, from, dst, to, st)
	case sys.S_IFLNK:
		target, err := src.Readlink(from)
		if err != nil {
			return err
		}
		if err := dst.Symlink(target, to); err != nil {
			return err
		}
	default:
		if err := dst.Mknod(to, st.Type()|0o600, st.RdevMajor, st.RdevMinor); err != nil {
			return err
		}
	}
	return c.metadata(src, from, dst, to, st)
}

func (c *copier) regular(src *sys.Fd, from string, dst *sys.Fd, to string, st *sys.Stat) error {
	in, err := src.Openat(from, sys.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := dst.Openat(to, sys.O_WRONLY|sys.O_CREAT|sys.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := c.content(in, out, st); err != nil {
		return err
	}
	return c.metadata(in, "", out, "", st)
}

// content shares the blocks of in, or copies its data and leaves its holes.
func (c *copier) content(in, out *sys.Fd, st *sys.Stat) error {
	if st.Size == 0 {
		return nil
	}
	if !c.noClone.Load() {
		err := out.Clone(in)
		if err == nil {
			return nil
		}
		if !c.cloneRefused(err) {
			return err
		}
	}
	if st.Blocks*512 >= st.Size { // no hole to keep
		return c.extent(in, out, 0, st.Size)
	}
	return c.sparse(in, out, st.Size)
}

// cloneRefused tells the errors of FICLONE that mean "copy instead". Only those
// that hold for the whole file system end the trying: EINVAL and EPERM may be of
// one file (its flags).
func (c *copier) cloneRefused(err error) bool {
	switch {
	case errors.Is(err, syscall.EOPNOTSUPP), errors.Is(err, syscall.EXDEV), errors.Is(err, syscall.ENOTTY), errors.Is(err, syscall.ENOSYS):
		c.noClone.Store(true)
		return true
	}
	return errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ETXTBSY)
}

func (c *copier) sparse(in, out *sys.Fd, size int64) error {
	for off := int64(0); off < size; {
		data, err := in.SeekData(off)
		if errors.Is(err, syscall.ENXIO) { // a hole to the end
			break
		}
		if err != nil {
			return err
		}
		end, err := in.SeekHole(data)
		if err != nil {
			return err
		}
		if err := c.extent(in, out, data, end); err != nil {
			return err
		}
		off = end
	}
	return out.Truncate(size)
}

// extent copies the bytes from off to end by copy_file_range, or by read and
// write where the file system refuses that.
func (c *copier) extent(in, out *sys.Fd, off, end int64) error {
	for off < end {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		n, err := out.CopyRange(off, in, off, int(min(end-off, chunkBytes)))
		if copyRangeRefused(err) {
			return c.readWrite(in, out, off, end)
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return &shortError{name: in.Name(), at: off, want: end}
		}
		off += int64(n)
	}
	return nil
}

func copyRangeRefused(err error) bool {
	return errors.Is(err, syscall.EXDEV) || errors.Is(err, syscall.EINVAL) ||
		errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS)
}

func (c *copier) readWrite(in, out *sys.Fd, off, end int64) error {
	b := make([]byte, 256<<10)
	for off < end {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		n, err := in.ReadAt(b[:min(int64(len(b)), end-off)], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n == 0 {
			return &shortError{name: in.Name(), at: off, want: end}
		}
		if _, err := out.WriteAt(b[:n], off); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

func (c *copier) count(st *sys.Stat) {
	if st.IsReg() {
		c.bytes.Add(st.Size)
	}
	if n := c.entries.Add(1); n%progressStep == 0 {
		c.report()
	}
}

func (c *copier) report() {
	drivers.ReportProgress(c.ctx, drivers.Progress{Step: "copy", Entries: c.entries.Load(), Bytes: c.bytes.Load()})
}
