package union

import (
	"io"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// File is an open file. It goes on working when its node is copied up, renamed
// or unlinked: a file that was opened for reading in a lower reads the upper's
// data once there is some.
type File struct {
	fs    *FS
	node  *Node
	flags int // as the file below is opened
	now   atomic.Pointer[openFd]

	mu  sync.Mutex
	old []*openFd // of before copy-ups: somebody may be reading
}

type openFd struct {
	fd    int
	upper bool
}

// unopened stands for the file below as long as nobody has asked for its data: what
// the kernel has in its page cache it reads without us.
var unopened = &openFd{fd: -1}

// backingFlags are those of open(2) that count for the file below.
const backingFlags = syscall.O_ACCMODE | syscall.O_SYNC | syscall.O_DSYNC | syscall.O_DIRECT | syscall.O_NOATIME

// backing makes the flags that a file is opened with below. A file that is
// written is opened for reading too: a cache may have to fill its pages.
func backing(flags uint32) int {
	f := int(flags) & backingFlags
	if f&syscall.O_ACCMODE != syscall.O_RDONLY {
		f = f&^syscall.O_ACCMODE | syscall.O_RDWR
	}
	return f
}

// Open opens a regular file; for writing it is copied up, without its data if
// flags have O_TRUNC. Special files are opened by the kernel itself.
func (fs *FS) Open(c Caller, n *Node, flags uint32) (*File, error) {
	switch n.typ {
	case sys.S_IFREG:
	case sys.S_IFDIR:
		return nil, syscall.EISDIR
	case sys.S_IFLNK:
		return nil, syscall.ELOOP
	default:
		return nil, syscall.ENXIO
	}
	if err := fs.mayOpen(n, flags); err != nil {
		return nil, err
	}
	trunc := flags&syscall.O_TRUNC != 0
	if trunc || flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		if err := fs.writable(); err != nil {
			return nil, err
		}
		what := copyAll
		if trunc {
			what = copyNoData
		}
		if err := fs.copyUp(c.PID, n, what); err != nil {
			return nil, err
		}
	}
	f := &File{fs: fs, node: n, flags: backing(flags)}
	if fs.readsAll && !f.writes() && !trunc && !n.has(inUpper|isMetacopy) { // of a metacopy file the data may be missing
		f.now.Store(unopened)
		f.keep()
		return f, nil
	}
	first := f.flags
	if trunc {
		first |= syscall.O_TRUNC
	}
	err := f.open(first)
	if err == syscall.EPERM && n.has(isAppend) { // the file below is append-only itself
		f.flags |= syscall.O_APPEND
		err = f.open(f.flags)
	}
	if err != nil {
		return nil, err
	}
	f.keep()
	return f, nil
}

// keep counts f among the open files of its node.
func (f *File) keep() {
	f.node.opens.Add(1)
	f.fs.hold(f.node)
}

// open opens what has the node's data now.
func (f *File) open(flags int) error {
	n := f.node
	n.change.Lock()
	defer n.change.Unlock()
	upper := n.has(inUpper) && !n.has(isMetacopy)
	flags |= sys.O_NONBLOCK // whatever somebody has put there behind our back
	var fd int
	var err error
	switch {
	case upper:
		fd, err = f.fs.openUpper(n, flags)
	case n.has(isMetacopy):
		fd, err = f.fs.openLower(func(flags int) (int, error) { return f.fs.openData(n, flags) }, flags)
	default:
		fd, err = f.fs.openLower(func(flags int) (int, error) { return f.fs.openUpper(n, flags) }, flags)
	}
	if err != nil {
		return err
	}
	if old := f.now.Swap(&openFd{fd, upper}); old != nil && old != unopened {
		f.old = append(f.old, old)
	}
	return nil
}

// openLower opens a file in a lower: its access time stays, where this process
// may ask for that.
func (fs *FS) openLower(open func(flags int) (int, error), flags int) (int, error) {
	flags = flags&^syscall.O_ACCMODE | syscall.O_RDONLY
	fd, err := open(flags | sys.O_NOATIME)
	if err == syscall.EPERM {
		fd, err = open(flags)
	}
	return fd, err
}

// current is the descriptor of what has the node's data now.
func (f *File) current() (*openFd, error) {
	o := f.now.Load()
	if f.isCurrent(o) {
		return o, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if o = f.now.Load(); f.isCurrent(o) {
		return o, nil
	}
	if o == nil {
		return nil, syscall.EBADF
	}
	if err := f.open(f.flags); err != nil {
		return nil, err
	}
	return f.now.Load(), nil
}

func (f *File) isCurrent(o *openFd) bool {
	return o != nil && (o.upper || o != unopened && !f.inUpper())
}

// inUpper tells whether the data of the file are the upper's.
func (f *File) inUpper() bool { return f.node.has(inUpper) && !f.node.has(isMetacopy) }

// Upper tells whether the data that the file reads are the upper's, without opening
// what is not open yet.
func (f *File) Upper() bool {
	o := f.now.Load()
	return o != nil && o.upper || f.inUpper()
}

func (f *File) writes() bool { return f.flags&syscall.O_ACCMODE != syscall.O_RDONLY }

// stat describes the file through what is open, if that is the upper's.
func (f *File) stat(st *sys.Stat) error {
	o, err := f.current()
	if err != nil {
		return err
	}
	if !o.upper {
		return f.fs.stat(f.node, st)
	}
	return f.fs.layers[0].stat(o.fd, "", st)
}

// Fd returns a descriptor of the file and whether its data are the upper's: one
// that stays right as long as the file is open (passthrough). It belongs to f.
func (f *File) Fd() (fd int, upper bool) {
	o, err := f.current()
	if err != nil {
		return -1, false
	}
	return o.fd, o.upper
}

// ReadAt reads into p; less than len(p) only at the end of the file.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	o, err := f.current()
	if err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		n, err := sys.PreadBare(o.fd, p[done:], off+int64(done))
		if err != nil {
			return done, err
		}
		if n == 0 {
			break
		}
		done += n
	}
	return done, nil
}

// WriteAt writes p. killPriv: see SetAttr.KillPriv.
func (f *File) WriteAt(p []byte, off int64, killPriv bool) (int, error) {
	o, err := f.writeFd()
	if err != nil {
		return 0, err
	}
	if killPriv {
		if err := f.fs.killPriv(&place{fd: o.fd}); err != nil {
			return 0, err
		}
	}
	n, err := o.write(p, off)
	if n > 0 {
		return n, nil // if it is a short write, the next one says why
	}
	return 0, err
}

// write writes p, all of it if there is no error.
func (o *openFd) write(p []byte, off int64) (done int, err error) {
	for done < len(p) {
		n, err := sys.PwriteBare(o.fd, p[done:], off+int64(done))
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// WriteBack writes what a cache above collected (FUSE's writeback cache), which
// keeps the file's mtime, too, and sends that by itself: the one on disk stays, else
// the write would bring a later one. A part that could not be written is an error: the
// cache asks for nothing twice, and takes a short write for a whole one
// (fs/fuse/file.c: fuse_writepage_end).
func (f *File) WriteBack(p []byte, off int64) (int, error) {
	o, err := f.writeFd()
	if err != nil {
		return 0, err
	}
	var st sys.Stat
	if err := sys.StatBare(o.fd, "", &st); err != nil {
		return 0, err
	}
	n, err := o.write(p, off)
	if n > 0 {
		if err := sys.UtimesBare(o.fd, "", sys.TimeOmit, st.Mtime); err != nil {
			return 0, err
		}
	}
	if err != nil {
		return 0, err
	}
	return n, nil
}

// writeFd is the upper's descriptor, of a file that was opened for writing.
func (f *File) writeFd() (*openFd, error) {
	o, err := f.current()
	if err != nil {
		return nil, err
	}
	if !o.upper || !f.writes() {
		return nil, syscall.EBADF
	}
	return o, nil
}

// Fsync flushes the file.
func (f *File) Fsync(dataOnly bool) error {
	if f.fs.config.Volatile || !f.node.has(inUpper) {
		return nil
	}
	o, err := f.current()
	if err != nil {
		return err
	}
	if err := f.fs.handleTable.sync(); err != nil {
		return err
	}
	return sys.FsyncBare(o.fd, dataOnly)
}

// Flush is what close(2) of one of the descriptors does.
func (f *File) Flush() error { return nil }

// Fallocate is fallocate(2).
func (f *File) Fallocate(mode uint32, off, size int64) error {
	o, err := f.writeFd()
	if err != nil {
		return err
	}
	refused := isImmutable
	const keepSize = 1 // FALLOC_FL_KEEP_SIZE
	if mode&^keepSize != 0 {
		refused |= isAppend
	}
	if err := f.fs.unguarded(f.node, refused); err != nil {
		return err
	}
	return sys.FallocateBare(o.fd, mode, off, size)
}

// Seek is lseek(2) with SEEK_DATA or SEEK_HOLE.
func (f *File) Seek(off int64, whence int) (int64, error) {
	o, err := f.current()
	if err != nil {
		return 0, err
	}
	return sys.SeekBare(o.fd, off, whence)
}

// CopyRange is copy_file_range(2) from src.
func (f *File) CopyRange(off int64, src *File, srcOff, size int64) (int64, error) {
	from, err := src.current()
	if err != nil {
		return 0, err
	}
	to, err := f.writeFd()
	if err != nil {
		return 0, err
	}
	if err := f.fs.unguarded(f.node, isImmutable); err != nil {
		return 0, err
	}
	const most = 1 << 30 // what a 32-bit size holds, and a call that can be waited for
	n, err := sys.CopyRangeBare(to.fd, off, from.fd, srcOff, int(min(size, most)))
	return int64(n), err
}

// Close closes the file.
func (f *File) Close() error {
	o := f.now.Swap(nil)
	if o == nil {
		return nil
	}
	f.mu.Lock()
	if o != unopened {
		f.old = append(f.old, o)
	}
	for _, o := range f.old {
		sys.CloseBare(o.fd)
	}
	f.old = nil
	f.mu.Unlock()
	f.node.opens.Add(-1)
	f.fs.release(f.node)
	return nil
}

var _ io.Closer = (*File)(nil)
