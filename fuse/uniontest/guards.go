package uniontest

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// The inode flags that guard a file: FS_IMMUTABLE_FL, FS_APPEND_FL.
const (
	immutable  = 0x10
	appendOnly = 0x20
)

// guardCases are about files and directories that must not change. An upper cannot
// have these flags itself, since it could be neither renamed nor marked then:
// they are in xattr protattr, and enforced above.
var guardCases = map[string]func(*Kit){
	"an immutable file": func(k *Kit) {
		k.guards()
		k.union(file("f", "content"), file("g", "from"))
		w := k.open("f", unix.O_RDWR)
		k.guard("f", immutable)
		k.fixedFile("f")
		_, err := w.WriteAt([]byte("C"), 0) // it was open before
		k.ok(err)
		k.ok(w.Truncate(7))
		k.is(unix.EPERM, unix.Fallocate(fd(w), 0, 0, 100))
		_, err = unix.CopyFileRange(fd(k.open("g", unix.O_RDONLY)), nil, fd(w), nil, 2, 0)
		k.is(unix.EPERM, err)
		k.byOther(func() { k.fixedFile("f") })
		k.guard("f", 0)
		k.noXattr(k.u("f"), k.ov("protattr"))
		k.write("f", "again")
		k.unlink("f")
	},
	"an append-only file": func(k *Kit) {
		k.guards()
		k.union(file("f", "content"))
		w := k.open("f", unix.O_RDWR)
		k.guard("f", appendOnly)
		k.growingFile("f")
		k.is(unix.EPERM, w.Truncate(3))
		k.ok(unix.Fallocate(fd(w), unix.FALLOC_FL_KEEP_SIZE, 0, 10_000))
		k.is(unix.EPERM, unix.Fallocate(fd(w), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096))
		k.appendTo("f", "!")
		k.byOther(func() {
			k.growingFile("f")
			k.appendTo("f", "?")
		})
		k.reads("f", "content!?")
		k.guard("f", 0)
		k.write("f", "again")
	},
	"a new file": func(k *Kit) {
		k.guards()
		k.union(dir("d"))
		k.write("d/new", "n")
		k.guard("d/new", immutable|appendOnly)
		equal(k, "protattr", k.xattrAt(k.u("d/new"), k.ov("protattr")), "ai")
		k.fixedFile("d/new")
		k.byOther(func() { k.fixedFile("d/new") })
		k.guard("d/new", appendOnly)
		equal(k, "protattr", k.xattrAt(k.u("d/new"), k.ov("protattr")), "a")
	},
	"an immutable directory": func(k *Kit) {
		k.guards()
		k.union(file("d/f", "x"), file("g", "y"), dir("d/sub"))
		k.guard("d", immutable)
		fixed := func() {
			k.is(unix.EPERM, unix.Mkdir(k.p("d/n"), 0o755))
			k.is(unix.EPERM, unix.Unlink(k.p("d/f")))
			k.is(unix.EPERM, unix.Rmdir(k.p("d/sub")))
			k.is(unix.EPERM, unix.Rename(k.p("g"), k.p("d/g")))
			k.is(unix.EPERM, unix.Rename(k.p("d/f"), k.p("h")))
			k.is(unix.EPERM, unix.Rename(k.p("d"), k.p("e")))
			k.is(unix.EPERM, unix.Link(k.p("g"), k.p("d/g")))
			k.is(unix.EPERM, unix.Chmod(k.p("d"), 0o700))
			_, err := k.tryOpen("d", unix.O_RDWR|unix.O_TMPFILE)
			k.is(unix.EPERM, err)
		}
		fixed()
		k.appendTo("d/f", "!") // what is in it is not guarded
		k.write("d/sub/n", "n")
		k.byOther(fixed)
	},
	"an append-only directory": func(k *Kit) {
		k.guards()
		k.union(file("d/f", "x"), file("g", "y"), file("h", "z"))
		k.guard("d", appendOnly)
		grows := func(n string) {
			k.makedir("d/" + n)
			k.is(unix.EPERM, unix.Rmdir(k.p("d/"+n)))
			k.is(unix.EPERM, unix.Unlink(k.p("d/f")))
			k.is(unix.EPERM, unix.Rename(k.p("d/f"), k.p("i")))
			k.is(unix.EPERM, unix.Rename(k.p("g"), k.p("d/f")))
			k.is(unix.EPERM, k.tryRename("g", "d/f", unix.RENAME_EXCHANGE))
			k.is(unix.EPERM, unix.Rename(k.p("d"), k.p("e")))
		}
		grows("one")
		k.rename("h", "d/h")
		k.byOther(func() { grows("two") })
		k.guard("d", 0)
		k.unlink("d/f")
	},
	"files of a lower": func(k *Kit) {
		k.guards()
		k.lower(file("d/f", "x"), file("a", "y"), file("e/g", "z"), file("h", "w"))
		for p, flags := range map[string]int{"d/f": immutable, "a": appendOnly, "e": immutable} {
			k.guardAt(k.l(0, p), flags)
			defer k.guardAt(k.l(0, p), 0)
			// Its time of change will be another one when that is taken off.
			k.noLowers = true
		}
		k.mount()
		k.fixedFile("d/f")
		k.growingFile("a")
		k.is(unix.EPERM, unix.Mkdir(k.p("e/n"), 0o755))
		k.is(unix.EPERM, unix.Unlink(k.p("e/g")))
		k.upperAbsent("d", "e")
		k.appendTo("a", "!")
		k.appendTo("e/g", "!")
		k.guard("d/f", 0)
		k.write("d/f", "again")
		fixed := func() {
			k.growingFile("a")
			k.is(unix.EPERM, unix.Unlink(k.p("e/g")))
			k.appendTo("d/f", "!")
		}
		fixed()
		k.byOther(fixed)
	},
	"what such an upper becomes as a lower": func(k *Kit) {
		k.guards()
		k.union(file("f", "x"))
		k.guard("f", immutable)
		k.unmount()
		k.spec.Lowers = append([]string{k.spec.Upper}, k.spec.Lowers...)
		k.spec.Upper, k.spec.Work = k.mkdir("u2"), k.mkdir("w2")
		k.before = nil
		k.mount()
		k.write("f", "the xattr is of its own layer alone")
		k.noXattr(k.u("f"), k.ov("protattr"))
	},
	"an xattr that is not valid": func(k *Kit) {
		k.guards()
		k.lower(dir("l"))
		k.upper(file("f", "x"), overlay("f", "protattr", "ix"), file("g", "y"), overlay("g", "protattr", "i"))
		k.mount()
		k.appendTo("f", "!")
		k.fixedFile("g")
	},
	"files of an upper that have the flags themselves": func(k *Kit) {
		k.guards()
		k.lower(dir("l"))
		k.upper(file("f", "x"), file("a", "y"), file("d/e", "z"), dir("d/sub"), file("g/h", "w"))
		for p, flags := range map[string]int{"f": immutable, "a": appendOnly, "d": immutable, "g": appendOnly} {
			k.guardAt(k.u(p), flags)
			defer k.guardAt(k.u(p), 0)
		}
		k.unread = "the flags are taken off, else nothing could be removed"
		k.mount()
		k.fixedFile("f")
		k.growingFile("a")
		k.appendTo("a", "!")
		w := k.open("a", unix.O_RDWR|unix.O_APPEND)
		_, err := w.WriteString("?")
		k.ok(err)
		k.readsFile(w, "y!?")
		k.is(unix.EPERM, unix.Rmdir(k.p("d/sub")))
		k.is(unix.EPERM, unix.Unlink(k.p("d/e")))
		k.is(unix.EPERM, unix.Rename(k.p("d/e"), k.p("e")))
		k.is(unix.EPERM, unix.Mkdir(k.p("d/n"), 0o755))
		k.write("g/n", "n")
		k.is(unix.EPERM, unix.Unlink(k.p("g/h")))
		k.unmount()
	},
	"a metacopy file": func(k *Kit) {
		k.guards()
		k.options("metacopy=on", "redirect_dir=on")
		k.union(file("f", "content"))
		k.chmod("f", 0o600)
		k.guard("f", immutable)
		k.fixedFile("f")
		k.byOther(func() { k.fixedFile("f") })
		k.guard("f", appendOnly)
		k.appendTo("f", "!")
		k.reads("f", "content!")
	},
	"a file with several names": func(k *Kit) {
		k.guards()
		k.unlikeBy(LinksLater)
		k.options("index=on")
		k.union(file("a", "x"), link("a", "b"))
		k.guard("a", immutable)
		k.fixedFile("a")
		k.fixedFile("b")
		k.byOther(func() { k.fixedFile("b") })
	},
	"by FS_IOC_FSSETXATTR": func(k *Kit) {
		k.guards()
		k.union(file("f", "x"))
		x, err := fsxattr(k.p("f"))
		k.ok(err)
		const xflagImmutable = 0x8
		x.Xflags |= xflagImmutable
		k.ok(setFSXattr(k.p("f"), x))
		k.fixedFile("f")
		x, err = fsxattr(k.p("f"))
		k.ok(err)
		equal(k, "xflags", x.Xflags&xflagImmutable, xflagImmutable)
		equal(k, "protattr", k.xattrAt(k.u("f"), k.ov("protattr")), "i")
	},
	"only by who may": func(k *Kit) {
		k.guards()
		k.union(file("f", "x"), chown("f", 1000, 1000), file("g", "y"), chown("g", 1000, 1000))
		k.guard("g", immutable)
		k.as(1000, 1000, func() {
			f, err := os.Open(k.p("f"))
			k.ok(err)
			defer f.Close()
			flags, err := unix.IoctlGetInt(fd(f), unix.FS_IOC_GETFLAGS)
			k.ok(err)
			k.is(unix.EPERM, unix.IoctlSetPointerInt(fd(f), unix.FS_IOC_SETFLAGS, flags|immutable))
			k.is(unix.EPERM, unix.Chmod(k.p("g"), 0o600))
			k.is(unix.EPERM, unix.UtimesNanoAt(unix.AT_FDCWD, k.p("g"), nil, 0))
		})
		k.write("f", "not guarded")
	},
}

// guards ends a case where these flags cannot be had.
func (k *Kit) guards() { k.Helper(); k.needRoot("CAP_LINUX_IMMUTABLE") }

// guard gives a file of the mount these flags, and takes the others off.
func (k *Kit) guard(p string, flags int) { k.Helper(); k.guardAt(k.p(p), flags) }

func (k *Kit) guardAt(path string, flags int) {
	k.Helper()
	f, err := os.Open(path)
	k.ok(err)
	defer f.Close()
	now, err := unix.IoctlGetInt(fd(f), unix.FS_IOC_GETFLAGS)
	k.ok(err)
	k.ok(unix.IoctlSetPointerInt(fd(f), unix.FS_IOC_SETFLAGS, now&^(immutable|appendOnly)|flags))
	now, err = unix.IoctlGetInt(fd(f), unix.FS_IOC_GETFLAGS)
	k.ok(err)
	equal(k, "flags", now&(immutable|appendOnly), flags)
}

// fixedFile says that a file is immutable.
func (k *Kit) fixedFile(p string) {
	k.Helper()
	k.guarded(p)
	_, err := k.tryOpen(p, unix.O_WRONLY|unix.O_APPEND)
	k.is(unix.EPERM, err)
	k.is(unix.EPERM, unix.UtimesNanoAt(unix.AT_FDCWD, k.p(p), nil, 0))
}

// growingFile says that a file is append-only.
func (k *Kit) growingFile(p string) {
	k.Helper()
	k.guarded(p)
	k.ok(unix.UtimesNanoAt(unix.AT_FDCWD, k.p(p), nil, 0)) // to the present
}

// guarded says what neither may be done to.
func (k *Kit) guarded(p string) {
	k.Helper()
	at := k.p(p)
	for _, flags := range []int{unix.O_WRONLY, unix.O_RDWR, unix.O_WRONLY | unix.O_TRUNC, unix.O_WRONLY | unix.O_APPEND | unix.O_TRUNC} {
		_, err := k.tryOpen(p, flags)
		k.is(unix.EPERM, err)
	}
	past := []unix.Timespec{{Sec: 1}, {Sec: 1}}
	other := k.p("other-name")
	for what, err := range map[string]error{
		"truncate":    unix.Truncate(at, 1),
		"chmod":       unix.Chmod(at, 0o640),
		"chown":       unix.Chown(at, 1, 1),
		"utimes":      unix.UtimesNanoAt(unix.AT_FDCWD, at, past, 0),
		"setxattr":    unix.Setxattr(at, "user.x", []byte("1"), 0),
		"removexattr": unix.Removexattr(at, "user.x"),
		"link":        unix.Link(at, other),
		"rename":      unix.Rename(at, other),
		"unlink":      unix.Unlink(at),
	} {
		if err != syscall.EPERM {
			k.Errorf("%s of %s: %v, want EPERM", what, p, err)
		}
	}
}

// byOther unmounts, mounts what is there by the other subject, and back again.
func (k *Kit) byOther(f func()) {
	k.Helper()
	k.unmount()
	k.actor, k.reader = k.reader, k.actor
	k.mount()
	f()
	k.unmount()
	k.actor, k.reader = k.reader, k.actor
	k.mount()
}
