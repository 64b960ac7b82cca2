package uniontest

import (
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

var redirectCases = map[string]func(*Kit){
	"off: rename of a lower directory is EXDEV": func(k *Kit) {
		k.union(file("d/f", "x"), dir("e"))
		k.is(unix.EXDEV, k.tryRename("d", "new", 0))
		k.is(unix.EXDEV, k.tryRename("d", "e/new", 0))
		k.is(unix.EXDEV, k.tryRename("d", "e", 0))
		k.is(unix.EXDEV, k.tryRename("d", "e", unix.RENAME_EXCHANGE))
		k.upperHolds(".")
	},
	"off: rename of a merged directory is EXDEV": func(k *Kit) {
		k.union(file("d/f", "x"))
		k.write("d/new", "n")
		k.is(unix.EXDEV, k.tryRename("d", "e", 0))
		k.holds("d", "f", "new")
	},
	"off: rename of an upper directory works": func(k *Kit) {
		k.union(file("x/f", "x"))
		k.makedir("d")
		k.write("d/new", "n")
		k.rename("d", "e")
		k.rename("e", "x/e")
		k.reads("x/e/new", "n")
		k.remount()
		k.reads("x/e/new", "n")
	},
	"off: rename of an opaque directory works": func(k *Kit) {
		k.union(file("d/f", "x"))
		k.removeAll("d")
		k.makedir("d")
		k.write("d/new", "n")
		k.rename("d", "e")
		k.holds("e", "new")
		k.absent("d")
		k.remount()
		k.holds("e", "new")
		k.absent("d")
	},
	"on: rename in the same directory": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("p/d/f", "x"), file("p/d/s/g", "y"))
		k.rename("p/d", "p/e")
		equal(k, "redirect", k.xattrAt(k.u("p/e"), k.ov("redirect")), "d")
		k.upperWhiteout("p/d")
		k.holds("p/e", "f", "s")
		k.reads("p/e/s/g", "y")
		k.absent("p/d")
		k.remount()
		k.reads("p/e/s/g", "y")
		k.absent("p/d")
	},
	"on: rename into another directory": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("p/d/f", "x"), dir("q"))
		k.rename("p/d", "q/e")
		equal(k, "redirect", k.xattrAt(k.u("q/e"), k.ov("redirect")), "/p/d")
		k.remount()
		k.reads("q/e/f", "x")
		k.holds("p")
	},
	"on: rename of a merged directory": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("d/f", "x"), file("d/g", "y"), dir("q"))
		k.write("d/new", "n")
		k.unlink("d/g")
		k.rename("d", "q/d")
		k.holds("q/d", "f", "new")
		k.remount()
		k.holds("q/d", "f", "new")
	},
	"on: twice, and back": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("a/d/f", "x"), dir("b"))
		k.rename("a/d", "b/d")
		k.rename("b", "c")
		k.remount()
		k.reads("c/d/f", "x")
		k.rename("c/d", "a/d2")
		k.rename("a/d2", "a/d")
		k.reads("a/d/f", "x")
		k.remount()
		k.reads("a/d/f", "x")
		k.holds("c")
	},
	"on: a parent is renamed after its child": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("a/b/c/f", "x"), file("a/b/g", "y"))
		k.rename("a/b/c", "a/b/C")
		k.rename("a/b", "a/B")
		k.rename("a", "A")
		k.reads("A/B/C/f", "x")
		k.remount()
		k.reads("A/B/C/f", "x")
		k.reads("A/B/g", "y")
		k.holds("A/B", "C", "g")
	},
	"on: a new directory where the old was": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("d/f", "x"))
		k.rename("d", "e")
		k.makedir("d")
		k.holds("d")
		k.write("d/new", "n")
		k.remount()
		k.holds("d", "new")
		k.holds("e", "f")
	},
	"on: exchange of two lower directories": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("d/f", "x"), file("p/e/g", "y"))
		k.exchange("d", "p/e")
		k.holds("d", "g")
		k.holds("p/e", "f")
		k.remount()
		k.holds("d", "g")
		k.holds("p/e", "f")
	},
	"on: exchange of a lower directory and a file": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("d/f", "x"), file("p/e", "y"))
		k.exchange("d", "p/e")
		k.reads("d", "y")
		k.holds("p/e", "f")
		k.remount()
		k.reads("d", "y")
		k.holds("p/e", "f")
	},
	"on: onto an empty merged directory": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("d/f", "x"), file("e/g", "y"))
		k.is(unix.ENOTEMPTY, k.tryRename("d", "e", 0))
		k.unlink("e/g")
		k.rename("d", "e")
		k.holds("e", "f")
		k.remount()
		k.holds("e", "f")
	},
	"on: changes below a renamed directory": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("d/f", "x"), file("d/s/g", "y"), file("d/s/h", "z"))
		k.rename("d", "e")
		k.appendTo("e/f", "!")
		k.unlink("e/s/g")
		k.write("e/s/new", "n")
		k.remount()
		k.reads("e/f", "x!")
		k.holds("e/s", "h", "new")
	},
	"on: over three layers": func(k *Kit) {
		k.options("redirect_dir=on")
		k.lower(file("d/1", "1"))
		k.lower(file("d/2", "2"), file("d/s/2", "2"))
		k.union(file("d/3", "3"), file("d/s/3", "3"))
		k.rename("d", "e")
		k.holds("e", "1", "2", "3", "s")
		k.holds("e/s", "2", "3")
		k.remount()
		k.holds("e", "1", "2", "3", "s")
		k.holds("e/s", "2", "3")
	},
	"follow: redirects of a lower layer": func(k *Kit) {
		k.options("redirect_dir=follow")
		k.lower(file("new/1", "1"), overlay("new", "redirect", "old"), whiteout("old"), file("p/moved/x", "x"), overlay("p/moved", "redirect", "/q/was"))
		k.union(file("old/2", "2"), file("q/was/y", "y"))
		k.holds("new", "1", "2")
		k.absent("old")
		k.holds("p/moved", "x", "y")
		k.is(unix.EXDEV, k.tryRename("new", "newer", 0))
	},
	"follow: a chain of redirects": func(k *Kit) {
		k.options("redirect_dir=follow")
		k.lower(dir("c"), overlay("c", "redirect", "b"), file("c/1", "1"))
		k.lower(dir("b"), overlay("b", "redirect", "/x/a"), file("b/2", "2"))
		k.union(file("x/a/3", "3"))
		k.holds("c", "1", "2", "3")
	},
	"follow: a redirect below a redirect": func(k *Kit) {
		k.options("redirect_dir=follow")
		k.lower(dir("A"), overlay("A", "redirect", "a"), dir("A/B"), overlay("A/B", "redirect", "b"), file("A/B/1", "1"))
		k.union(file("a/b/2", "2"), file("a/c/3", "3"))
		k.holds("A", "B", "b", "c")
		k.holds("A/B", "1", "2")
	},
	"follow: a redirect to nothing": func(k *Kit) {
		k.options("redirect_dir=follow")
		k.lower(file("d/1", "1"), overlay("d", "redirect", "/not/there"))
		k.union(file("d/2", "2"))
		k.holds("d", "1")
	},
	"follow: a redirect to a file": func(k *Kit) {
		k.options("redirect_dir=follow")
		k.lower(file("d/1", "1"), overlay("d", "redirect", "f"))
		k.union(file("f", "file"), file("d/2", "2"))
		k.holds("d", "1")
	},
	"follow: a redirect through a symlink": func(k *Kit) {
		k.options("redirect_dir=follow")
		k.lower(file("d/1", "1"), overlay("d", "redirect", "/l/s"))
		k.union(symlink("real", "l"), file("real/s/2", "2"))
		k.holds("d", "1")
	},
	"follow: a redirect through a file is not found": func(k *Kit) {
		k.options("redirect_dir=follow")
		k.lower(file("d/1", "1"), overlay("d", "redirect", "/f/s"))
		k.union(file("f", "x"))
		k.holds("d", "1")
	},
	"a redirect with .. in it": func(k *Kit) {
		k.options("redirect_dir=follow")
		k.lower(file("d/1", "1"), overlay("d", "redirect", "/../e"))
		k.union(file("e/2", "2"))
		_, err := os.ReadDir(k.p("d"))
		k.notOutside(err, "d")
		k.unread = "what the kernel makes of it is not said anywhere"
		k.unlike = k.unread
	},
	"a relative redirect with a slash is refused": func(k *Kit) {
		k.options("redirect_dir=follow")
		k.lower(file("d/1", "1"), overlay("d", "redirect", "a/b"))
		k.union(file("a/b/2", "2"))
		_, err := os.Lstat(k.p("d"))
		k.is(unix.EINVAL, err)
		k.that(slices.Contains(k.names("."), "d"), "it is not listed")
		k.unread = "it cannot be listed"
	},
	"an empty redirect": func(k *Kit) {
		k.options("redirect_dir=follow")
		k.lower(file("d/1", "1"), overlay("d", "redirect", ""))
		k.union(file("d/2", "2"))
		_, err := os.Lstat(k.p("d"))
		k.is(unix.EINVAL, err)
		k.that(slices.Contains(k.names("."), "d"), "it is not listed")
		k.unread = "it cannot be listed"
	},
	"nofollow: redirects are not followed": func(k *Kit) {
		k.options("redirect_dir=nofollow")
		k.lower(file("new/1", "1"), overlay("new", "redirect", "old"), whiteout("old"))
		k.union(file("old/2", "2"))
		_, err := os.Lstat(k.p("new"))
		k.is(unix.EPERM, err)
		k.that(slices.Contains(k.names("."), "new"), "it is not listed")
		k.unread = "it cannot be listed"
	},
	"userxattr: redirects are not made": func(k *Kit) {
		k.options("userxattr")
		k.union(file("d/f", "x"))
		k.is(unix.EXDEV, k.tryRename("d", "e", 0))
	},
	"userxattr with redirect_dir=on is refused": func(k *Kit) {
		k.options("userxattr", "redirect_dir=on")
		k.lower(file("d/f", "x"))
		if k.differs(UserRedirects) {
			k.mount()
			k.rename("d", "e")
			k.remount()
			k.reads("e/f", "x")
			k.unread = k.actor.differs(UserRedirects)
			k.unlike = k.unread
			return
		}
		k.refused(unix.EINVAL)
	},
	"on: a redirect of more than 256 bytes is EXDEV": func(k *Kit) {
		k.options("redirect_dir=on")
		deep := strings.Repeat("long-directory-name/", 14)
		k.union(file(deep+"d/f", "x"), dir("q"))
		k.is(unix.EXDEV, k.tryRename(deep+"d", "q/d", 0))
		k.unlike = "the kernel has marked the target's directory before it gives up"
		k.rename(deep+"d", deep+"e")
		k.remount()
		k.reads(deep+"e/f", "x")
	},
	"on: a directory into itself": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("d/s/f", "x"))
		k.is(unix.EINVAL, k.tryRename("d", "d/s/d", 0))
		k.is(unix.EINVAL, k.tryRename("d", "d/s", unix.RENAME_EXCHANGE))
		k.upperHolds(".")
	},
	"on: a file open below a renamed directory": func(k *Kit) {
		k.options("redirect_dir=on")
		k.union(file("d/s/f", "x"))
		f := k.open("d/s/f", unix.O_RDWR)
		d := k.open("d/s", unix.O_RDONLY|unix.O_DIRECTORY)
		k.rename("d", "e")
		_, err := f.WriteAt([]byte("yz"), 1)
		k.ok(err)
		k.reads("e/s/f", "xyz")
		k.ok(unix.Mkdirat(fd(d), "made", 0o755))
		k.holds("e/s", "f", "made")
	},
	"on: a name with every byte": func(k *Kit) {
		k.options("redirect_dir=on")
		name := "a\\b:c,d=\x01\xff\n\"%"
		k.union(file(name+"/f", "x"), dir("q"))
		k.rename(name, "q/"+name+"2")
		equal(k, "redirect", k.xattrAt(k.u("q/"+name+"2"), k.ov("redirect")), "/"+name)
		k.remount()
		k.reads("q/"+name+"2/f", "x")
	},
}

// notOutside: whatever is shown of a directory, it is of its layers.
func (k *Kit) notOutside(err error, p string) {
	k.Helper()
	if err != nil {
		return
	}
	for _, n := range k.names(p) {
		k.that(n == "1" || n == "2", "%s shows %s", p, n)
	}
}
