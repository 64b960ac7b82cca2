package sys_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bareDir is a directory on a file system of the kind, open for reading and as
// O_PATH.
func bareDir(t *testing.T, kind string) (path string, dir, pathOnly *sys.Fd) {
	t.Helper()
	path = testenv.FS(t, kind)
	dir, err := sys.OpenDir(path)
	must(t, err)
	t.Cleanup(func() { dir.Close() })
	pathOnly, err = sys.Open(path, sys.O_PATH|sys.O_DIRECTORY, 0)
	must(t, err)
	t.Cleanup(func() { pathOnly.Close() })
	return path, dir, pathOnly
}

func TestBareNamesAndStat(t *testing.T) {
	path, _, dir := bareDir(t, "tmpfs")
	d := dir.Int()
	long := strings.Repeat("n", 255)
	must(t, sys.MknodBare(d, long, sys.S_IFREG|0o640, 0, 0))
	must(t, sys.MkdirBare(d, "d", 0o750))
	must(t, sys.SymlinkBare("nowhere", d, "l"))
	must(t, sys.LinkBare(d, "l", d, "l2"))
	must(t, sys.MknodBare(d, "null", sys.S_IFCHR|0o600, 1, 3))
	must(t, sys.RenameBare(d, "null", d, "d2", 0))
	var s sys.Stat
	for _, c := range []struct {
		name  string
		typ   uint32
		nlink uint32
	}{{long, sys.S_IFREG, 1}, {"d", sys.S_IFDIR, 2}, {"l", sys.S_IFLNK, 2}, {"d2", sys.S_IFCHR, 1}, {"", sys.S_IFDIR, 3}} {
		must(t, sys.StatBare(d, c.name, &s))
		if s.Type() != c.typ || s.Nlink != c.nlink {
			t.Errorf("%q: type %o nlink %d, want %o, %d", c.name, s.Type(), s.Nlink, c.typ, c.nlink)
		}
	}
	b := make([]byte, 100)
	if n, err := sys.ReadlinkBare(d, "l", b); err != nil || string(b[:n]) != "nowhere" {
		t.Errorf("readlink: %q, %v", b[:n], err)
	}
	for name, want := range map[string]error{"none": syscall.ENOENT, long + "n": syscall.ENAMETOOLONG, "a\x00b": syscall.EINVAL} {
		if err := sys.StatBare(d, name, &s); err != want {
			t.Errorf("stat %q: %v, want %v", name, err, want)
		}
	}
	must(t, sys.ChownBare(d, "l", 5, 6))
	must(t, sys.UtimesBare(d, "l", sys.Time{Sec: 1, Nsec: 2}, sys.Time{Sec: -3, Nsec: 4}))
	must(t, sys.StatBare(d, "l2", &s))
	if s.UID != 5 || s.GID != 6 || s.Mtime != (sys.Time{Sec: -3, Nsec: 4}) {
		t.Errorf("owner %d:%d, mtime %v", s.UID, s.GID, s.Mtime)
	}
	must(t, sys.ChmodBare(d, "d", 0o2755))
	if fi, err := os.Stat(path + "/d"); err != nil || fi.Mode().Perm() != 0o755 || fi.Mode()&os.ModeSetgid == 0 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	must(t, sys.UnlinkBare(d, "d", sys.AT_REMOVEDIR))
	must(t, sys.UnlinkBare(d, "l", 0))
	if err := sys.UnlinkBare(d, "l", 0); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("unlink: %v", err)
	}
}

// Chmod of a symlink changes nothing, on kernels without fchmodat2(2) either.
func TestBareChmodFollowsNoSymlink(t *testing.T) {
	path, dir, _ := bareDir(t, "tmpfs")
	d := dir.Int()
	must(t, os.WriteFile(path+"/f", nil, 0o600))
	must(t, os.Symlink("f", path+"/l"))
	for _, old := range []bool{false, true} {
		defer sys.SetNoFchmodat2(sys.SetNoFchmodat2(old))
		if err := sys.ChmodBare(d, "l", 0o777); !errors.Is(err, syscall.EOPNOTSUPP) {
			t.Errorf("old kernel %v: %v", old, err)
		}
		must(t, sys.ChmodBare(d, "f", 0o640))
		if fi, err := os.Stat(path + "/f"); err != nil || fi.Mode() != 0o640 {
			t.Errorf("old kernel %v: mode %v, %v", old, fi.Mode(), err)
		}
	}
}

// One call sees below a directory, and never through a symlink.
func TestBareExistsBelow(t *testing.T) {
	path, _, dir := bareDir(t, "tmpfs")
	must(t, os.Mkdir(path+"/d", 0o700))
	must(t, os.Symlink("nowhere", path+"/d/there"))
	must(t, os.Symlink("d", path+"/l"))
	must(t, os.WriteFile(path+"/f", nil, 0o600))
	for _, c := range []struct {
		name, sub string
		want      bool
		err       error
	}{
		{"d", "there", true, nil}, {"d", "none", false, nil}, {"none", "x", false, nil},
		{"l", "there", false, syscall.ELOOP}, {"f", "x", false, syscall.ENOTDIR},
		{"d", "a\x00b", false, syscall.EINVAL}, {strings.Repeat("n", 300), strings.Repeat("n", 300), false, syscall.ENAMETOOLONG},
	} {
		got, err := sys.ExistsBelowBare(dir.Int(), c.name, c.sub)
		if got != c.want || err != c.err {
			t.Errorf("%.9q below %.9q: %v, %v; want %v, %v", c.sub, c.name, got, err, c.want, c.err)
		}
	}
}

// TestBareOnPathDescriptors: what takes "" works on O_PATH descriptors of every
// type, symlinks too.
func TestBareOnPathDescriptors(t *testing.T) {
	_, _, dir := bareDir(t, "tmpfs")
	d := dir.Int()
	must(t, sys.MknodBare(d, "f", sys.S_IFREG|0o600, 0, 0))
	must(t, sys.MkdirBare(d, "d", 0o700))
	must(t, sys.SymlinkBare("f", d, "l"))
	must(t, sys.MknodBare(d, "p", sys.S_IFIFO|0o600, 0, 0))
	for _, name := range []string{"f", "d", "l", "p"} {
		n, err := sys.OpenBare(d, name, sys.O_PATH, 0)
		must(t, err)
		var s sys.Stat
		must(t, sys.StatBare(n, "", &s))
		must(t, sys.ChownBare(n, "", 7, 8))
		must(t, sys.UtimesBare(n, "", sys.TimeOmit, sys.Time{Sec: 9}))
		must(t, sys.SetxattrBare(n, "", "trusted.x", []byte("v"), sys.XATTR_CREATE))
		b := make([]byte, 64)
		if k, err := sys.GetxattrBare(n, "", "trusted.x", b); err != nil || string(b[:k]) != "v" {
			t.Errorf("%s: getxattr %q, %v", name, b[:k], err)
		}
		if k, err := sys.GetxattrBare(d, name, "trusted.x", b); err != nil || string(b[:k]) != "v" {
			t.Errorf("%s: getxattr by name %q, %v", name, b[:k], err)
		}
		if k, err := sys.ListxattrBare(n, "", b); err != nil || string(b[:k]) != "trusted.x\x00" {
			t.Errorf("%s: listxattr %q, %v", name, b[:k], err)
		}
		if k, err := sys.ListxattrBare(d, name, b); err != nil || string(b[:k]) != "trusted.x\x00" {
			t.Errorf("%s: listxattr by name %q, %v", name, b[:k], err)
		}
		if err := sys.SetxattrBare(d, name, "trusted.x", nil, sys.XATTR_CREATE); err != syscall.EEXIST {
			t.Errorf("%s: setxattr XATTR_CREATE: %v", name, err)
		}
		must(t, sys.RemovexattrBare(n, "", "trusted.x"))
		if _, err := sys.GetxattrBare(d, name, "trusted.x", b); err != syscall.ENODATA {
			t.Errorf("%s: getxattr of none: %v", name, err)
		}
		must(t, sys.SetxattrBare(d, name, "trusted.y", []byte("w"), 0))
		must(t, sys.RemovexattrBare(d, name, "trusted.y"))
		if name != "l" {
			must(t, sys.ChmodBare(n, "", 0o711))
			must(t, sys.StatBare(d, name, &s))
			if s.Mode&0o777 != 0o711 || s.UID != 7 || s.GID != 8 || s.Mtime.Sec != 9 {
				t.Errorf("%s: mode %o owner %d:%d mtime %v", name, s.Mode, s.UID, s.GID, s.Mtime)
			}
		}
		sys.CloseBare(n)
	}
}

// TestOldXattrCalls: what kernels before 6.13 get does the same.
func TestOldXattrCalls(t *testing.T) {
	defer sys.SetNoXattrat(sys.SetNoXattrat(true))
	TestBareOnPathDescriptors(t)
}

func TestBareDirents(t *testing.T) {
	path, dir, _ := bareDir(t, "ext4")
	want := []string{".", "..", "lost+found"}
	for i := range 3000 {
		name := fmt.Sprintf("%s%d", strings.Repeat("x", i%200), i)
		must(t, os.WriteFile(filepath.Join(path, name), nil, 0o600))
		want = append(want, name)
	}
	slices.Sort(want)
	var got []string
	var middle int64
	buf := make([]byte, 8192)
	var e sys.BareDirent
	read := func(visit func()) {
		for {
			n, err := sys.DirentsBare(dir.Int(), buf)
			must(t, err)
			if n == 0 {
				return
			}
			for rest, ok := sys.NextDirent(buf[:n], &e); ok; rest, ok = sys.NextDirent(rest, &e) {
				visit()
			}
		}
	}
	read(func() {
		got = append(got, string(e.Name))
		if len(got) == 1500 {
			middle = e.Off
		}
		if e.IsDot() != (string(e.Name) == "." || string(e.Name) == "..") {
			t.Errorf("%q: IsDot %v", e.Name, e.IsDot())
		}
		if wantType := uint32(sys.S_IFREG); !e.IsDot() && string(e.Name) != "lost+found" && e.Type != wantType {
			t.Errorf("%q: type %o", e.Name, e.Type)
		}
	})
	rest := slices.Clone(got[1500:])
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("%d names, want %d", len(got), len(want))
	}
	_, err := sys.SeekBare(dir.Int(), middle, io.SeekStart)
	must(t, err)
	var again []string
	read(func() { again = append(again, string(e.Name)) })
	if !slices.Equal(again, rest) {
		t.Errorf("from d_off of name 1500: %d names, want %d", len(again), len(rest))
	}
}

// TestNextDirentOfGarbage: a buffer that is no kernel's ends the walk.
func TestNextDirentOfGarbage(t *testing.T) {
	for _, b := range [][]byte{nil, make([]byte, 18), make([]byte, 64), bytes.Repeat([]byte{0xff}, 300)} {
		var e sys.BareDirent
		if _, ok := sys.NextDirent(b, &e); ok {
			t.Errorf("%d bytes of %x are a name", len(b), b[:min(len(b), 1)])
		}
	}
}

func TestBareHandles(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			path, dir, pathOnly := bareDir(t, kind)
			must(t, os.WriteFile(path+"/f", []byte("content"), 0o600))
			var h, same sys.FileHandle
			_, err := sys.HandleBare(pathOnly.Int(), "f", &h)
			must(t, err)
			must(t, os.Rename(path+"/f", path+"/g"))
			_, err = sys.HandleBare(pathOnly.Int(), "g", &same)
			must(t, err)
			if h != same || h.Len == 0 {
				t.Errorf("the handle changed with the name: %v, %v", h, same)
			}
			n, err := sys.OpenHandleBare(dir.Int(), &h, sys.O_RDONLY)
			must(t, err)
			b := make([]byte, 20)
			if k, err := sys.PreadBare(n, b, 0); err != nil || string(b[:k]) != "content" {
				t.Errorf("read %q, %v", b[:k], err)
			}
			sys.CloseBare(n)
			must(t, os.Remove(path+"/g"))
			if n, err := sys.OpenHandleBare(dir.Int(), &h, sys.O_PATH); err != syscall.ESTALE {
				t.Errorf("open of a removed file: %d, %v", n, err)
			}
		})
	}
}

func TestTmpfileGetsAName(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			path, _, dir := bareDir(t, kind)
			n, err := sys.TmpfileBare(dir.Int(), sys.O_RDWR, 0o600)
			must(t, err)
			defer sys.CloseBare(n)
			k, err := sys.PwriteBare(n, []byte("abc"), 0)
			if k != 3 {
				t.Fatal(k, err)
			}
			must(t, sys.LinkBare(n, "", dir.Int(), "f"))
			if b, err := os.ReadFile(path + "/f"); string(b) != "abc" {
				t.Errorf("%q, %v", b, err)
			}
			if err := sys.LinkBare(n, "", dir.Int(), "f"); err != syscall.EEXIST {
				t.Errorf("second link: %v", err)
			}
		})
	}
}

func TestBareIO(t *testing.T) {
	path, _, dir := bareDir(t, "xfs")
	n, err := sys.OpenBare(dir.Int(), "a", sys.O_RDWR|sys.O_CREAT, 0o600)
	must(t, err)
	defer sys.CloseBare(n)
	m, err := sys.OpenBare(dir.Int(), "b", sys.O_RDWR|sys.O_CREAT, 0o600)
	must(t, err)
	defer sys.CloseBare(m)
	data := bytes.Repeat([]byte("0123456789abcdef"), 4096)
	k, err := sys.PwriteBare(n, data, 0)
	must(t, err)
	if k != len(data) {
		t.Fatal(k)
	}
	must(t, sys.CloneBare(m, n))
	k, err = sys.CopyRangeBare(m, int64(len(data)), n, 0, 4096)
	if err != nil || k != 4096 {
		t.Fatal(k, err)
	}
	must(t, sys.FtruncateBare(m, 200000))
	const punchHole, keepSize = 2, 1
	must(t, sys.FallocateBare(m, punchHole|keepSize, 0, 4096))
	must(t, sys.FsyncBare(m, true))
	if off, err := sys.SeekBare(m, 0, 3 /* SEEK_DATA */); err != nil || off != 4096 {
		t.Errorf("data after the hole: %d, %v", off, err)
	}
	r, err := sys.ReopenBare(m, sys.O_RDONLY)
	must(t, err)
	defer sys.CloseBare(r)
	if _, err := sys.PwriteBare(r, []byte("x"), 0); err != syscall.EBADF {
		t.Errorf("write to a read-only descriptor: %v", err)
	}
	got, err := os.ReadFile(path + "/b")
	must(t, err)
	want := append(slices.Clone(data), data[:4096]...)
	clear(want[:4096])
	want = append(want, make([]byte, 200000-len(want))...)
	if !bytes.Equal(got, want) {
		t.Errorf("content differs")
	}
}

func TestBareFlags(t *testing.T) {
	_, _, dir := bareDir(t, "ext4")
	n, err := sys.OpenBare(dir.Int(), "a", sys.O_RDWR|sys.O_CREAT, 0o600)
	must(t, err)
	defer sys.CloseBare(n)
	old, err := sys.FlagsBare(n)
	must(t, err)
	const noatime = 0x80
	must(t, sys.SetFlagsBare(n, old|noatime))
	if now, err := sys.FlagsBare(n); err != nil || now != old|noatime {
		t.Errorf("flags %x, %v; want %x", now, err, old|noatime)
	}
	var s sys.Statfs
	must(t, sys.StatfsBare(n, &s))
	if s.Type != sys.EXT4_SUPER_MAGIC || s.NameMax != 255 || s.Files == 0 || s.Fsid == [2]int32{} {
		t.Errorf("statfs %+v", s)
	}
}

func TestBareLocks(t *testing.T) {
	_, _, dir := bareDir(t, "tmpfs")
	open := func() int {
		n, err := sys.OpenBare(dir.Int(), "a", sys.O_RDWR|sys.O_CREAT, 0o600)
		must(t, err)
		t.Cleanup(func() { sys.CloseBare(n) })
		return n
	}
	a, b := open(), open()
	must(t, sys.SetRangeLock(a, sys.RangeLock{Type: sys.F_WRLCK, Start: 10, Len: 10}, false))
	if err := sys.SetRangeLock(b, sys.RangeLock{Type: sys.F_RDLCK, Start: 15, Len: 1}, false); err != syscall.EAGAIN {
		t.Errorf("second lock: %v", err)
	}
	l, err := sys.GetRangeLock(b, sys.RangeLock{Type: sys.F_RDLCK})
	if want := (sys.RangeLock{Type: sys.F_WRLCK, Start: 10, Len: 10}); err != nil || l != want {
		t.Errorf("in the way: %+v, %v", l, err)
	}
	done := make(chan error, 1)
	go func() { done <- sys.SetRangeLock(b, sys.RangeLock{Type: sys.F_WRLCK}, true) }()
	must(t, sys.SetRangeLock(a, sys.RangeLock{Type: sys.F_UNLCK}, false))
	must(t, <-done)
	must(t, sys.FlockBare(a, sys.LOCK_EX|sys.LOCK_NB))
	if err := sys.FlockBare(b, sys.LOCK_SH|sys.LOCK_NB); err != syscall.EWOULDBLOCK {
		t.Errorf("second flock: %v", err)
	}
	must(t, sys.FlockBare(a, sys.LOCK_UN))
}

// TestSetFsID: files made meanwhile belong to the ids, and root is root again.
func TestSetFsID(t *testing.T) {
	_, _, dir := bareDir(t, "tmpfs")
	must(t, os.Chmod(dir.Name(), 0o777))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	must(t, sys.SetFsID(1234, 2345))
	err := sys.MknodBare(dir.Int(), "theirs", sys.S_IFREG|0o600, 0, 0)
	must(t, sys.SetFsID(0, 0))
	must(t, err)
	must(t, sys.MknodBare(dir.Int(), "ours", sys.S_IFCHR|0o600, 5, 5))
	var s sys.Stat
	must(t, sys.StatBare(dir.Int(), "theirs", &s))
	if s.UID != 1234 || s.GID != 2345 {
		t.Errorf("owner %d:%d", s.UID, s.GID)
	}
}

// TestFSUUID: the general request and the ones of single file systems agree, and
// two file systems differ.
func TestFSUUID(t *testing.T) {
	seen := map[[16]byte]string{}
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		_, dir, _ := bareDir(t, kind)
		u, err := dir.FSUUID()
		if errors.Is(err, syscall.ENOTTY) {
			t.Logf("%s: the kernel does not say", kind)
			continue
		}
		must(t, err)
		if u == [16]byte{} || seen[u] != "" {
			t.Errorf("%s: %x, as %q", kind, u, seen[u])
		}
		seen[u] = kind
		if old, ok := sys.OldUUID(dir); kind != "tmpfs" && (!ok || old != u) {
			t.Errorf("%s: %x by the old request (%v), %x by the new one", kind, old, ok, u)
		}
	}
}

func TestFileLimit(t *testing.T) {
	if n, err := sys.FileLimit(); err != nil || n < 256 {
		t.Errorf("%d, %v", n, err)
	}
}

// TestBareCallsAllocateNothing, neither where they succeed nor where they fail.
func TestBareCallsAllocateNothing(t *testing.T) {
	path, dir, pathOnly := bareDir(t, "tmpfs")
	must(t, os.WriteFile(path+"/f", []byte("content"), 0o600))
	must(t, sys.SetxattrBare(pathOnly.Int(), "f", "trusted.x", []byte("v"), 0))
	f, err := sys.OpenBare(dir.Int(), "f", sys.O_PATH, 0)
	must(t, err)
	defer sys.CloseBare(f)
	d, buf := pathOnly.Int(), make([]byte, 512)
	check := func(what string, call func() error, want error) {
		t.Helper()
		var err error
		if n := testing.AllocsPerRun(100, func() { err = call() }); n != 0 || err != want {
			t.Errorf("%s: %v allocations, %v", what, n, err)
		}
	}
	var s sys.Stat
	check("stat", func() error { return sys.StatBare(d, "f", &s) }, nil)
	check("exists below", func() error { _, err := sys.ExistsBelowBare(d, "none", "x"); return err }, nil)
	check("stat of none", func() error { return sys.StatBare(d, "none", &s) }, syscall.ENOENT)
	check("open", func() error {
		n, err := sys.OpenBare(d, "f", sys.O_PATH, 0)
		sys.CloseBare(n)
		return err
	}, nil)
	check("reopen", func() error {
		n, err := sys.ReopenBare(f, sys.O_RDONLY)
		sys.CloseBare(n)
		return err
	}, nil)
	check("getxattr", func() error { _, err := sys.GetxattrBare(d, "f", "trusted.x", buf); return err }, nil)
	check("getxattr on the stack", func() error {
		var b [64]byte
		_, err := sys.GetxattrBare(d, "f", "trusted.x", b[:])
		return err
	}, nil)
	check("getxattr of O_PATH", func() error { _, err := sys.GetxattrBare(f, "", "trusted.x", buf); return err }, nil)
	check("getxattr of none", func() error { _, err := sys.GetxattrBare(d, "f", "trusted.y", buf); return err }, syscall.ENODATA)
	check("listxattr", func() error { _, err := sys.ListxattrBare(d, "f", buf); return err }, nil)
	check("getdents", func() error {
		if _, err := sys.SeekBare(dir.Int(), 0, io.SeekStart); err != nil {
			return err
		}
		n, err := sys.DirentsBare(dir.Int(), buf)
		var e sys.BareDirent
		for rest, ok := sys.NextDirent(buf[:n], &e); ok; rest, ok = sys.NextDirent(rest, &e) {
		}
		return err
	}, nil)
	check("handle", func() error {
		var h sys.FileHandle
		_, err := sys.HandleBare(d, "f", &h)
		if err != nil {
			return err
		}
		n, err := sys.OpenHandleBare(dir.Int(), &h, sys.O_PATH)
		sys.CloseBare(n)
		return err
	}, nil)
	check("rename", func() error { return sys.RenameBare(d, "f", d, "f", 0) }, nil)
	check("chmod", func() error { return sys.ChmodBare(d, "f", 0o600) }, nil)
	check("utimes", func() error { return sys.UtimesBare(d, "f", sys.TimeNow, sys.TimeOmit) }, nil)
	check("statfs", func() error { var s sys.Statfs; return sys.StatfsBare(d, &s) }, nil)
}

// BenchmarkBareLookup is what a lookup in one layer costs.
func BenchmarkBareLookup(b *testing.B) {
	dir := b.TempDir()
	must(b, os.WriteFile(dir+"/f", nil, 0o600))
	d, err := sys.Open(dir, sys.O_PATH, 0)
	must(b, err)
	defer d.Close()
	var s sys.Stat
	var buf [512]byte
	b.Run("stat", func(b *testing.B) {
		for b.Loop() {
			must(b, sys.StatBare(d.Int(), "f", &s))
		}
	})
	b.Run("listxattr", func(b *testing.B) {
		for b.Loop() {
			_, err := sys.ListxattrBare(d.Int(), "f", buf[:])
			must(b, err)
		}
	})
}
