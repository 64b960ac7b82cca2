package uniontest

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/sys"
)

// attrCases are about link counts, times, modes, names, special files and
// xattrs.
var attrCases = map[string]func(*Kit){
	"times of access": func(k *Kit) {
		k.atimes(atimesMove{old: true, oldDir: true})
	},
	"times of access, noatime": func(k *Kit) {
		k.options("noatime")
		k.atimes(atimesMove{})
	},
	"times of access, nodiratime": func(k *Kit) {
		k.options("nodiratime")
		k.atimes(atimesMove{old: true})
	},
	"times of access, strictatime": func(k *Kit) {
		k.options("strictatime")
		k.atimes(atimesMove{old: true, future: true, oldDir: true, futureDir: true})
	},
	"st_nlink of directories": func(k *Kit) {
		k.lower(dir("m/a"), dir("l/x/y"))
		k.union(dir("m/b"), dir("m/c"))
		k.makedir("u")
		k.makedir("u/s")
		k.makedir("m/d")
		live := map[string]uint32{}
		for _, p := range []string{".", "m", "l", "u", "u/s", "m/a", "m/d"} {
			live[p] = k.stat(p).Nlink
		}
		equal(k, "a merged directory", live["m"], 1)
		equal(k, "the root", live["."], 1)
		equal(k, "an upper directory", live["u/s"], k.statAt(k.u("u/s")).Nlink)
		k.remount()
		for p, n := range live {
			k.nlink(p, n)
		}
	},
	"a directory's mtime changes with its entries": func(k *Kit) {
		k.lower(dir("m"))
		k.union(file("m/f", "x"), file("m/g", "y"), dir("m/s"))
		for _, what := range []struct {
			name string
			do   func()
		}{
			{"create", func() { k.write("m/new", "n") }},
			{"mkdir", func() { k.makedir("m/newdir") }},
			{"symlink", func() { k.symlink("t", "m/l") }},
			{"mknod", func() { k.mknod("m/p", unix.S_IFIFO|0o600, 0, 0) }},
			{"link", func() { k.hardlink("m/new", "m/link") }},
			{"unlink of an upper name", func() { k.unlink("m/link") }},
			{"unlink of a lower name", func() { k.unlink("m/g") }},
			{"rmdir", func() { k.rmdir("m/newdir") }},
			{"rename", func() { k.rename("m/l", "m/l2") }},
		} {
			k.utimes("m", 1000, 0)
			what.do()
			k.that(k.stat("m").Mtime.Sec >= k.start.Sec, "%s leaves mtime %v", what.name, k.stat("m").Mtime)
		}
	},
	"a directory's mtime stays": func(k *Kit) {
		k.lower(dir("m"))
		k.union(file("m/f", "x"), file("m/g", "y"), dir("m/s"), file("m/s/t", "z"))
		k.utimes("m", 1000, 0)
		k.appendTo("m/f", "!")
		k.chmod("m/g", 0o600)
		k.write("m/s/new", "n")
		k.unlink("m/s/t")
		_ = k.names("m")
		equal(k, "mtime", k.stat("m").Mtime, sys.Time{Sec: 1000})
	},
	"a file's times change as they should": func(k *Kit) {
		k.union(file("f", "x"), file("g", "x"), file("h", "x"))
		k.appendTo("f", "y")
		k.that(k.stat("f").Mtime.Sec >= k.start.Sec, "a write leaves mtime")
		k.truncate("g", 0)
		k.that(k.stat("g").Mtime.Sec >= k.start.Sec, "truncate leaves mtime")
		k.chmod("h", 0o600)
		equal(k, "mtime after chmod", k.stat("h").Mtime, born)
		k.that(k.stat("h").Ctime.Sec >= k.start.Sec, "chmod leaves ctime")
	},
	"utimensat with now and omit": func(k *Kit) {
		k.union(file("f", "x"))
		set := func(a, m int64) {
			k.ok(unix.UtimesNanoAt(unix.AT_FDCWD, k.p("f"), []unix.Timespec{{Nsec: a}, {Nsec: m}}, 0))
		}
		k.utimes("f", 100, 5)
		set(unix.UTIME_OMIT, unix.UTIME_NOW)
		st := k.stat("f")
		equal(k, "atime", st.Atime, sys.Time{Sec: 100, Nsec: 5})
		k.that(st.Mtime.Sec >= k.start.Sec, "mtime %v", st.Mtime)
		k.utimes("f", 200, 6)
		set(unix.UTIME_OMIT, unix.UTIME_OMIT)
		equal(k, "mtime", k.stat("f").Mtime, sys.Time{Sec: 200, Nsec: 6})
		set(unix.UTIME_NOW, unix.UTIME_OMIT)
		equal(k, "mtime", k.stat("f").Mtime, sys.Time{Sec: 200, Nsec: 6})
	},
	"times before 1970 and far in the future": func(k *Kit) {
		k.union(file("f", "x"))
		for _, sec := range []int64{-1, -100_000, 0, 1<<32 + 5} {
			k.utimes("f", sec, 999_999_999)
			equal(k, "mtime", k.stat("f").Mtime, sys.Time{Sec: sec, Nsec: 999_999_999})
		}
		k.remount()
		equal(k, "mtime", k.stat("f").Mtime, sys.Time{Sec: 1<<32 + 5, Nsec: 999_999_999})
	},
	"btime is that of a file": func(k *Kit) {
		k.union(file("f", "x"))
		k.write("new", "n")
		st := k.stat("new")
		if st.Mask&unix.STATX_BTIME != 0 {
			k.that(st.Btime.Sec >= k.start.Sec-1, "btime %v", st.Btime)
		}
	},
	"mkdir with a mode without write": func(k *Kit) {
		k.union(file("x/y", "y"))
		old := unix.Umask(0)
		defer unix.Umask(old)
		for _, mode := range []uint32{0o555, 0o000, 0o1777, 0o700} {
			p := fmt.Sprintf("d%o", mode)
			k.ok(unix.Mkdir(k.p(p), mode))
			k.mode(p, mode)
			k.write(p+"/f", "x")
		}
		k.removeAll("x")
		k.ok(unix.Mkdir(k.p("x"), 0o555))
		k.mode("x", 0o555)
		k.upperOpaque("x", true)
	},
	"umask is applied once": func(k *Kit) {
		k.union(file("x", "x"))
		old := unix.Umask(0o027)
		defer unix.Umask(old)
		k.ok(unix.Mkdir(k.p("d"), 0o777))
		k.mode("d", 0o750)
		fdn, err := unix.Open(k.p("f"), unix.O_CREAT|unix.O_WRONLY, 0o666)
		k.ok(err)
		unix.Close(fdn)
		k.mode("f", 0o640)
		k.ok(unix.Mknod(k.p("p"), unix.S_IFIFO|0o777, 0))
		k.mode("p", 0o750)
		unix.Umask(0)
		fdn, err = unix.Open(k.p("g"), unix.O_CREAT|unix.O_WRONLY, 0o666)
		k.ok(err)
		unix.Close(fdn)
		k.mode("g", 0o666)
		k.ok(unix.Mkdir(k.p("e"), 0o777))
		k.mode("e", 0o777)
	},
	"all twelve bits of chmod": func(k *Kit) {
		k.union(file("f", "x"), dir("d"))
		for _, mode := range []uint32{0o7777, 0o4755, 0o2755, 0o1755, 0o000, 0o644} {
			k.chmod("f", mode)
			k.mode("f", mode)
			k.chmod("d", mode)
			k.mode("d", mode)
		}
		k.chmod("d", 0o755)
	},
	"a setgid directory passes its group on": func(k *Kit) {
		k.union(dir("d"), chown("d", 0, 77), chmod("d", 0o2775), file("d/x", "x"))
		k.write("d/f", "x")
		k.makedir("d/s")
		k.symlink("t", "d/l")
		k.mknod("d/p", unix.S_IFIFO|0o600, 0, 0)
		for _, p := range []string{"d/f", "d/s", "d/l", "d/p"} {
			k.owner(p, 0, 77)
		}
		k.mode("d/s", 0o2755)
		k.mode("d/f", 0o644)
		k.makedir("d/s/t")
		k.mode("d/s/t", 0o2755)
		k.owner("d/s/t", 0, 77)
		fdn, err := unix.Open(k.p("d"), unix.O_TMPFILE|unix.O_RDWR, 0o600)
		k.ok(err)
		var st unix.Stat_t
		k.ok(unix.Fstat(fdn, &st))
		unix.Close(fdn)
		equal(k, "group of a tmpfile", st.Gid, 77)
	},
	"a default ACL is inherited": func(k *Kit) {
		k.needRoot("ACL ids")
		k.union(dir("d"), xattr("d", "system.posix_acl_default", acl), chmod("d", 0o777))
		old := unix.Umask(0o077) // a default ACL stands for it
		defer unix.Umask(old)
		fdn, err := unix.Open(k.p("d/f"), unix.O_CREAT|unix.O_WRONLY, 0o666)
		k.ok(err)
		unix.Close(fdn)
		k.mode("d/f", 0o644)
		k.that(strings.HasPrefix(k.xattr("d/f", "system.posix_acl_access"), acl[:4]), "no ACL")
		k.ok(unix.Mkdir(k.p("d/s"), 0o777))
		equal(k, "default ACL", k.xattr("d/s", "system.posix_acl_default"), acl)
		k.mode("d/s", 0o754)
		k.ok(unix.Mknod(k.p("d/p"), unix.S_IFIFO|0o666, 0))
		k.mode("d/p", 0o644)
		k.remount()
		equal(k, "default ACL", k.xattr("d/s", "system.posix_acl_default"), acl)
	},
	"chmod changes the ACL's mask": func(k *Kit) {
		k.needRoot("ACL ids")
		k.union(file("f", "x"), xattr("f", "system.posix_acl_access", acl))
		k.mode("f", 0o754)
		k.chmod("f", 0o704)
		want := strings.Replace(acl, "\x10\x00\x05\x00", "\x10\x00\x00\x00", 1)
		equal(k, "ACL", k.xattr("f", "system.posix_acl_access"), want)
	},
	"an ACL that says no more than the mode is none": func(k *Kit) {
		k.union(file("f", "x"))
		minimal := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x04\x00\x04\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
		k.setxattr("f", "system.posix_acl_access", minimal)
		k.mode("f", 0o640)
		k.noXattr(k.p("f"), "system.posix_acl_access")
	},
	"an ACL that is removed": func(k *Kit) {
		k.needRoot("ACL ids")
		k.union(file("f", "x"), xattr("f", "system.posix_acl_access", acl), dir("d"), xattr("d", "system.posix_acl_default", acl))
		k.ok(unix.Removexattr(k.p("f"), "system.posix_acl_access"))
		k.noXattr(k.p("f"), "system.posix_acl_access")
		k.ok(unix.Removexattr(k.p("d"), "system.posix_acl_default"))
		k.write("d/x", "x")
		k.noXattr(k.p("d/x"), "system.posix_acl_access")
		k.mode("f", 0o754)
	},
	"names that are not UTF-8 and names of 255 bytes": func(k *Kit) {
		names := []string{"\xff\xfe", "caf\xe9", "new\nline", " ", "...", strings.Repeat("ä", 127) + "x", strings.Repeat("x", 255), "-rf", "*", `a\b"c`, "\x01\x7f"}
		k.union(each(names[:5], func(n string) change { return file("d/"+n, n) }))
		for _, n := range names {
			k.write("d/"+n, "new "+n)
		}
		k.holds("d", append([]string{}, names...)...)
		k.remount()
		for _, n := range names {
			k.reads("d/"+n, "new "+n)
			k.unlink("d/" + n)
		}
		k.holds("d")
	},
	"a name of 256 bytes": func(k *Kit) {
		k.union(file("f", "x"))
		long := strings.Repeat("x", 256)
		_, err := k.tryOpen(long, unix.O_CREAT|unix.O_WRONLY)
		k.is(unix.ENAMETOOLONG, err)
		k.is(unix.ENAMETOOLONG, unix.Mkdir(k.p(long), 0o755))
		k.is(unix.ENAMETOOLONG, unix.Rename(k.p("f"), k.p(long)))
		k.is(unix.ENAMETOOLONG, unix.Link(k.p("f"), k.p(long)))
		k.is(unix.ENAMETOOLONG, unix.Symlink("x", k.p(long)))
		k.is(unix.ENAMETOOLONG, unix.Unlink(k.p(long)))
		k.is(unix.ENAMETOOLONG, unix.Mknod(k.p(long), unix.S_IFIFO|0o600, 0))
		_, err = os.Lstat(k.p(long))
		k.is(unix.ENAMETOOLONG, err)
	},
	"a symlink of 4095 bytes": func(k *Kit) {
		low, up := strings.Repeat("l/", 2047)+"l", strings.Repeat("u/", 2047)+"u"
		if k.fs.kind == "xfs" { // XFS takes 1024
			low, up = low[:1023], up[:1023]
		}
		k.union(symlink(low, "low"))
		k.symlink(up, "up")
		k.utimes("low", 5, 5)
		for p, want := range map[string]string{"low": low, "up": up} {
			b := make([]byte, 8192)
			n, err := unix.Readlink(k.p(p), b)
			k.ok(err)
			equal(k, p, string(b[:n]), want)
			k.size(p, int64(len(want)))
		}
		k.is(unix.ENAMETOOLONG, unix.Symlink(strings.Repeat("x", 4096), k.p("long")))
		k.is(unix.ENOENT, unix.Symlink("", k.p("empty")))
	},
	"symlinks lead where they say": func(k *Kit) {
		k.union(file("d/f", "x"), symlink("f", "d/rel"), symlink("../d/f", "d/up"), symlink("loop", "loop"), symlink("none", "dangling"), symlink("d", "dirlink"))
		for _, p := range []string{"d/rel", "d/up", "dirlink/f"} {
			k.reads(p, "x")
		}
		_, err := k.tryOpen("loop", unix.O_RDONLY)
		k.is(unix.ELOOP, err)
		_, err = k.tryOpen("d/rel", unix.O_RDONLY|unix.O_NOFOLLOW)
		k.is(unix.ELOOP, err)
		k.write("dangling", "made")
		k.reads("none", "made")
		k.is(unix.ENOTDIR, unix.Rmdir(k.p("dirlink")))
		k.is(unix.ENOTDIR, unix.Rmdir(k.p("dirlink/f")))
		k.unlink("dirlink")
		k.holds("d", "f", "rel", "up")
	},
	"fifos and sockets work": func(k *Kit) {
		k.union(node("p", unix.S_IFIFO|0o600, 0, 0))
		k.mknod("q", unix.S_IFIFO|0o600, 0, 0)
		for _, p := range []string{"p", "q"} {
			f := k.open(p, unix.O_RDWR)
			_, err := f.WriteString("through")
			k.ok(err)
			b := make([]byte, 7)
			_, err = f.Read(b)
			k.ok(err)
			equal(k, "read", string(b), "through")
		}
		s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		k.ok(err)
		defer unix.Close(s)
		d := k.open(".", unix.O_RDONLY|unix.O_DIRECTORY)
		k.ok(unix.Bind(s, &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/sock", fd(d))}))
		k.ok(unix.Listen(s, 1))
		c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		k.ok(err)
		defer unix.Close(c)
		k.ok(unix.Connect(c, &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/sock", fd(d))}))
		equal(k, "type", k.stat("sock").Type(), uint32(unix.S_IFSOCK))
	},
	"devices": func(k *Kit) {
		k.needRoot("devices")
		k.union(node("null", unix.S_IFCHR|0o666, 1, 3))
		k.mknod("zero", unix.S_IFCHR|0o666, 1, 5)
		k.mknod("block", unix.S_IFBLK|0o600, 255, 1<<19)
		st := k.stat("block")
		equal(k, "major", st.RdevMajor, 255)
		equal(k, "minor", st.RdevMinor, 1<<19)
		f := k.open("null", unix.O_WRONLY)
		_, err := f.WriteString("gone")
		k.ok(err)
		z := k.open("zero", unix.O_RDONLY)
		_, err = z.Read(make([]byte, 10))
		k.ok(err)
		k.upperAbsent("null")
	},
	"xattrs of every kind of name": func(k *Kit) {
		k.union(file("f", "x"), dir("d"))
		for _, p := range []string{"f", "d"} {
			for _, n := range []string{"user.a", "user." + strings.Repeat("n", 250), "user.k=v x\n\xff", "user.UPPER"} {
				k.setxattr(p, n, "value of "+n)
				equal(k, n, k.xattr(p, n), "value of "+n)
			}
			equal(k, "names", len(k.xattrNames(p)), 4)
			k.ok(unix.Removexattr(k.p(p), "user.a"))
			equal(k, "names", len(k.xattrNames(p)), 3)
		}
		k.is(unix.ERANGE, setxattr(k.p("f"), "user."+strings.Repeat("n", 251), "x"))
	},
	"XATTR_CREATE and XATTR_REPLACE": func(k *Kit) {
		k.union(file("f", "x"), xattr("f", "user.a", "1"))
		k.is(unix.EEXIST, unix.Lsetxattr(k.p("f"), "user.a", []byte("2"), unix.XATTR_CREATE))
		k.is(unix.ENODATA, unix.Lsetxattr(k.p("f"), "user.b", []byte("2"), unix.XATTR_REPLACE))
		k.ok(unix.Lsetxattr(k.p("f"), "user.a", []byte("2"), unix.XATTR_REPLACE))
		k.ok(unix.Lsetxattr(k.p("f"), "user.b", []byte("2"), unix.XATTR_CREATE))
		equal(k, "user.a", k.xattr("f", "user.a"), "2")
	},
	"xattr sizes and short buffers": func(k *Kit) {
		k.union(file("f", "x"), xattr("f", "user.a", "12345"))
		n, err := unix.Lgetxattr(k.p("f"), "user.a", nil)
		k.ok(err)
		equal(k, "size", n, 5)
		_, err = unix.Lgetxattr(k.p("f"), "user.a", make([]byte, 3))
		k.is(unix.ERANGE, err)
		n, err = unix.Llistxattr(k.p("f"), nil)
		k.ok(err)
		equal(k, "size of the list", n, len("user.a")+1)
		_, err = unix.Llistxattr(k.p("f"), make([]byte, 3))
		k.is(unix.ERANGE, err)
	},
	"xattrs as large as the upper takes": func(k *Kit) {
		k.union(file("f", "x"))
		probe := k.dir + "/probe" // on the upper's file system
		k.ok(os.WriteFile(probe, nil, 0o600))
		for _, n := range []int{4000, 16_000, 60_000, 65_536} {
			want := setxattr(probe, "user.big", strings.Repeat("v", n))
			got := setxattr(k.p("f"), "user.big", strings.Repeat("v", n))
			k.that(got == want, "%d bytes: %v, the upper's file system says %v", n, got, want)
			if want == nil {
				equal(k, "value", k.xattr("f", "user.big"), strings.Repeat("v", n))
			}
		}
		k.is(unix.E2BIG, setxattr(k.p("f"), "user.big", strings.Repeat("v", 65_537)))
	},
	"xattrs of symlinks and fifos": func(k *Kit) {
		k.needRoot("trusted xattrs")
		k.union(symlink("t", "l"), node("p", unix.S_IFIFO|0o600, 0, 0))
		for _, p := range []string{"l", "p"} {
			k.is(unix.EPERM, setxattr(k.p(p), "user.a", "1"))
			k.setxattr(p, "trusted.a", "1")
			equal(k, "trusted.a", k.xattr(p, "trusted.a"), "1")
		}
	},
	"unknown xattr namespaces": func(k *Kit) {
		k.union(file("f", "x"))
		k.is(unix.EOPNOTSUPP, setxattr(k.p("f"), "unknown.a", "1"))
		_, err := getxattr(k.p("f"), "unknown.a")
		k.is(unix.EOPNOTSUPP, err)
		_, err = getxattr(k.p("f"), "user.none")
		k.is(unix.ENODATA, err)
	},
	"sizes and blocks": func(k *Kit) {
		k.union(sparse("f", 1<<30), file("g", "x"))
		k.size("f", 1<<30)
		k.that(k.stat("f").Blocks < 100, "%d blocks", k.stat("f").Blocks)
		equal(k, "blocks", k.stat("g").Blocks, k.statAt(k.l(0, "g")).Blocks)
	},
	"paths through files": func(k *Kit) {
		k.union(file("f", "x"), file("d/g", "y"))
		for _, p := range []string{"f/a", "f/", "d/g/"} {
			_, err := os.Lstat(k.p(p))
			k.is(unix.ENOTDIR, err)
		}
		_, err := k.tryOpen("f/new", unix.O_CREAT|unix.O_WRONLY)
		k.is(unix.ENOTDIR, err)
		k.is(unix.ENOTDIR, unix.Mkdir(k.p("f/new"), 0o755))
	},
	"the root keeps its attributes": func(k *Kit) {
		k.lower(chmod(".", 0o700), chown(".", 3, 4), xattr(".", "user.low", "1"))
		k.ok(os.Chmod(k.spec.Upper, 0o751))
		k.mount()
		k.mode(".", 0o751)
		k.owner(".", 0, 0)
		k.chmod(".", 0o755)
		k.setxattr(".", "user.up", "1")
		k.remount()
		k.mode(".", 0o755)
		equal(k, "xattr", k.xattr(".", "user.up"), "1")
		k.noXattr(k.p("."), "user.low")
	},
}

// atimesMove is which times of access move: those of a file and a directory that
// were accessed before they were changed, and those that seem to be accessed tomorrow.
type atimesMove struct{ old, future, oldDir, futureDir bool }

// atimes says which times of access in the upper move; in a lower none does.
func (k *Kit) atimes(want atimesMove) {
	k.Helper()
	k.union(file("low", "x"), file("up", "y"), dir("d"))
	tomorrow := k.start.Sec + 24*3600
	set := func(p string, atime int64) {
		ts := []unix.Timespec{{Sec: atime}, {Sec: 2000}}
		k.ok(unix.UtimesNanoAt(unix.AT_FDCWD, k.p(p), ts, 0))
	}
	k.write("new", "n")
	k.makedir("m")
	for _, what := range []struct {
		p     string
		atime int64
		moves bool
	}{
		{"up", 1000, want.old}, {"new", 1000, want.old}, {"up", tomorrow, want.future}, {"new", tomorrow, want.future},
		{"d", 1000, want.oldDir}, {"m", tomorrow, want.futureDir},
	} {
		set(what.p, what.atime)
		equal(k, "atime before", k.stat(what.p).Atime.Sec, what.atime)
		if k.stat(what.p).IsDir() {
			k.names(what.p)
		} else {
			must(os.ReadFile(k.p(what.p)))
		}
		now := k.stat(what.p).Atime.Sec
		k.that(now == what.atime == !what.moves, "atime of %s was %d and is %d", what.p, what.atime, now)
		k.that(now == what.atime || now >= k.start.Sec && now < tomorrow, "atime of %s is %d", what.p, now)
	}
	before := k.statAt(k.l(0, "low")).Atime
	k.reads("low", "x")
	equal(k, "atime of a lower file", k.statAt(k.l(0, "low")).Atime, before)
	equal(k, "atime of a lower file, as shown", k.stat("low").Atime, before)
}
