package overlay

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
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
	return b.commit(b.applied(drivers.Ref{}, archive(b, "./", "etc/", "etc/old", "usr/", "usr/lib/", "usr/lib/old", "usr/bin/", "lib -> usr/lib",
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

// Commit is tried again after it was stopped anywhere.
func TestRebaseIsRepeatable(t *testing.T) {
	names := []string{"lib/d/e/f", "lib/g/h", "usr/lib/g/i", "etc/new"}
	b := newBench(t, "tmpfs", nil)
	base := b.system()
	want := b.applied(drivers.Ref{}, archive(t, names...))
	want.Parents = on(base)
	b.commit(want)
	_, wantLines := b.tarOf(b.Diff(b.ctx, base, want))
	stopped := errors.New("stopped")
	for n := range 20 {
		r := b.applied(drivers.Ref{}, archive(t, names...))
		r.Parents = on(base)
		at := 0
		ctx := faults.With(context.Background(), func(string) error {
			if at++; at > n {
				return stopped
			}
			return nil
		})
		_, err := b.Commit(ctx, r, drivers.CommitOptions{})
		if err == nil {
			if n < 3 {
				t.Errorf("only %d steps", n)
			}
			return
		}
		b.wants("stopped", err, stopped)
		b.commit(r)
		if _, lines := b.tarOf(b.Diff(b.ctx, base, r)); !slices.Equal(lines, wantLines) {
			t.Errorf("stopped at step %d: %q, want %q", n, lines, wantLines)
		}
	}
	t.Error("more steps than thought")
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
