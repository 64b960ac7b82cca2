package server_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/layerctl/layerctl/fuse/server"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"golang.org/x/sys/unix"
)

func TestTimesOfBirthArePassedOn(t *testing.T) {
	m := serveFiles(t, policyA, "f")
	var below, seen unix.Statx_t
	must(t, unix.Statx(unix.AT_FDCWD, filepath.Join(m.Dir, "l", "f"), 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &below))
	must(t, unix.Statx(unix.AT_FDCWD, m.path("f"), 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &seen))
	if seen.Mask&unix.STATX_BTIME == 0 || seen.Btime != below.Btime || seen.Btime.Sec == 0 {
		t.Errorf("birth %v, below %v", seen.Btime, below.Btime)
	}
}

func TestInodeFlags(t *testing.T) {
	m := serveFiles(t, policyA, "f")
	must(t, os.Mkdir(filepath.Join(m.Dir, "l", "d"), 0o755))
	for _, name := range []string{"f", "d"} {
		fd, err := unix.Open(m.path(name), unix.O_RDONLY, 0)
		must(t, err)
		defer unix.Close(fd)
		flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
		must(t, err)
		const noDump = 0x40 // FS_NODUMP_FL
		must(t, unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags|noDump)))
		if got, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS); got != flags|noDump || err != nil {
			t.Errorf("%s: flags %#x, not %#x: %v", name, got, flags|noDump, err)
		}
		if _, err := os.Stat(filepath.Join(m.Dir, "u", name)); err != nil {
			t.Errorf("not copied up: %v", err)
		}
		var x [28]byte // struct fsxattr
		const fsGetXattr = 0x801c581f
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsGetXattr, uintptr(unsafe.Pointer(&x))); e != 0 || x[0]&0x80 == 0 { // FS_XFLAG_NODUMP
			t.Errorf("%s: fsxattr %x, %v", name, x, e)
		}
		must(t, unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags|0x10))) // FS_IMMUTABLE_FL
		if err := unix.Chmod(m.path(name), 0o700); !errors.Is(err, unix.EPERM) {
			t.Errorf("%s: chmod of what is immutable: %v", name, err)
		}
		must(t, unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags)))
		if _, err := unix.IoctlGetInt(fd, unix.BLKGETSIZE); !errors.Is(err, unix.ENOTTY) {
			t.Errorf("another ioctl: %v", err)
		}
	}
}

// Locks of all three kinds hold over two names of one file, and over a copy-up.
func TestLocksOverTwoNames(t *testing.T) {
	for name, o := range map[string]server.Options{"passthrough": policyA, "writeback": {Writeback: true}} {
		t.Run(name, func(t *testing.T) {
			m := serveFiles(t, o, "lower")
			must(t, os.WriteFile(m.path("a"), []byte("x"), 0o644))
			must(t, os.Link(m.path("a"), m.path("b")))
			a, b := open(t, m.path("a"), os.O_RDWR), open(t, m.path("b"), os.O_RDWR)
			must(t, unix.Flock(int(a.Fd()), unix.LOCK_EX))
			if err := unix.Flock(int(b.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
				t.Errorf("flock: %v", err)
			}
			lock := unix.Flock_t{Type: unix.F_WRLCK}
			must(t, unix.FcntlFlock(a.Fd(), unix.F_OFD_SETLK, &lock))
			if err := unix.FcntlFlock(b.Fd(), unix.F_OFD_SETLK, &lock); !errors.Is(err, unix.EAGAIN) {
				t.Errorf("OFD: %v", err)
			}
			out := asNobodyFlock(t, m.path("b"))
			if out == nil {
				t.Error("another process got the flock")
			}
			r := open(t, m.path("lower"), os.O_RDONLY)
			must(t, unix.Flock(int(r.Fd()), unix.LOCK_EX))
			w := open(t, m.path("lower"), os.O_RDWR)
			writeAt(t, w, "upper")
			if err := unix.Flock(int(w.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
				t.Errorf("flock over a copy-up: %v", err)
			}
		})
	}
}

// asNobodyFlock tries to lock a file in another process.
func asNobodyFlock(t *testing.T, path string) error {
	t.Helper()
	return exec.Command("flock", "-n", path, "true").Run()
}

// Every name comes exactly once though names already read are removed, and others
// are made, between the reads.
func TestReaddirWhileNamesGo(t *testing.T) {
	for _, layer := range []string{"lower", "upper", "merged"} {
		t.Run(layer, func(t *testing.T) {
			dir := dirs(t, "ext4")
			const files = 3000
			for i := range files {
				in := "l"
				if layer == "upper" || layer == "merged" && i%2 == 0 {
					in = "u"
				}
				d := filepath.Join(dir, in, "d")
				_ = os.Mkdir(d, 0o755)
				must(t, os.WriteFile(filepath.Join(d, fmt.Sprintf("file-%05d", i)), nil, 0o644))
			}
			m := serve(t, setup{Dir: dir, Options: policyA})
			d := open(t, m.path("d"), os.O_RDONLY)
			seen := map[string]int{}
			for {
				names, err := d.Readdirnames(100)
				if len(names) == 0 {
					if err != nil && err.Error() != "EOF" {
						t.Fatal(err)
					}
					break
				}
				for _, n := range names {
					seen[n]++
					must(t, os.Remove(m.path("d/"+n)))
				}
			}
			for n, times := range seen {
				if times != 1 {
					t.Errorf("%s came %d times", n, times)
				}
			}
			if len(seen) != files {
				t.Errorf("%d names of %d", len(seen), files)
			}
			must(t, os.Remove(m.path("d")))
		})
	}
}

// A directory that is read again shows what changed, though the kernel keeps
// directories; so does one that is rewound.
func TestDirectoriesAreKeptAndFresh(t *testing.T) {
	m := serveFiles(t, policyA, "a", "b")
	names := func(f *os.File) string {
		t.Helper()
		_, err := f.Seek(0, 0)
		must(t, err)
		list, err := f.Readdirnames(-1)
		must(t, err)
		sort.Strings(list)
		return strings.Join(list, " ")
	}
	d := open(t, m.path(""), os.O_RDONLY)
	if got := names(d); got != "a b" {
		t.Errorf("%q", got)
	}
	open(t, m.path(""), os.O_RDONLY).Readdirnames(-1)
	before := m.counts().Requests
	for range 20 {
		if got := names(d); got != "a b" {
			t.Fatalf("%q", got)
		}
	}
	if n := m.counts().Requests - before; n > 5 {
		t.Errorf("%d requests to read a directory again", n)
	}
	must(t, os.Remove(m.path("a")))
	must(t, os.WriteFile(m.path("c"), nil, 0o644))
	if got := names(d); got != "b c" {
		t.Errorf("%q", got)
	}
}

// What is known stays known: no request for names, absent names, attributes and
// links that were asked for before.
func TestTheKernelKeepsWhatItKnows(t *testing.T) {
	m := serveFiles(t, policyA, "f")
	must(t, os.Symlink("f", m.path("s")))
	look := func() {
		_, err := os.Stat(m.path("s"))
		must(t, err)
		if _, err := os.Stat(m.path("absent")); !errors.Is(err, syscall.ENOENT) {
			t.Fatal(err)
		}
	}
	look()
	before := m.counts().Requests
	for range 50 {
		look()
	}
	if n := m.counts().Requests - before; n > 0 {
		t.Errorf("%d requests", n)
	}
	must(t, os.WriteFile(m.path("absent"), nil, 0o644))
	if _, err := os.Stat(m.path("absent")); err != nil {
		t.Errorf("a name that was absent: %v", err)
	}
}

func TestBigXattrs(t *testing.T) {
	m := serveFiles(t, policyA, "f")
	value := strings.Repeat("v", 3000)
	must(t, unix.Setxattr(m.path("f"), "user.big", []byte(value), 0))
	b := make([]byte, 1<<16)
	n, err := unix.Getxattr(m.path("f"), "user.big", b)
	if err != nil || string(b[:n]) != value {
		t.Errorf("%d bytes, %v", n, err)
	}
	if n, err := unix.Getxattr(m.path("f"), "user.big", nil); n != len(value) || err != nil {
		t.Errorf("size %d, %v", n, err)
	}
	if _, err := unix.Getxattr(m.path("f"), "user.big", b[:10]); !errors.Is(err, unix.ERANGE) {
		t.Errorf("short: %v", err)
	}
	if n, err := unix.Listxattr(m.path("f"), b); err != nil || !strings.Contains(string(b[:n]), "user.big\x00") || strings.Contains(string(b[:n]), "overlay") {
		t.Errorf("list %q, %v", b[:n], err)
	}
	if _, err := unix.Getxattr(m.path("f"), "user.none", b); !errors.Is(err, unix.ENODATA) {
		t.Errorf("none: %v", err)
	}
	must(t, unix.Removexattr(m.path("f"), "user.big"))
	if err := unix.Removexattr(m.path("f"), "user.big"); !errors.Is(err, unix.ENODATA) {
		t.Errorf("again: %v", err)
	}
}

// ACLs are the kernel's to check and to inherit, umask or not.
func TestDefaultACLsAndUmask(t *testing.T) {
	m := serveFiles(t, policyA)
	must(t, os.Mkdir(m.path("d"), 0o755))
	if out, err := exec.Command("setfacl", "-d", "-m", "u:65534:rwx,m:rwx", m.path("d")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	must(t, os.WriteFile(m.path("d/acl"), nil, 0o666))
	must(t, os.WriteFile(m.path("plain"), nil, 0o666))
	must(t, os.Mkdir(m.path("d/sub"), 0o777))
	for name, want := range map[string]uint32{"d/acl": 0o664, "plain": 0o600, "d/sub": 0o775} {
		var st unix.Stat_t
		must(t, unix.Stat(m.path(name), &st))
		if st.Mode&0o7777 != want {
			t.Errorf("%s: mode %o, not %o", name, st.Mode&0o7777, want)
		}
	}
	asNobody(t, "test -w "+m.path("d/acl"))
}

// An id-mapped mount of the mount shows and makes files with mapped owners.
func TestIDMappedMount(t *testing.T) {
	m := serveFiles(t, policyA, "f")
	src, err := sys.Open(m.path(""), sys.O_PATH|sys.O_DIRECTORY, 0)
	must(t, err)
	clone, err := src.OpenTree(true, false)
	src.Close()
	must(t, err)
	defer clone.Close()
	holder := exec.Command("sleep", "600")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1000, Size: 1000}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1000, Size: 1000}}}
	must(t, holder.Start())
	defer func() { _ = holder.Process.Kill(); _ = holder.Wait() }()
	ns, err := sys.Open(fmt.Sprintf("/proc/%d/ns/user", holder.Process.Pid), sys.O_RDONLY, 0)
	must(t, err)
	defer ns.Close()
	must(t, clone.SetMountAttr(sys.MountAttr{Set: sys.MOUNT_ATTR_IDMAP, UserNS: ns}, false))
	at := filepath.Join(m.Dir, "x")
	must(t, os.Mkdir(at, 0o755))
	to, err := sys.Open(at, sys.O_PATH|sys.O_DIRECTORY, 0)
	must(t, err)
	must(t, clone.MoveTo(to))
	to.Close()
	clone.Close()
	defer testenv.Unmount(t, at)
	var st unix.Stat_t
	must(t, unix.Stat(at+"/f", &st))
	if st.Uid != 1000 {
		t.Errorf("owner %d through the map", st.Uid)
	}
	asUser(t, 1000, "cd "+at+" && echo x >new && mkdir dir && rm new && echo y >again")
	must(t, unix.Stat(m.path("again"), &st))
	if st.Uid != 0 {
		t.Errorf("made as %d", st.Uid)
	}
}

// A killed server is ENOTCONN, and what it left mounts again.
func TestKilledServer(t *testing.T) {
	m := serveFiles(t, policyA, "f")
	must(t, os.WriteFile(m.path("f"), []byte("upper"), 0o644))
	f := open(t, m.path("f"), os.O_RDONLY)
	must(t, m.cmd.Process.Kill())
	_ = m.cmd.Wait()
	m.gone = true
	if _, err := os.Stat(m.path("not asked for yet")); !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("stat: %v", err)
	}
	f.Close()
	testenv.Unmount(t, m.path(""))
	again := serve(t, m.setup)
	if b, err := os.ReadFile(again.path("f")); string(b) != "upper" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// The mount may cover a layer of its own.
func TestMountOverALowerAndOverTheUpper(t *testing.T) {
	for _, layer := range []string{"l", "u"} {
		t.Run(layer, func(t *testing.T) {
			dir := dirs(t, "ext4")
			must(t, os.WriteFile(filepath.Join(dir, layer, "f"), []byte("x"), 0o644))
			must(t, os.Remove(filepath.Join(dir, "m")))
			must(t, os.Symlink(layer, filepath.Join(dir, "m")))
			m := serve(t, setup{Dir: dir, Options: policyA})
			f := open(t, m.path("f"), os.O_RDWR)
			writeAt(t, f, "y")
			must(t, os.WriteFile(m.path("g"), []byte("new"), 0o644))
			must(t, os.Remove(m.path("f")))
			if b, err := os.ReadFile(m.path("g")); string(b) != "new" || err != nil {
				t.Errorf("%q, %v", b, err)
			}
			f.Close()
			m.Dir, m.mountpoint = dir, filepath.Join(dir, layer)
		})
	}
}

// chattr changes the ctime; stat(1) that asks for no more saw the old one.
func TestInodeFlagsChangeCtime(t *testing.T) {
	m := serveFiles(t, policyA, "f")
	must(t, os.WriteFile(m.path("f"), []byte("upper"), 0o644))
	must(t, os.Chtimes(m.path("f"), time.Unix(1, 0), time.Unix(1, 0)))
	f := open(t, m.path("f"), os.O_RDONLY)
	before := statx(t, m.path("f"), unix.STATX_CTIME).Ctime
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	must(t, err)
	for end := time.Now().Add(patience); ; { // until the kernel's clock has gone on
		must(t, unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags|0x80)))
		must(t, unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags)))
		if below := statx(t, filepath.Join(m.Dir, "u", "f"), unix.STATX_CTIME).Ctime; below != before {
			break
		} else if time.Now().After(end) {
			t.Fatal("the flags below never changed the ctime")
		}
	}
	if now := statx(t, m.path("f"), unix.STATX_CTIME).Ctime; now == before {
		t.Errorf("ctime is still %v", now)
	}
}

// A write in passthrough by a stranger takes setuid and setgid away; whoever asked
// for the mode alone saw them still.
func TestSetIDsAreSeenToGo(t *testing.T) {
	m := serveFiles(t, policyA)
	must(t, os.WriteFile(m.path("f"), []byte("upper"), 0o777))
	for _, flags := range []string{"", "oflag=direct"} {
		must(t, os.Chmod(m.path("f"), os.ModeSetuid|os.ModeSetgid|0o777))
		if mode := statx(t, m.path("f"), unix.STATX_MODE).Mode; mode&0o7777 != 0o6777 {
			t.Fatalf("mode %o", mode)
		}
		asUser(t, 1000, "dd if=/dev/zero of="+m.path("f")+" conv=notrunc bs=4096 count=1 status=none "+flags)
		if mode := statx(t, m.path("f"), unix.STATX_MODE).Mode; mode&0o7777 != 0o777 {
			t.Errorf("%q: mode %o", flags, mode)
		}
	}
}

// fallocate by somebody who is not in the group takes setgid away where the group
// may not execute, too.
func TestFallocateTakesSetIDsAway(t *testing.T) {
	m := serveFiles(t, policyA)
	must(t, os.WriteFile(m.path("f"), []byte("upper"), 0o666))
	for gid, want := range map[int]uint16{0: 0o666, 1000: 0o2666} {
		must(t, os.Chown(m.path("f"), 0, gid))
		must(t, unix.Chmod(m.path("f"), 0o6666))
		asUser(t, 1000, "fallocate -l 100000 "+m.path("f"))
		if mode := statx(t, m.path("f"), unix.STATX_MODE).Mode & 0o7777; mode != want {
			t.Errorf("group %d: mode %o, not %o", gid, mode, want)
		}
		must(t, os.Truncate(m.path("f"), 0))
	}
}

// statx asks for what mask names, and no more: the kernel answers from its cache
// what it can.
func statx(t testing.TB, path string, mask int) (st unix.Statx_t) {
	t.Helper()
	must(t, unix.Statx(unix.AT_FDCWD, path, 0, mask, &st))
	return st
}

// Descriptors and memory do not grow with what the kernel knows of the tree.
func TestDescriptorsAreBounded(t *testing.T) {
	dir := dirs(t, "tmpfs")
	const many = 600
	for i := range many {
		d := filepath.Join(dir, "l", fmt.Sprintf("d%d", i))
		must(t, os.Mkdir(d, 0o755))
		must(t, os.WriteFile(filepath.Join(d, "f"), []byte("x"), 0o644))
	}
	const keep = 50
	m := serve(t, setup{Dir: dir, Options: policyA, Config: union.Config{MaxDirs: keep}})
	fds := func() int {
		list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", m.cmd.Process.Pid))
		must(t, err)
		return len(list)
	}
	before := fds()
	for i := range many {
		path := m.path(fmt.Sprintf("d%d/f", i))
		_, err := os.ReadFile(path)
		must(t, err)
		if i%2 == 0 {
			must(t, os.WriteFile(path, []byte("y"), 0o644))
		}
		if i%3 == 0 {
			must(t, os.Remove(path))
		}
	}
	testenv.Eventually(t, "all files closed", func() bool { return m.counts().Files == 0 })
	testenv.Eventually(t, "descriptors given back", func() bool { return fds() <= before+keep+20 })
}
