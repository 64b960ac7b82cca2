package uniontest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// alice and bob are two who are not root.
const alice, bob = 1001, 1002

// permissionCases are about users that are not root.
var permissionCases = map[string]func(*Kit){
	"reading needs r": func(k *Kit) {
		k.union(file("open", "x"), file("mine", "x"), chmod("mine", 0o600), chown("mine", alice, alice), file("root", "x"), chmod("root", 0o600))
		k.as(alice, alice, func() {
			k.reads("open", "x")
			k.reads("mine", "x")
			_, err := os.ReadFile(k.p("root"))
			k.is(unix.EACCES, err)
		})
		k.as(bob, bob, func() {
			_, err := os.ReadFile(k.p("mine"))
			k.is(unix.EACCES, err)
		})
	},
	"writing needs w": func(k *Kit) {
		k.union(file("f", "x"), chown("f", alice, alice), file("ro", "x"), chown("ro", alice, alice), chmod("ro", 0o444))
		k.as(bob, bob, func() {
			_, err := os.OpenFile(k.p("f"), os.O_WRONLY, 0)
			k.is(unix.EACCES, err)
			k.is(unix.EACCES, unix.Truncate(k.p("f"), 0))
		})
		k.upperHolds(".")
		k.as(alice, alice, func() {
			k.appendTo("f", "y")
			_, err := os.OpenFile(k.p("ro"), os.O_WRONLY, 0)
			k.is(unix.EACCES, err)
			k.is(0, unix.Chmod(k.p("ro"), 0o644))
			k.appendTo("ro", "y")
		})
		k.owner("f", alice, alice)
		k.reads("f", "xy")
	},
	"changing names needs w and x of the directory": func(k *Kit) {
		k.union(file("d/f", "x"), dir("mine"), chown("mine", alice, alice), file("mine/g", "y"), dir("w"), chmod("w", 0o776), file("w/h", "z"))
		k.as(alice, alice, func() {
			k.is(unix.EACCES, unix.Unlink(k.p("d/f")))
			k.is(unix.EACCES, unix.Mkdir(k.p("d/new"), 0o755))
			k.is(unix.EACCES, unix.Rename(k.p("d/f"), k.p("mine/f")))
			k.is(unix.EACCES, unix.Rename(k.p("mine/g"), k.p("d/g")))
			k.is(unix.EACCES, unix.Unlink(k.p("w/h")))
			k.is(unix.EACCES, unix.Symlink("x", k.p("d/l")))
			k.is(unix.EACCES, unix.Mknod(k.p("d/p"), unix.S_IFIFO|0o600, 0))
			k.unlink("mine/g")
			k.write("mine/new", "n")
			k.makedir("mine/s")
			k.rename("mine/new", "mine/s/new")
		})
		k.upperWhiteout("mine/g")
		k.owner("mine/s/new", alice, alice)
		k.upperAbsent("d", "w")
	},
	"searching needs x": func(k *Kit) {
		k.union(file("d/f", "x"), chmod("d", 0o744), file("e/f", "x"), chmod("e", 0o711))
		k.as(alice, alice, func() {
			_, err := os.Lstat(k.p("d/f"))
			k.is(unix.EACCES, err)
			k.holds("d", "f")
			k.reads("e/f", "x")
			_, err = os.ReadDir(k.p("e"))
			k.is(unix.EACCES, err)
		})
	},
	"sticky directories": func(k *Kit) {
		k.union(dir("tmp"), chmod("tmp", 0o1777), file("tmp/a", "a"), chown("tmp/a", alice, alice), file("tmp/b", "b"), chown("tmp/b", bob, bob))
		k.as(alice, alice, func() {
			k.is(unix.EPERM, unix.Unlink(k.p("tmp/b")))
			k.is(unix.EPERM, unix.Rename(k.p("tmp/b"), k.p("tmp/c")))
			k.is(unix.EPERM, unix.Rename(k.p("tmp/a"), k.p("tmp/b")))
			k.rename("tmp/a", "tmp/a2")
			k.write("tmp/new", "n")
			k.makedir("tmp/dir")
		})
		k.as(bob, bob, func() {
			k.is(unix.EPERM, unix.Unlink(k.p("tmp/new")))
			k.is(unix.EPERM, unix.Rmdir(k.p("tmp/dir")))
			k.unlink("tmp/b")
		})
		k.upperWhiteout("tmp/b")
		k.owner("tmp/new", alice, alice)
	},
	"chmod and chown of others' files": func(k *Kit) {
		k.union(file("a", "a"), chown("a", alice, alice), file("b", "b"), chown("b", bob, bob))
		k.as(alice, alice, func() {
			k.chmod("a", 0o640)
			k.is(unix.EPERM, unix.Chmod(k.p("b"), 0o666))
			k.is(unix.EPERM, unix.Chown(k.p("a"), bob, alice))
			k.is(unix.EPERM, unix.Chown(k.p("a"), -1, bob))
			k.is(0, unix.Chown(k.p("a"), -1, alice))
			k.is(unix.EPERM, unix.Chown(k.p("b"), alice, alice))
		})
		k.upperAbsent("b")
	},
	"utimes of others' files": func(k *Kit) {
		k.union(file("f", "x"), chmod("f", 0o666), file("g", "x"))
		k.as(alice, alice, func() {
			ts := []unix.Timespec{{Sec: 1}, {Sec: 1}}
			k.is(unix.EPERM, unix.UtimesNanoAt(unix.AT_FDCWD, k.p("f"), ts, 0))
			k.is(0, unix.UtimesNanoAt(unix.AT_FDCWD, k.p("f"), nil, 0))
			k.is(unix.EACCES, unix.UtimesNanoAt(unix.AT_FDCWD, k.p("g"), nil, 0))
		})
		k.that(k.stat("f").Mtime.Sec >= k.start.Sec, "mtime %v", k.stat("f").Mtime)
	},
	"xattrs of others' files": func(k *Kit) {
		k.union(file("f", "x"), xattr("f", "user.a", "1"), xattr("f", "trusted.t", "1"), file("mine", "x"), chown("mine", alice, alice))
		k.as(alice, alice, func() {
			k.is(unix.EACCES, setxattr(k.p("f"), "user.b", "1"))
			k.is(unix.EACCES, unix.Removexattr(k.p("f"), "user.a"))
			k.is(unix.EPERM, setxattr(k.p("mine"), "trusted.x", "1"))
			k.setxattr("mine", "user.b", "1")
			_, err := getxattr(k.p("f"), "trusted.t")
			k.is(unix.ENODATA, err)
			for _, n := range k.xattrNames("f") {
				k.that(n != "trusted.t", "trusted.t is listed to a user")
			}
			k.is(unix.EPERM, setxattr(k.p("mine"), "security.capability", capNet))
		})
	},
	"suid and sgid go on a user's write": func(k *Kit) {
		k.suidFiles()
		k.as(alice, alice, func() {
			k.appendTo("low", "y")
			k.appendTo("new", "y")
		})
		k.dropped()
	},
	"suid and sgid go on a user's truncate": func(k *Kit) {
		k.suidFiles()
		k.as(alice, alice, func() {
			k.truncate("low", 1)
			k.truncate("new", 1)
		})
		k.dropped()
	},
	"suid and sgid go on a user's ftruncate and O_TRUNC": func(k *Kit) {
		k.suidFiles()
		k.as(alice, alice, func() {
			f := k.open("low", unix.O_RDWR)
			k.ok(f.Truncate(1))
			k.open("new", unix.O_WRONLY|unix.O_TRUNC)
		})
		k.dropped()
	},
	"suid and sgid go on a user's fallocate": func(k *Kit) {
		k.suidFiles()
		k.as(alice, alice, func() {
			for _, p := range []string{"low", "new"} {
				f := k.open(p, unix.O_RDWR)
				k.ok(unix.Fallocate(fd(f), 0, 0, 8192))
			}
		})
		k.dropped()
	},
	"suid and sgid go on chown": func(k *Kit) {
		k.suidFiles()
		k.as(alice, alice, func() {
			k.ok(unix.Chown(k.p("low"), alice, alice))
			k.ok(unix.Chown(k.p("new"), alice, alice))
		})
		k.dropped()
	},
	"root's chown drops them, too": func(k *Kit) {
		k.suidFiles()
		for _, p := range []string{"low", "new"} {
			k.chown(p, bob, bob)
			k.mode(p, 0o777)
		}
	},
	"root's write keeps suid": func(k *Kit) {
		k.suidFiles()
		k.appendTo("low", "y")
		k.appendTo("new", "y")
		k.mode("low", 0o6777)
		k.mode("new", 0o6777)
	},
	"root's write to a file that got suid while it was open": func(k *Kit) {
		k.union(file("x", "x"))
		k.write("f", "x")
		f := k.open("f", unix.O_RDWR)
		k.chmod("f", 0o4755)
		_, err := f.WriteAt([]byte("y"), 0)
		k.ok(err)
		want := uint32(0o4755)
		if k.differs(SetIDLater) {
			want = 0o755
		}
		k.mode("f", want)
		k.unlikeBy(SetIDLater)
	},
	"sgid without x stays on a user's write": func(k *Kit) {
		k.union(file("f", "x"), chown("f", alice, alice), chmod("f", 0o2666))
		k.as(alice, alice, func() { k.appendTo("f", "y") })
		k.mode("f", 0o2666)
	},
	"capabilities go on write": func(k *Kit) {
		k.union(file("low", "x"), xattr("low", "security.capability", capNet), file("root", "x"), xattr("root", "security.capability", capNet), chmod("low", 0o666))
		k.write("new", "x")
		k.chmod("new", 0o666)
		k.setxattr("new", "security.capability", capNet)
		k.as(alice, alice, func() {
			k.appendTo("low", "y")
			k.appendTo("new", "y")
		})
		k.appendTo("root", "y")
		for _, p := range []string{"low", "new", "root"} {
			k.noXattr(k.p(p), "security.capability")
			k.noXattr(k.u(p), "security.capability")
		}
	},
	"capabilities go on truncate and chown": func(k *Kit) {
		k.union(file("a", "x"), xattr("a", "security.capability", capNet), file("b", "x"), xattr("b", "security.capability", capNet), file("c", "x"), xattr("c", "security.capability", capNet))
		k.truncate("a", 0)
		k.chown("b", alice, alice)
		k.chmod("c", 0o700)
		k.noXattr(k.p("a"), "security.capability")
		k.noXattr(k.p("b"), "security.capability")
		equal(k, "capability after chmod", k.xattr("c", "security.capability"), capNet)
	},
	"capabilities stay where nothing is written": func(k *Kit) {
		k.union(file("a", "x"), xattr("a", "security.capability", capNet), file("b", "x"), xattr("b", "security.capability", capNet))
		k.open("a", unix.O_RDWR).Close()
		k.rename("b", "c")
		k.hardlink("c", "d")
		equal(k, "a", k.xattr("a", "security.capability"), capNet)
		equal(k, "d", k.xattr("d", "security.capability"), capNet)
	},
	"a user's chmod drops sgid of a foreign group": func(k *Kit) {
		k.union(file("f", "x"), chown("f", alice, bob))
		k.as(alice, alice, func() { k.chmod("f", 0o2755) })
		k.mode("f", 0o755)
	},
	"a user's file in a setgid directory": func(k *Kit) {
		k.union(dir("d"), chown("d", 0, bob), chmod("d", 0o2777))
		k.as(alice, alice, func() {
			old := unix.Umask(0)
			defer unix.Umask(old)
			fdn, err := unix.Open(k.p("d/f"), unix.O_CREAT|unix.O_WRONLY, 0o2775)
			k.ok(err)
			unix.Close(fdn)
			k.ok(unix.Mkdir(k.p("d/s"), 0o755))
		})
		k.owner("d/f", alice, bob)
		k.mode("d/f", 0o775) // sgid of a group that is not the user's
		k.owner("d/s", alice, bob)
		k.mode("d/s", 0o2755)
	},
	"new files belong to who makes them": func(k *Kit) {
		k.union(dir("d"), chmod("d", 0o777), file("d/was", "x"), chmod("d/was", 0o666))
		k.as(alice, bob, func() {
			k.write("d/f", "x")
			k.makedir("d/s")
			k.symlink("t", "d/l")
			k.mknod("d/p", unix.S_IFIFO|0o600, 0, 0)
			k.unlink("d/was")
			k.write("d/was", "again")
			k.unlink("d/was")
			k.makedir("d/was")
			fdn, err := unix.Open(k.p("d"), unix.O_TMPFILE|unix.O_RDWR, 0o600)
			k.ok(err)
			k.ok(unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/thread-self/fd/%d", fdn), unix.AT_FDCWD, k.p("d/t"), unix.AT_SYMLINK_FOLLOW))
			unix.Close(fdn)
		})
		for _, p := range []string{"d/f", "d/s", "d/l", "d/p", "d/was", "d/t"} {
			k.owner(p, alice, bob)
		}
		k.upperOpaque("d/was", true)
	},
	"ACLs are obeyed": func(k *Kit) {
		named := "\x02\x00\x00\x00" +
			"\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x06\x00\xe9\x03\x00\x00" + "\x04\x00\x00\x00\xff\xff\xff\xff" +
			"\x10\x00\x06\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
		k.union(file("f", "x"), xattr("f", "system.posix_acl_access", named))
		k.write("new", "x")
		k.setxattr("new", "system.posix_acl_access", named)
		for _, p := range []string{"f", "new"} {
			k.as(alice, alice, func() {
				k.reads(p, "x")
				k.appendTo(p, "y")
			})
			k.as(bob, bob, func() {
				_, err := os.ReadFile(k.p(p))
				k.is(unix.EACCES, err)
			})
		}
		equal(k, "ACL", k.xattr("f", "system.posix_acl_access"), named)
	},
	"a user cannot set the ACL of others' files": func(k *Kit) {
		k.union(file("f", "x"), chmod("f", 0o666), file("mine", "x"), chown("mine", alice, alice))
		k.as(alice, alice, func() {
			k.is(unix.EPERM, setxattr(k.p("f"), "system.posix_acl_access", acl))
			k.setxattr("mine", "system.posix_acl_access", acl)
		})
	},
	"mknod of devices needs root": func(k *Kit) {
		k.union(dir("d"), chmod("d", 0o777))
		k.as(alice, alice, func() {
			k.is(unix.EPERM, unix.Mknod(k.p("d/c"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
			k.is(0, unix.Mknod(k.p("d/p"), unix.S_IFIFO|0o600, 0))
		})
		k.holds("d", "p")
	},
	"access(2)": func(k *Kit) {
		k.union(file("f", "x"), file("x", "x"), chmod("x", 0o711), dir("d"), chmod("d", 0o700))
		k.as(alice, alice, func() {
			k.is(0, unix.Access(k.p("f"), unix.R_OK))
			k.is(unix.EACCES, unix.Access(k.p("f"), unix.W_OK))
			k.is(unix.EACCES, unix.Access(k.p("f"), unix.X_OK))
			k.is(0, unix.Access(k.p("x"), unix.X_OK))
			k.is(unix.EACCES, unix.Access(k.p("d"), unix.X_OK))
		})
		k.is(unix.EACCES, unix.Access(k.p("f"), unix.X_OK))
	},
	"O_NOATIME of others' files": func(k *Kit) {
		k.union(file("f", "x"))
		k.open("f", unix.O_RDONLY|unix.O_NOATIME)
		k.as(alice, alice, func() {
			_, err := unix.Open(k.p("f"), unix.O_RDONLY|unix.O_NOATIME, 0)
			k.is(unix.EPERM, err)
		})
	},
	"copy-up by a user keeps the owner": func(k *Kit) {
		k.union(file("d/e/f", "x"), chmod("d/e/f", 0o666), chown("d/e/f", bob, bob), chown("d", 5, 5))
		k.as(alice, alice, func() { k.appendTo("d/e/f", "y") })
		k.owner("d/e/f", bob, bob)
		k.owner("d", 5, 5)
		k.owner("d/e", 0, 0)
		equal(k, "owner in the upper", k.statAt(k.u("d")).UID, 5)
	},
	"a user's whiteouts work on a directory without others' rights": func(k *Kit) {
		k.union(dir("p"), chmod("p", 0o700), chown("p", alice, alice), file("p/a", "x"), chown("p/a", bob, bob), chmod("p/a", 0o000))
		k.as(alice, alice, func() { k.unlink("p/a") })
		k.upperWhiteout("p/a")
		k.as(alice, alice, func() { k.write("p/a", "new") })
		k.owner("p/a", alice, alice)
	},
	"execution needs x": func(k *Kit) {
		k.union(file("run", "#!/bin/sh\necho ran"), chmod("run", 0o644))
		k.is(unix.EACCES, unix.Access(k.p("run"), unix.X_OK))
		k.chmod("run", 0o755)
		k.executes("run", "ran")
	},
	"protected hard links": func(k *Kit) {
		b, err := os.ReadFile("/proc/sys/fs/protected_hardlinks")
		k.ok(err)
		k.union(dir("d"), chmod("d", 0o777), file("root", "x"), chmod("root", 0o600))
		k.as(alice, alice, func() {
			if err := unix.Link(k.p("root"), k.p("d/l")); b[0] == '1' {
				k.is(unix.EPERM, err)
			}
		})
	},
}

// suidFiles are two that a user may write.
func (k *Kit) suidFiles() {
	k.Helper()
	make := func(p string) change { return all(file(p, "xxx"), chown(p, alice, alice), chmod(p, 0o6777)) }
	k.upper(make("new"))
	k.union(make("low"))
}

// dropped says that both have lost suid and sgid.
func (k *Kit) dropped() {
	k.Helper()
	for _, p := range []string{"low", "new"} {
		k.mode(p, 0o777)
		equal(k, "mode in the upper", k.statAt(k.u(p)).Mode&0o7777, 0o777)
	}
}
