package treegen

import (
	"errors"
	"math/rand/v2"
	"path"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Tree applies operations to one directory.
type Tree struct{ root *sys.Fd }

// Open opens the directory dir as a tree. The caller closes it.
func Open(dir string) (*Tree, error) {
	fd, err := sys.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	return &Tree{root: fd}, nil
}

// Close lets the directory go.
func (t *Tree) Close() error { return t.root.Close() }

// Errno is the errno of an error of Do: 0 for nil, EIO for one without any.
func Errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	var e syscall.Errno
	if errors.As(err, &e) {
		return e
	}
	return syscall.EIO
}

// Apply opens dir, does all ops and returns the errno of each.
func Apply(dir string, ops []Op) ([]syscall.Errno, error) {
	t, err := Open(dir)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	errnos := make([]syscall.Errno, len(ops))
	for i, o := range ops {
		errnos[i] = Errno(t.Do(o))
	}
	return errnos, nil
}

// Content returns size bytes of the pseudo-random content of seed from off; seed
// 0 is zero bytes.
func Content(seed uint64, size int64) []byte {
	b := make([]byte, size)
	if seed == 0 {
		return b
	}
	r := rand.NewPCG(seed, seed)
	for i := 0; i < len(b); i += 8 {
		v := r.Uint64()
		for j := i; j < min(i+8, len(b)); j++ {
			b[j] = byte(v)
			v >>= 8
		}
	}
	return b
}

// at is a name in an open directory.
type at struct {
	dir  *sys.Fd
	name string
}

// at opens the directory that holds p; no component may be a symlink.
func (t *Tree) at(p string) (at, error) {
	if p == "" || p == "." {
		return at{}, syscall.EINVAL
	}
	parent, name := path.Split(p)
	d, err := t.root.Openat2("./"+parent, sys.O_RDONLY|sys.O_DIRECTORY, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
	return at{d, name}, err
}

// Do does one operation. A nil error or one with the errno of the system call
// that decided.
func (t *Tree) Do(o Op) error {
	a, err := t.at(o.Path)
	if err != nil {
		return err
	}
	defer a.dir.Close()
	switch o.Verb {
	case Link, Rename, Exchange:
		return t.two(a, o)
	case Write, Append, Truncate, Rewrite, Retouch:
		return a.write(o)
	case Chmod, Chown, Utimes, Setxattr, Rmxattr:
		return a.meta(o)
	}
	return a.names(o)
}

// names does the verbs that make or remove a name.
func (a at) names(o Op) error {
	var err error
	made := true
	switch o.Verb {
	case Create:
		err = a.create(o)
	case Replace:
		err = a.replace(o)
	case Mkdir:
		err = a.mkdir(o)
	case Symlink:
		err = a.dir.Symlink(o.To, a.name)
	case Mknod:
		if err = a.dir.Mknod(a.name, o.Mode, o.Major, o.Minor); err == nil {
			err = a.dir.ChmodAt(a.name, o.Mode&0o7777)
		}
	case Recreate:
		if err = a.rmTree(true); err == nil {
			err = a.mkdir(o)
		}
	case Rmdir:
		made, err = false, a.dir.Unlink(a.name, sys.AT_REMOVEDIR)
	case Unlink:
		made, err = false, a.dir.Unlink(a.name, 0)
	case RmTree:
		made, err = false, a.rmTree(false)
	default:
		return syscall.ENOSYS
	}
	if err != nil {
		return err
	}
	if made {
		if err := a.pin(o); err != nil {
			return err
		}
	}
	return pinDir(a.dir, o)
}

func (o Op) time() sys.Time { return sys.Time{Sec: o.Sec, Nsec: o.Nsec} }

func (a at) pin(o Op) error { return a.dir.Utimes(a.name, o.time(), o.time()) }

func pinDir(d *sys.Fd, o Op) error { return d.Utimes("", o.time(), o.time()) }

func (a at) mkdir(o Op) error {
	if err := a.dir.Mkdir(a.name, 0o700); err != nil {
		return err
	}
	return a.dir.ChmodAt(a.name, o.Mode)
}

func (a at) create(o Op) error {
	f, err := a.dir.Openat(a.name, sys.O_WRONLY|sys.O_CREAT|sys.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := writeAt(f, o.Seed, 0, o.Size); err != nil {
		return err
	}
	return f.Chmod(o.Mode)
}

// writeAt leaves holes where the content is zero bytes and grows the file: a
// sparse file is part of what trees hold.
func writeAt(f *sys.Fd, seed uint64, off, size int64) error {
	if seed == 0 {
		st, err := f.Stat("")
		if err == nil && off >= st.Size {
			return f.Truncate(off + size)
		}
	}
	_, err := f.WriteAt(Content(seed, size), off)
	return err
}

func (a at) replace(o Op) error {
	st, err := a.dir.Stat(a.name)
	if err != nil {
		return err
	}
	if st.IsDir() {
		return syscall.EISDIR
	}
	tmp := at{a.dir, ".treegen"}
	if err := tmp.create(o); err != nil {
		return err
	}
	err = a.dir.Rename(tmp.name, a.dir, a.name, 0)
	if err != nil {
		a.dir.Unlink(tmp.name, 0)
	}
	return err
}

// rmTree removes a tree; dirOnly refuses anything but a directory.
func (a at) rmTree(dirOnly bool) error {
	st, err := a.dir.Stat(a.name)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		if dirOnly {
			return syscall.ENOTDIR
		}
		return a.dir.Unlink(a.name, 0)
	}
	d, err := a.dir.Openat(a.name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.ReadDir()
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := (at{d, n.Name}).rmTree(false); err != nil {
			return err
		}
	}
	return a.dir.Unlink(a.name, sys.AT_REMOVEDIR)
}

func (a at) write(o Op) error {
	st, err := a.dir.Stat(a.name)
	if err != nil {
		return err
	}
	if !st.IsReg() { // a fifo or device would block
		return syscall.EISDIR
	}
	f, err := a.dir.Openat(a.name, sys.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := writeFile(f, st, o); err != nil {
		return err
	}
	at := o.time()
	if o.Verb == Rewrite || o.Verb == Retouch {
		at = st.Mtime
	}
	return f.Utimes("", at, at)
}

func writeFile(f *sys.Fd, st sys.Stat, o Op) error {
	switch o.Verb {
	case Append:
		return writeAt(f, o.Seed, st.Size, o.Size)
	case Truncate:
		return f.Truncate(o.Size)
	case Write:
		return writeAt(f, o.Seed, o.Off, o.Size)
	}
	if st.Size == 0 {
		return nil
	}
	if o.Verb == Retouch {
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, 0); err != nil {
			return err
		}
		_, err := f.WriteAt(b, 0)
		return err
	}
	off := o.Off % st.Size
	_, err := f.WriteAt(Content(o.Seed, min(o.Size, st.Size-off)), off)
	return err
}

func (a at) meta(o Op) error {
	st, err := a.dir.Stat(a.name)
	if err != nil {
		return err
	}
	switch o.Verb {
	case Chmod:
		if st.Type() == sys.S_IFLNK {
			return syscall.ELOOP
		}
		return a.dir.ChmodAt(a.name, o.Mode)
	case Chown:
		return a.dir.Chown(a.name, o.UID, o.GID)
	case Utimes:
		return a.pin(o)
	case Setxattr:
		return a.dir.Setxattr(a.name, o.Attr, o.Value)
	}
	return a.dir.Removexattr(a.name, o.Attr)
}

func (t *Tree) two(a at, o Op) error {
	b, err := t.at(o.To)
	if err != nil {
		return err
	}
	defer b.dir.Close()
	switch o.Verb {
	case Link:
		err = a.dir.Link(a.name, b.dir, b.name)
	case Rename:
		if within(o.Path, o.To) {
			return syscall.EINVAL
		}
		err = a.dir.Rename(a.name, b.dir, b.name, 0)
	default:
		if within(o.Path, o.To) || within(o.To, o.Path) {
			return syscall.EINVAL
		}
		err = a.dir.Rename(a.name, b.dir, b.name, sys.RENAME_EXCHANGE)
	}
	if err != nil {
		return err
	}
	if o.Verb != Link {
		if err := errors.Join(pinMoved(b, o), pinMoved(a, o), pinDir(a.dir, o)); err != nil {
			return err
		}
	}
	return pinDir(b.dir, o)
}

// pinMoved sets the time of a directory that was moved: its ".." is another, which
// some file systems take for a change of it (btrfs, tmpfs, xfs) and others do not.
func pinMoved(a at, o Op) error {
	st, err := a.dir.Stat(a.name)
	if errors.Is(err, syscall.ENOENT) {
		return nil // a rename took it away
	}
	if err != nil || !st.IsDir() {
		return err
	}
	return a.pin(o)
}

// within reports whether b lies strictly below a.
func within(a, b string) bool { return strings.HasPrefix(b, a+"/") }
