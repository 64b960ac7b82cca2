package overlay

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// archive makes a layer tar: "d/" is a directory of mode 0710, "l -> t" a
// symlink, any other name a file that contains its name.
func archive(t testing.TB, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	at := time.Unix(1_600_000_000, 0)
	for _, n := range names {
		h := &tar.Header{Name: n, Mode: 0o640, ModTime: at, Typeflag: tar.TypeReg, Uid: 5, Gid: 6}
		link, target, isLink := strings.Cut(n, " -> ")
		switch {
		case isLink:
			h.Name, h.Linkname, h.Typeflag, h.Mode = link, target, tar.TypeSymlink, 0o777
		case strings.HasSuffix(n, "/"):
			h.Typeflag, h.Mode = tar.TypeDir, 0o710
		case !strings.Contains(n, ".wh."):
			h.Size = int64(len(n))
		}
		err := w.WriteHeader(h)
		if err == nil && h.Size > 0 {
			_, err = w.Write([]byte(n))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (b *bench) applied(parent drivers.Ref, archive []byte) drivers.Ref {
	b.Helper()
	r := b.create(parent, drivers.CreateOptions{})
	b.check(b.Apply(b.ctx, r, bytes.NewReader(archive), layer.ApplyOptions{}))
	return r
}

// system is a base layer as distributions have it.
func (b *bench) system() drivers.Ref {
	b.Helper()
	return b.commit(b.applied(drivers.Ref{}, archive(b, "./", "etc/", "etc/old", "usr/", "usr/lib/", "usr/lib/old", "usr/lib/alias -> ../bin", "usr/bin/", "lib -> usr/lib",
		"bin -> /usr/bin", "file", "loop -> loop", "dangling -> nowhere", "up -> ../../usr")))
}

// A layer that is applied without parents and gets them at Commit must be the
// layer that it is when its parents are known from the start.
func TestRebaseEqualsApply(t *testing.T) {
	for name, names := range map[string][]string{
		"implied directories":          {"etc/new", "usr/lib/x/y", "fresh/a/b"},
		"named directories":            {"./", "etc/", "etc/new", "usr/", "usr/lib/x"},
		"whiteouts":                    {"etc/.wh.old", "usr/lib/.wh.old", "usr/.wh.bin", ".wh.nothing"},
		"opaque":                       {"etc/", "etc/.wh..wh..opq", "etc/new", "usr/lib/.wh..wh..opq", "usr/lib/new"},
		"below a replaced file":        {"file/", "file/a/b"},
		"below a replaced symlink":     {"lib/", "lib/a/x"},
		"replaced directory":           {".wh.etc", "etc/", "etc/new"},
		"below a replaced directory":   {".wh.usr", "usr/", "usr/lib/x"},
		"below an opaque directory":    {"usr/", "usr/.wh..wh..opq", "usr/lib/x/y"},
		"below an implied opaque one":  {"usr/.wh..wh..opq", "usr/lib/x/y"},
		"through a symlink":            {"lib/new"},
		"through an absolute symlink":  {"bin/new", "bin/sub/new"},
		"through .. of a symlink":      {"up/local/new"},
		"whiteout through a symlink":   {"lib/.wh.old"},
		"a symlink's both ways":        {"usr/lib/one", "lib/two", "lib/d/three", "usr/lib/d/four"},
		"named below a symlink":        {"lib/d/", "lib/d/f"},
		"named below, implied there":   {"usr/lib/d/four", "lib/d/", "lib/d/three"},
		"a directory over a symlink":   {"lib/", "lib/new"},
		"a file over a symlink":        {"lib"},
		"a link over a directory":      {"etc -> usr"},
		"whiteouts of what is nowhere": {"no/such/.wh.thing", "none/.wh..wh..opq", "etc/none/.wh.thing", ".wh.usr", "usr/lib/.wh.old"},
		"a symlink of the layer's own": {"l -> usr", "l/x"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, "ext4", nil)
			base := b.system()
			a := archive(t, names...)
			want := b.commit(b.applied(base, a))
			r := b.applied(drivers.Ref{}, a)
			r.Parents = on(base)
			b.commit(r)
			wantTar, wantLines := b.tarOf(b.Diff(b.ctx, base, want))
			gotTar, lines := b.tarOf(b.Diff(b.ctx, base, r))
			if !slices.Equal(lines, wantLines) {
				t.Errorf("rebased:\n%s\napplied onto its parents:\n%s", strings.Join(lines, "\n"), strings.Join(wantLines, "\n"))
			} else if wantTar != gotTar {
				t.Error("the same changes, other bytes")
			}
			b.exact(base, r)
			if b.exists(b.path(r.ID.String(), appliedFile)) || b.exists(b.path(r.ID.String(), workDir)) {
				t.Error("a committed layer has what only a writable one needs")
			}
		})
	}
}

func TestRebaseRefusesByName(t *testing.T) {
	for name, c := range map[string]struct {
		names []string
		says  string
	}{
		"below a file":               {[]string{"file/below"}, `"file"`},
		"below a loop":               {[]string{"loop/below"}, `"loop"`},
		"below a dangling link":      {[]string{"dangling/below"}, `"dangling"`},
		"one file twice":             {[]string{"lib/f", "usr/lib/f"}, "usr/lib/f"},
		"one named directory twice":  {[]string{"lib/d/", "usr/lib/d/"}, "usr/lib/d"},
		"a file and a directory":     {[]string{"lib/f", "usr/lib/f/g"}, "usr/lib/f"},
		"a whiteout and a directory": {[]string{"lib/.wh.d", "usr/lib/d/"}, "usr/lib/d"},
		"a link's place taken":       {[]string{"usr/lib/alias/f", "lib/alias/", "lib/alias/g"}, "usr/lib/alias"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, "tmpfs", nil)
			base := b.system()
			r := b.applied(drivers.Ref{}, archive(t, c.names...))
			r.Parents = on(base)
			_, err := b.Commit(b.ctx, r, drivers.CommitOptions{})
			b.wants("commit", err, errdefs.ErrFailedPrecondition, c.says)
			b.check(b.Remove(b.ctx, r.ID))
		})
	}
}

// A layer with whiteouts that lies on nothing shows none, before Commit and after.
func TestWhiteoutsOnNothing(t *testing.T) {
	b := newBench(t, "ext4", nil)
	r := b.applied(drivers.Ref{}, archive(t, "./", "d/", "d/f", "d/.wh.g", ".wh.h", "no/such/.wh.thing", "e/.wh..wh..opq", "e/f"))
	want := []string{"A .", "A d", "A d/f", "A e", "A e/f"}
	look := func(what string, want []string) {
		if _, lines := b.tarOf(b.Diff(b.ctx, drivers.Ref{}, r)); !slices.Equal(lines, want) {
			t.Errorf("%s: diff %q, want %q", what, lines, want)
		}
		b.mounted(b.mounts(r, drivers.MountOptions{ReadOnly: true}), func(dir string) {
			_, lines := b.tarOf(layer.DiffTrees(b.ctx, "", dir, layer.DiffOptions{}))
			if !slices.Equal(lines, want) {
				t.Errorf("%s: shows %q, want %q", what, lines, want)
			}
		})
	}
	// Until then it may get parents, which may have no/such.
	look("before Commit", append(slices.Clone(want), "A no", "A no/such"))
	b.edit(r, func(dir string) { b.check(os.Mkdir(dir+"/h", 0o755)); b.check(os.Remove(dir + "/h")) })
	before, err := os.Stat(b.fs(r.ID) + "/d")
	b.check(err)
	b.commit(r)
	look("after Commit", want)
	after, err := os.Stat(b.fs(r.ID) + "/d")
	b.check(err)
	if !before.ModTime().Equal(after.ModTime()) {
		t.Error("taking a whiteout away changed its directory's mtime")
	}
	if b.exists(b.fs(r.ID) + "/d/g") {
		t.Error("the whiteout is still there")
	}
}

// stopAt lets a Commit stop at its n-th step; false if it has none.
func (b *bench) stopAt(r drivers.Ref, n int) bool {
	b.Helper()
	stopped := errors.New("stopped")
	at := 0
	ctx := faults.With(context.Background(), func(string) error {
		if at++; at > n {
			return stopped
		}
		return nil
	})
	_, err := b.Commit(ctx, r, drivers.CommitOptions{})
	if err == nil {
		return false
	}
	b.wants("stopped", err, stopped)
	return true
}

// Commit is tried again after it was stopped anywhere, with the same result on
// disk. (drivertest kills it everywhere, and looks at what is seen.)
func TestRebaseIsRepeatable(t *testing.T) {
	names := []string{"lib/d/e/f", "lib/g/h", "usr/lib/g/i", "etc/new", "no/.wh.x", "lib/.wh.old", "usr/.wh..wh..opq", "bin/.wh..wh..opq"}
	b := newBench(t, "tmpfs", nil)
	base := b.system()
	rebased := func(stop int) (stopped bool, found []string) {
		r := b.applied(drivers.Ref{}, archive(t, names...))
		r.Parents = on(base)
		stopped = b.stopAt(r, stop)
		if stopped {
			b.commit(r)
		}
		if ents, err := os.ReadDir(b.path(r.ID.String())); err != nil || len(ents) != 3 {
			t.Errorf("stopped at step %d, then again: left in the layer: %v, %v", stop, ents, err)
		}
		return stopped, b.onDisk(r)
	}
	_, want := rebased(1000)
	for n := 0; ; n++ {
		stopped, found := rebased(n)
		if !slices.Equal(found, want) {
			t.Errorf("stopped at step %d, then again:\n%s\nwant:\n%s", n, strings.Join(found, "\n"), strings.Join(want, "\n"))
		}
		if !stopped {
			if n < 20 {
				t.Errorf("only %d steps", n)
			}
			return
		}
	}
}

// onDisk lists a layer's own directory, with overlayfs's xattrs.
func (b *bench) onDisk(r drivers.Ref) (lines []string) {
	b.Helper()
	for e, err := range layer.Walk(b.ctx, b.fs(r.ID)) {
		b.check(err)
		dir, err := sys.OpenDir(b.fs(r.ID))
		b.check(err)
		opaque, err := dir.Getxattr(e.Path, "trusted.overlay.opaque")
		dir.Close()
		if err != nil && !errors.Is(err, syscall.ENODATA) {
			b.Fatal(err)
		}
		if e.Type == layer.TypeChar { // a whiteout has the time at which it was made
			e.ModTime = layer.Timespec{}
		}
		lines = append(lines, fmt.Sprintf("%+v opaque=%q", e, opaque))
	}
	return lines
}

// A layer that a Commit has begun to fit to one parent is no other's, and nothing
// is put into it before it is committed.
func TestRebaseThatWasBegun(t *testing.T) {
	b := newBench(t, "tmpfs", nil)
	base, other := b.system(), b.system()
	r := b.applied(drivers.Ref{}, archive(t, "lib/new", "etc/new"))
	begun := drivers.Ref{ID: r.ID, Parents: on(base)}
	if !b.stopAt(begun, 5) || !b.exists(b.path(r.ID.String(), rebaseFile)) {
		t.Fatal("it was not begun")
	}
	_, err := b.Mounts(b.ctx, r, drivers.MountOptions{})
	b.wants("mounts", err, errdefs.ErrFailedPrecondition, "Commit on "+base.ID.String())
	b.wants("apply", b.Apply(b.ctx, r, bytes.NewReader(archive(t, "x")), layer.ApplyOptions{}), errdefs.ErrFailedPrecondition, "remove it")
	for _, parents := range [][]drivers.ID{on(other), nil} {
		_, err = b.Commit(b.ctx, drivers.Ref{ID: r.ID, Parents: parents}, drivers.CommitOptions{})
		b.wants("commit on another", err, errdefs.ErrFailedPrecondition, "Commit on "+base.ID.String())
	}
	b.mounted(b.mounts(r, drivers.MountOptions{ReadOnly: true}), func(string) {})
	b.commit(begun)
	b.mounted(b.mounts(begun, drivers.MountOptions{}), func(dir string) {
		for _, n := range []string{"/usr/lib/new", "/lib/new", "/etc/new", "/etc/old"} {
			if !b.exists(dir + n) {
				t.Errorf("%s is not there", n)
			}
		}
	})
}

// A refusal comes before the first change: the layer is as it was.
func TestRebaseRefusedChangesNothing(t *testing.T) {
	b := newBench(t, "tmpfs", nil)
	base := b.system()
	r := b.applied(drivers.Ref{}, archive(t, "bin/moves", "etc/dressed", "no/.wh.thing", "lib/f", "usr/lib/f"))
	before := b.onDisk(r)
	_, err := b.Commit(b.ctx, drivers.Ref{ID: r.ID, Parents: on(base)}, drivers.CommitOptions{})
	b.wants("commit", err, errdefs.ErrFailedPrecondition, "usr/lib/f")
	if after := b.onDisk(r); !slices.Equal(after, before) || b.exists(b.path(r.ID.String(), rebaseFile)) {
		t.Errorf("after:\n%s\nbefore:\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
	}
	b.edit(r, func(dir string) { b.check(os.Remove(dir + "/lib/f")) })
	b.commit(drivers.Ref{ID: r.ID, Parents: on(base)})
}

// A commit that was killed between the mode and the time of a made-up directory
// must give it the parents' time when it is done again.
func TestRebaseKilledLeavesTimeZero(t *testing.T) {
	b := newBench(t, "ext4", nil)
	base := b.system()
	r := b.applied(drivers.Ref{}, archive(t, "etc/new"))
	dir := b.fs(r.ID) + "/etc"
	b.check(os.Chown(dir, 5, 6))
	b.check(os.Chmod(dir, 0o710)) // as etc is in base; Chtimes was next
	b.check(os.Chtimes(dir, time.Unix(0, 0), time.Unix(0, 0)))
	r.Parents = on(base)
	b.commit(r)
	want, err := os.Stat(b.fs(base.ID) + "/etc")
	b.check(err)
	got, err := os.Stat(dir)
	b.check(err)
	if !got.ModTime().Equal(want.ModTime()) {
		t.Errorf("etc has the time %v, its parent's is %v", got.ModTime(), want.ModTime())
	}
}
