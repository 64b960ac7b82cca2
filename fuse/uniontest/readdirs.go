package uniontest

import (
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// merged is a directory of n names in three layers.
func (k *Kit) merged(n int) []string {
	k.Helper()
	part := func(from, to int) change {
		var cs []change
		for i := from; i < to; i++ {
			cs = append(cs, file(fmt.Sprintf("d/file-%06d", i), ""))
		}
		return all(cs...)
	}
	k.upper(part(0, n/3+10))
	k.lower(part(n/3, 2*n/3+10))
	k.union(part(2*n/3, n))
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("file-%06d", i))
	}
	return names
}

var readdirCases = map[string]func(*Kit){
	"every name once": func(k *Kit) {
		names := k.merged(1500)
		k.holds("d", names...)
		equal(k, "names by getdents", len(k.dirents("d")), 1502)
	},
	"small buffers": func(k *Kit) {
		k.merged(300)
		f := k.open("d", unix.O_RDONLY|unix.O_DIRECTORY)
		seen := map[string]bool{}
		for {
			batch := k.getdents(fd(f), 64)
			if len(batch) == 0 {
				break
			}
			for _, e := range batch {
				k.that(!seen[e.name], "%s twice", e.name)
				seen[e.name] = true
			}
		}
		equal(k, "names", len(seen), 302)
	},
	"a buffer too small": func(k *Kit) {
		k.merged(30)
		f := k.open("d", unix.O_RDONLY|unix.O_DIRECTORY)
		_, err := unix.Getdents(fd(f), make([]byte, 8))
		k.is(unix.EINVAL, err)
	},
	"rm -rf of a merged tree": func(k *Kit) {
		k.merged(900)
		k.removeAll("d")
		k.absent("d")
		k.upperWhiteout("d")
	},
	"rm -rf of an upper tree": func(k *Kit) {
		k.union(file("x", "x"))
		k.makedir("d")
		for i := range 900 {
			k.ok(os.WriteFile(k.p(fmt.Sprintf("d/f%d", i)), nil, 0o644))
		}
		k.unlinkWhileReading("d", 900)
		k.rmdir("d")
		k.upperHolds(".")
	},
	"unlinking what was read, merged": func(k *Kit) {
		k.merged(900)
		k.unlinkWhileReading("d", 900)
		k.holds("d")
		k.rmdir("d")
	},
	"unlinking what was read, lower": func(k *Kit) {
		k.union(each(numbered("d/f", 900), func(n string) change { return file(n, "") }))
		k.unlinkWhileReading("d", 900)
		k.rmdir("d")
	},
	"renaming what was read": func(k *Kit) {
		k.merged(600)
		f := k.open("d", unix.O_RDONLY|unix.O_DIRECTORY)
		seen := map[string]int{}
		for {
			batch := k.getdents(fd(f), 1024)
			if len(batch) == 0 {
				break
			}
			for _, e := range batch {
				seen[e.name]++
				if len(e.name) == len("file-000000") {
					k.rename("d/"+e.name, "d/"+e.name+"+")
				}
			}
		}
		for i := range 600 {
			equal(k, "times seen", seen[fmt.Sprintf("file-%06d", i)], 1)
		}
	},
	"names made while reading": func(k *Kit) {
		names := k.merged(600)
		k.unlike = "how many are made depends on how many names one read gives"
		f := k.open("d", unix.O_RDONLY|unix.O_DIRECTORY)
		seen := map[string]int{}
		for n := 0; ; n++ {
			batch := k.getdents(fd(f), 1024)
			if len(batch) == 0 {
				break
			}
			if n < 500 {
				k.write(fmt.Sprintf("d/new-%d", n), "")
			}
			for _, e := range batch {
				seen[e.name]++
			}
		}
		for _, n := range names {
			equal(k, "times seen", seen[n], 1)
		}
		for n, times := range seen {
			k.that(times == 1, "%s was seen %d times", n, times)
		}
	},
	"seekdir goes back to any name": func(k *Kit) {
		k.merged(400)
		k.seeks("d")
	},
	"seekdir in an upper directory": func(k *Kit) {
		k.union(file("x", "x"))
		k.makedir("d")
		for _, n := range numbered("d/n", 300) {
			k.write(n, "")
		}
		k.seeks("d")
	},
	"seekdir in a lower directory": func(k *Kit) {
		k.union(each(numbered("d/n", 300), func(n string) change { return file(n, "") }))
		k.seeks("d")
	},
	"rewinddir shows what was made since": func(k *Kit) {
		k.merged(30)
		f := k.open("d", unix.O_RDONLY|unix.O_DIRECTORY)
		first, err := f.Readdirnames(-1)
		k.ok(err)
		k.write("d/new", "")
		k.unlink("d/file-000000")
		k.unlink("d/file-000029")
		_, err = f.Seek(0, io.SeekStart)
		k.ok(err)
		second, err := f.Readdirnames(-1)
		k.ok(err)
		equal(k, "names first", len(first), 30)
		equal(k, "names then", len(second), 29)
		k.that(slices.Contains(second, "new"), "new is not there")
	},
	"a directory removed while open": func(k *Kit) {
		k.union(file("d/a", ""), dir("e"))
		d, e := k.open("d", unix.O_RDONLY|unix.O_DIRECTORY), k.open("e", unix.O_RDONLY|unix.O_DIRECTORY)
		k.removeAll("d")
		k.rmdir("e")
		for _, f := range []*os.File{d, e} {
			names, err := f.Readdirnames(-1)
			k.that(err == nil || os.IsNotExist(err), "%v", err)
			equal(k, "names", len(names), 0)
			k.is(unix.ENOENT, unix.Mkdirat(fd(f), "new", 0o755))
		}
	},
	"two readers at their own places": func(k *Kit) {
		names := k.merged(500)
		a, b := k.open("d", unix.O_RDONLY|unix.O_DIRECTORY), k.open("d", unix.O_RDONLY|unix.O_DIRECTORY)
		var fromA, fromB []string
		for {
			x, errX := a.Readdirnames(7)
			y, errY := b.Readdirnames(11)
			fromA, fromB = append(fromA, x...), append(fromB, y...)
			if errX != nil && errY != nil {
				break
			}
		}
		slices.Sort(fromA)
		slices.Sort(fromB)
		k.that(slices.Equal(fromA, names) && slices.Equal(fromB, names), "the readers saw %d and %d names", len(fromA), len(fromB))
	},
	"d_type of all types": func(k *Kit) {
		k.needRoot("devices")
		k.lower(node("c", unix.S_IFCHR|0o600, 1, 3), node("b", unix.S_IFBLK|0o600, 7, 0), node("s", unix.S_IFSOCK|0o600, 0, 0))
		k.union(file("f", ""), dir("d"), symlink("x", "l"), node("p", unix.S_IFIFO|0o600, 0, 0))
		want := map[string]byte{"c": unix.DT_CHR, "b": unix.DT_BLK, "s": unix.DT_SOCK, "f": unix.DT_REG, "d": unix.DT_DIR, "l": unix.DT_LNK, "p": unix.DT_FIFO}
		got := k.dirents(".")
		for n, typ := range want {
			equal(k, "d_type of "+n, got[n].typ, typ)
		}
	},
	"d_type of a name whose layers differ": func(k *Kit) {
		k.upper(dir("a"), file("b", ""))
		k.union(file("a", ""), dir("b"))
		got := k.dirents(".")
		equal(k, "a", got["a"].typ, unix.DT_DIR)
		equal(k, "b", got["b"].typ, unix.DT_REG)
	},
	"of a file": func(k *Kit) {
		k.union(file("f", ""))
		_, err := k.tryOpen("f", unix.O_RDONLY|unix.O_DIRECTORY)
		k.is(unix.ENOTDIR, err)
		f := k.open("f", unix.O_RDONLY)
		_, err = unix.Getdents(fd(f), make([]byte, 1024))
		k.is(unix.ENOTDIR, err)
	},
	"after changes in the same directory": func(k *Kit) {
		k.merged(60)
		for i := range 30 {
			k.unlink(fmt.Sprintf("d/file-%06d", 2*i))
			k.write(fmt.Sprintf("d/new-%d", i), "")
			equal(k, "names", len(k.names("d")), 60)
		}
	},
	"an empty directory": func(k *Kit) {
		k.lower(dir("d"))
		k.union(dir("d"), dir("e"))
		k.makedir("f")
		for _, p := range []string{"d", "e", "f"} {
			equal(k, "names", len(k.dirents(p)), 2)
		}
	},
	"a long name in every layer": func(k *Kit) {
		long := func(c byte) string { return string(slices.Repeat([]byte{c}, 255)) }
		k.upper(file(long('u'), ""))
		k.lower(file(long('m'), ""), file(long('u'), ""))
		k.union(file(long('l'), ""), file(long('u'), ""))
		k.holds(".", long('u'), long('m'), long('l'))
	},
}

// unlinkWhileReading unlinks every name as soon as it is read.
func (k *Kit) unlinkWhileReading(p string, n int) {
	k.Helper()
	f := k.open(p, unix.O_RDONLY|unix.O_DIRECTORY)
	defer f.Close()
	count := 0
	for {
		batch := k.getdents(fd(f), 2048)
		if len(batch) == 0 {
			break
		}
		for _, e := range batch {
			if e.name != "." && e.name != ".." {
				k.unlink(p + "/" + e.name)
				count++
			}
		}
	}
	equal(k, "names unlinked in one pass", count, n)
}

// seeks goes to the place after each name and reads the next one again.
func (k *Kit) seeks(p string) {
	k.Helper()
	f := k.open(p, unix.O_RDONLY|unix.O_DIRECTORY)
	var order []namedDirent
	for {
		batch := k.getdents(fd(f), 512)
		if len(batch) == 0 {
			break
		}
		order = append(order, batch...)
	}
	for i := len(order) - 2; i >= 0; i -= 7 {
		at, err := unix.Seek(fd(f), order[i].off, io.SeekStart)
		k.ok(err)
		equal(k, "place", at, order[i].off)
		batch := k.getdents(fd(f), 512)
		k.that(len(batch) > 0, "nothing after name %d", i)
		equal(k, fmt.Sprintf("the name after number %d", i), batch[0].name, order[i+1].name)
	}
}
