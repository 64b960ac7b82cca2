package uniontest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// inodeCases: st_ino and st_dev of a name stay what they are.
var inodeCases = map[string]func(*Kit){
	"over copy-up of a file": func(k *Kit) {
		k.union(file("d/f", "x"))
		k.sameInode(func() { k.chmod("d/f", 0o600) }, "d/f", "d", ".")
		k.sameInode(func() { k.appendTo("d/f", "y") }, "d/f", "d", ".")
	},
	"over copy-up of a directory": func(k *Kit) {
		k.union(file("d/f", "x"), dir("d/e"))
		k.sameInode(func() { k.chmod("d", 0o700) }, "d", "d/f", "d/e")
		k.sameInode(func() { k.write("d/e/new", "n") }, "d", "d/e")
	},
	"over copy-up of a symlink and a fifo": func(k *Kit) {
		k.union(symlink("t", "l"), node("p", unix.S_IFIFO|0o600, 0, 0))
		k.sameInode(func() { k.utimes("l", 1, 1); k.chmod("p", 0o644) }, "l", "p")
	},
	"over rename": func(k *Kit) {
		k.union(file("f", "x"), dir("d"))
		k.write("u", "upper")
		k.makedir("e")
		k.sameInode(func() { k.rename("f", "d/g"); k.rename("u", "d/v"); k.rename("e", "d/e2") }, "f>d/g", "u>d/v", "e>d/e2")
	},
	"over exchange": func(k *Kit) {
		k.union(file("f", "x"), file("g", "y"))
		k.sameInode(func() { k.exchange("f", "g") }, "f>g", "g>f")
	},
	"over remount": func(k *Kit) {
		k.needRoot("file handles")
		k.union(file("d/f", "x"), file("lower", "l"), symlink("t", "d/l"), dir("e/s"))
		k.chmod("d/f", 0o600)
		k.write("new", "n")
		k.chmod("e", 0o700)
		k.sameInode(k.remount, ".", "d", "d/f", "lower", "d/l", "e", "e/s", "new")
	},
	"over rename and remount": func(k *Kit) {
		k.needRoot("file handles")
		k.union(file("f", "x"), file("g", "y"), dir("d"))
		k.sameInode(func() { k.rename("f", "d/h"); k.remount() }, "f>d/h", "g", "d")
	},
	"over caches dropped": func(k *Kit) {
		k.union(file("d/f", "x"), file("g", "y"))
		k.chmod("d/f", 0o600)
		k.sameInode(k.dropCaches, ".", "d", "d/f", "g")
	},
	"of an open file over copy-up": func(k *Kit) {
		k.union(file("f", "x"))
		f := k.open("f", unix.O_RDONLY)
		before, err := f.Stat()
		k.ok(err)
		k.appendTo("f", "y")
		after, err := f.Stat()
		k.ok(err)
		path, err := os.Stat(k.p("f"))
		k.ok(err)
		k.that(os.SameFile(before, after) && os.SameFile(after, path), "the open file is another")
	},
	"hard links of a lower": func(k *Kit) {
		k.union(file("a", "x"), link("a", "b"))
		equal(k, "inode", k.inode("a"), k.inode("b"))
		k.nlink("a", 2)
	},
	"hard links of the upper": func(k *Kit) {
		k.union(file("x", "x"))
		k.write("a", "x")
		k.hardlink("a", "b")
		equal(k, "inode", k.inode("a"), k.inode("b"))
		k.remount()
		equal(k, "inode", k.inode("a"), k.inode("b"))
	},
	"different files have different numbers": func(k *Kit) {
		k.lower(each(numbered("d/a", 20), func(n string) change { return file(n, "x") }))
		k.lower(each(numbered("d/b", 20), func(n string) change { return file(n, "x") }))
		k.union(each(numbered("d/c", 20), func(n string) change { return file(n, "x") }))
		for _, n := range numbered("d/u", 20) {
			k.write(n, "u")
		}
		for _, n := range numbered("d/a", 10) {
			k.chmod(n, 0o600)
		}
		seen := map[inode]string{}
		for _, n := range k.names("d") {
			i := k.inode("d/" + n)
			if seen[i] != "" {
				k.Fatalf("%s and %s have one inode", n, seen[i])
			}
			seen[i] = n
		}
	},
	"d_ino of a name linked into a listed directory": func(k *Kit) {
		k.needRoot("file handles")
		k.options("xino=on")
		k.union(file("a", "x"))
		k.makedir("d")
		k.rename("a", "d/b")
		k.dirents("d")
		k.hardlink("d/b", "c")
		k.hardlink("c", "d/e")
		equal(k, "the list shows another number", k.dirents("d")["e"].ino != k.inode("d/e").ino, !k.differs(TrueNumbers))
	},
	"d_ino equals st_ino": func(k *Kit) {
		k.lower(file("d/a", "1"), dir("d/s"))
		k.union(file("d/b", "2"), file("d/c", "3"), dir("d/s"), symlink("x", "d/l"))
		k.chmod("d/a", 0o600)
		k.write("d/new", "n")
		k.makedir("d/newdir")
		k.rename("d/b", "d/renamed")
		k.dinoEqual("d")
		k.dinoEqual(".")
		k.remount()
		k.dinoEqual("d")
		k.dinoEqual(".")
		k.dinoEqual("d/s")
	},
	"d_ino of an upper directory with copied-up files": func(k *Kit) {
		k.union(file("a", "1"), file("b", "2"))
		k.makedir("d")
		k.rename("a", "d/a")
		k.rename("b", "d/b")
		k.write("d/c", "3")
		k.dinoEqual("d")
		k.remount()
		k.dinoEqual("d")
	},
	"d_ino of a lower directory": func(k *Kit) {
		k.union(each(numbered("d/f", 30), func(n string) change { return file(n, "x") }), dir("d/s"))
		k.dinoEqual("d")
		k.dinoEqual(".")
	},
	"d_ino of .. in and below a merged directory": func(k *Kit) {
		k.lower(dir("m/low"))
		k.union(dir("m/sub/x"), file("m/sub/f", "f"))
		k.write("m/new", "n")
		k.makedir("m/up")
		for _, p := range []string{"m", "m/sub", "m/low", "m/up"} {
			entries := k.dirents(p)
			equal(k, p+"/.", entries["."].ino, k.stat(p).Ino)
			equal(k, p+"/..", entries[".."].ino, k.stat(filepath.Dir(p)).Ino)
		}
	},
	"of a file made again": func(k *Kit) {
		k.union(file("f", "x"))
		before := k.inode("f")
		k.unlink("f")
		k.write("f", "other")
		k.that(k.inode("f") != before, "the new file has the old one's number")
	},
	"of layers on two file systems": func(k *Kit) {
		k.onTmpfs(0, file("d/f", "x"), file("g", "y"))
		k.union(file("d/h", "z"))
		k.chmod("d/h", 0o600)
		f, g := k.stat("d/f"), k.stat("g")
		k.sameInode(func() { k.chmod("d/f", 0o600) }, "d", "g")
		equal(k, "st_ino of what did not change", k.stat("g").Ino, g.Ino)
		_ = f
		k.unread = "device numbers of other mounts are made up"
	},
	"of layers on two file systems with xino": func(k *Kit) {
		k.options("xino=on")
		k.onTmpfs(0, file("d/f", "x"), file("g", "y"), symlink("t", "l"))
		k.union(file("d/h", "z"))
		dev := k.stat(".").Dev
		for _, p := range []string{"d", "d/f", "d/h", "g", "l"} {
			equal(k, "st_dev of "+p, k.stat(p).Dev, dev)
		}
		k.sameInode(func() { k.chmod("d/f", 0o600); k.chmod("d/h", 0o600); k.utimes("l", 1, 1) }, "d", "d/f", "d/h", "g", "l")
		k.dinoEqual("d")
		k.dinoEqual(".")
		k.unread = "the tmpfs has another number in each mount"
	},
	"of all names are on one device": func(k *Kit) {
		k.lower(file("d/a", "1"))
		k.union(file("d/b", "2"), file("c", "3"))
		k.write("new", "n")
		k.chmod("d/b", 0o600)
		dev := k.stat(".").Dev
		for _, p := range []string{"d", "d/a", "d/b", "c", "new"} {
			equal(k, "st_dev of "+p, k.stat(p).Dev, dev)
		}
	},
}

// onTmpfs adds a lower on a file system of its own.
func (k *Kit) onTmpfs(_ int, changes ...change) {
	k.Helper()
	d := k.tmpfs(16 << 20)
	k.ok(build(d, k.ov(""), changes))
	k.spec.Lowers = append(k.spec.Lowers, d)
}

// dirent is what getdents64 says of a name.
type dirent struct {
	ino uint64
	off int64
	typ byte
}

// dirents reads a directory of the mount with getdents64.
func (k *Kit) dirents(p string) map[string]dirent {
	k.Helper()
	f := k.open(p, unix.O_RDONLY|unix.O_DIRECTORY)
	defer f.Close()
	all := map[string]dirent{}
	for {
		batch := k.getdents(fd(f), 4096)
		if len(batch) == 0 {
			return all
		}
		for _, e := range batch {
			if _, twice := all[e.name]; twice {
				k.Fatalf("%s is listed twice in %s", e.name, p)
			}
			all[e.name] = e.dirent
		}
	}
}

type namedDirent struct {
	name string
	dirent
}

// getdents reads one buffer of names.
func (k *Kit) getdents(fd, size int) []namedDirent {
	k.Helper()
	buf := make([]byte, size)
	n, err := unix.Getdents(fd, buf)
	k.ok(err)
	return parseDirents(buf[:n])
}

// dinoEqual compares d_ino with st_ino, and d_type with the type, of all names.
func (k *Kit) dinoEqual(p string) {
	k.Helper()
	all := k.dirents(p)
	names := k.names(p)
	equal(k, "number of names", len(all), len(names)+2)
	for _, n := range names {
		st, e := k.stat(p+"/"+n), all[n]
		if e.ino != st.Ino {
			k.Errorf("%s/%s: d_ino %d, st_ino %d", p, n, e.ino, st.Ino)
		}
		if uint32(e.typ)<<12 != st.Type() && e.typ != unix.DT_UNKNOWN {
			k.Errorf("%s/%s: d_type %d, mode %o", p, n, e.typ, st.Mode)
		}
	}
	if k.Failed() {
		k.Fatal(fmt.Sprint(slices.Sorted(slices.Values(names))))
	}
}
