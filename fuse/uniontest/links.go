package uniontest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// three is a file with three names in a lower.
func three() change { return all(file("a", "content"), link("a", "b"), link("a", "d/c")) }

var linkCases = withIndex(map[string]func(*Kit){
	"off: copy-up breaks the link": func(k *Kit) {
		k.union(three())
		k.appendTo("a", "!")
		k.reads("a", "content!")
		k.reads("b", "content")
		k.remount()
		k.reads("a", "content!")
		k.reads("d/c", "content")
	},
	"off: link counts": func(k *Kit) {
		k.union(three())
		k.nlink("a", 3)
		k.chmod("a", 0o600)
		k.nlink("a", 1)
		k.nlink("b", 3)
		k.unlink("b")
		k.absent("b")
		k.nlink("d/c", 3)
	},
	"off: a link to a lower name": func(k *Kit) {
		k.union(three())
		k.hardlink("a", "new")
		k.nlink("a", 2)
		k.nlink("new", 2)
		equal(k, "inode", k.inode("a"), k.inode("new"))
		k.remount()
		k.nlink("new", 2)
	},
	"on: copy-up keeps the link": func(k *Kit) {
		k.unlikeBy(LinksLater)
		k.options("index=on")
		k.union(three())
		k.appendTo("a", "!")
		for _, p := range []string{"a", "b", "d/c"} {
			k.reads(p, "content!")
			k.nlink(p, 3)
		}
		k.appendTo("b", "?")
		k.reads("d/c", "content!?")
		equal(k, "inode", k.inode("a"), k.inode("d/c"))
	},
	"on: over remount": func(k *Kit) {
		k.unlikeBy(LinksLater)
		k.options("index=on")
		k.union(three())
		k.chmod("b", 0o600)
		k.remount()
		k.appendTo("d/c", "!")
		for _, p := range []string{"a", "b", "d/c"} {
			k.reads(p, "content!")
			k.nlink(p, 3)
			k.mode(p, 0o600)
		}
	},
	"on: unlink of names": func(k *Kit) {
		k.options("index=on")
		k.union(three())
		k.unlink("a")
		k.nlink("b", 2)
		k.appendTo("b", "!")
		k.nlink("b", 2)
		k.reads("d/c", "content!")
		k.unlink("d/c")
		k.nlink("b", 1)
		k.remount()
		k.nlink("b", 1)
		k.reads("b", "content!")
		k.unlink("b")
		k.holds(".", "d")
	},
	"on: rename over a name": func(k *Kit) {
		k.options("index=on")
		k.union(three(), file("x", "other"))
		k.chmod("a", 0o600)
		k.rename("x", "b")
		k.nlink("a", 2)
		k.reads("b", "other")
		k.reads("d/c", "content")
		k.rename("a", "d/c") // two names of one file: nothing happens
		k.nlink("a", 2)
		k.present("a", "d/c")
	},
	"on: new links": func(k *Kit) {
		k.unlikeBy(LinksLater)
		k.options("index=on")
		k.union(three())
		k.hardlink("a", "new")
		k.nlink("d/c", 4)
		k.remount()
		k.nlink("b", 4)
		k.unlink("new")
		k.nlink("a", 3)
		k.appendTo("d/c", "!")
		k.reads("a", "content!")
	},
	"on: an open file of another name": func(k *Kit) {
		k.unlikeBy(LinksLater)
		k.options("index=on")
		k.union(three())
		f := k.open("b", unix.O_RDONLY)
		k.readsFile(f, "content")
		k.appendTo("a", "!")
		k.readsFile(f, "content!")
	},
	"on: all names unlinked while open": func(k *Kit) {
		k.options("index=on")
		k.union(three())
		f := k.open("a", unix.O_RDWR)
		for _, p := range []string{"a", "b", "d/c"} {
			k.unlink(p)
		}
		k.workUnlinked(f)
	},
	"on: links across directories renamed": func(k *Kit) {
		k.options("index=on", "redirect_dir=on")
		k.union(three())
		k.rename("d", "e")
		k.appendTo("e/c", "!")
		k.reads("a", "content!")
		k.nlink("e/c", 3)
		k.remount()
		k.reads("b", "content!")
	},
	"on: two groups": func(k *Kit) {
		k.options("index=on")
		k.union(three(), file("p", "two"), link("p", "q"))
		k.appendTo("q", "!")
		k.appendTo("a", "?")
		k.reads("p", "two!")
		k.reads("b", "content?")
		k.nlink("p", 2)
	},
	"on: links of symlinks and fifos": func(k *Kit) {
		k.options("index=on")
		k.union(symlink("t", "l1"), link("l1", "l2"), node("p1", unix.S_IFIFO|0o600, 0, 0), link("p1", "p2"))
		k.utimes("l1", 9, 9)
		equal(k, "mtime", k.stat("l2").Mtime.Sec, 9)
		k.chmod("p2", 0o640)
		k.mode("p1", 0o640)
		k.nlink("l2", 2)
		k.nlink("p1", 2)
	},
	"on: a file with one name is not indexed": func(k *Kit) {
		k.options("index=on")
		k.union(file("a", "x"))
		k.chmod("a", 0o600)
		equal(k, "entries of the index", len(k.namesAt(k.spec.Work+"/index")), 0)
	},
	"on: the index has one entry a group": func(k *Kit) {
		k.unlikeBy(LinksLater)
		k.options("index=on")
		k.union(three(), file("p", "two"), link("p", "q"))
		k.chmod("a", 0o600)
		k.chmod("b", 0o600)
		equal(k, "entries of the index", len(k.namesAt(k.spec.Work+"/index")), 1)
		k.chmod("q", 0o600)
		equal(k, "entries of the index", len(k.namesAt(k.spec.Work+"/index")), 2)
		k.unlink("p")
		k.unlink("q")
		k.remount() // which clears the orphans away
		equal(k, "entries of the index", len(k.namesAt(k.spec.Work+"/index")), 1)
	},
	// A count of links that a lower's new ones have put out of step went to none while
	// there were names: link(2) was ENOENT, and the entry stayed in the index.
	"on: links added to a lower behind the mount": func(k *Kit) {
		k.options("index=on")
		k.union(file("a", "x"), link("a", "b"))
		k.noLowers = true
		k.chmod("a", 0o600)
		for _, p := range []string{"c", "d"} {
			k.ok(os.Link(k.l(0, "a"), k.l(0, p)))
			k.unlink(p)
		}
		k.nlink("a", 1)
		k.hardlink("a", "e")
		k.nlink("e", 2)
		k.unlink("a")
		k.unlink("b")
		k.reads("e", "x")
		k.nlink("e", 1)
		k.unlink("e")
		k.remount()
		equal(k, "entries of the index", len(k.namesAt(k.spec.Work+"/index")), 0)
		k.holds(".")
	},
	"on: metacopy of a linked file": func(k *Kit) {
		k.unlikeBy(LinksLater)
		k.options("index=on", "metacopy=on", "redirect_dir=on")
		k.union(three())
		k.chmod("a", 0o600)
		k.mode("b", 0o600)
		k.reads("d/c", "content")
		k.appendTo("b", "!")
		k.reads("a", "content!")
	},
	"many links": func(k *Kit) {
		k.unlikeBy(LinksLater)
		k.options("index=on")
		names := numbered("n", 200)
		k.union(file("f", "x"), each(names, func(n string) change { return link("f", n) }))
		k.nlink("f", 201)
		for i, n := range names {
			if i%2 == 0 {
				k.unlink(n)
			}
		}
		k.nlink("f", 101)
		k.appendTo("n1", "y")
		k.reads("n199", "xy")
		k.remount()
		k.nlink("n3", 101)
	},
	"link over an existing name": func(k *Kit) {
		k.union(file("a", "x"), file("b", "y"), dir("d"))
		k.is(unix.EEXIST, unix.Link(k.p("a"), k.p("b")))
		k.is(unix.EPERM, unix.Link(k.p("d"), k.p("e")))
		k.is(unix.ENOENT, unix.Link(k.p("none"), k.p("e")))
	},
	"link of a symlink": func(k *Kit) {
		k.needRoot("file handles")
		k.union(symlink("to", "l"))
		k.ok(unix.Linkat(unix.AT_FDCWD, k.p("l"), unix.AT_FDCWD, k.p("m"), 0))
		equal(k, "inode", k.inode("l"), k.inode("m"))
		k.nlink("m", 2)
	},
	"link over a whiteout": func(k *Kit) {
		k.union(file("a", "x"), file("b", "y"))
		k.unlink("b")
		k.hardlink("a", "b")
		k.reads("b", "x")
		k.nlink("a", 2)
		k.remount()
		k.reads("b", "x")
	},
	"rename between two names of one file": func(k *Kit) {
		k.union(file("x", "x"))
		k.write("a", "1")
		k.hardlink("a", "b")
		k.rename("a", "b")
		k.present("a", "b")
		k.nlink("a", 2)
	},
})

// withIndex repeats what every trigger does for a file with two names, index on
// and off: the other name shows it, or not.
func withIndex(cases map[string]func(*Kit)) map[string]func(*Kit) {
	for name, do := range triggers {
		for _, index := range []string{"on", "off"} {
			cases[fmt.Sprintf("%s: %s of one of two names", index, name)] = func(k *Kit) {
				k.options("index=" + index)
				k.union(rich("f"), link("f", "g"))
				do(k, "f")
				now := renamed(k, "f")
				st := k.stat(now)
				equal(k, "one inode", k.inode(now) == k.inode("g"), index == "on")
				k.remount()
				equal(k, "nlink after remount", k.stat(now).Nlink, st.Nlink)
			}
		}
	}
	return cases
}
