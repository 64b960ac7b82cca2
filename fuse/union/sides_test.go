package union

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/mount"
)

// side is a mounted union, by the kernel or by this package: what is done to
// one is done to the other, and the answers must be the same.
type side interface {
	mkdir(p string, mode uint32) error
	create(p, data string) error
	read(p string) (string, error)
	write(p string, off int64, data string) error // open for writing, no truncation
	trunc(p string) error                         // O_TRUNC
	mknod(p string, mode uint32, major, minor uint32) error
	symlink(target, p string) error
	link(old, p string) error
	unlink(p string) error
	rmdir(p string) error
	rename(old, p string, flags uint) error
	chmod(p string, mode uint32) error
	chown(p string, uid, gid uint32) error
	utimes(p string, atime, mtime sys.Time) error
	truncate(p string, size int64) error
	setxattr(p, attr, value string) error
	removexattr(p, attr string) error
	getxattr(p, attr string) (string, error)
	listxattr(p string) ([]string, error)
	stat(p string) (Attr, error)
	readlink(p string) (string, error)
	readdir(p string) ([]DirEntry, error)
	close()
}

func errno(err error) string {
	if err == nil {
		return "ok"
	}
	for e := err; e != nil; {
		if n, ok := e.(syscall.Errno); ok {
			return n.Error()
		}
		u, ok := e.(interface{ Unwrap() error })
		if !ok {
			break
		}
		e = u.Unwrap()
	}
	return "?? " + err.Error()
}

// kernelSide is overlayfs, mounted.
type kernelSide struct {
	t   testing.TB
	dir string
	fd  *sys.Fd

	config Config
}

func mountKernel(t testing.TB, c Config) *kernelSide {
	t.Helper()
	dir := t.TempDir()
	m := mount.Mount{Type: "overlay", Source: "overlay"}
	var lowers []string
	for _, l := range c.Lowers {
		lowers = append(lowers, mount.EscapeLayer(l))
	}
	lower := strings.Join(lowers, ":")
	for _, l := range c.DataLowers {
		lower += "::" + mount.EscapeLayer(l)
	}
	m.Options = append(m.Options, "lowerdir="+lower)
	if c.Upper != "" {
		m.Options = append(m.Options, "upperdir="+mount.EscapeLayer(c.Upper), "workdir="+mount.EscapeLayer(c.Work))
	}
	onOff := map[bool]string{true: "on", false: "off"}
	redirect := map[RedirectMode]string{RedirectNoFollow: "nofollow", RedirectFollow: "follow", RedirectOn: "on"}
	m.Options = append(m.Options, "metacopy="+onOff[c.Metacopy], "index="+onOff[c.Index], "redirect_dir="+redirect[c.Redirect])
	if c.NFSExport {
		m.Options = append(m.Options, "nfs_export=on")
	}
	if c.Xattrs == XattrUser {
		m.Options = append(m.Options[:len(m.Options)-3], "userxattr", "index="+onOff[c.Index])
	}
	if err := mount.All(context.Background(), []mount.Mount{m}, dir); err != nil {
		t.Fatalf("kernel overlay %v: %v", m.Options, err)
	}
	fd, err := sys.Open(dir, sys.O_PATH|sys.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return &kernelSide{t: t, dir: dir, fd: fd, config: c}
}

func (k *kernelSide) close() {
	k.fd.Close()
	if err := syscall.Unmount(k.dir, 0); err != nil {
		k.t.Error(err)
	}
}
func (k *kernelSide) at(p string) string                { return filepath.Join(k.dir, p) }
func (k *kernelSide) mkdir(p string, mode uint32) error { return syscall.Mkdir(k.at(p), mode) }
func (k *kernelSide) create(p, data string) error {
	f, err := os.OpenFile(k.at(p), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(data)
	return err
}
func (k *kernelSide) read(p string) (string, error) {
	b, err := os.ReadFile(k.at(p))
	return string(b), err
}
func (k *kernelSide) write(p string, off int64, data string) error {
	f, err := os.OpenFile(k.at(p), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt([]byte(data), off)
	return err
}
func (k *kernelSide) trunc(p string) error {
	f, err := os.OpenFile(k.at(p), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	return f.Close()
}
func (k *kernelSide) mknod(p string, mode uint32, major, minor uint32) error {
	return k.fd.Mknod(p, mode, major, minor)
}
func (k *kernelSide) symlink(target, p string) error { return syscall.Symlink(target, k.at(p)) }
func (k *kernelSide) link(old, p string) error       { return syscall.Link(k.at(old), k.at(p)) }
func (k *kernelSide) unlink(p string) error          { return syscall.Unlink(k.at(p)) }
func (k *kernelSide) rmdir(p string) error           { return syscall.Rmdir(k.at(p)) }
func (k *kernelSide) rename(old, p string, flags uint) error {
	return k.fd.Rename(old, k.fd, p, flags)
}
func (k *kernelSide) chmod(p string, mode uint32) error { return syscall.Chmod(k.at(p), mode) }
func (k *kernelSide) chown(p string, uid, gid uint32) error {
	return syscall.Lchown(k.at(p), int(int32(uid)), int(int32(gid)))
}
func (k *kernelSide) utimes(p string, a, m sys.Time) error    { return k.fd.Utimes(p, a, m) }
func (k *kernelSide) truncate(p string, size int64) error     { return syscall.Truncate(k.at(p), size) }
func (k *kernelSide) setxattr(p, attr, value string) error    { return k.fd.Setxattr(p, attr, value) }
func (k *kernelSide) removexattr(p, attr string) error        { return k.fd.Removexattr(p, attr) }
func (k *kernelSide) getxattr(p, attr string) (string, error) { return k.fd.Getxattr(p, attr) }
func (k *kernelSide) listxattr(p string) ([]string, error)    { return k.fd.Listxattr(p) }
func (k *kernelSide) stat(p string) (a Attr, err error) {
	st, err := k.fd.Stat(p)
	if err != nil {
		return a, err
	}
	return Attr{Ino: st.Ino, Size: st.Size, Blocks: st.Blocks, Mode: st.Mode, Nlink: st.Nlink, UID: st.UID, GID: st.GID,
		RdevMajor: st.RdevMajor, RdevMinor: st.RdevMinor, Atime: st.Atime, Mtime: st.Mtime, Ctime: st.Ctime, Btime: st.Btime}, nil
}
func (k *kernelSide) readlink(p string) (string, error) { return os.Readlink(k.at(p)) }
func (k *kernelSide) readdir(p string) ([]DirEntry, error) {
	f, err := sys.Open(k.at(p), sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	l, err := f.ReadDir()
	var all []DirEntry
	for _, e := range l {
		all = append(all, DirEntry{Name: e.Name, Ino: e.Ino, Type: e.Type})
	}
	return all, err
}

// unionSide is this package.
type unionSide struct {
	t  testing.TB
	fs *FS

	shared bool // others change it at the same time
}

func openUnion(t testing.TB, c Config) *unionSide {
	t.Helper()
	if c.Log == nil {
		c.Log = t.Logf
	}
	fs, err := Open(context.Background(), c)
	if err != nil {
		t.Fatalf("union: %v", err)
	}
	return &unionSide{t: t, fs: fs}
}

var rootCaller = Caller{Umask: 0o022, PID: 1}

func (u *unionSide) close() {
	if n := len(u.fs.table.byID); n != 1 {
		u.t.Errorf("%d nodes are in memory at the end, all but the root's without a reference", n)
		for id, n := range u.fs.table.byID {
			u.t.Logf("  %d %q refs %d holds %d flags %b", id, n.name, n.refs, n.holds, n.flags.Load())
		}
	}
	if err := u.fs.Close(); err != nil {
		u.t.Error(err)
	}
}

// walk finds a node and calls f with it.
func (u *unionSide) walk(p string, f func(n *Node) error) error {
	n := u.fs.Root()
	var held []uint64
	defer func() {
		for i := len(held) - 1; i >= 0; i-- {
			u.fs.Forget(held[i], 1)
		}
	}()
	for _, part := range strings.Split(p, "/") {
		if part == "" || part == "." {
			continue
		}
		e, err := u.fs.Lookup(n, part)
		if err != nil {
			return err
		}
		held = append(held, e.Node.ID())
		n = e.Node
	}
	return f(n)
}

func (u *unionSide) in(p string, f func(dir *Node, name string) error) error {
	return u.walk(path.Dir(p), func(n *Node) error { return f(n, path.Base(p)) })
}

func (u *unionSide) drop(e Entry, err error) error {
	if err == nil {
		u.fs.Forget(e.Node.ID(), 1)
	}
	return err
}
func (u *unionSide) mkdir(p string, mode uint32) error {
	return u.in(p, func(d *Node, name string) error { return u.drop(u.fs.Mkdir(rootCaller, d, name, mode)) })
}
func (u *unionSide) create(p, data string) error {
	return u.in(p, func(d *Node, name string) error {
		e, f, err := u.fs.Create(rootCaller, d, name, syscall.O_RDWR|syscall.O_CREAT|syscall.O_EXCL, 0o644)
		if err != nil {
			return err
		}
		defer u.fs.Forget(e.Node.ID(), 1)
		defer f.Close()
		_, err = f.WriteAt([]byte(data), 0, false)
		return err
	})
}
func (u *unionSide) open(p string, flags uint32, g func(f *File) error) error {
	return u.walk(p, func(n *Node) error {
		f, err := u.fs.Open(Caller{}, n, flags)
		if err != nil {
			return err
		}
		defer f.Close()
		return g(f)
	})
}
func (u *unionSide) read(p string) (s string, err error) {
	err = u.open(p, syscall.O_RDONLY, func(f *File) error {
		b := make([]byte, 1<<20)
		n, err := f.ReadAt(b, 0)
		s = string(b[:n])
		return err
	})
	return s, err
}
func (u *unionSide) write(p string, off int64, data string) error {
	return u.open(p, syscall.O_WRONLY, func(f *File) error { _, err := f.WriteAt([]byte(data), off, false); return err })
}
func (u *unionSide) trunc(p string) error {
	return u.open(p, syscall.O_WRONLY|syscall.O_TRUNC, func(f *File) error { return nil })
}
func (u *unionSide) mknod(p string, mode uint32, major, minor uint32) error {
	return u.in(p, func(d *Node, name string) error {
		return u.drop(u.fs.Mknod(rootCaller, d, name, mode, major, minor))
	})
}
func (u *unionSide) symlink(target, p string) error {
	return u.in(p, func(d *Node, name string) error { return u.drop(u.fs.Symlink(rootCaller, d, name, target)) })
}
func (u *unionSide) link(old, p string) error {
	return u.walk(old, func(n *Node) error {
		return u.in(p, func(d *Node, name string) error {
			if e, err := u.fs.Lookup(d, name); err == nil { // the kernel's client side does not ask for a link then
				u.fs.Forget(e.Node.ID(), 1)
				return syscall.EEXIST
			}
			return u.drop(u.fs.Link(Caller{}, n, d, name))
		})
	})
}
func (u *unionSide) unlink(p string) error {
	return u.in(p, func(d *Node, name string) error { return u.fs.Unlink(d, name) })
}
func (u *unionSide) rmdir(p string) error {
	return u.in(p, func(d *Node, name string) error { return u.fs.Rmdir(d, name) })
}
func (u *unionSide) rename(old, p string, flags uint) error {
	return u.in(old, func(d *Node, name string) error {
		return u.in(p, func(d2 *Node, name2 string) error {
			return u.fs.Rename(rootCaller, d, name, d2, name2, uint32(flags))
		})
	})
}
func (u *unionSide) set(p string, s SetAttr) error {
	return u.walk(p, func(n *Node) error { _, err := u.fs.Setattr(rootCaller, n, nil, s); return err })
}
func (u *unionSide) chmod(p string, mode uint32) error {
	return u.set(p, SetAttr{Valid: SetMode, Mode: mode})
}
func (u *unionSide) chown(p string, uid, gid uint32) error {
	return u.set(p, SetAttr{Valid: SetUID | SetGID, UID: uid, GID: gid})
}
func (u *unionSide) utimes(p string, a, m sys.Time) error {
	return u.set(p, SetAttr{Valid: SetAtime | SetMtime, Atime: a, Mtime: m})
}
func (u *unionSide) truncate(p string, size int64) error {
	return u.set(p, SetAttr{Valid: SetSize, Size: size})
}
func (u *unionSide) setxattr(p, attr, value string) error {
	return u.walk(p, func(n *Node) error { return u.fs.Setxattr(rootCaller, n, attr, []byte(value), 0, false) })
}
func (u *unionSide) removexattr(p, attr string) error {
	return u.walk(p, func(n *Node) error { return u.fs.Removexattr(rootCaller, n, attr) })
}
func (u *unionSide) getxattr(p, attr string) (s string, err error) {
	err = u.walk(p, func(n *Node) error {
		b := make([]byte, 64<<10)
		size, err := u.fs.Getxattr(n, attr, b)
		s = string(b[:size])
		return err
	})
	return s, err
}
func (u *unionSide) listxattr(p string) (l []string, err error) {
	err = u.walk(p, func(n *Node) error {
		b := make([]byte, 64<<10)
		size, err := u.fs.Listxattr(n, b)
		for s := range strings.SplitSeq(string(b[:size]), "\x00") {
			if s != "" {
				l = append(l, s)
			}
		}
		return err
	})
	return l, err
}
func (u *unionSide) stat(p string) (a Attr, err error) {
	err = u.walk(p, func(n *Node) (err error) { a, err = u.fs.Getattr(n, nil); return err })
	return a, err
}
func (u *unionSide) readlink(p string) (s string, err error) {
	err = u.walk(p, func(n *Node) (err error) { s, err = u.fs.Readlink(n); return err })
	return s, err
}
func (u *unionSide) readdir(p string) (all []DirEntry, err error) {
	err = u.walk(p, func(n *Node) error {
		d, err := u.fs.OpenDir(n)
		if err != nil {
			return err
		}
		defer d.Close()
		off, done := uint64(0), false
		for !done { // three at a time
			done = true
			left := 3
			if err := d.Read(off, func(e DirEntry) bool {
				if left == 0 {
					done = false
					return false
				}
				left--
				off = e.Next
				all = append(all, DirEntry{Name: e.Name, Ino: e.Ino, Type: e.Type})
				return true
			}); err != nil {
				return err
			}
		}
		var plus []string
		if err := d.ReadPlus(0, func(e DirEntry, n Entry) bool {
			plus = append(plus, e.Name)
			if n.Attr.Ino != e.Ino {
				u.t.Errorf("%s/%s: d_ino %d, st_ino %d", p, e.Name, e.Ino, n.Attr.Ino)
			}
			u.fs.Forget(n.Node.ID(), 1)
			return true
		}); err != nil {
			return err
		}
		if len(plus) != len(all) && !u.shared {
			u.t.Errorf("%s: Read gives %d names, ReadPlus %d", p, len(all), len(plus))
		}
		return nil
	})
	return all, err
}

// listing describes a whole tree, a line for each name. volatile facts (numbers,
// ctime) are left out; times are of what kept them.
func listing(t testing.TB, s side) []string {
	t.Helper()
	var lines []string
	var walk func(p string)
	walk = func(p string) {
		a, err := s.stat(p)
		if err != nil {
			lines = append(lines, p+": stat: "+errno(err))
			return
		}
		line := fmt.Sprintf("%s: %o %d:%d", p, a.Mode, a.UID, a.GID)
		switch a.Mode & sys.S_IFMT {
		case sys.S_IFREG:
			data, err := s.read(p)
			if len(data) > 60 {
				data = data[:60]
			}
			line += fmt.Sprintf(" nlink %d size %d %q %s mtime %d", a.Nlink, a.Size, data, errno(err), oldTime(a.Mtime))
		case sys.S_IFLNK:
			to, err := s.readlink(p)
			line += fmt.Sprintf(" -> %q %s", to, errno(err))
		case sys.S_IFCHR, sys.S_IFBLK:
			line += fmt.Sprintf(" %d,%d", a.RdevMajor, a.RdevMinor)
		case sys.S_IFDIR:
			line += fmt.Sprintf(" nlink %d mtime %d", a.Nlink, oldTime(a.Mtime))
		}
		attrs, err := s.listxattr(p)
		sort.Strings(attrs)
		for _, x := range attrs {
			v, err := s.getxattr(p, x)
			line += fmt.Sprintf(" %s=%q(%s)", x, v, errno(err))
		}
		if err != nil {
			line += " listxattr " + errno(err)
		}
		lines = append(lines, line)
		if a.Mode&sys.S_IFMT != sys.S_IFDIR {
			return
		}
		l, err := s.readdir(p)
		if err != nil {
			lines = append(lines, p+": readdir: "+errno(err))
		}
		slices.SortFunc(l, func(a, b DirEntry) int { return strings.Compare(a.Name, b.Name) })
		for i, e := range l {
			if i > 0 && l[i-1].Name == e.Name {
				lines = append(lines, p+"/"+e.Name+" is there twice")
			}
			if st, err := s.stat(path.Join(p, e.Name)); err == nil && (st.Ino != e.Ino || st.Mode&sys.S_IFMT != e.Type) {
				lines = append(lines, fmt.Sprintf("%s/%s: d_ino %d type %o, st_ino %d type %o", p, e.Name, e.Ino, e.Type, st.Ino, st.Mode&sys.S_IFMT))
			}
			walk(path.Join(p, e.Name))
		}
	}
	walk(".")
	return lines
}

// oldTime is a time of long ago, which must be kept, or 0 for one of today.
func oldTime(t sys.Time) int64 {
	if t.Sec > 1_500_000_000 {
		return 0
	}
	return t.Sec*1_000_000_000 + int64(t.Nsec)
}

func diffLines(a, b []string) string {
	var out []string
	for _, l := range a {
		if !slices.Contains(b, l) {
			out = append(out, "- "+l)
		}
	}
	for _, l := range b {
		if !slices.Contains(a, l) {
			out = append(out, "+ "+l)
		}
	}
	return strings.Join(out, "\n")
}

// layers makes a Config of fresh directories, and the lowers with what build puts
// there, nearest first.
func layersFor(t testing.TB, base string, lowers int, c Config, build func(lower []string)) Config {
	t.Helper()
	dir, err := os.MkdirTemp(base, "u")
	if err != nil {
		t.Fatal(err)
	}
	for i := range lowers {
		c.Lowers = append(c.Lowers, filepath.Join(dir, fmt.Sprintf("l%d", i)))
	}
	c.Upper, c.Work = filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	for _, d := range append([]string{c.Upper, c.Work}, c.Lowers...) {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	build(c.Lowers)
	return c
}

// both runs what do does on both sides, and compares what was answered and what
// is there at the end, by whichever of the two it is looked at.
func both(t *testing.T, lowers int, c Config, build func(lower []string), do func(s side, say func(string, ...any))) {
	t.Helper()
	testenv.Root(t)
	base := testenv.FS(t, "tmpfs")
	var said, lists [2][]string
	var configs [2]Config
	for i := range 2 {
		configs[i] = layersFor(t, base, lowers, c, build)
		open := func() side {
			if i == 0 {
				return mountKernel(t, configs[i])
			}
			return openUnion(t, configs[i])
		}
		s := open()
		do(s, func(format string, args ...any) { said[i] = append(said[i], fmt.Sprintf(format, args...)) })
		lists[i] = listing(t, s)
		s.close()
		s = open()
		if d := diffLines(lists[i], listing(t, s)); d != "" {
			t.Errorf("side %d changes by a new mount:\n%s", i, d)
		}
		s.close()
	}
	for i := range said[0] {
		if i >= len(said[1]) || said[0][i] != said[1][i] {
			t.Errorf("kernel: %s\nunion:  %s", said[0][i], said[1][i])
		}
	}
	if d := diffLines(lists[0], lists[1]); d != "" {
		t.Errorf("kernel (-) and union (+) end with different trees:\n%s", d)
	}
	k, u := mountKernel(t, configs[1]), openUnion(t, configs[0])
	if d := diffLines(lists[1], listing(t, k)); d != "" {
		t.Errorf("what the union (-) wrote, the kernel (+) reads otherwise:\n%s", d)
	}
	if d := diffLines(lists[0], listing(t, u)); d != "" {
		t.Errorf("what the kernel (-) wrote, the union (+) reads otherwise:\n%s", d)
	}
	k.close()
	u.close()
	if d := diffLines(upperListing(t, configs[0]), upperListing(t, configs[1])); d != "" {
		t.Errorf("uppers of kernel (-) and union (+):\n%s", d)
	}
}

// upperListing is the upper itself, with overlay xattrs but those that have
// numbers in them.
func upperListing(t testing.TB, c Config) (lines []string) {
	t.Helper()
	err := filepath.Walk(c.Upper, func(p string, i os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		fd, err := sys.Open(filepath.Dir(p), sys.O_PATH, 0)
		if err != nil {
			return err
		}
		defer fd.Close()
		attrs, err := fd.Listxattr(filepath.Base(p))
		if err != nil {
			return err
		}
		sort.Strings(attrs)
		rel, _ := filepath.Rel(c.Upper, p)
		line := fmt.Sprintf("%s: %v", rel, i.Mode())
		for _, x := range attrs {
			v, _ := fd.Getxattr(filepath.Base(p), x)
			if strings.HasSuffix(x, "overlay.uuid") {
				continue // the kernel's own number for statfs, which it makes up when it mounts an upper anew
			}
			if strings.HasSuffix(x, "overlay.origin") {
				v = fmt.Sprint(len(v), " bytes")
			}
			line += fmt.Sprintf(" %s=%q", x, v)
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}
