package drivertest

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/layerctl/layerctl/internal/sys"
)

// work changes a tree by hand. Everything that fails ends the test. For one
// goroutine.
type work struct {
	testing.TB
	dir string
	// separates says that this is the plain directory that stands for a driver
	// with Capabilities.BreaksHardLinks: what such a driver's copy-up separates is
	// separated here by hand.
	separates bool
}

func (w *work) path(p string) string { return filepath.Join(w.dir, p) }

func (w *work) check(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// root runs f with the tree's root opened.
func (w *work) root(f func(root *sys.Fd) error) {
	w.Helper()
	fd, err := sys.OpenDir(w.dir)
	w.check(err)
	defer fd.Close()
	w.check(f(fd))
}

func (w *work) mkdir(p string)       { w.Helper(); w.check(os.MkdirAll(w.path(p), 0o755)) }
func (w *work) remove(p string)      { w.Helper(); w.check(os.RemoveAll(w.path(p))) }
func (w *work) unlink(p string)      { w.Helper(); w.check(os.Remove(w.path(p))) }
func (w *work) rename(p, to string)  { w.Helper(); w.check(os.Rename(w.path(p), w.path(to))) }
func (w *work) link(p, to string)    { w.Helper(); w.check(os.Link(w.path(p), w.path(to))) }
func (w *work) symlink(to, p string) { w.Helper(); w.check(os.Symlink(to, w.path(p))) }
func (w *work) chown(p string, uid, gid int) {
	w.Helper()
	w.check(os.Lchown(w.path(p), uid, gid))
}

// file makes a file, its directories too.
func (w *work) file(p, content string) {
	w.Helper()
	w.mkdir(filepath.Dir(p))
	w.check(os.WriteFile(w.path(p), []byte(content), 0o644))
}

// chmod sets all twelve bits.
func (w *work) chmod(p string, mode uint32) {
	w.Helper()
	w.root(func(root *sys.Fd) error { return root.ChmodAt(p, mode) })
}

func (w *work) append(p, content string) {
	w.Helper()
	f, err := os.OpenFile(w.path(p), os.O_WRONLY|os.O_APPEND, 0)
	w.check(err)
	defer f.Close()
	_, err = io.WriteString(f, content)
	w.check(err)
}

// overwrite writes into a file and puts its mtime back.
func (w *work) overwrite(p string, off int64, content string) {
	w.Helper()
	st, err := os.Lstat(w.path(p))
	w.check(err)
	f, err := os.OpenFile(w.path(p), os.O_WRONLY, 0)
	w.check(err)
	defer f.Close()
	_, err = f.WriteAt([]byte(content), off)
	w.check(err)
	w.check(os.Chtimes(w.path(p), time.Time{}, st.ModTime()))
}

func (w *work) truncate(p string, size int64) {
	w.Helper()
	w.check(os.Truncate(w.path(p), size))
}

func (w *work) xattr(p, attr, value string) {
	w.Helper()
	w.root(func(root *sys.Fd) error { return root.Setxattr(p, attr, value) })
}

func (w *work) rmxattr(p, attr string) {
	w.Helper()
	w.root(func(root *sys.Fd) error { return root.Removexattr(p, attr) })
}

// mknod makes a node at the top of the tree.
func (w *work) mknod(p string, mode, major, minor uint32) {
	w.Helper()
	w.root(func(root *sys.Fd) error { return root.Mknod(p, mode, major, minor) })
}

func (w *work) mtime(p string, sec int64, nsec uint32) {
	w.Helper()
	at := sys.Time{Sec: sec, Nsec: nsec}
	w.root(func(root *sys.Fd) error { return root.Utimes(p, at, at) })
}

// separate stands before a change to one name of a hard-link group of a lower
// layer. It does nothing but where such a change separates the name from its
// group by itself, and this is the plain directory that has to show the same.
func (w *work) separate(p string) {
	w.Helper()
	if !w.separates {
		return
	}
	st, err := os.Stat(w.path(filepath.Dir(p)))
	w.check(err)
	w.root(func(root *sys.Fd) error { return separate(root, p) })
	w.check(os.Chtimes(w.path(filepath.Dir(p)), time.Time{}, st.ModTime()))
}

// Times that a case sets lie before recent; what the kernel set to the current
// time lies after it, and pin sets that to pinned, so that two trees which went
// through the same changes are equal.
const recent = 1_700_000_000

var pinned = sys.Time{Sec: 1_650_000_000, Nsec: 123_456_789}

// pin sets every recent mtime below and of dir.
func pin(dir string) error {
	d, err := sys.OpenDir(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return pinAll(d)
}

func pinAll(d *sys.Fd) error {
	names, err := d.ReadDir()
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := pinName(d, n.Name); err != nil {
			return err
		}
	}
	return pinOne(d, "")
}

func pinName(d *sys.Fd, name string) error {
	st, err := d.Stat(name)
	if err != nil || !st.IsDir() {
		return errOr(err, func() error { return pinOne(d, name) })
	}
	sub, err := d.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sub.Close()
	return pinAll(sub)
}

func errOr(err error, f func() error) error {
	if err != nil {
		return err
	}
	return f()
}

func pinOne(d *sys.Fd, name string) error {
	st, err := d.Stat(name)
	if err != nil || st.Mtime.Sec < recent {
		return err
	}
	return d.Utimes(name, pinned, pinned)
}

// separate makes one name of a hard-link group a file of its own, equal in all
// else. p may have directories.
func separate(root *sys.Fd, p string) error {
	dir, name := filepath.Split(p)
	d, err := root.Openat2("./"+dir, sys.O_RDONLY|sys.O_DIRECTORY, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return err
	}
	defer d.Close()
	const tmp = ".drivertest-separate"
	st, err := d.Stat(name)
	if err != nil {
		return err
	}
	if err := replicate(d, name, tmp, &st); err != nil {
		return err
	}
	return d.Rename(tmp, d, name, 0)
}

// replicate copies one non-directory with its metadata.
func replicate(d *sys.Fd, name, to string, st *sys.Stat) error {
	err := replicateContent(d, name, to, st)
	if err != nil {
		return err
	}
	if err := d.Chown(to, st.UID, st.GID); err != nil {
		return err
	}
	attrs, err := ownXattrs(d, name)
	if err != nil {
		return err
	}
	inherited, err := ownXattrs(d, to) // of a directory with a default ACL
	if err != nil {
		return err
	}
	for _, a := range inherited {
		if !slices.Contains(attrs, a) {
			if err := d.Removexattr(to, a); err != nil {
				return err
			}
		}
	}
	for _, a := range slices.Sorted(slices.Values(attrs)) {
		v, err := d.Getxattr(name, a)
		if err == nil {
			err = d.Setxattr(to, a, v)
		}
		if err != nil {
			return err
		}
	}
	if st.Type() != sys.S_IFLNK {
		if err := d.ChmodAt(to, st.Mode&0o7777); err != nil {
			return err
		}
	}
	return d.Utimes(to, st.Atime, st.Mtime)
}

// ownXattrs lists the xattrs of a name without XFS's second names of ACLs.
func ownXattrs(d *sys.Fd, name string) ([]string, error) {
	attrs, err := d.Listxattr(name)
	return slices.DeleteFunc(attrs, func(a string) bool { return strings.HasPrefix(a, "trusted.SGI_ACL_") }), err
}

func replicateContent(d *sys.Fd, name, to string, st *sys.Stat) error {
	switch st.Type() {
	case sys.S_IFLNK:
		target, err := d.Readlink(name)
		if err != nil {
			return err
		}
		return d.Symlink(target, to)
	case sys.S_IFREG:
		in, err := d.Openat(name, sys.O_RDONLY, 0)
		if err != nil {
			return err
		}
		defer in.Close()
		var b bytes.Buffer
		if _, err := io.Copy(&b, in); err != nil {
			return err
		}
		out, err := d.Openat(to, sys.O_WRONLY|sys.O_CREAT|sys.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		defer out.Close()
		_, err = out.Write(b.Bytes())
		return err
	}
	return d.Mknod(to, st.Mode, st.RdevMajor, st.RdevMinor)
}
