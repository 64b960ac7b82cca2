package union

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// linkedLowers has a file of three names, one of two in different directories, and
// one of one.
func linkedLowers(t testing.TB) func(l []string) {
	return func(l []string) {
		put(t, l[0], "a", "linked")
		put(t, l[0], "d/x", "two")
		put(t, l[0], "alone", "one")
		put(t, l[0], "e/f", "f")
		for old, name := range map[string]string{"a": "b", "d/x": "y"} {
			must(t, os.Link(filepath.Join(l[0], old), filepath.Join(l[0], name)))
		}
		must(t, os.Link(filepath.Join(l[0], "a"), filepath.Join(l[0], "d/c")))
	}
}

// linksCase runs a case with the configurations that have an index.
func linksCase(t *testing.T, do func(s side, say func(string, ...any))) {
	for name, c := range map[string]Config{
		"index": {Index: true}, "metacopy": {Index: true, Metacopy: true, Redirect: RedirectOn}, "redirect": {Index: true, Redirect: RedirectOn},
	} {
		t.Run(name, func(t *testing.T) { both(t, 1, c, linkedLowers(t), do) })
	}
	t.Run("nfs_export", func(t *testing.T) { exported(t, 1, linkedLowers(t), do) })
}

// exported is both with everything indexed. Linux 6.18.44 shows a file that has one
// link below as having two after the next mount (it passes over xattr nlink; 6.12.117
// of Debian does not): so the kernel is asked in its first mount only.
func exported(t *testing.T, lowers int, build func(l []string), do func(s side, say func(string, ...any))) {
	t.Helper()
	base := testenv.FS(t, "xfs")
	var said, lists, upper [2][]string
	var configs [2]Config
	for i := range 2 {
		c := layersFor(t, base, lowers, Config{Index: true, NFSExport: true, Redirect: RedirectOn}, build)
		configs[i] = c
		var s side
		if i == 0 {
			s = mountKernel(t, c)
		} else {
			s = openUnion(t, c)
		}
		do(s, func(format string, args ...any) { said[i] = append(said[i], fmt.Sprintf(format, args...)) })
		lists[i] = listing(t, s)
		s.close()
		upper[i] = append(upperListing(t, c), (&stage{t: t, dir: filepath.Dir(c.Work)}).indexKinds()...)
	}
	for i, what := range [][2][]string{said, lists, upper} {
		if d := diffLines(what[0], what[1]); d != "" {
			t.Errorf("kernel (-) and union (+) differ in %s:\n%s", []string{"answers", "trees", "uppers and indexes"}[i], d)
		}
	}
	for i, c := range configs {
		u := openUnion(t, c)
		if d := diffLines(lists[0], listing(t, u)); d != "" {
			t.Errorf("opened again, what %s wrote:\n%s", []string{"the kernel", "we"}[i], d)
		}
		u.close()
	}
	mountKernel(t, configs[1]).close() // it takes our index
}

// tell says how many links names show, what is in them, and whether they are one
// file.
func tell(s side, say func(string, ...any), names ...string) {
	var first Attr
	for i, n := range names {
		a, err := s.stat(n)
		data, _ := s.read(n)
		say("%s: %s nlink %d %q", n, errno(err), a.Nlink, data)
		if i == 0 {
			first = a
		}
		say("%s is %s: %v", n, names[0], a.Ino == first.Ino)
	}
}

func TestLinksStayOverCopyUp(t *testing.T) {
	linksCase(t, func(s side, say func(string, ...any)) {
		tell(s, say, "a", "b", "d/c")
		say("write %s", errno(s.write("a", 0, "WRITTEN")))
		tell(s, say, "a", "b", "d/c")
		say("chmod %s", errno(s.chmod("y", 0o600)))
		tell(s, say, "y", "d/x")
		say("write alone %s", errno(s.write("alone", 0, "ALONE")))
		tell(s, say, "alone")
	})
}

func TestLinksRemoved(t *testing.T) {
	linksCase(t, func(s side, say func(string, ...any)) {
		say("unlink lower %s", errno(s.unlink("b")))
		tell(s, say, "a", "d/c")
		say("write %s", errno(s.write("a", 0, "WRITTEN")))
		say("unlink upper %s", errno(s.unlink("a")))
		tell(s, say, "d/c")
		say("unlink last %s", errno(s.unlink("d/c")))
		say("make it anew %s", errno(s.create("d/c", "new")))
		tell(s, say, "d/c")
		say("unlink both %s %s", errno(s.unlink("y")), errno(s.unlink("d/x")))
		say("unlink alone %s", errno(s.unlink("alone")))
	})
}

func TestLinksMade(t *testing.T) {
	linksCase(t, func(s side, say func(string, ...any)) {
		say("link lower %s", errno(s.link("b", "e/new")))
		tell(s, say, "a", "b", "d/c", "e/new")
		say("link again %s", errno(s.link("a", "e/new2")))
		say("link the link %s", errno(s.link("e/new", "d/new3")))
		tell(s, say, "a", "b", "d/c", "e/new", "e/new2", "d/new3")
		say("unlink %s", errno(s.unlink("e/new")))
		say("unlink %s", errno(s.unlink("a")))
		tell(s, say, "b", "d/c", "e/new2", "d/new3")
		say("link alone %s", errno(s.link("alone", "e/alone")))
		tell(s, say, "alone", "e/alone")
		say("write %s", errno(s.write("e/alone", 0, "X")))
		tell(s, say, "alone", "e/alone")
	})
}

func TestLinksRenamed(t *testing.T) {
	linksCase(t, func(s side, say func(string, ...any)) {
		say("rename lower %s", errno(s.rename("b", "e/b", 0)))
		tell(s, say, "a", "e/b", "d/c")
		say("rename unlinked %s", errno(s.rename("d/c", "e/c", 0)))
		tell(s, say, "a", "e/b", "e/c")
		say("rename onto its own %s", errno(s.rename("a", "e/b", 0)))
		tell(s, say, "a", "e/b", "e/c")
		say("rename over a linked %s", errno(s.rename("e/f", "y", 0)))
		tell(s, say, "d/x", "y")
		say("rename over the last %s", errno(s.rename("y", "d/x", 0)))
		tell(s, say, "d/x")
		say("exchange %s", errno(s.rename("a", "d/x", sys.RENAME_EXCHANGE)))
		tell(s, say, "a")
		tell(s, say, "d/x", "e/b", "e/c")
	})
}

func TestLinksExchangedUnlinked(t *testing.T) {
	linksCase(t, func(s side, say func(string, ...any)) {
		say("write %s", errno(s.write("a", 0, "WRITTEN")))
		say("exchange %s", errno(s.rename("b", "d/x", sys.RENAME_EXCHANGE)))
		tell(s, say, "a", "d/x", "d/c")
		tell(s, say, "b", "y")
		say("truncate %s", errno(s.truncate("b", 1)))
		tell(s, say, "b", "y")
		say("O_TRUNC %s", errno(s.trunc("d/x")))
		tell(s, say, "a", "d/x", "d/c")
	})
}

// TestEverythingIndexed: with nfs_export directories and files of one name go by way
// of index, too, and a whiteout stays in it for each that is gone.
func TestEverythingIndexed(t *testing.T) {
	exported(t, 2, plainLowers(t), func(s side, say func(string, ...any)) {
		say("write %s", errno(s.write("a", 0, "WRITTEN")))
		say("unlink lower %s", errno(s.unlink("d/x")))
		say("unlink upper %s", errno(s.unlink("a")))
		say("rmdir lower %s", errno(s.rmdir("empty")))
		say("chmod dir %s", errno(s.chmod("e", 0o700)))
		say("rmdir full %s", errno(s.rmdir("e")))
		say("empty it %s", errno(s.unlink("e/v")))
		say("rmdir upper %s", errno(s.rmdir("e")))
		say("rename dir %s", errno(s.rename("d", "dd", 0)))
		say("rename over %s", errno(s.rename("dd/z", "sym", 0)))
		say("mkdir %s", errno(s.mkdir("a", 0o755)))
	})
}

// TestIndexedFileOutlivesItsNames: a descriptor from before the copy-up reads what
// is written by another name, and goes on when all names are gone; the entry in
// index goes with the last name.
func TestIndexedFileOutlivesItsNames(t *testing.T) {
	c := layersFor(t, testenv.FS(t, "xfs"), 1, Config{Index: true}, linkedLowers(t))
	u := openUnion(t, c)
	must(t, u.walk("d/c", func(n *Node) error {
		f, err := u.fs.Open(Caller{}, n, syscall.O_RDWR)
		must(t, err)
		defer f.Close()
		must(t, u.write("a", 0, "WRITTEN"))
		read := func(what, want string) {
			t.Helper()
			b := make([]byte, 20)
			if k, err := f.ReadAt(b, 0); err != nil || string(b[:k]) != want {
				t.Errorf("%s: %q, %v; want %q", what, b[:k], err, want)
			}
		}
		read("written by another name", "WRITTEN")
		for i, name := range []string{"b", "d/c", "a"} {
			must(t, u.unlink(name))
			if a, err := u.fs.Getattr(n, f); err != nil || a.Nlink != uint32(2-i) {
				t.Errorf("after unlink of %s: %d links, %v", name, a.Nlink, err)
			}
		}
		_, err = f.WriteAt([]byte("gone on"), 0, false)
		must(t, err)
		read("without a name", "gone on")
		if left := namesIn(t, filepath.Join(c.Work, "index")); len(left) > 0 {
			t.Errorf("left in index: %v", left)
		}
		return nil
	}))
	u.close()
}

// TestIndexFallsBack: where there can be none, hard links break as without it, and
// the log says why.
func TestIndexFallsBack(t *testing.T) {
	var said []string
	c := Config{Index: true, NFSExport: true, Xattrs: XattrUser, Log: func(f string, a ...any) { said = append(said, fmt.Sprintf(f, a...)) }}
	c = layersFor(t, testenv.FS(t, "ext4"), 0, c, func([]string) {})
	u := openUnion(t, c)
	must(t, u.create("f", "x"))
	u.close()
	if len(said) != 2 || !strings.Contains(said[0], "index is off") || !strings.Contains(said[1], "nfs_export") {
		t.Errorf("said %q", said)
	}
}

// TestDataOnlyLayers: files without data find them there by absolute redirects, and
// not by their names; a redirect that leads nowhere is EIO; the kernel agrees.
func TestDataOnlyLayers(t *testing.T) {
	testenv.Root(t)
	base := testenv.FS(t, "ext4")
	c := layersFor(t, base, 1, Config{Metacopy: true, Redirect: RedirectFollow}, func(l []string) {
		for _, d := range []string{"data1", "data2"} {
			put(t, filepath.Join(filepath.Dir(l[0]), d), "objects/aa/"+d, "content of "+d)
		}
		put(t, filepath.Join(filepath.Dir(l[0]), "data2"), "objects/aa/data1", "hidden")
		put(t, filepath.Join(filepath.Dir(l[0]), "data1"), "only-by-name", "never seen")
		must(t, os.Symlink("data1", filepath.Join(filepath.Dir(l[0]), "data1/objects/aa/link")))
		for name, to := range map[string]string{"one": "/objects/aa/data1", "two": "/objects/aa/data2", "none": "/objects/nothing", "through": "/objects/aa/link"} {
			p := filepath.Join(l[0], name)
			must(t, os.WriteFile(p, nil, 0o644))
			must(t, os.Truncate(p, 16))
			must(t, syscall.Setxattr(p, "trusted.overlay.metacopy", nil, 0))
			must(t, syscall.Setxattr(p, "trusted.overlay.redirect", []byte(to), 0))
		}
	})
	dir := filepath.Dir(c.Lowers[0])
	c.DataLowers = []string{dir + "/data1", dir + "/data2"}
	c.Upper, c.Work = "", ""
	var said [2][]string
	for i, open := range []func() side{func() side { return mountKernel(t, c) }, func() side { return openUnion(t, c) }} {
		s := open()
		for _, name := range []string{"one", "two", "none", "through", "only-by-name", "objects"} {
			data, err := s.read(name)
			said[i] = append(said[i], fmt.Sprintf("%s: %q %s", name, data, errno(err)))
		}
		s.close()
	}
	if !slices.Equal(said[0], said[1]) {
		t.Errorf("kernel %q\nunion  %q", said[0], said[1])
	}
	if want := `one: "content of data1" ok`; said[1][0] != want {
		t.Errorf("%s, want %s", said[1][0], want)
	}
}
