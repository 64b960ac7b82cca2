package btrfs

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// diffCases are changes of which SEND says little: what it does not name must be
// found all the same. Each is a script that makes a tree, and one that changes it.
var diffCases = []struct{ name, base, change string }{
	{"two directories change places",
		`mkdir -p a/sub/deep b/sub/deep; echo 1 >a/sub/deep/x; echo 2 >b/sub/deep/y; echo 3 >b/sub/deep/x; echo same >a/sub/s; cp -p a/sub/s b/sub/s`,
		`mv a t; mv b a; mv t b`},
	{"three directories go around",
		`for d in a b c; do mkdir -p $d/sub; echo $d >$d/sub/f; echo $d >$d/sub/$d; done`,
		`mv a t; mv b a; mv c b; mv t c`},
	{"a directory takes the place of one that was removed",
		`mkdir -p a/sub b/sub; echo 1 >a/sub/x; echo 2 >b/sub/y; echo 3 >b/sub/x`,
		`rm -r a; mv b a`},
	{"a directory that was moved is changed below",
		`mkdir -p a/one/two b/one/two; echo 1 >a/one/two/x; echo 2 >b/one/two/x`,
		`mv a c; mv b a; echo 3 >>c/one/two/x; mkdir c/one/new; mv c/one/two c/one/new/two`},
	{"parent and child change places",
		`mkdir -p a/b/c; echo 1 >a/f; echo 2 >a/b/f; echo 3 >a/b/c/f`,
		`mv a/b t; mv a t/a; mv t a; mv a/a a/b`},
	{"moved out and in again",
		`mkdir -p a/sub b; echo 1 >a/sub/x; echo 2 >a/sub/y`,
		`mv a/sub b/sub; echo 3 >b/sub/x; rm b/sub/y; mv b/sub a/sub`},
	{"moved and made anew",
		`mkdir -p a/sub; echo 1 >a/sub/x; echo 2 >a/y`,
		`mv a b; mkdir -p a/sub; echo 4 >a/sub/x; echo 5 >a/y`},
	{"a directory becomes a file, and a file a directory",
		`mkdir -p a/sub; echo 1 >a/sub/x; echo 2 >b`,
		`rm -r a; echo 3 >a; rm b; mkdir b; echo 4 >b/x`},
	{"one name of a file of several names is written to",
		`mkdir a b c; echo 1 >a/x; ln a/x b/y; ln a/x c/z; echo 2 >c/other`,
		`echo 3 >>b/y`},
	{"a file of several names changes its xattr",
		`mkdir a b; echo 1 >a/x; ln a/x b/y`,
		`setfattr -n user.k -v v a/x`},
	{"one of three names goes",
		`mkdir a b c; echo 1 >a/x; ln a/x b/y; ln a/x c/z`,
		`rm b/y`},
	{"a name is added in another directory",
		`mkdir a b c; echo 1 >b/x; ln b/x c/z`,
		`ln b/x a/w`},
	{"a name moves with its directory, another stays",
		`mkdir -p a/sub b; echo 1 >a/sub/x; ln a/sub/x b/y`,
		`mv a c; echo 2 >>b/y`},
	{"a name moves to another directory",
		`mkdir a b c; echo 1 >a/x; ln a/x b/y`,
		`mv b/y c/y`},
	{"names of two files change places",
		`mkdir a b; echo 1 >a/x; ln a/x b/x; echo 2 >a/y; ln a/y b/y`,
		`mv b/x t; mv b/y b/x; mv t b/y`},
	{"a group is split, of equal content",
		`mkdir a b; echo 1 >a/x; ln a/x b/y; touch -d @1000000000 a/x`,
		`cp -p b/y t; mv t b/y`},
	{"two files become one, of equal content",
		`mkdir a b; echo 1 >a/x; cp a/x b/y; touch -d @1000000000 a/x b/y a b`,
		`ln -f a/x b/y; touch -d @1000000000 a b`},
	{"hard links and a directory that takes another's place",
		`mkdir -p a/d b/d; echo 1 >a/d/x; ln a/d/x b/d/x; echo 2 >a/d/y; ln a/d/y b/d/z`,
		`mv a t; mv b a; mv t b; rm b/d/x`},
	{"rewritten and equal",
		`mkdir a; head -c 300000 /dev/zero | tr '\0' x >a/f; touch -d @1000000000 a/f a`,
		`cp a/f t; cat t >a/f; rm t; touch -d @1000000000 a/f`},
	{"other extents, the same content",
		`head -c 300000 /dev/zero | tr '\0' x >f; cp --reflink=never f g; touch -d @1000000000 f g`,
		`cp --reflink=always g t; cat t | dd of=f conv=notrunc status=none; cp --reflink=always f g; rm t; touch -d @1000000000 f g`},
	{"same size, same mtime, other bytes",
		`echo aaaa >f; touch -d @1000000000 f`,
		`echo bbbb | dd of=f conv=notrunc status=none; touch -d @1000000000 f`},
	{"a hole is punched where zeros were",
		`head -c 300000 /dev/zero >f; touch -d @1000000000 f`,
		`fallocate -p -o 4096 -l 200000 f; touch -d @1000000000 f`},
	{"only an xattr goes", `echo 1 >f; setfattr -n user.k -v v f`, `setfattr -x user.k f`},
	{"only the owner, and back", `echo 1 >f; echo 2 >g`, `chown 5:6 f g; chown 0:0 g`},
	{"a symlink of another target", `ln -s a l; touch -h -d @1000000000 l`, `rm l; ln -s b l; touch -h -d @1000000000 l`},
	{"removed, and a new file of the same name and content",
		`mkdir a; echo 1 >a/f; touch -d @1000000000 a/f a`,
		`cp -p a/f t; rm a/f; sync -f .; mv t a/f; touch -d @1000000000 a`},
	{"inline to regular, and back",
		`echo 1 >f; head -c 300000 /dev/zero | tr '\0' x >g; touch -d @1000000000 f g`,
		`head -c 300000 /dev/zero | tr '\0' x >f; echo 1 >g; touch -d @1000000000 f g`},
	{"preallocated beyond the end and inside, and a hole at the end",
		`head -c 8192 /dev/zero | tr '\0' x >f; cp f g; cp f h; touch -d @1000000000 f g h`,
		`fallocate -n -l 1M f; fallocate -o 1M -l 1M g; truncate -s 1M h; touch -d @1000000000 f g h`},
	{"another file's blocks by reflink, the size the same",
		`head -c 262144 /dev/zero | tr '\0' x >f; head -c 262144 /dev/zero | tr '\0' y >g; touch -d @1000000000 f g`,
		`cp --reflink=always g f; touch -d @1000000000 f`},
	{"a device takes another's place", `mknod n c 1 3; mknod m b 7 0; touch -d @1000000000 n m .`, `rm n m; mknod n c 1 5; mknod m c 7 0; touch -d @1000000000 n m .`},
	{"the last inode number is given again, to another type",
		`mkdir a b; echo 1 >a/last`,
		`rm a/last; mkdir a/last; echo 2 >a/last/x`},
	{"a default ACL and its inheritance", `mkdir a; echo 1 >a/f`, `setfacl -d -m u:1:r a; touch a/g; setfacl -m u:2:rw a/f`},
	{"a capability, kept by a rename", `cp /bin/true f; setcap cap_net_raw+ep f; cp /bin/true g`, `mv f h; setcap cap_chown+ep g`},
	{"names with bytes that mean something",
		`mkdir -p 'o257-7-0/x' 'a b'; echo 1 >'o257-7-0/x/f'; echo 2 >'a b/o258-7-0'`,
		`mv 'o257-7-0' t; mv 'a b' 'o257-7-0'; mv t 'a b'; echo 3 >>'a b/x/f'`},
}

// TestDiffEqualsTheWalk: what is found by SEND is what the exact walk finds, and
// there is something to find in most.
func TestDiffEqualsTheWalk(t *testing.T) {
	h := fixture(t)
	for _, c := range diffCases {
		t.Run(c.name, func(t *testing.T) {
			g := *h
			g.T = t
			from := g.script(drivers.Ref{}, c.base)
			to := g.script(from, c.change)
			for _, p := range [][2]drivers.Ref{{from, to}, {to, from}} {
				if msg := g.compare(p[0], p[1]); msg != "" {
					t.Errorf("from %s to %s: %s", p[0].ID, p[1].ID, msg)
				}
				if !g.sendable(p[0], p[1]) {
					t.Error("not by SEND")
				}
			}
			h.next = g.next
		})
	}
}

// script makes a committed layer by a shell script in its tree.
func (h *history) script(parent drivers.Ref, script string) drivers.Ref {
	h.Helper()
	r, tree := h.create(parent, drivers.CreateOptions{})
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir = tree
	if out, err := cmd.CombinedOutput(); err != nil {
		h.Fatalf("%s: %v\n%s", script, err, out)
	}
	h.commit(r)
	return r
}

// SEND said nothing of a symlink or a file that two containers of one image made
// or changed at the same moment: the numbers, the transaction and the tick of the
// clock are the same, and it compares no more. Of names and xattrs it then says EIO.
func TestDiffOfWhatHappenedAtTheSameMoment(t *testing.T) {
	h := fixture(t, testenv.MountOptions("commit=300"))
	base := h.script(drivers.Ref{}, "mkdir d; echo 1 >f; for i in 0 1 2 3 4 5 6 7 8 9; do echo 1 >d/$i; done")
	alike := false
	for round := 0; round < 6 || !alike && round < 1000; round++ {
		making := round%2 == 0 // what is made in one transaction is told apart without a look at the clock
		a, aTree := h.create(base, drivers.CreateOptions{})
		b, bTree := h.create(base, drivers.CreateOptions{})
		for i := range 10 {
			n := strconv.Itoa(i)
			for tree, content := range map[string]string{aTree: "a", bTree: "b"} {
				if making {
					h.must(os.Symlink(content, tree+"/symlink"+n))
					h.must(os.WriteFile(tree+"/new"+n, []byte(content), 0o644))
				}
				h.must(os.WriteFile(tree+"/d/"+n, []byte(content), 0o644))
				h.must(os.Link(tree+"/d/"+n, tree+"/"+content+n))
			}
		}
		for _, p := range [][2]drivers.Ref{{a, b}, {b, a}} {
			if msg := h.differs(p[0], p[1]); msg != "" {
				t.Fatalf("from %s to %s: %s", p[0].ID, p[1].ID, msg)
			}
		}
		alike = alike || !making && h.alike(a, b)
		h.must(h.d.Remove(h.ctx, a.ID))
		h.must(h.d.Remove(h.ctx, b.ID))
	}
	if !alike {
		t.Error("nothing ever happened at the same moment")
	}
}

// SEND took a directory and a file that two containers of one image made in the same
// transaction, with the same number, for one, and could end with ENOENT.
func TestDiffOfWhatWasMadeInOneTransaction(t *testing.T) {
	h := fixture(t, testenv.MountOptions("commit=300"))
	base := h.script(drivers.Ref{}, "mkdir d; echo 1 >d/h; touch t1; mkdir d/c; touch t2; mkdir n; echo 1 >n/f; rm t1 t2")
	var rs [2]drivers.Ref
	var trees [2]string
	for i := range rs {
		rs[i], trees[i] = h.create(base, drivers.CreateOptions{})
	}
	for i, script := range []string{
		`mkdir i0 g; touch x; echo 1 >z; touch y; mkdir g/i; mv d/c i; mv i0 i/f; mv d/h i/f/g; rmdir d; rm x y`,
		`mkdir a b; echo 1 >f; mkdir x y; mv d/c t; mv d b/h; mv n b/h/c; mv t b/h/c/b; mv b/h/c/f b/h/c/i; mv a b/h/c/a; mv f b/h/c/b/a; mv x b/h/a; mv y b/h/c/d; ln b/h/h b/h/e`,
	} {
		cmd := exec.Command("sh", "-ec", script)
		cmd.Dir = trees[i]
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
	}
	for _, p := range [][2]drivers.Ref{{rs[0], rs[1]}, {rs[1], rs[0]}} {
		if msg := h.differs(p[0], p[1]); msg != "" {
			t.Errorf("from %s to %s: %s", p[0].ID, p[1].ID, msg)
		}
	}
}

// alike reports whether a diff of two layers has files that SEND cannot tell apart.
func (h *history) alike(a, b drivers.Ref) bool {
	h.Helper()
	since, apart, err := h.d.apart(a, b)
	h.must(err)
	if !apart {
		h.Fatal("siblings are said not to be")
	}
	from, to, done := h.sendTrees(a, b)
	defer done()
	alike, err := takenForOne(from.fd, to.fd, since)
	h.must(err)
	return alike
}

// Files that are open and have no name any more are in a snapshot, and in no tree.
func TestDiffAndUsageWithoutUnlinkedFiles(t *testing.T) {
	h := fixture(t)
	base := h.script(drivers.Ref{}, "mkdir d; echo 1 >d/f; echo 2 >d/g; ln d/g d/h")
	r, tree := h.create(base, drivers.CreateOptions{})
	for _, names := range [][]string{{"f"}, {"g", "h"}, {"new"}} {
		f, err := os.OpenFile(tree+"/d/"+names[0], os.O_RDWR|os.O_CREATE, 0o600)
		h.must(err)
		defer f.Close()
		for _, n := range names {
			h.must(os.Remove(tree + "/d/" + n))
		}
		_, err = f.Write(make([]byte, 1<<20))
		h.must(err)
		h.must(f.Sync())
	}
	if msg := h.compare(base, r); msg != "" {
		t.Error(msg)
	}
	h.commit(r)
	if msg := h.compare(base, r); msg != "" {
		t.Error(msg)
	}
	if h.sent != 2 {
		t.Errorf("%d of 2 by SEND", h.sent)
	}
	if u, err := h.d.Usage(h.ctx, r); err != nil || u.Bytes != 0 || u.Inodes != 0 {
		t.Errorf("usage %+v, %v, of a layer that has only deletions", u, err)
	}
}

// On a read-only file system an active layer has no snapshot to be sent from: its diff
// was "read-only file system".
func TestDiffOnAReadOnlyFileSystem(t *testing.T) {
	h := fixture(t)
	base := h.script(drivers.Ref{}, "mkdir d; echo 1 >d/f; echo 2 >d/g; ln d/g d/h")
	r, tree := h.create(base, drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/d/f", []byte("2"), 0o600))
	h.must(os.Remove(tree + "/d/g"))
	h.must(h.d.SyncUsage(h.ctx))
	h.must(sys.Mount("", filepath.Dir(h.d.root), "", sys.MS_REMOUNT|sys.MS_RDONLY, ""))
	for _, p := range [][2]drivers.Ref{{base, r}, {r, base}} {
		if msg := h.differs(p[0], p[1]); msg != "" {
			t.Error(msg)
		}
	}
}
