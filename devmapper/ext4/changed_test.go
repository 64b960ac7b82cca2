package ext4

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
	"github.com/layerctl/layerctl/layer"
)

// compare holds the diff of the candidates against that of the whole trees.
func compare(t *testing.T, what string, a, b disk, ranges []Range) *layer.Candidates {
	t.Helper()
	c, err := changed(a, b, ranges)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	from, unmountFrom := a.mount(true)
	defer unmountFrom()
	to, unmountTo := b.mount(true)
	defer unmountTo()
	want, err := drivertest.Collect(t.Context(), layer.DiffTrees(t.Context(), from, to, layer.DiffOptions{}))
	if err != nil {
		t.Fatalf("%s: walk: %v", what, err)
	}
	got, err := drivertest.Collect(t.Context(), layer.DiffTrees(t.Context(), from, to, layer.DiffOptions{Candidates: c.Names}))
	if err != nil {
		t.Fatalf("%s: candidates: %v", what, err)
	}
	if msg := got.Differs(want); msg != "" {
		t.Fatalf("%s: %s\nthe candidates are\n%v", what, msg, c)
	}
	return c
}

// TestCandidatesGiveTheDiffOfTheWalk: between any two of several file systems that
// random operations made of one, the changeset of the candidates is, as a tar, that
// of the whole trees. LAYERCTL_SEED gives the first seed, LAYERCTL_HISTORIES how many.
func TestCandidatesGiveTheDiffOfTheWalk(t *testing.T) {
	first, each := testenv.Number(t, "LAYERCTL_SEED", rand.Uint64()>>1), testenv.Number(t, "LAYERCTL_HISTORIES", 2)
	for i, o := range []struct {
		name  string
		size  int64
		mkfs  []string
		fixed bool // resize2fs damages it, or waits for long
	}{
		{"as by default", 64 << 20, nil, false},
		{"small blocks and groups", 24 << 20, []string{"-b", "1024", "-g", "1024", "-I", "256"}, false},
		{"as ten years ago", 24 << 20, []string{"-b", "1024", "-I", "128", "-O", "^metadata_csum,^64bit,uninit_bg"}, false},
		{"no checksums", 32 << 20, []string{"-b", "2048", "-O", "^metadata_csum,^uninit_bg,^flex_bg,^dir_index"}, false},
		{"meta_bg, sparse_super2, orphan_file", 32 << 20, []string{"-b", "1024", "-g", "2048", "-O", "meta_bg,^resize_inode,sparse_super2,orphan_file"}, true},
		{"quota", 32 << 20, []string{"-O", "quota,project"}, false},
		{"no journal, mmp, metadata_csum_seed", 32 << 20, []string{"-O", "^has_journal,mmp,metadata_csum_seed,large_dir"}, true},
	} {
		t.Run(o.name, func(t *testing.T) {
			if o.mkfs != nil && o.name != "quota" {
				testenv.AnyKernel(t)
			}
			testenv.Leaks(t)
			for n := range each {
				seed := first + uint64(i)*each + n
				history(t, seed, o.size, o.mkfs, n%2 == 0 && !o.fixed)
			}
		})
	}
}

func history(t *testing.T, seed uint64, size int64, mkfs []string, grows bool) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 5))
	g := treegen.New(rnd, treegen.Config{Root: true, Sockets: true, FileSize: 30_000})
	apply := func(d disk, n int) disk {
		ops := g.Ops(n)
		d.change(func(dir string) {
			_, err := treegen.Apply(dir, ops)
			d.check(err)
		})
		return d
	}
	base := apply(newDisk(t, size, mkfs...), 20+rnd.IntN(80))
	child := apply(base.copy(), 1+rnd.IntN(40))
	grand := apply(child.copy(), rnd.IntN(30))
	beside := apply(base.copy(), 1+rnd.IntN(30))
	beside.fsck()
	grand.fsck()
	disks := []disk{base, child, grand, beside}
	pairs := [][2]int{{0, 1}, {1, 0}, {1, 2}, {0, 2}, {2, 3}, {3, 1}}
	if grows {
		grown := child.copy()
		grown.grow(size*int64(2+rnd.IntN(4)), rnd.IntN(3) == 0)
		apply(grown, rnd.IntN(40))
		more := grown.copy()
		more.grow(size*int64(6+rnd.IntN(4)), rnd.IntN(3) == 0)
		apply(more, rnd.IntN(40))
		more.fsck()
		apart := beside.copy() // its tables may be elsewhere
		apart.grow(size*int64(2+rnd.IntN(4)), rnd.IntN(3) == 0)
		apply(apart, rnd.IntN(40))
		disks, pairs = append(disks, grown, more, apart), [][2]int{{0, 1}, {2, 3}, {1, 4}, {4, 1}, {4, 5}, {5, 3}, {4, 6}, {6, 5}}
	}
	block := []int{4096, 64 << 10, 1 << 20}[rnd.IntN(3)]
	for _, p := range pairs {
		a, b := disks[p[0]], disks[p[1]]
		what := fmt.Sprintf("LAYERCTL_SEED=%d, from %d to %d, blocks of %d", seed, p[0], p[1], block)
		compare(t, what, a, b, differences(a, b, block))
	}
}

func (d disk) file(name string, data []byte) {
	d.Helper()
	d.check(os.MkdirAll(filepath.Dir(name), 0o755))
	d.check(os.WriteFile(name, data, 0o644))
}

// TestTheCandidatesAreFew: of 5,000 files in 500 directories ten are changed in ten
// ways, and little more than these are candidates.
func TestTheCandidatesAreFew(t *testing.T) {
	testenv.AnyKernel(t)
	testenv.Leaks(t)
	a := newDisk(t, 128<<20)
	name := func(dir string, n int) string { return fmt.Sprintf("%s/d%d/e%d/f%d", dir, n%10, n%500, n) }
	a.change(func(dir string) {
		for n := range 5000 {
			a.file(name(dir, n), []byte(strconv.Itoa(n)))
		}
	})
	b := a.copy()
	b.change(func(dir string) {
		b.check(os.WriteFile(name(dir, 1), []byte("x"), 0))                  // truncated and written
		b.check(os.Chmod(name(dir, 11), 0o600))                              // only the inode
		b.check(os.Remove(name(dir, 21)))                                    // only in the first
		b.file(name(dir, 31)+"new", nil)                                     // only in the second
		b.check(os.Rename(name(dir, 41), name(dir, 51)+"moved"))             // elsewhere
		b.check(os.Link(name(dir, 61), name(dir, 71)+"link"))                // a name more
		b.check(os.Chtimes(name(dir, 81), time.Unix(1, 2), time.Unix(3, 4))) // times
		b.check(os.RemoveAll(filepath.Dir(name(dir, 91))))                   // a directory less
		b.check(os.Mkdir(dir+"/new", 0o700))                                 // one more
		b.check(os.Symlink("target", dir+"/d0/link"))                        // a symlink
		f, err := os.OpenFile(name(dir, 101), os.O_RDWR, 0)                  // in place, its time put back
		b.check(err)
		st, err := f.Stat()
		b.check(err)
		_, err = f.WriteAt([]byte("9"), 0)
		b.check(errors.Join(err, f.Close(), os.Chtimes(f.Name(), st.ModTime(), st.ModTime())))
	})
	c := compare(t, "ten changes", a, b, differences(a, b, 64<<10))
	if c.Len() > 50 {
		t.Errorf("%d candidates: %v", c.Len(), c)
	}
	same := compare(t, "no change", a, a, []Range{{0, 128 << 20}})
	if same.Len() != 0 {
		t.Errorf("candidates for equal disks: %v", same)
	}
}

// TestAWriteThatLeftNoTraceInTheInode: bytes of a file change, and nothing else (an
// inode whose times are those of before, a device written to from below). No name is
// known for them: the walk must answer.
func TestAWriteThatLeftNoTraceInTheInode(t *testing.T) {
	testenv.Leaks(t)
	a := newDisk(t, 32<<20)
	mark := bytes.Repeat([]byte("a mark on the disk, "), 200)
	a.change(func(dir string) { a.file(dir+"/file", mark) })
	b := a.copy()
	whole, err := os.ReadFile(b.name)
	b.check(err)
	at := bytes.Index(whole, mark)
	if at < 0 {
		t.Fatal("the file is not on the disk")
	}
	whole[at] ^= 1
	b.check(os.WriteFile(b.name, whole, 0))
	_, err = changed(a, b, differences(a, b, 4096))
	if !errors.Is(err, ErrCannotTell) || !strings.Contains(err.Error(), "belongs to no file") {
		t.Errorf("%v", err)
	}
}

// TestXattrBlocksThatSeveralShare: files with the same long xattrs have one block
// of them, whose count changes with every file.
func TestXattrBlocksThatSeveralShare(t *testing.T) {
	testenv.Leaks(t)
	a := newDisk(t, 32<<20)
	value := strings.Repeat("v", 300)
	set := func(d disk, dir string, names ...string) {
		for _, n := range names {
			d.file(dir+"/"+n, nil)
			_, err := treegen.Apply(dir, []treegen.Op{
				{Verb: treegen.Setxattr, Path: n, Attr: "user.a", Value: value, Sec: 5},
				{Verb: treegen.Setxattr, Path: n, Attr: "user.b", Value: value, Sec: 5}})
			d.check(err)
		}
	}
	a.change(func(dir string) { set(a, dir, "one", "two", "three") })
	b := a.copy()
	b.change(func(dir string) {
		set(b, dir, "four", "five")
		b.check(os.Remove(dir + "/two"))
	})
	c := compare(t, "shared", a, b, differences(a, b, 4096))
	names, _, _ := c.Names(".")
	slices.Sort(names)
	if got := strings.Join(names, " "); got != "five four two" {
		t.Errorf("candidates %q: the files that share a block did not change", got)
	}
	d := b.copy()
	d.change(func(dir string) {
		for _, n := range []string{"one", "three", "four", "five"} {
			_, err := treegen.Apply(dir, []treegen.Op{{Verb: treegen.Setxattr, Path: n, Attr: "user.c", Value: "1", Sec: 6}})
			d.check(err)
		}
	})
	compare(t, "all of them", b, d, differences(b, d, 4096))
}

// TestLargeDirectories: names in an index of two levels, and
// files with extents in several nodes.
func TestLargeDirectories(t *testing.T) {
	testenv.AnyKernel(t)
	testenv.Leaks(t)
	a := newDisk(t, 96<<20, "-b", "1024", "-N", "20000")
	a.change(func(dir string) {
		for n := range 8000 {
			a.file(fmt.Sprintf("%s/large/%0100d", dir, n), nil)
		}
		f, err := os.Create(dir + "/holes")
		a.check(err)
		for n := range int64(2000) {
			_, err := f.WriteAt([]byte{1}, n*8192)
			a.check(err)
		}
		a.check(f.Close())
	})
	b := a.copy()
	b.change(func(dir string) {
		b.file(dir+"/large/new", nil)
		b.check(os.Remove(fmt.Sprintf("%s/large/%0100d", dir, 77)))
		b.check(os.Truncate(fmt.Sprintf("%s/large/%0100d", dir, 78), 9))
		f, err := os.OpenFile(dir+"/holes", os.O_RDWR, 0)
		b.check(err)
		for n := range int64(400) {
			_, err := f.WriteAt([]byte{1}, n*8192+4096)
			b.check(err)
		}
		b.check(f.Close())
	})
	b.fsck()
	c := compare(t, "large", a, b, differences(a, b, 4096))
	if c.Len() > 8 {
		t.Errorf("%d candidates: %v", c.Len(), c)
	}
}

func TestWhatCannotBeTold(t *testing.T) {
	testenv.AnyKernel(t)
	testenv.Leaks(t)
	a := newDisk(t, 16<<20)
	for _, o := range []struct{ feature, want string }{
		{"inline_data", "features"}, {"ea_inode", "features"}, {"casefold", "features"}, {"encrypt", "features"}, {"bigalloc", "features"}, {"verity", "features"},
		{"^extents,^64bit", "extent"},
	} {
		d := newDisk(t, 16<<20, "-O", o.feature)
		if _, err := changed(d, d, nil); !errors.Is(err, ErrCannotTell) || !strings.Contains(err.Error(), o.want) {
			t.Errorf("%s: %v", o.feature, err)
		}
	}
	if _, err := changed(a, newDisk(t, 16<<20), nil); !errors.Is(err, ErrCannotTell) || !strings.Contains(err.Error(), "identity") {
		t.Errorf("another file system: %v", err)
	}
	b := a.copy()
	b.change(func(dir string) {
		b.file(dir+"/a", []byte("a"))
		mounted := b.copy() // its journal is not at rest
		if _, err := changed(a, mounted, differences(a, mounted, 4096)); !errors.Is(err, ErrCannotTell) || !strings.Contains(err.Error(), "journal") {
			t.Errorf("mounted: %v", err)
		}
	})
	empty := disk{t, filepath.Join(testenv.Scratch(t), "empty")}
	empty.check(os.WriteFile(empty.name, make([]byte, 100), 0o600))
	if _, err := changed(empty, empty, nil); !errors.Is(err, ErrCannotTell) {
		t.Errorf("no file system: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f := a.open()
	defer f.Close()
	if _, err := Changed(ctx, f, f, []Range{{0, 16 << 20}}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
