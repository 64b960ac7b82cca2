package uniontest

import (
	"os"

	"golang.org/x/sys/unix"
)

// whiteoutCases are about names that a layer hides.
var whiteoutCases = map[string]func(*Kit){
	"unlink of a lower name leaves a 0/0 device": func(k *Kit) {
		k.union(file("a", "x"), file("b", "y"))
		k.unlink("a")
		k.absent("a")
		k.holds(".", "b")
		k.upperWhiteout("a")
		k.upperHolds(".", "a")
	},
	"unlink of a lower name in a directory": func(k *Kit) {
		k.union(file("d/e/a", "x"), file("d/e/b", "y"))
		k.unlink("d/e/a")
		k.holds("d/e", "b")
		k.upperWhiteout("d/e/a")
		k.upperHolds("d/e", "a")
	},
	"unlink of an upper name leaves nothing": func(k *Kit) {
		k.union(dir("d"))
		k.write("d/a", "x")
		k.unlink("d/a")
		k.absent("d/a")
		k.upperHolds("d")
	},
	"unlink of a copied-up name leaves a 0/0 device": func(k *Kit) {
		k.union(file("a", "x"))
		k.appendTo("a", "y")
		k.unlink("a")
		k.upperWhiteout("a")
	},
	"unlink of a special file of a lower": func(k *Kit) {
		k.union(node("p", unix.S_IFIFO|0o644, 0, 0), node("s", unix.S_IFSOCK|0o644, 0, 0), symlink("t", "l"))
		for _, n := range []string{"p", "s", "l"} {
			k.unlink(n)
			k.absent(n)
			k.upperWhiteout(n)
		}
	},
	"rmdir of a lower directory leaves a 0/0 device": func(k *Kit) {
		k.union(dir("d"))
		k.rmdir("d")
		k.absent("d")
		k.upperWhiteout("d")
	},
	"rmdir of a merged directory leaves a 0/0 device": func(k *Kit) {
		k.union(file("d/a", "x"))
		k.write("d/b", "y")
		k.unlink("d/a")
		k.unlink("d/b")
		k.rmdir("d")
		k.absent("d")
		k.upperWhiteout("d")
	},
	"rmdir of an upper directory leaves nothing": func(k *Kit) {
		k.union(file("a", "x"))
		k.makedir("d")
		k.rmdir("d")
		k.upperHolds(".")
	},
	"rmdir of a directory that is not empty": func(k *Kit) {
		k.union(file("d/a", "x"), dir("e"))
		k.is(unix.ENOTEMPTY, unix.Rmdir(k.p("d")))
		k.write("e/new", "x")
		k.is(unix.ENOTEMPTY, unix.Rmdir(k.p("e")))
		k.upperAbsent("d")
		k.unlink("d/a")
		k.rmdir("d")
	},
	"rmdir with only whiteouts inside": func(k *Kit) {
		k.union(each(numbered("d/f", 50), func(n string) change { return file(n, "x") }))
		for _, n := range numbered("d/f", 50) {
			k.unlink(n)
		}
		k.rmdir("d")
		k.upperWhiteout("d")
	},
	"a new file over a whiteout": func(k *Kit) {
		k.union(file("a", "old"), chmod("a", 0o600))
		k.unlink("a")
		k.write("a", "new")
		k.reads("a", "new")
		k.mode("a", 0o644)
		k.remount()
		k.reads("a", "new")
	},
	"a new directory over a whiteout is opaque": func(k *Kit) {
		k.union(file("d/a", "x"))
		k.removeAll("d")
		k.makedir("d")
		k.holds("d")
		k.upperOpaque("d", true)
		k.upperHolds("d")
		k.write("d/b", "y")
		k.remount()
		k.holds("d", "b")
	},
	"a new directory over a file's whiteout": func(k *Kit) {
		k.union(file("a", "x"))
		k.unlink("a")
		k.makedir("a")
		k.write("a/b", "y")
		k.remount()
		k.holds("a", "b")
	},
	"a new directory where nothing was is not opaque": func(k *Kit) {
		k.union(file("a", "x"))
		k.makedir("d")
		k.upperOpaque("d", false)
	},
	"a new symlink, fifo and hard link over a whiteout": func(k *Kit) {
		k.union(file("l", "x"), file("p", "x"), file("h", "x"), file("keep", "k"))
		for _, n := range []string{"l", "p", "h"} {
			k.unlink(n)
		}
		k.symlink("to", "l")
		k.mknod("p", unix.S_IFIFO|0o600, 0, 0)
		k.write("new", "n")
		k.hardlink("new", "h")
		k.reads("h", "n")
		k.nlink("h", 2)
		k.remount()
		k.reads("h", "n")
	},
	"O_EXCL over a whiteout": func(k *Kit) {
		k.union(file("a", "x"))
		_, err := k.tryOpen("a", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
		k.is(unix.EEXIST, err)
		k.unlink("a")
		k.open("a", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
		k.size("a", 0)
	},
	"a 0/0 device of the upper hides": func(k *Kit) {
		k.upper(whiteout("a", "d", "nothing"))
		k.union(file("a", "x"), file("d/b", "y"), file("c", "z"))
		k.absent("a", "d", "nothing")
		k.holds(".", "c")
	},
	"a 0/0 device of a middle lower hides": func(k *Kit) {
		k.lower(file("x", "1"))
		k.lower(whiteout("a", "d/b"))
		k.union(file("a", "x"), file("d/b", "y"), file("d/c", "z"))
		k.holds(".", "d", "x")
		k.holds("d", "c")
	},
	"a name above a whiteout is there": func(k *Kit) {
		k.lower(file("a", "top"), file("d/new", "n"))
		k.lower(whiteout("a", "d"))
		k.union(file("a", "bottom"), file("d/old", "o"))
		k.reads("a", "top")
		k.holds("d", "new")
	},
	"a 0/0 device of the lowest layer is not listed": func(k *Kit) {
		k.union(whiteout("a"), file("b", "x"))
		k.absent("a")
		k.holds(".", "b")
		k.write("a", "new")
		k.reads("a", "new")
	},
	"an opaque lower directory ends the merge": func(k *Kit) {
		k.lower(file("d/a", "1"), opaque("d", "y"))
		k.union(file("d/b", "2"), file("e/c", "3"))
		k.holds("d", "a")
		k.holds(".", "d", "e")
	},
	"an opaque middle lower": func(k *Kit) {
		k.lower(file("d/a", "1"))
		k.lower(file("d/b", "2"), opaque("d", "y"))
		k.union(file("d/c", "3"))
		k.holds("d", "a", "b")
	},
	"an opaque upper directory": func(k *Kit) {
		k.upper(file("d/a", "1"), opaque("d", "y"))
		k.union(file("d/b", "2"), file("d/s/c", "3"))
		k.holds("d", "a")
	},
	"opaque below an opaque parent": func(k *Kit) {
		k.lower(dir("d/s"), file("d/s/a", "1"), opaque("d", "y"))
		k.union(file("d/s/b", "2"))
		k.holds("d/s", "a")
	},
	"opaque with another value": func(k *Kit) {
		k.lower(file("d/a", "1"), opaque("d", "n"))
		k.union(file("d/b", "2"))
		k.holds("d", "a", "b")
	},
	"an opaque root merges all the same": func(k *Kit) {
		k.lower(file("a", "1"), opaque(".", "y"))
		k.union(file("b", "2"))
		k.holds(".", "a", "b")
	},
	"an opaque file is a file": func(k *Kit) {
		k.lower(file("a", "1"), opaque("a", "y"))
		k.union(file("a", "2"))
		k.reads("a", "1")
	},
	"xattr whiteouts in a directory marked x": func(k *Kit) {
		k.lower(dir("d"), opaque("d", "x"), xwhiteout("d/a"), file("d/c", "c"))
		k.union(file("d/a", "1"), file("d/b", "2"))
		k.absent("d/a")
		k.holds("d", "b", "c")
	},
	"xattr whiteouts hide directories": func(k *Kit) {
		k.lower(dir("d"), opaque("d", "x"), xwhiteout("d/s"))
		k.union(file("d/s/a", "1"), file("d/b", "2"))
		k.holds("d", "b")
		k.makedir("d/s")
		k.holds("d/s")
		k.remount()
		k.holds("d/s")
	},
	"a directory marked x merges": func(k *Kit) {
		k.lower(file("d/top", "t"), opaque("d", "x"))
		k.lower(file("d/mid", "m"))
		k.union(file("d/low", "l"))
		k.holds("d", "low", "mid", "top")
	},
	"an xattr whiteout elsewhere is listed": func(k *Kit) {
		k.lower(dir("d"), xwhiteout("d/a"), xwhiteout("e/a"))
		k.union(file("d/a", "1"))
		k.unread = "one of the two may differ"
		for _, d := range []string{"d", "e"} {
			k.holds(d, "a")
			if k.differs(StrayWhiteouts) {
				k.reads(d+"/a", "")
				continue
			}
			_, err := os.Lstat(k.p(d + "/a"))
			k.is(unix.ENOENT, err)
		}
	},
	"an xattr whiteout over nothing": func(k *Kit) {
		k.lower(dir("d"), opaque("d", "x"), xwhiteout("d/a"))
		k.union(file("d/b", "1"))
		k.holds("d", "b")
		k.write("d/a", "new")
		k.holds("d", "a", "b")
	},
	"an xattr whiteout in the root": func(k *Kit) {
		k.lower(opaque(".", "x"), xwhiteout("a"))
		k.union(file("a", "1"), file("b", "2"))
		k.holds(".", "b")
	},
	"a file over a directory hides it wholly": func(k *Kit) {
		k.lower(file("n", "file"))
		k.union(file("n/a", "1"))
		k.reads("n", "file")
		k.unlink("n")
		k.absent("n")
		k.upperWhiteout("n")
		k.makedir("n")
		k.holds("n")
	},
	"a directory over a file hides it": func(k *Kit) {
		k.lower(file("n/a", "1"))
		k.lower(file("n", "file"))
		k.union(file("n/b", "2"))
		k.holds("n", "a")
	},
	"a symlink over a directory is not followed": func(k *Kit) {
		k.lower(symlink("other", "n"), file("other/x", "x"))
		k.union(file("n/a", "1"))
		k.holds("n", "x")
		to, err := os.Readlink(k.p("n"))
		k.ok(err)
		equal(k, "target", to, "other")
	},
	"a fifo over a directory": func(k *Kit) {
		k.lower(node("n", unix.S_IFIFO|0o644, 0, 0))
		k.union(file("n/a", "1"))
		equal(k, "type", k.stat("n").Type(), uint32(unix.S_IFIFO))
	},
	"aufs names are plain names": func(k *Kit) {
		if !k.actor.Kernel {
			k.unlike = ""
		}
		k.lower(file("d/.wh.a", ""), file("e/.wh..wh..opq", ""))
		k.union(file("d/a", "1"), file("e/b", "2"))
		k.holds("d", ".wh.a", "a")
		k.holds("e", ".wh..wh..opq", "b")
	},
	"whiteouts are not seen by a lookup": func(k *Kit) {
		k.union(file("a", "x"), dir("d"))
		k.unlink("a")
		k.rmdir("d")
		for _, n := range []string{"a", "d", "a/x", "d/x"} {
			_, err := os.Lstat(k.p(n))
			k.is(unix.ENOENT, err)
		}
		_, err := k.tryOpen("a", unix.O_RDWR)
		k.is(unix.ENOENT, err)
		k.is(unix.ENOENT, unix.Unlink(k.p("a")))
		k.is(unix.ENOENT, unix.Rmdir(k.p("d")))
		k.is(unix.ENOENT, unix.Chmod(k.p("a"), 0o600))
	},
	"mknod of a 0/0 device": func(k *Kit) {
		k.union(file("a", "x"))
		k.is(unix.EPERM, unix.Mknod(k.p("new"), unix.S_IFCHR|0o600, 0))
		k.absent("new")
	},
	"unlink copies no data up": func(k *Kit) {
		k.union(sparse("big", 1<<40))
		k.unlink("big")
		k.upperWhiteout("big")
	},
	"rename of a lower file leaves a whiteout": func(k *Kit) {
		k.union(file("a", "x"), dir("d"))
		k.rename("a", "d/b")
		k.absent("a")
		k.reads("d/b", "x")
		k.upperWhiteout("a")
		k.remount()
		k.reads("d/b", "x")
	},
	"a removed tree leaves one whiteout": func(k *Kit) {
		k.union(file("t/a", "1"), file("t/d/b", "2"), file("t/d/e/c", "3"), symlink("x", "t/l"))
		k.removeAll("t")
		k.absent("t")
		k.upperWhiteout("t")
		k.upperHolds(".", "t")
	},
	"a tree removed and made again shows nothing of the old": func(k *Kit) {
		k.union(file("t/a", "1"), file("t/d/b", "2"))
		k.removeAll("t")
		k.ok(os.MkdirAll(k.p("t/d"), 0o755))
		k.holds("t/d")
		k.write("t/d/new", "n")
		k.remount()
		k.holds("t", "d")
		k.holds("t/d", "new")
		k.upperOpaque("t", true)
		k.upperOpaque("t/d", false)
	},
	"whiteouts and opaque over three layers": func(k *Kit) {
		k.lower(whiteout("a"), file("d/1", "1"))
		k.lower(file("a", "mid"), whiteout("d/3"), file("d/2", "2"), dir("o"), opaque("o", "y"))
		k.union(file("a", "low"), file("d/3", "3"), file("d/4", "4"), file("o/x", "x"))
		k.holds(".", "d", "o")
		k.holds("d", "1", "2", "4")
		k.holds("o")
		k.write("d/3", "again")
		k.unlink("d/2")
		k.holds("d", "1", "3", "4")
	},
	"a whiteout over a whiteout and back": func(k *Kit) {
		k.union(file("a", "x"))
		for range 5 {
			k.unlink("a")
			k.upperWhiteout("a")
			k.write("a", "again")
			k.reads("a", "again")
		}
		for range 5 {
			k.unlink("a")
			k.makedir("a")
			k.rmdir("a")
			k.upperWhiteout("a")
			k.write("a", "file")
		}
	},
	"names that begin with .wh. can be made and removed": func(k *Kit) {
		k.union(file("x", "x"))
		k.write(".wh.x", "plain")
		k.reads("x", "x")
		k.reads(".wh.x", "plain")
		k.unlink(".wh.x")
		k.holds(".", "x")
	},
}
