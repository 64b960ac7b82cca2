package uniontest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/treegen"
)

// The values of xattrs that the kernel checks: cap_net_bind_service, and
// user::rwx user:1000:r-- group::r-x mask::r-x other::r--.
const (
	capNet = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	acl    = "\x02\x00\x00\x00" +
		"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" + "\x04\x00\x05\x00\xff\xff\xff\xff" +
		"\x10\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x04\x00\xff\xff\xff\xff"
)

// rich is a lower file with all that copy-up has to keep.
func rich(p string) change {
	return all(file(p, "content of "+p), chown(p, 1001, 1002), chmod(p, 0o4751), xattr(p, "user.a", "1"),
		xattr(p, "user.empty", ""), mtime(p, 1_234_567_890, 987_654_321))
}

// triggers are everything that copies a file up, each with what it leaves: do
// changes nothing else than it says.
var triggers = map[string]func(k *Kit, p string){
	"chmod":          func(k *Kit, p string) { k.chmod(p, 0o640) },
	"chown":          func(k *Kit, p string) { k.chown(p, 7, 8) },
	"utimes":         func(k *Kit, p string) { k.utimes(p, 1000, 5) },
	"setxattr":       func(k *Kit, p string) { k.setxattr(p, "user.new", "n") },
	"removexattr":    func(k *Kit, p string) { k.ok(unix.Lremovexattr(k.p(p), "user.a")) },
	"open for write": func(k *Kit, p string) { k.open(p, unix.O_WRONLY).Close() },
	"open for both":  func(k *Kit, p string) { k.open(p, unix.O_RDWR).Close() },
	"write":          func(k *Kit, p string) { k.overwrite(p, 0, "C") },
	"append":         func(k *Kit, p string) { k.appendTo(p, " more") },
	"truncate":       func(k *Kit, p string) { k.truncate(p, 3) },
	"extend":         func(k *Kit, p string) { k.truncate(p, 10_000) },
	"O_TRUNC":        func(k *Kit, p string) { k.open(p, unix.O_WRONLY|unix.O_TRUNC).Close() },
	"link":           func(k *Kit, p string) { k.needRoot("file handles"); k.hardlink(p, p+".link") },
	"rename":         func(k *Kit, p string) { k.rename(p, p+".to") },
	"acl":            func(k *Kit, p string) { k.setxattr(p, "system.posix_acl_access", acl) },
	"fallocate": func(k *Kit, p string) {
		f := k.open(p, unix.O_RDWR)
		k.ok(unix.Fallocate(fd(f), 0, 0, 100))
	},
	"shared mmap": func(k *Kit, p string) {
		if k.fs.user {
			k.unlikeBy(SetIDLater)
		}
		f := k.open(p, unix.O_RDWR)
		m, err := unix.Mmap(fd(f), 0, 5, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		k.ok(err)
		m[0] = 'X'
		k.ok(unix.Msync(m, unix.MS_SYNC))
		k.ok(unix.Munmap(m))
	},
	"copy_file_range": func(k *Kit, p string) {
		f := k.open(p, unix.O_RDWR)
		off := int64(2)
		_, err := unix.CopyFileRange(fd(f), ptr(int64(0)), fd(f), &off, 2, 0)
		k.ok(err)
	},
}

func ptr[T any](v T) *T { return &v }

// overwrite writes at an offset.
func (k *Kit) overwrite(p string, off int64, content string) {
	k.Helper()
	f := k.open(p, unix.O_WRONLY)
	_, err := f.WriteAt([]byte(content), off)
	k.ok(err)
	k.ok(f.Close())
}

// copyUpCases are about files of a lower that are changed.
var copyUpCases = withTriggers(map[string]func(*Kit){
	"keeps owner, mode, times, xattrs": func(k *Kit) {
		k.union(rich("d/f"))
		k.open("d/f", unix.O_WRONLY).Close()
		st := k.stat("d/f")
		k.owner("d/f", 1001, 1002)
		k.mode("d/f", 0o4751)
		equal(k, "mtime", fmt.Sprint(st.Mtime), "{1234567890 987654321}")
		equal(k, "user.a", k.xattr("d/f", "user.a"), "1")
		equal(k, "user.empty", k.xattr("d/f", "user.empty"), "")
		k.reads("d/f", "content of d/f")
		up := k.statAt(k.u("d/f"))
		equal(k, "mtime in the upper", up.Mtime, st.Mtime)
		equal(k, "mode in the upper", up.Mode, st.Mode)
	},
	"keeps atime": func(k *Kit) {
		k.lower(file("f", "x"))
		later := k.start.Sec + 3600 // what relatime leaves alone
		ts := []unix.Timespec{{Sec: later, Nsec: 5}, {Sec: 1_600_000_000}}
		k.ok(unix.UtimesNanoAt(unix.AT_FDCWD, k.l(0, "f"), ts, 0))
		k.mount()
		k.chmod("f", 0o600)
		equal(k, "atime", fmt.Sprint(k.statAt(k.u("f")).Atime), fmt.Sprintf("{%d 5}", later))
	},
	"keeps capabilities and ACLs": func(k *Kit) {
		k.needRoot("file capabilities of the initial namespace")
		k.union(file("f", "x"), xattr("f", "security.capability", capNet), file("g", "y"), xattr("g", "system.posix_acl_access", acl), xattr("g", "trusted.t", "v"))
		k.utimes("f", 5, 5)
		k.utimes("g", 5, 5)
		equal(k, "capability", k.xattrAt(k.u("f"), "security.capability"), capNet)
		equal(k, "capability", k.xattr("f", "security.capability"), capNet)
		equal(k, "ACL", k.xattrAt(k.u("g"), "system.posix_acl_access"), acl)
		equal(k, "trusted", k.xattrAt(k.u("g"), "trusted.t"), "v")
	},
	"keeps default ACLs of directories": func(k *Kit) {
		k.needRoot("ACL ids")
		k.union(file("d/f", "x"), xattr("d", "system.posix_acl_default", acl))
		k.chmod("d/f", 0o600)
		equal(k, "ACL", k.xattrAt(k.u("d"), "system.posix_acl_default"), acl)
		k.noXattr(k.u("d/f"), "system.posix_acl_access")
		k.mode("d/f", 0o600)
	},
	"copies content exactly": func(k *Kit) {
		k.union(random("f", 3<<20+17, 7), random("g", 4096, 8), file("empty", ""))
		for _, n := range []string{"f", "g", "empty"} {
			k.open(n, unix.O_RDWR).Close()
		}
		k.reads("f", string(treegen.Content(7, 3<<20+17)))
		k.reads("g", string(treegen.Content(8, 4096)))
		k.reads("empty", "")
	},
	"keeps holes": func(k *Kit) {
		k.union(sparse("f", 64<<20), data("f", 32<<20, "middle"), data("f", 64<<20-3, "end"))
		k.open("f", unix.O_RDWR).Close()
		k.upperBlocks("f", 2<<20)
		k.size("f", 64<<20)
	},
	"copies what lies above 4 GiB": func(k *Kit) {
		k.needRoot("passthrough, without which the holes are read")
		k.union(sparse("f", 5<<30), data("f", 4<<30+12345, "far"))
		k.appendTo("f", "end")
		k.upperBlocks("f", 2<<20)
		f := k.open("f", unix.O_RDONLY)
		b := make([]byte, 3)
		_, err := f.ReadAt(b, 4<<30+12345)
		k.ok(err)
		equal(k, "content", string(b), "far")
		k.size("f", 5<<30+3)
	},
	"copies parents with their metadata": func(k *Kit) {
		k.union(file("a/b/c/f", "x"), chown("a", 5, 6), chmod("a/b", 0o2770), xattr("a/b/c", "user.x", "y"), mtime("a/b", 99, 9))
		k.chmod("a/b/c/f", 0o600)
		equal(k, "uid", k.statAt(k.u("a")).UID, 5)
		equal(k, "mode", k.statAt(k.u("a/b")).Mode&0o7777, 0o2770)
		equal(k, "xattr", k.xattrAt(k.u("a/b/c"), "user.x"), "y")
		equal(k, "mtime", fmt.Sprint(k.statAt(k.u("a/b")).Mtime), "{99 9}")
	},
	"leaves the parent's times": func(k *Kit) {
		k.union(file("d/f", "x"), mtime("d", 77, 7))
		k.chmod("d/f", 0o600)
		equal(k, "mtime", fmt.Sprint(k.stat("d").Mtime), "{77 7}")
		equal(k, "mtime in the upper", fmt.Sprint(k.statAt(k.u("d")).Mtime), "{77 7}")
		k.appendTo("d/f", "y")
		equal(k, "mtime", fmt.Sprint(k.stat("d").Mtime), "{77 7}")
	},
	"leaves the root's times": func(k *Kit) {
		k.union(file("f", "x"), file("g/h", "y"))
		before := k.stat(".").Mtime
		k.chmod("f", 0o600)
		k.chmod("g/h", 0o600)
		equal(k, "mtime", k.stat(".").Mtime, before)
	},
	"notes its origin": func(k *Kit) {
		k.union(file("d/f", "x"))
		k.chmod("d/f", 0o600)
		for _, p := range []string{"d", "d/f"} {
			k.that(len(k.xattrAt(k.u(p), k.ov("origin"))) > 8 || k.fs.user, "%s has a short origin", p)
		}
		equal(k, "impure", k.xattrAt(k.u("d"), k.ov("impure")), "y")
		equal(k, "impure", k.xattrAt(k.spec.Upper, k.ov("impure")), "y")
	},
	"of a directory alone": func(k *Kit) {
		k.union(file("d/f", "x"), chmod("d", 0o700))
		k.chmod("d", 0o711)
		k.mode("d", 0o711)
		k.upperHolds("d")
		k.reads("d/f", "x")
	},
	"of a symlink": func(k *Kit) {
		k.union(symlink("a/long/target", "l"), mtime("l", 50, 5), file("x", ""))
		k.chown("l", 3, 4)
		k.owner("l", 3, 4)
		to, err := os.Readlink(k.p("l"))
		k.ok(err)
		equal(k, "target", to, "a/long/target")
		equal(k, "mtime", k.stat("l").Mtime.Sec, 50)
	},
	"of fifos, sockets and devices": func(k *Kit) {
		k.needRoot("devices")
		k.union(node("p", unix.S_IFIFO|0o640, 0, 0), node("s", unix.S_IFSOCK|0o600, 0, 0), node("c", unix.S_IFCHR|0o600, 1, 3), node("b", unix.S_IFBLK|0o600, 7, 300))
		for _, n := range []string{"p", "s", "c", "b"} {
			k.chown(n, 9, 9)
			equal(k, n+" type", k.statAt(k.u(n)).Type(), k.statAt(k.l(0, n)).Type())
			equal(k, n+" minor", k.stat(n).RdevMinor, k.statAt(k.l(0, n)).RdevMinor)
		}
	},
	"O_TRUNC copies no data": func(k *Kit) {
		k.union(sparse("f", 1<<40), data("f", 0, "x"))
		f := k.open("f", unix.O_WRONLY|unix.O_TRUNC)
		_, err := f.WriteString("new")
		k.ok(err)
		k.reads("f", "new")
	},
	"O_TRUNC read-only": func(k *Kit) {
		k.union(file("f", "content"))
		k.open("f", unix.O_RDONLY|unix.O_TRUNC)
		k.size("f", 0)
	},
	"reading copies nothing up": func(k *Kit) {
		k.union(file("d/f", "x"), symlink("t", "d/l"), xattr("d/f", "user.a", "1"))
		k.reads("d/f", "x")
		k.holds("d", "f", "l")
		_ = k.xattr("d/f", "user.a")
		_, err := os.Readlink(k.p("d/l"))
		k.ok(err)
		k.ok(unix.Access(k.p("d/f"), unix.W_OK))
		k.upperHolds(".")
	},
	"failing calls copy nothing up": func(k *Kit) {
		k.union(file("f", "x"), dir("d"))
		_, err := k.tryOpen("f", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
		k.is(unix.EEXIST, err)
		k.is(unix.EEXIST, unix.Mkdir(k.p("d"), 0o755))
		k.is(unix.ENOTDIR, unix.Rmdir(k.p("f")))
		k.is(unix.EISDIR, unix.Unlink(k.p("d")))
		_, err = k.tryOpen("d", unix.O_WRONLY)
		k.is(unix.EISDIR, err)
		k.is(unix.EEXIST, unix.Link(k.p("f"), k.p("d")))
		k.is(unix.ENODATA, unix.Lremovexattr(k.p("f"), "user.not"))
		k.upperAbsent("d")
	},
	"a file opened before reads what is written after": func(k *Kit) {
		k.union(file("f", "old content"))
		f := k.open("f", unix.O_RDONLY)
		k.readsFile(f, "old content")
		k.write("f", "new")
		k.readsFile(f, "new")
		st, err := f.Stat()
		k.ok(err)
		equal(k, "size", st.Size(), 3)
	},
	"two files opened before": func(k *Kit) {
		k.union(random("f", 100_000, 1))
		a, b := k.open("f", unix.O_RDONLY), k.open("f", unix.O_RDONLY)
		k.readsFile(a, string(treegen.Content(1, 100_000)))
		w := k.open("f", unix.O_RDWR)
		_, err := w.WriteAt([]byte("head"), 0)
		k.ok(err)
		want := "head" + string(treegen.Content(1, 100_000)[4:])
		k.readsFile(a, want)
		k.readsFile(b, want)
		k.readsFile(w, want)
		_, err = w.WriteAt([]byte("tail"), 100_000)
		k.ok(err)
		k.readsFile(b, want+"tail")
	},
	"a file opened before, written, closed and written again": func(k *Kit) {
		k.union(file("f", "0"))
		f := k.open("f", unix.O_RDONLY)
		for i := range 10 {
			k.write("f", strings.Repeat("z", i))
			k.readsFile(f, strings.Repeat("z", i))
		}
		k.unlink("f")
		k.readsFile(f, strings.Repeat("z", 9))
	},
	"a file opened before and mapped private": func(k *Kit) {
		k.union(random("f", 8192, 2))
		f := k.open("f", unix.O_RDONLY)
		m, err := unix.Mmap(fd(f), 0, 8192, unix.PROT_READ, unix.MAP_PRIVATE)
		k.ok(err)
		defer unix.Munmap(m)
		k.that(bytes.Equal(m, treegen.Content(2, 8192)), "the mapping has another content")
		k.chmod("f", 0o600)
		k.that(bytes.Equal(m, treegen.Content(2, 8192)), "the mapping changed")
	},
	"fchmod and fchown of a file opened before": func(k *Kit) {
		k.union(file("f", "x"))
		f := k.open("f", unix.O_RDONLY)
		k.ok(unix.Fchmod(fd(f), 0o640))
		k.ok(unix.Fchown(fd(f), 11, 12))
		k.mode("f", 0o640)
		k.owner("f", 11, 12)
		ts := []unix.Timeval{{Sec: 10}, {Sec: 20}}
		k.ok(unix.Futimes(fd(f), ts))
		equal(k, "mtime", k.stat("f").Mtime.Sec, 20)
		k.ok(unix.Fsetxattr(fd(f), "user.f", []byte("v"), 0))
		equal(k, "xattr", k.xattr("f", "user.f"), "v")
	},
	"a lower file unlinked while open": func(k *Kit) {
		k.union(file("f", "content"))
		f := k.open("f", unix.O_RDONLY)
		k.unlink("f")
		k.readsFile(f, "content")
		st, err := f.Stat()
		k.ok(err)
		equal(k, "size", st.Size(), 7)
	},
	"fchmod of a lower file whose name is gone or another's": func(k *Kit) {
		k.union(file("gone", "x"), file("taken", "y"))
		a, b := k.open("gone", unix.O_RDONLY), k.open("taken", unix.O_RDONLY)
		k.unlink("gone")
		k.write("new", "z")
		k.rename("new", "taken")
		var st unix.Stat_t
		k.ok(unix.Fstat(fd(a), &st))
		equal(k, "no links are shown", st.Nlink == 0, k.differs(LostNames))
		k.unlikeBy(LostNames)
		errs := []error{unix.Fchmod(fd(a), 0o600), unix.Fchmod(fd(b), 0o600)}
		if k.differs(LostNames) {
			k.ok(errors.Join(errs...))
		} else {
			k.is(unix.EEXIST, errs[0])
			k.is(unix.EEXIST, errs[1])
		}
		k.readsFile(a, "x")
		k.readsFile(b, "y")
		k.mode("taken", 0o644)
		k.absent("gone")
	},
	"an upper file unlinked while open": func(k *Kit) {
		k.union(dir("d"))
		k.write("d/f", "content")
		f := k.open("d/f", unix.O_RDWR)
		k.unlink("d/f")
		k.workUnlinked(f)
		k.upperHolds("d")
	},
	"a copied-up file unlinked while open": func(k *Kit) {
		k.union(file("d/f", "content"))
		f := k.open("d/f", unix.O_RDWR)
		k.unlink("d/f")
		k.workUnlinked(f)
		k.upperWhiteout("d/f")
	},
	"a file replaced by rename while open": func(k *Kit) {
		k.union(file("f", "old"), file("g", "new"))
		f := k.open("f", unix.O_RDONLY)
		k.rename("g", "f")
		k.readsFile(f, "old")
		k.reads("f", "new")
	},
	"fds of a renamed file": func(k *Kit) {
		k.union(file("a", "x"), dir("d"))
		f := k.open("a", unix.O_RDWR)
		k.rename("a", "d/b")
		_, err := f.WriteAt([]byte("yz"), 1)
		k.ok(err)
		k.reads("d/b", "xyz")
	},
	"O_TMPFILE and linkat": func(k *Kit) {
		k.union(file("d/x", "x"))
		fdn, err := unix.Open(k.p("d"), unix.O_TMPFILE|unix.O_RDWR, 0o640)
		k.ok(err)
		f := os.NewFile(uintptr(fdn), "tmpfile")
		k.files = append(k.files, f)
		_, err = f.WriteString("made")
		k.ok(err)
		k.holds("d", "x")
		k.ok(unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fdn), unix.AT_FDCWD, k.p("d/new"), unix.AT_SYMLINK_FOLLOW))
		k.reads("d/new", "made")
		k.mode("d/new", 0o640)
		k.nlink("d/new", 1)
	},
	"O_TMPFILE with O_EXCL cannot be linked": func(k *Kit) {
		k.union(dir("d"))
		fdn, err := unix.Open(k.p("d"), unix.O_TMPFILE|unix.O_EXCL|unix.O_RDWR, 0o600)
		k.ok(err)
		k.files = append(k.files, os.NewFile(uintptr(fdn), "tmpfile"))
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fdn), unix.AT_FDCWD, k.p("d/new"), unix.AT_SYMLINK_FOLLOW)
		k.is(unix.ENOENT, err)
	},
	"O_TMPFILE that is never linked leaves nothing": func(k *Kit) {
		k.union(dir("d"))
		fdn, err := unix.Open(k.p("d"), unix.O_TMPFILE|unix.O_RDWR, 0o600)
		k.ok(err)
		f := os.NewFile(uintptr(fdn), "tmpfile")
		_, err = f.WriteString("gone")
		k.ok(err)
		k.readsFile(f, "gone")
		k.ok(f.Close())
		k.holds("d")
	},
	"O_PATH and reopening": func(k *Kit) {
		k.union(file("f", "x"))
		o := k.open("f", unix.O_PATH)
		w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd(o)), os.O_WRONLY, 0)
		k.ok(err)
		_, err = w.WriteString("y")
		k.ok(err)
		k.ok(w.Close())
		k.reads("f", "y")
	},
	"link of a lower file makes both names one file": func(k *Kit) {
		k.needRoot("file handles")
		k.union(file("a", "x"), dir("d"))
		k.hardlink("a", "d/b")
		k.nlink("a", 2)
		equal(k, "inode", k.inode("a"), k.inode("d/b"))
		k.appendTo("d/b", "y")
		k.reads("a", "xy")
		k.unlink("a")
		k.nlink("d/b", 1)
		k.reads("d/b", "xy")
	},
	"a lower below a lower is copied from the nearest": func(k *Kit) {
		k.lower(file("f", "near"))
		k.union(file("f", "far"), xattr("f", "user.far", "1"))
		k.appendTo("f", "!")
		k.reads("f", "near!")
		k.noXattr(k.p("f"), "user.far")
	},
	"a merged directory has the attributes of the nearest": func(k *Kit) {
		k.lower(dir("d"), chmod("d", 0o750), file("d/a", "a"))
		k.union(dir("d"), chmod("d", 0o777), file("d/b", "b"), xattr("d", "user.far", "1"))
		k.mode("d", 0o750)
		k.chmod("d/b", 0o600)
		k.mode("d", 0o750)
		equal(k, "mode", k.statAt(k.u("d")).Mode&0o7777, 0o750)
		k.noXattr(k.u("d"), "user.far")
	},
	"overlay xattrs of a lower are not copied": func(k *Kit) {
		k.lower(file("d/f", "x"), overlay("d/f", "origin", "?"), overlay("d", "impure", "y"), opaque("d", "y"))
		k.union(file("d/g", "y"))
		k.chmod("d/f", 0o600)
		k.upperOpaque("d", false)
		k.holds("d", "f")
		k.remount()
		k.holds("d", "f")
	},
	"many small files": func(k *Kit) {
		names := numbered("d/f", 300)
		k.union(each(names, func(n string) change { return file(n, n) }))
		for _, n := range names {
			k.appendTo(n, "+")
		}
		for _, n := range names {
			k.reads(n, n+"+")
		}
	},
	"what no more holds anything of a lower is pure again": func(k *Kit) {
		k.union(file("f", "x"), file("g", "y"), file("d/h", "z"))
		k.makedir("n")
		k.write("n/own", "o")
		k.rename("f", "n/f")
		impure := func(p string, want bool) {
			k.Helper()
			_, err := getxattr(k.u(p), k.ov("impure"))
			k.that((err == nil) == want, "%s has the xattr: %v", p, err == nil)
		}
		k.holds("n", "own", "f")
		impure("n", true)
		k.unlink("n/f")
		impure("n", true)
		k.holds("n", "own")
		impure("n", false)
		k.rename("g", "n/g")
		k.holds("n", "own", "g")
		impure("n", true)
		k.unlink("n/g")
		k.unlink("n/own")
		k.holds("n")
		impure("n", false)
		k.rename("d/h", "n/h")
		k.holds("d")
		impure("n", true)
		k.remount()
		k.unlink("n/h")
		k.holds("n")
		impure("n", false)
		k.rmdir("n")
	},
	"readers and a writer at once": func(k *Kit) {
		k.union(random("f", 1<<20, 3))
		done := make(chan error)
		for range 4 {
			go func() {
				b, err := os.ReadFile(k.p("f"))
				if err == nil && len(b) != 1<<20 {
					err = fmt.Errorf("%d bytes", len(b))
				}
				done <- err
			}()
		}
		k.chmod("f", 0o600)
		k.overwrite("f", 0, "same file")
		for range 4 {
			k.ok(<-done)
		}
	},
	"eight that copy one file up at once": func(k *Kit) {
		k.union(random("d/e/f", 1<<20, 3))
		done := make(chan error)
		for i := range 8 {
			go func() {
				f, err := os.OpenFile(k.p("d/e/f"), os.O_WRONLY, 0)
				if err == nil {
					_, err = f.WriteAt([]byte{byte('0' + i)}, int64(i))
					f.Close()
				}
				done <- err
			}()
		}
		for range 8 {
			k.ok(<-done)
		}
		b, err := os.ReadFile(k.p("d/e/f"))
		k.ok(err)
		equal(k, "content", string(b[:8]), "01234567")
		k.that(bytes.Equal(b[8:], treegen.Content(3, 1<<20)[8:]), "the rest differs")
	},
	"eight that unlink, make and link names of one directory at once": func(k *Kit) {
		k.union(each(numbered("d/f", 80), func(n string) change { return file(n, "x") }))
		done := make(chan error)
		for i := range 8 {
			go func() { done <- churn(k.p("d"), i) }()
		}
		for range 8 {
			k.ok(<-done)
		}
		equal(k, "names", len(k.names("d")), 160)
	},
	"sendfile out of a file of a lower": func(k *Kit) {
		k.union(random("f", 200_000, 4))
		in, out := k.open("f", unix.O_RDONLY), k.open("g", unix.O_RDWR|unix.O_CREAT)
		n, err := io.Copy(out, in)
		k.ok(err)
		equal(k, "length", n, 200_000)
		k.reads("g", string(treegen.Content(4, 200_000)))
	},
})

// churn works on ten names of a directory and leaves twenty.
func churn(dir string, n int) error {
	for i := range 10 {
		old := fmt.Sprintf("%s/f%d", dir, n*10+i)
		if err := unix.Unlink(old); err != nil {
			return err
		}
		if err := os.WriteFile(old, []byte("new"), 0o644); err != nil {
			return err
		}
		if err := os.Link(old, old+".link"); err != nil {
			return err
		}
		if err := os.Rename(old+".link", old+".renamed"); err != nil {
			return err
		}
		if err := os.Chmod(old, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// workUnlinked works on an open file that has no name any more.
func (k *Kit) workUnlinked(f *os.File) {
	k.Helper()
	_, err := f.WriteAt([]byte("more"), 7)
	k.ok(err)
	k.readsFile(f, "contentmore")
	k.ok(f.Truncate(4))
	k.readsFile(f, "cont")
	k.ok(unix.Fallocate(fd(f), 0, 0, 8192))
	k.ok(unix.Fchmod(fd(f), 0o600))
	k.ok(unix.Fsetxattr(fd(f), "user.late", []byte("v"), 0))
	k.ok(unix.Futimes(fd(f), []unix.Timeval{{Sec: 1}, {Sec: 2}}))
	var st unix.Stat_t
	k.ok(unix.Fstat(fd(f), &st))
	equal(k, "nlink", uint64(st.Nlink), 0)
	equal(k, "size", st.Size, 8192)
	equal(k, "mode", st.Mode&0o7777, 0o600)
	equal(k, "mtime", st.Mtim.Sec, 2)
	k.ok(f.Sync())
}

// withTriggers adds a case for each trigger: it is done to a copy of the lower,
// too, and both must be equal afterwards.
func withTriggers(cases map[string]func(*Kit)) map[string]func(*Kit) {
	for name, do := range triggers {
		cases["by "+name] = func(k *Kit) { k.triggered(do) }
		cases["by "+name+" with a file open"] = func(k *Kit) {
			k.union(rich("f"))
			f := k.open("f", unix.O_RDONLY)
			do(k, "f")
			b, err := io.ReadAll(f)
			k.ok(err)
			want, err := os.ReadFile(k.u(renamed(k, "f")))
			k.ok(err)
			equal(k, "content", string(b), string(want))
		}
	}
	return cases
}

func renamed(k *Kit, p string) string {
	if _, err := os.Lstat(k.u(p)); err == nil {
		if st := k.statAt(k.u(p)); !st.IsWhiteout() {
			return p
		}
	}
	return p + ".to"
}

// triggered does the same to a file of a lower and to one of the upper; the
// mount must show no difference.
func (k *Kit) triggered(do func(k *Kit, p string)) {
	k.Helper()
	k.upper(rich("b/f"))
	k.union(rich("a/f"), all(file("a/f", "content of b/f"), chmod("a/f", 0o4751)))
	do(k, "a/f")
	do(k, "b/f")
	var got [2][]string
	for i, d := range []string{"a", "b"} {
		lines, err := listing{since: k.start, comparable: true}.list(k.p(d))
		k.ok(err)
		got[i] = lines[1:]
	}
	if d := difference(got[1], got[0]); d != "" {
		k.Errorf("what was in a lower (+) differs from what was in the upper (-):\n%s", d)
	}
}
