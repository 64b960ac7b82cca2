package uniontest

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/treegen"
)

// metaTriggers change metadata alone: with metacopy=on they copy no data.
var metaTriggers = map[string]func(k *Kit, p string){
	"chmod":    func(k *Kit, p string) { k.chmod(p, 0o640) },
	"chown":    func(k *Kit, p string) { k.chown(p, 7, 8) },
	"utimes":   func(k *Kit, p string) { k.utimes(p, 1000, 5) },
	"setxattr": func(k *Kit, p string) { k.setxattr(p, "user.new", "n") },
	"link":     func(k *Kit, p string) { k.hardlink(p, p+".link") },
	"rename":   func(k *Kit, p string) { k.rename(p, p+".to"); k.rename(p+".to", p) },
}

// fillTriggers need the data.
var fillTriggers = map[string]func(k *Kit, p string){
	"open for write":  func(k *Kit, p string) { k.open(p, unix.O_WRONLY).Close() },
	"open for append": func(k *Kit, p string) { k.open(p, unix.O_WRONLY|unix.O_APPEND).Close() },
	"truncate":        func(k *Kit, p string) { k.truncate(p, 100_000) },
}

const metaSize = 200_000

func metaFile(p string) change {
	return all(random(p, metaSize, 5), xattr(p, "user.a", "1"), mtime(p, 12345, 678))
}

var metacopyCases = withMetaTriggers(map[string]func(*Kit){
	"off: chmod copies the data": func(k *Kit) {
		k.union(metaFile("f"))
		k.chmod("f", 0o600)
		k.that(k.statAt(k.u("f")).Blocks*512 >= metaSize, "the data was not copied")
		k.noXattr(k.u("f"), k.ov("metacopy"))
	},
	"O_TRUNC of a metacopy file": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.union(metaFile("f"))
		k.chmod("f", 0o600)
		k.write("f", "new")
		k.reads("f", "new")
		k.noXattr(k.u("f"), k.ov("metacopy"))
		k.remount()
		k.reads("f", "new")
	},
	"a moved file has a redirect": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.union(metaFile("d/f"), dir("e"))
		k.rename("d/f", "e/g")
		equal(k, "redirect", k.xattrAt(k.u("e/g"), k.ov("redirect")), "/d/f")
		k.upperBlocks("e/g", 8192)
		k.reads("e/g", string(treegen.Content(5, metaSize)))
		k.remount()
		k.reads("e/g", string(treegen.Content(5, metaSize)))
		k.appendTo("e/g", "!")
		equal(k, "redirect", k.xattrAt(k.u("e/g"), k.ov("redirect")), "/d/f")
		k.remount()
		k.reads("e/g", string(treegen.Content(5, metaSize))+"!")
	},
	"a file renamed in its directory has a relative redirect": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.union(metaFile("d/f"))
		k.rename("d/f", "d/g")
		equal(k, "redirect", k.xattrAt(k.u("d/g"), k.ov("redirect")), "f")
		k.remount()
		k.reads("d/g", string(treegen.Content(5, metaSize)))
	},
	"a metacopy file unlinked while open": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.union(metaFile("f"))
		k.chmod("f", 0o600)
		f := k.open("f", unix.O_RDONLY)
		k.unlink("f")
		k.readsFile(f, string(treegen.Content(5, metaSize)))
		k.upperWhiteout("f")
	},
	"a file open before the data comes": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.union(metaFile("f"))
		a := k.open("f", unix.O_RDONLY)
		k.chmod("f", 0o600)
		b := k.open("f", unix.O_RDONLY)
		want := string(treegen.Content(5, metaSize))
		k.readsFile(a, want)
		k.readsFile(b, want)
		k.appendTo("f", "end")
		k.readsFile(a, want+"end")
		k.readsFile(b, want+"end")
	},
	"size and blocks of a metacopy file": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.union(metaFile("f"), sparse("s", 1<<30))
		for _, p := range []string{"f", "s"} {
			before := k.stat(p)
			k.chmod(p, 0o600)
			after := k.stat(p)
			equal(k, "size", after.Size, before.Size)
			equal(k, "blocks", after.Blocks, before.Blocks)
			equal(k, "size in the upper", k.statAt(k.u(p)).Size, before.Size)
		}
	},
	"a metacopy file in a lower": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.lower(sparse("f", metaSize), overlay("f", "metacopy", ""), chmod("f", 0o640))
		k.union(metaFile("f"))
		k.mode("f", 0o640)
		k.reads("f", string(treegen.Content(5, metaSize)))
		k.appendTo("f", "!")
		k.reads("f", string(treegen.Content(5, metaSize))+"!")
	},
	"metacopy over three layers with redirects": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.lower(sparse("top", metaSize), overlay("top", "metacopy", ""), overlay("top", "redirect", "/mid"), chmod("top", 0o640))
		k.lower(sparse("mid", metaSize), overlay("mid", "metacopy", ""), overlay("mid", "redirect", "/d/low"), chmod("mid", 0o600))
		k.union(metaFile("d/low"))
		k.mode("top", 0o640)
		k.reads("top", string(treegen.Content(5, metaSize)))
		k.reads("mid", string(treegen.Content(5, metaSize)))
		k.chmod("top", 0o644)
		k.appendTo("top", "!")
		k.reads("top", string(treegen.Content(5, metaSize))+"!")
	},
	"metacopy without the file below": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.lower(sparse("f", metaSize), overlay("f", "metacopy", ""))
		k.union(file("other", "x"))
		_, err := k.tryOpen("f", unix.O_RDONLY)
		k.is(unix.EIO, err)
		_, err = os.Lstat(k.p("f"))
		k.is(unix.EIO, err)
		k.holds(".", "f", "other")
	},
	"a metacopy xattr with metacopy=off": func(k *Kit) {
		k.lower(sparse("f", 1000), overlay("f", "metacopy", ""), chmod("f", 0o640))
		k.union(file("f", strings.Repeat("d", 1000)))
		_, err := k.tryOpen("f", unix.O_RDONLY)
		k.is(unix.EPERM, err)
	},
	"removing and renaming metacopy files": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.union(metaFile("a"), metaFile("b"), metaFile("d/c"))
		for _, p := range []string{"a", "b", "d/c"} {
			k.chmod(p, 0o600)
		}
		k.unlink("a")
		k.rename("b", "a")
		k.rename("d", "e")
		k.rename("e/c", "c")
		for _, p := range []string{"a", "c"} {
			k.reads(p, string(treegen.Content(5, metaSize)))
		}
		k.remount()
		for _, p := range []string{"a", "c"} {
			k.reads(p, string(treegen.Content(5, metaSize)))
		}
	},
	"exchange of two metacopy files": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.union(metaFile("a"), random("b", metaSize, 6))
		k.chmod("a", 0o600)
		k.exchange("a", "b")
		k.remount()
		k.reads("b", string(treegen.Content(5, metaSize)))
		k.reads("a", string(treegen.Content(6, metaSize)))
	},
	"data-only lowers are reached by redirects alone": func(k *Kit) {
		k.dataUnion()
		k.reads("f", string(treegen.Content(5, metaSize)))
		k.holds(".", "f", "plain")
		k.absent("blobs")
	},
	"a data-only lower without metacopy=on": func(k *Kit) {
		k.datalower(random("blobs/1", metaSize, 5))
		k.union(dataFile("f", "/blobs/1"), dataFile("other", "blobs"), sparse("none", metaSize), overlay("none", "metacopy", ""))
		equal(k, "blocks before the data are looked for", k.stat("f").Blocks, (metaSize+4095)/4096*8)
		k.reads("f", string(treegen.Content(5, metaSize)))
		for _, p := range []string{"other", "none"} {
			_, err := os.Lstat(k.p(p))
			k.is(unix.EPERM, err)
		}
		k.appendTo("f", "!")
		k.reads("f", string(treegen.Content(5, metaSize))+"!")
		k.remount()
		k.reads("f", string(treegen.Content(5, metaSize))+"!")
		k.unread = "names that cannot be looked at"
	},
	"a data-only lower without metacopy=on, behind two lowers": func(k *Kit) {
		k.datalower(random("blobs/1", metaSize, 5))
		k.lower(dataFile("f", "/blobs/1"))
		k.union(dataFile("g", "/blobs/1"))
		_, err := os.Lstat(k.p("f"))
		k.is(unix.EPERM, err)
		k.reads("g", string(treegen.Content(5, metaSize)))
		k.unread = "names that cannot be looked at"
	},
	"data of a data-only lower is copied up": func(k *Kit) {
		k.dataUnion()
		k.chmod("f", 0o600)
		k.upperBlocks("f", 8192)
		k.reads("f", string(treegen.Content(5, metaSize)))
		k.appendTo("f", "!")
		k.reads("f", string(treegen.Content(5, metaSize))+"!")
		k.remount()
		k.reads("f", string(treegen.Content(5, metaSize))+"!")
	},
	"the first of two data-only lowers counts": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.datalower(random("blobs/1", metaSize, 5))
		k.datalower(random("blobs/1", metaSize, 6), random("blobs/2", metaSize, 7))
		k.lower(dataFile("f", "/blobs/1"), dataFile("g", "/blobs/2"))
		k.union(file("plain", "p"))
		k.reads("f", string(treegen.Content(5, metaSize)))
		k.reads("g", string(treegen.Content(7, metaSize)))
	},
	"a data-only lower without the file": func(k *Kit) {
		k.options("metacopy=on", "redirect_dir=on")
		k.datalower(file("blobs/1", "x"))
		k.union(dataFile("f", "/blobs/none"))
		equal(k, "size", k.stat("f").Size, metaSize)
		_, err := k.tryOpen("f", unix.O_RDONLY)
		k.is(unix.ENOENT, err)
	},
	"data-only lowers, read-only": func(k *Kit) {
		k.readOnly()
		k.dataUnion()
		k.reads("f", string(treegen.Content(5, metaSize)))
		k.holds(".", "f", "plain")
	},
	"data-only lowers, userxattr": func(k *Kit) {
		k.options("userxattr", "metacopy=on", "redirect_dir=on")
		k.datalower(random("blobs/1", metaSize, 5))
		k.lower(dataFile("f", "/blobs/1"))
		k.lower(file("plain", "p"))
		if k.differs(UserRedirects) {
			k.mount()
			k.reads("f", string(treegen.Content(5, metaSize)))
			k.unread = k.actor.differs(UserRedirects)
			return
		}
		k.refused(unix.EINVAL)
	},
	"unlink and rename of a file of a data-only lower": func(k *Kit) {
		k.dataUnion()
		k.rename("f", "g")
		k.reads("g", string(treegen.Content(5, metaSize)))
		k.remount()
		k.reads("g", string(treegen.Content(5, metaSize)))
		k.unlink("g")
		k.absent("f", "g")
	},
})

// dataFile is a metacopy file whose data is at redirect.
func dataFile(p, redirect string) change {
	return all(sparse(p, metaSize), overlay(p, "metacopy", ""), overlay(p, "redirect", redirect))
}

// dataUnion is a union with one file of a data-only lower.
func (k *Kit) dataUnion() {
	k.Helper()
	k.needRoot("data-only lowers")
	k.options("metacopy=on", "redirect_dir=on")
	k.datalower(random("blobs/1", metaSize, 5))
	k.lower(dataFile("f", "/blobs/1"))
	k.union(file("plain", "p"))
}

func withMetaTriggers(cases map[string]func(*Kit)) map[string]func(*Kit) {
	want := string(treegen.Content(5, metaSize))
	for name, do := range metaTriggers {
		cases["on: "+name+" copies no data"] = func(k *Kit) {
			k.options("metacopy=on", "redirect_dir=on")
			k.union(metaFile("d/f"))
			do(k, "d/f")
			k.upperBlocks("d/f", 8192)
			_ = k.xattrAt(k.u("d/f"), k.ov("metacopy"))
			k.reads("d/f", want)
			k.size("d/f", metaSize)
			k.remount()
			k.reads("d/f", want)
		}
		for fill, do2 := range fillTriggers {
			cases["on: "+name+", then "+fill] = func(k *Kit) {
				k.options("metacopy=on", "redirect_dir=on")
				k.union(metaFile("d/f"))
				do(k, "d/f")
				before := k.stat("d/f").Mtime
				do2(k, "d/f")
				if k.differs(KeepsTimes) && fill != "truncate" {
					equal(k, "mtime", k.stat("d/f").Mtime, before)
				}
				k.unlikeBy(KeepsTimes)
				k.noXattr(k.u("d/f"), k.ov("metacopy"))
				k.reads("d/f", want[:k.stat("d/f").Size])
				equal(k, "xattr", k.xattr("d/f", "user.a"), "1")
			}
		}
	}
	return cases
}
