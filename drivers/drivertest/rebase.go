package drivertest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/layer"
)

// A rebase takes names away and puts others there, and each time the kernel sets
// the time of a directory. Whoever is stopped in between and asks the directories
// for their times when he begins again gets "now"; so these cases stop it at every
// step, and want the very same tree from a second attempt, nanoseconds included.
var rebaseCases = []testCase{
	{"a rebase that was killed, done again", rebaseKilled},
	{"a power cut in a rebase, done again", rebaseCut},
}

// rebaseBase is what the layers are put on: a system as distributions have it.
var rebaseBase = []string{"./", "etc/", "etc/old", "usr/", "usr/lib/", "usr/lib/old", "usr/lib/sub/", "usr/lib/sub/old", "usr/share/",
	"usr/share/old", "usr/bin/", "lib -> usr/lib", "bin -> /usr/bin", "usr/lib/alias -> ../share", "up -> ../../usr"}

// rebaseLayers are archives that are unpacked before their parents are known. The
// first is some of everything.
var rebaseLayers = []struct {
	name  string
	names []string
}{
	{"everything", []string{"etc/new", "usr/lib/x/y", "usr/lib/sub/new", "usr/lib/sub/.wh.old", "lib/d/e/f", "lib/d/g", "usr/lib/d/h",
		"lib/.wh.old", "lib/hard", "lib/hard2 => lib/hard", "lib/named/", "lib/named/f", "usr/lib/named/g", "no/such/.wh.thing",
		"none/.wh..wh..opq", "etc/none/deep/.wh.thing", "lib/alias/.wh.old", "lib/alias/o/.wh..wh..opq", "lib/alias/o/new", "bin/tool"}},
	{"directories that were made up", []string{"etc/new", "usr/lib/x/y", "fresh/a/b"}},
	{"directories for whiteouts only", []string{"no/such/.wh.thing", "none/.wh..wh..opq", "etc/none/.wh.thing", "etc/none/deep/.wh.thing", "etc/f"}},
	{"through a symlink", []string{"lib/d/e/f", "lib/d/g", "bin/tool", "up/local/new"}},
	{"a symlink's both ways", []string{"usr/lib/one", "lib/two", "lib/d/three", "usr/lib/d/four", "lib/sub/five"}},
	{"a directory that is named there", []string{"usr/lib/d/four", "lib/d/", "lib/d/three", "lib/whole/", "lib/whole/f", "lib/whole/g/"}},
	{"an opaque directory through a symlink", []string{"lib/sub/.wh..wh..opq", "lib/sub/new", "bin/.wh..wh..opq", "bin/new"}},
	{"hard links through a symlink", []string{"lib/a", "lib/b => lib/a", "bin/c => lib/a", "lib/d/e => lib/a"}},
	{"a symlink behind a symlink", []string{"lib/alias/f", "lib/alias/d/g", "usr/lib/alias/d/h", "usr/share/d/i"}},
	{"whiteouts through symlinks", []string{"lib/.wh.old", "lib/alias/.wh.old", "bin/.wh.none", "lib/sub/.wh.old"}},
	{"a symlink to above itself", []string{"usr/lib/alias/f", "up/lib/alias/g", "up/lib/h"}},
}

// rebaseTar makes an archive: "d/" is a directory, "l -> t" a symlink, "h => t" a
// hard link, any other name a file that contains its name. All times differ.
func rebaseTar(k *kit, names []string) []byte {
	k.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, n := range names {
		h := &tar.Header{Name: n, Mode: 0o640, Typeflag: tar.TypeReg, Uid: 5, Gid: 6, Format: tar.FormatPAX,
			ModTime: time.Unix(1_600_000_000+int64(i), 123_456_700+int64(i))}
		link, target, isLink := strings.Cut(n, " -> ")
		hard, first, isHard := strings.Cut(n, " => ")
		switch {
		case isLink:
			h.Name, h.Linkname, h.Typeflag, h.Mode = link, target, tar.TypeSymlink, 0o777
		case isHard:
			h.Name, h.Linkname, h.Typeflag = hard, first, tar.TypeLink
			h.ModTime = time.Unix(1_600_000_000+int64(slices.Index(names, first)), 123_456_700+int64(slices.Index(names, first)))
		case strings.HasSuffix(n, "/"):
			h.Typeflag, h.Mode = tar.TypeDir, 0o710
		case !strings.Contains(n, ".wh."):
			h.Size = int64(len(n))
		}
		k.check(w.WriteHeader(h))
		if h.Size > 0 {
			_, err := w.Write([]byte(n))
			k.check(err)
		}
	}
	k.check(w.Close())
	return b.Bytes()
}

// rebasing is a base, and a layer that gets it as its parent at Commit.
type rebasing struct {
	*kit
	name    string
	base    drivers.Ref
	archive []byte
	tree    []string // of the layer, rebased without disturbance
	changes []byte   // as a tar
	steps   int
}

// rebasing does it once undisturbed, and compares that with the layer that knew
// its parents from the start.
func (k *kit) rebasing(name string, names []string) *rebasing {
	k.Helper()
	b := &rebasing{kit: k, name: name, archive: rebaseTar(k, names)}
	b.base = b.unpacked(drivers.Ref{}, rebaseTar(k, rebaseBase))
	k.commit(b.base)
	direct := b.unpacked(b.base, b.archive)
	k.commit(direct)
	r := b.ready()
	ctx := faults.With(k.ctx, func(string) error { b.steps++; return nil })
	_, err := k.driver.Commit(ctx, r, drivers.CommitOptions{})
	k.check(err)
	b.tree, b.changes = k.tree(r), k.diffIsExact(b.base, r).Tar
	k.same(name+": rebased, and applied onto its parents", b.tree, k.tree(direct))
	k.check(k.driver.Remove(k.ctx, direct.ID))
	k.check(k.driver.Remove(k.ctx, r.ID))
	return b
}

func (k *kit) unpacked(on drivers.Ref, archive []byte) drivers.Ref {
	k.Helper()
	r := k.create(on, drivers.CreateOptions{})
	k.check(k.driver.(drivers.Applier).Apply(k.ctx, r, bytes.NewReader(archive), layer.ApplyOptions{}))
	return r
}

// ready makes a layer that knows no parents, and names those it will get.
func (b *rebasing) ready() drivers.Ref {
	b.Helper()
	r := b.unpacked(drivers.Ref{}, b.archive)
	r.Parents = []drivers.ID{b.base.ID}
	return r
}

// again commits a layer whose Commit was stopped, and looks at what became of it.
// on is where: its own kit, or one after a power cut.
func (b *rebasing) again(on *kit, step int, r drivers.Ref) {
	b.Helper()
	_, err := on.driver.Commit(context.WithoutCancel(b.ctx), r, drivers.CommitOptions{})
	if err != nil && !errors.Is(err, errdefs.ErrFailedPrecondition) { // it may have been done
		b.Fatalf("%s: stopped at step %d, then again: %v", b.name, step, err)
	}
	on.same(fmt.Sprintf("%s: stopped at step %d, then again", b.name, step), on.tree(r), b.tree)
	c, err := Collect(b.ctx, on.driver.(drivers.Differ).Diff(b.ctx, b.base, r))
	b.check(err)
	if !bytes.Equal(c.Tar, b.changes) {
		b.Fatalf("%s: stopped at step %d, then again: other changes: %v", b.name, step, c.Lines)
	}
	on.check(on.driver.Remove(b.ctx, r.ID))
}

func needsRebase(k *kit) {
	_, applies := k.driver.(drivers.Applier)
	_, diffs := k.driver.(drivers.Differ)
	if !k.caps.Rebase || !applies || !diffs {
		k.Skip("the driver has no rebase")
	}
}

// rebaseKilled: on tmpfs, where it is cheapest, every archive at each step.
func rebaseKilled(k *kit) {
	needsRebase(k)
	layers, stride := rebaseLayers[:1], 7
	if k.fs.kind == "tmpfs" && k.fs.privileged {
		layers, stride = rebaseLayers, 1
	}
	for _, l := range layers {
		b := k.rebasing(l.name, l.names)
		if b.steps < 5 {
			k.Errorf("%s: only %d steps", l.name, b.steps)
		}
		for step := 0; step < b.steps; step += stride {
			r := b.ready()
			k.check(k.driver.Close())
			k.crashed(job{Crash: true, Op: "commit", Root: k.root, Step: step, Ref: r})
			k.driver = k.open(k.root)
			b.again(k, step, r)
		}
		k.check(k.driver.Remove(k.ctx, b.base.ID))
	}
}

// rebaseCut: what was flushed before a step is all that the second attempt has.
func rebaseCut(k *kit) {
	needsRebase(k)
	d := k.disk()
	b := d.rebasing(rebaseLayers[0].name, rebaseLayers[0].names)
	for first := 0; first < 5; first++ { // of which each step is cut once, of five layers
		r := b.ready()
		step := 0
		ctx := faults.With(d.ctx, func(string) error {
			if step++; step%5 != first {
				return nil
			}
			after, release := d.cut()
			defer release()
			b.again(after, step, r)
			return nil
		})
		_, err := d.driver.Commit(ctx, r, drivers.CommitOptions{})
		d.check(err)
		d.check(d.driver.Remove(d.ctx, r.ID))
		if os.Getenv("LAYERCTL_LONG") == "" {
			return
		}
	}
}
