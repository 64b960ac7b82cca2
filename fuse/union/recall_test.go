package union

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
)

// tokenAttr names an object for good, in whatever layer it is: what a handle leads to
// can be told from what it must lead to by something that no code here looks at.
const tokenAttr = "trusted.token"

// exportTest has handles of everything that ever was in a union.
type exportTest struct {
	t    *testing.T
	c    Config
	u    *unionSide
	r    *rand.Rand
	last int

	linked  map[string]bool       // tokens of lower files with several links
	handles map[string]testHandle // by token
	now     map[string]string     // tokens to a path each, of what is there now
}

type testHandle struct {
	id         uint64
	generation uint32
}

// markLowers gives everything in the lowers its token.
func (x *exportTest) markLowers() {
	for _, l := range x.c.Lowers {
		must(x.t, filepath.WalkDir(l, func(p string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			st, err := sys.LstatPath(p)
			if err != nil || st.IsWhiteout() {
				return err
			}
			if _, err := sys.GetxattrBare(-1, p, tokenAttr, make([]byte, 64)); err == nil {
				return nil // another name of it
			}
			token := x.token()
			x.linked[string(token)] = !st.IsDir() && st.Nlink > 1
			return sys.SetxattrBare(-1, p, tokenAttr, token, 0)
		}))
	}
}

func (x *exportTest) token() []byte {
	x.last++
	return []byte(strconv.Itoa(x.last))
}

// look goes through the whole union, gives what is new its token, and has a handle of
// everything: always the same one.
func (x *exportTest) look() {
	x.t.Helper()
	x.now = map[string]string{}
	x.lookAt(".")
}

func (x *exportTest) lookAt(p string) {
	x.t.Helper()
	all, err := x.u.readdir(p)
	must(x.t, err)
	for _, e := range all {
		at := filepath.Join(p, e.Name)
		token, err := x.u.getxattr(at, tokenAttr)
		if errors.Is(err, syscall.ENODATA) {
			token = string(x.token())
			err = x.u.setxattr(at, tokenAttr, token)
		}
		must(x.t, err)
		var h testHandle
		must(x.t, x.u.walk(at, func(n *Node) error { h = testHandle{n.ID(), n.Generation()}; return nil }))
		if h.id >= firstUnlasting {
			x.t.Fatalf("%s has no number that lasts", at)
		}
		if was, ok := x.handles[token]; ok && was != h {
			x.t.Fatalf("%s (token %s) has handle %v, and had %v", at, token, h, was)
		}
		x.handles[token], x.now[token] = h, at
		if e.Type == sys.S_IFDIR {
			x.lookAt(at)
		}
	}
}

// check opens every handle: it leads to the object that it was of, or is stale.
func (x *exportTest) check() {
	x.t.Helper()
	for token, h := range x.handles {
		at, there := x.now[token]
		e, err := x.u.fs.Recall(h.id)
		if err == nil && e.Node.Generation() != h.generation {
			x.u.fs.Forget(h.id, 1)
			err = syscall.ESTALE // as the kernel says
		}
		switch {
		case err == nil && !there && x.linked[token]: // names that no layer shows count, as with the kernel
			at = "nowhere"
		case err == nil && !there:
			x.t.Fatalf("the handle %v of %s, which is gone, leads to inode %d", h, token, e.Attr.Ino)
		case err != nil && there:
			x.t.Fatalf("the handle %v of %s (token %s): %v", h, at, token, err)
		case err != nil && err != syscall.ESTALE:
			x.t.Fatalf("the handle %v of what is gone: %v", h, err)
		case err != nil:
			continue
		}
		if e.Node.ID() != h.id {
			x.t.Fatalf("the handle %v of %s leads to node %d", h, at, e.Node.ID())
		}
		x.same(e.Node, token, at)
		x.u.fs.Forget(h.id, 1)
	}
}

// same says that a node must be the object with a token, which is at a path.
func (x *exportTest) same(n *Node, token, at string) {
	x.t.Helper()
	var b [64]byte
	size, err := x.u.fs.Getxattr(n, tokenAttr, b[:])
	if err != nil || string(b[:size]) != token {
		x.t.Fatalf("the handle of %s leads to token %q, %v, not %s", at, b[:max(size, 0)], err, token)
	}
	is, err := x.u.fs.Getattr(n, nil)
	must(x.t, err)
	if at == "nowhere" {
		return
	}
	want, err := x.u.stat(at)
	must(x.t, err)
	is.Blocks, want.Blocks = 0, 0 // as the file system below gets to it
	if is != want {
		x.t.Fatalf("%s is by its handle\n%+v, by its name\n%+v", at, is, want)
	}
}

// use does something to what a handle leads to, and looks at it by its name.
func (x *exportTest) use(do func(n *Node, at string)) {
	x.t.Helper()
	tokens := slices.Sorted(maps.Keys(x.now))
	if len(tokens) == 0 {
		return
	}
	token := tokens[x.r.IntN(len(tokens))]
	at := x.now[token]
	e, err := x.u.fs.Recall(x.handles[token].id)
	must(x.t, err)
	defer x.u.fs.Forget(e.Node.ID(), 1)
	do(e.Node, at)
	if _, err := x.u.stat(at); err == nil {
		x.same(e.Node, token, at)
	}
}

func (x *exportTest) change() {
	x.use(func(n *Node, at string) {
		switch {
		case n.isDir():
			_ = x.u.drop(x.u.fs.Mkdir(rootCaller, n, fmt.Sprint("new", x.last), 0o755))
		case n.typ != sys.S_IFREG:
			a := sys.Time{Sec: int64(x.last)}
			_, err := x.u.fs.Setattr(rootCaller, n, nil, SetAttr{Valid: SetMtime, Mtime: a})
			must(x.t, err)
		case x.r.IntN(2) == 0:
			_, err := x.u.fs.Setattr(rootCaller, n, nil, SetAttr{Valid: SetMode, Mode: x.r.Uint32N(0o1000)})
			must(x.t, err)
		default:
			f, err := x.u.fs.Open(rootCaller, n, syscall.O_RDWR)
			must(x.t, err)
			defer f.Close()
			data := fmt.Sprint("written ", x.last)
			_, err = f.WriteAt([]byte(data), 0, false)
			must(x.t, err)
			got, err := x.u.read(at)
			must(x.t, err)
			if len(got) < len(data) || got[:len(data)] != data {
				x.t.Fatalf("%s reads %.20q, written by its handle was %q", at, got, data)
			}
		}
	})
}

// lose takes the name of something away that is known by its handle, and goes on
// with it; or gives it another one.
func (x *exportTest) lose() {
	x.use(func(n *Node, at string) {
		if n.isDir() {
			return
		}
		before, err := x.u.fs.Getattr(n, nil)
		must(x.t, err)
		other := "link" + strconv.Itoa(x.last)
		x.last++
		switch x.r.IntN(3) {
		case 0:
			must(x.t, x.u.drop(x.u.fs.Link(rootCaller, n, x.u.fs.Root(), other)))
		case 1:
			must(x.t, x.u.rename(at, other, 0))
		default:
			must(x.t, x.u.unlink(at))
		}
		after, err := x.u.fs.Getattr(n, nil)
		if err != nil || after.Ino != before.Ino {
			x.t.Fatalf("%s without its name: inode %d, %v; it was %d", at, after.Ino, err, before.Ino)
		}
	})
}

// churn makes and deletes files, so that inode numbers and places in the table are
// used again.
func (x *exportTest) churn(n int) {
	for i := range n {
		p := "churn" + strconv.Itoa(i%8)
		_ = x.u.unlink(p)
		must(x.t, x.u.create(p, p))
		must(x.t, x.u.setxattr(p, tokenAttr, string(x.token())))
		must(x.t, x.u.walk(p, func(n *Node) error {
			x.handles[strconv.Itoa(x.last)] = testHandle{n.ID(), n.Generation()}
			return nil
		}))
	}
}

func (x *exportTest) reopen() {
	x.u.close()
	x.u = openUnion(x.t, x.c)
}

// run does random operations, and opens all handles after some of them, and in
// another FS.
func (x *exportTest) run(ops []treegen.Op) {
	x.look()
	x.check()
	for i, o := range ops {
		_ = apply(x.u, o)
		switch i % 8 {
		case 1:
			x.look()
			x.change()
		case 3:
			x.look()
			x.lose()
		case 5:
			x.look()
			x.check()
		case 7:
			x.churn(20)
			if i%32 == 31 {
				x.reopen()
			}
		}
	}
	x.look()
	x.check()
	x.reopen()
	x.check()
}

// TestRecallRandom: whatever is done to a union, and in whatever order, a handle that
// was ever given out leads to the object that it was of, or to nothing.
func TestRecallRandom(t *testing.T) {
	testenv.Root(t)
	seeds := 2
	if s := os.Getenv("UNION_RANDOM_SEEDS"); s != "" {
		seeds, _ = strconv.Atoi(s)
	}
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			base := testenv.FS(t, kind)
			for seed := range seeds {
				c := Config{Redirect: []RedirectMode{RedirectOn, RedirectFollow}[seed%2], Index: true, NFSExport: true}
				rc := drawCase(uint64(seed), c, 2, 60)
				dir, err := os.MkdirTemp(base, "x")
				must(t, err)
				rc.build(t, dir)
				c = rc.withUpper(t, dir, "")
				x := &exportTest{t: t, c: c, r: rand.New(rand.NewPCG(uint64(seed), 7)), handles: map[string]testHandle{},
					linked: map[string]bool{}}
				x.markLowers()
				x.u = openUnion(t, c)
				defer func() { _ = x.u.fs.Close() }() // of a test that has failed
				x.run(rc.ops)
				x.u.close()
				t.Logf("seed %d: %d handles, %d of them of what is there", seed, len(x.handles), len(x.now))
				must(t, os.RemoveAll(dir))
			}
		})
	}
}

// TestRecallAfterTheKernel: the kernel's overlayfs changes the same upper between two
// mounts. Handles lead to what they were of, where it is now, or nowhere.
func TestRecallAfterTheKernel(t *testing.T) {
	testenv.Root(t)
	c := layersFor(t, testenv.FS(t, "ext4"), 1, Config{Index: true, NFSExport: true, Redirect: RedirectOn}, func(l []string) {
		put(t, l[0], "gone", "low")
		put(t, l[0], "d/f", "low f")
		put(t, l[0], "dir/x/y", "low y")
	})
	x := &exportTest{t: t, c: c, linked: map[string]bool{}, handles: map[string]testHandle{}}
	x.markLowers()
	x.u = openUnion(t, c)
	must(t, x.u.create("new", "new"))
	must(t, x.u.mkdir("up", 0o755))
	x.look()
	x.u.close()

	k := mountKernel(t, c)
	must(t, k.unlink("gone"))
	must(t, k.unlink("new"))
	must(t, k.rename("dir", "up/moved", 0))
	must(t, k.rename("d/f", "g", 0))
	for i := range 20 {
		must(t, k.create("other"+strconv.Itoa(i), "other"))
	}
	k.close()

	x.u = openUnion(t, c)
	defer func() { _ = x.u.fs.Close() }() // of a test that has failed
	x.look()
	x.check()
	for token, at := range x.now {
		if h, ok := x.handles[token]; !ok || h.id < firstPlace {
			t.Errorf("%s has no handle", at)
		}
	}
	x.u.close()
}

// TestRecallOfADirectoryAtTwoPlaces: a redirect of one lower shows a directory of the
// next at a second place. Looking for it there had no end while the first one's node
// was in memory, and coming back by a number waits with every change of names meanwhile.
func TestRecallOfADirectoryAtTwoPlaces(t *testing.T) {
	testenv.Root(t)
	c := layersFor(t, testenv.FS(t, "ext4"), 2, Config{Index: true, NFSExport: true, Redirect: RedirectOn}, func(l []string) {
		put(t, l[1], "o/d/e/f", "x")
		must(t, os.Mkdir(filepath.Join(l[0], "m"), 0o755))
		must(t, syscall.Setxattr(filepath.Join(l[0], "m"), "trusted.overlay.redirect", []byte("o"), 0))
	})
	u := openUnion(t, c)
	defer u.close()
	ids := map[string]uint64{}
	must(t, u.walk("m/d/e", func(n *Node) error {
		ids["m/d/e"] = n.ID()
		return u.walk("o/d/e", func(n *Node) error { ids["o/d/e"] = n.ID(); return nil })
	}))
	if ids["m/d/e"] == ids["o/d/e"] {
		t.Errorf("one node, %d, at two places", ids["m/d/e"])
	}
	must(t, u.rename("m", "n", 0))
	must(t, u.walk("n/d", func(*Node) error {
		for at, id := range ids {
			if e, err := u.fs.Recall(id); err == nil {
				u.fs.Forget(e.Node.ID(), 1)
			} else if err != syscall.ESTALE {
				t.Errorf("the number of %s: %v", at, err)
			}
		}
		return nil
	}))
	if got, err := u.read("n/d/e/f"); got != "x" || err != nil {
		t.Errorf("n/d/e/f: %q, %v", got, err)
	}
}
