package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/testenv"
)

// jail is a target with a secret beside it that no archive may reach.
type jail struct {
	dir    string // holds root, lower and the secret
	root   string
	lower  string
	before map[string]string
}

func newJail(t testing.TB, dir string) *jail {
	t.Helper()
	j := &jail{dir: dir, root: filepath.Join(dir, "root"), lower: filepath.Join(dir, "lower")}
	err := errors.Join(os.MkdirAll(j.root, 0o755), os.Mkdir(j.lower, 0o755), os.MkdirAll(dir+"/secret/d", 0o755),
		os.WriteFile(dir+"/secret/f", []byte("secret"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	j.before = treeState(t, dir+"/secret")
	return j
}

// check fails if something outside the root has changed, or the root holds a
// file of the outside.
func (j *jail) check(t testing.TB, what string) {
	t.Helper()
	if d := stateDiff(treeState(t, j.dir+"/secret"), j.before); d != "" {
		t.Fatalf("%s: changed outside the root:\n%s", what, d)
	}
	names, err := os.ReadDir(j.dir)
	if err != nil || len(names) != 3 {
		t.Fatalf("%s: left beside the root: %v, %v", what, names, err)
	}
	_ = filepath.WalkDir(j.root, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if b, _ := os.ReadFile(p); string(b) == "secret" {
				t.Fatalf("%s: %s is the secret", what, p)
			}
		}
		return nil
	})
}

// escapes are archives that try to get out; want is the tree that they make in
// the root, or err.
var escapes = []struct{ name, layer, want, err string }{
	{name: "dot dot", layer: "f ../x=1\nf ../../secret/f=1", want: "d secret\nf secret/f=1\nf x=1"},
	{name: "absolute", layer: "f /x=1\nf //secret/f=1", want: "d secret\nf secret/f=1\nf x=1"},
	{name: "dot dot in the middle", layer: "d a\nf a/../../x=1\nf a/./b//../y=1", want: "d a\nd a/b\nf a/y=1\nf x=1"},
	{name: "through an absolute symlink", layer: "l s->/secret\nd secret\nf s/f=1", want: "l s->/secret\nd secret\nf secret/f=1"},
	{name: "through a relative symlink", layer: "l s->../../secret\nf s/f=1", want: "l s->../../secret\nd secret\nf secret/f=1"},
	{name: "through a chain", layer: "d a\nl a/up->..\nl b->a/up/../../..\nf b/secret/f=1", want: "d a\nl a/up->..\nl b->a/up/../../..\nd secret\nf secret/f=1"},
	{name: "dot dot after a symlink", layer: "d a\nd a/b\nl s->a/b\nf s/../x=1", want: "d a\nd a/b\nf a/x=1\nl s->a/b"},
	{name: "a file replaces the symlink", layer: "l s->../secret/f\nf s=1", want: "f s=1"},
	{name: "a directory replaces the symlink", layer: "l s->../secret\nd s\nf s/x=1", want: "d s\nf s/x=1"},
	{name: "link out", layer: "h x->../secret/f", err: "hard link"},
	{name: "link out, absolute", layer: "h x->/secret/f", err: "hard link"},
	{name: "link out, through a symlink", layer: "l s->../secret\nh x->s/f", err: "hard link"},
	{name: "link to the symlink, then write", layer: "l s->../secret/f\nh x->s\nf x=1", want: "l s->../secret/f\nf x=1"},
	{name: "link to the symlink, then through it", layer: "l s->../secret\nh x->s\nf x/f=1", want: "l s->../secret\nd secret\nf secret/f=1\nl x->../secret"},
	{name: "whiteout outside", layer: "w ../secret/f\nw ../secret\nf ../secret/.wh..wh..opq=", want: ""},
	{name: "whiteout through a symlink", layer: "l s->../secret\nw s/f\no s", want: "l s->../secret"},
	{name: "a loop", layer: "l a->b\nl b->a\nf a/x=1", err: `"a/x"`},
	{name: "a loop in itself", layer: "l a->a/a\nf a/x=1", err: "too many levels"},
	{name: "proc", layer: "l s->/proc/self/root\nf s/x=1", want: "d proc\nd proc/self\nd proc/self/root\nf proc/self/root/x=1\nl s->/proc/self/root"},
}

func TestApplyStaysInTheRoot(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	for i, c := range escapes {
		for _, o := range []ApplyOptions{{}, {Whiteouts: WhiteoutsTrusted}, {Whiteouts: WhiteoutsTrusted, Lower: "lower"}} {
			what := fmt.Sprintf("%s (%d%s)", c.name, o.Whiteouts, o.Lower)
			j := newJail(t, filepath.Join(dir, fmt.Sprint(i, o.Whiteouts, o.Lower)))
			if o.Lower != "" {
				o.Lower = j.lower
			}
			o.Volatile = true
			err := Apply(t.Context(), j.root, bytes.NewReader(parseTar(c.layer)), o)
			j.check(t, what)
			if c.err != "" {
				checkError(t, err, c.err)
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", what, err)
				continue
			}
			if o.Whiteouts != WhiteoutsNone && o.Lower == "" {
				continue // its whiteouts are all there
			}
			if got, want := shortTree(t, j.root), trimLines(c.want); got != want {
				t.Errorf("%s: got\n%s\nwant\n%s", what, got, want)
			}
		}
	}
}

// A PAX record may say another path than the header that people look at.
func TestApplyPAXPathIsConfinedToo(t *testing.T) {
	testenv.Root(t)
	j := newJail(t, filepath.Join(testenv.FS(t, "tmpfs"), "j"))
	a := newTar()
	a.symlink("s", "../secret")
	a.add(tar.Header{Name: strings.Repeat("../", 60) + "secret/f", Typeflag: tar.TypeReg}, "x")
	a.add(tar.Header{Name: "s/" + strings.Repeat("n", 120), Typeflag: tar.TypeReg}, "x")
	mustTar(t, j.root, a.bytes())
	j.check(t, "PAX path")
}

// Somebody who moves directories and plants symlinks in the target while it is
// unpacked does not get a file outside.
func TestApplyUnderSymlinkRaces(t *testing.T) {
	testenv.Root(t)
	j := newJail(t, filepath.Join(testenv.FS(t, "tmpfs"), "j"))
	a := newTar()
	for i := range 3000 {
		a.file(fmt.Sprintf("a/b%d/f", i%7), "not the secret")
		a.white(fmt.Sprintf("a/b%d/.wh.g", i%5))
	}
	archive := a.bytes()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ctx.Err() == nil; i++ {
			b := fmt.Sprintf("%s/a/b%d", j.root, i%7)
			_ = os.Rename(b, b+"x")
			_ = os.Symlink("../../secret", b)
			_ = os.Remove(b)
			_ = os.Rename(b+"x", b)
		}
	}()
	for range 10 {
		_ = Apply(ctx, j.root, bytes.NewReader(archive), ApplyOptions{Volatile: true, openDirs: 2})
	}
	cancel()
	<-done
	j.check(t, "race")
}

// A limit refuses by name what goes beyond it, and takes what does not.
func TestApplyLimits(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	deep := strings.TrimSuffix(strings.Repeat("d/", 1025), "/")
	pax := func(records map[string]string) []byte {
		return newTar().add(tar.Header{Name: "f", PAXRecords: records}, "").bytes()
	}
	many := map[string]string{}
	for i := range 257 {
		many[fmt.Sprint(paxSchily, "user.", i)] = "x"
	}
	for _, c := range []struct {
		name    string
		archive []byte
		l       Limits
		want    string // "" if it is taken
	}{
		{"deep path", newTar().file(deep, "x").bytes(), Limits{}, "components of the name: 1025, more than the limit of 1024"},
		{"deep path, allowed", newTar().file(deep, "x").bytes(), Limits{Depth: -1}, ""},
		{"long name", newTar().file(strings.Repeat("d/", 8200)+"x", "").bytes(), Limits{Depth: -1}, "bytes of the name"},
		{"long link name", newTar().symlink("f", strings.Repeat("d/", 8200)).bytes(), Limits{}, "bytes of the link name"},
		{"long component", newTar().file(strings.Repeat("n", 256), "").bytes(), Limits{}, "name too long"},
		{"large file", newTar().file("f", "12345").bytes(), Limits{FileSize: 4}, "bytes of the file: 5"},
		{"large layer", newTar().file("f", strings.Repeat("x", 10_000)).bytes(), Limits{Size: 8000}, "bytes of the layer"},
		{"large xattr", pax(map[string]string{paxSchily + "user.x": strings.Repeat("v", 70_000)}), Limits{}, `bytes of xattr "user.x"`},
		{"many xattrs", pax(many), Limits{}, "xattrs: 257"},
		{"much PAX", pax(map[string]string{"some.thing": strings.Repeat("v", 2000)}), Limits{PAXBytes: 1000}, "bytes of PAX records"},
		{"much PAX, not allowed", rawTar([2]string{"x", testPAXRecord("some.thing", strings.Repeat("v", 2<<20))}, [2]string{"0", ""}), Limits{PAXBytes: -1}, "too long"},
		{"many entries", newTar().file("a", "").file("b", "").file("f", "").bytes(), Limits{Entries: 2}, "entries: 3"},
		{"global records", globalTar(map[string]string{"path": "x"}), Limits{}, `global PAX record "path"`},
		{"a global comment", globalTar(map[string]string{"comment": "x"}), Limits{}, ""},
		{"unknown type", newTar().add(tar.Header{Name: "f", Typeflag: 'Z'}).bytes(), Limits{}, "unknown type 'Z'"},
		{"owner", newTar().add(tar.Header{Name: "f", Uid: 1 << 32}, "").bytes(), Limits{}, "owner 4294967296:0"},
		{"no owner", newTar().add(tar.Header{Name: "f", Gid: 1<<32 - 1}, "").bytes(), Limits{}, "owner 0:4294967295"},
		{"device", newTar().add(tar.Header{Name: "f", Typeflag: tar.TypeChar, Devmajor: 1 << 12}).bytes(), Limits{}, "device 4096:0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := filepath.Join(dir, strings.ReplaceAll(c.name, " ", "-"))
			if err := os.Mkdir(root, 0o755); err != nil {
				t.Fatal(err)
			}
			err := Apply(t.Context(), root, bytes.NewReader(c.archive), ApplyOptions{Volatile: true, Limits: c.l})
			checkError(t, err, c.want)
		})
	}
}

func globalTar(records map[string]string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: records}), w.Close()); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// An archive of a few bytes may not unpack to a terabyte of holes.
func TestApplyTerabyteOfHoles(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	for _, size := range []int64{1 << 40, 100 << 40} {
		err := Apply(t.Context(), dir, bytes.NewReader(sparseTar(size)), ApplyOptions{Volatile: true})
		if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), `"f"`) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

// sparseTar is an archive of a file that is one hole (GNU.sparse 1.0), written
// by hand as archive/tar writes none.
func sparseTar(size int64) []byte {
	var pax strings.Builder
	for _, r := range [][2]string{{"GNU.sparse.major", "1"}, {"GNU.sparse.minor", "0"}, {"GNU.sparse.name", "f"}, {"GNU.sparse.realsize", fmt.Sprint(size)}} {
		pax.WriteString(testPAXRecord(r[0], r[1]))
	}
	dataMap := fmt.Sprintf("1\n%d\n0\n", size)
	return rawTar([2]string{"x", pax.String()}, [2]string{"0", dataMap + strings.Repeat("\x00", 512-len(dataMap))})
}

// rawTar is an archive of headers of a type and their bodies.
func rawTar(parts ...[2]string) []byte {
	var b bytes.Buffer
	for _, p := range parts {
		b.Write(rawHeader(p[0][0], int64(len(p[1]))))
		b.WriteString(p[1])
		b.Write(make([]byte, -len(p[1])&511))
	}
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

func testPAXRecord(k, v string) string {
	n := len(k) + len(v) + 3
	for {
		s := fmt.Sprintf("%d %s=%s\n", n, k, v)
		if len(s) == n {
			return s
		}
		n = len(s)
	}
}

func rawHeader(typ byte, size int64) []byte {
	h := make([]byte, 512)
	copy(h, "f")
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00%011o\x00", size, 0))
	copy(h[148:], "        ")
	h[156] = typ
	copy(h[257:], "ustar\x0000")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return h
}

// truncatedTar has entries of every kind of header and content.
func truncatedTar() []byte {
	a := newTar()
	a.dir("d/")
	a.file("d/empty", "")
	a.file("d/small", "0123456789")
	a.file("d/"+strings.Repeat("long", 50), strings.Repeat("x", 2000))
	a.symlink("d/s", strings.Repeat("t/", 120))
	a.link("d/h", "d/small")
	a.white("d/.wh.gone")
	a.add(tar.Header{Name: "d/x", PAXRecords: map[string]string{"SCHILY.xattr.user.x": strings.Repeat("v", 700)}}, strings.Repeat("y", 700))
	return a.bytes()
}

// Cut anywhere, an archive is refused with the byte and, where one has begun,
// the entry.
func TestApplyTruncated(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	whole := truncatedTar()
	end := len(whole) - 1024
	for n := 0; n < len(whole); n += 512 {
		for _, at := range []int{n, n + 1, n + 511} {
			root := filepath.Join(dir, "t")
			if err := os.Mkdir(root, 0o755); err != nil {
				t.Fatal(err)
			}
			err := Apply(t.Context(), root, bytes.NewReader(whole[:at]), ApplyOptions{Volatile: true})
			if at >= end+512 && err == nil {
				// One block of zeros is end enough for most programs.
			} else if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "at byte") {
				t.Errorf("cut at %d of %d: %v", at, len(whole), err)
			}
			if err := os.RemoveAll(root); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := Apply(t.Context(), dir, bytes.NewReader(whole[:end]), ApplyOptions{Volatile: true, Unterminated: true}); err != nil {
		t.Errorf("unterminated, allowed: %v", err)
	}
}

// A header whose bytes have changed is refused, with what came before it.
func TestApplyCorruptHeader(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	archive := newTar().file("a", "x").file("b", "y").bytes()
	archive[2048+150] ^= 1
	err := Apply(t.Context(), dir, bytes.NewReader(archive), ApplyOptions{Volatile: true})
	if !errdefs.IsDataLoss(err) {
		t.Errorf("%v", err)
	}
	checkError(t, err, `after "a"`)
}

// The reader's own error comes through, at the end too.
func TestApplyReaderErrors(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	archive := newTar().file("a", "x").bytes()
	broken := errors.New("the network is down")
	for _, n := range []int{0, 600, 1700, len(archive)} {
		err := Apply(t.Context(), dir, io.MultiReader(bytes.NewReader(archive[:n]), errReader{broken}), ApplyOptions{Volatile: true})
		if !errors.Is(err, broken) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// What the file system refuses names the entry and the errno.
func TestApplyFileSystemErrors(t *testing.T) {
	small := testenv.FS(t, "tmpfs", testenv.Size(1<<20))
	big := newTar().file("small", "x").file("big", strings.Repeat("x", 2<<20)).bytes()
	err := Apply(t.Context(), small, bytes.NewReader(big), ApplyOptions{Volatile: true})
	if !errdefs.IsResourceExhausted(err) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("full: %v", err)
	}
	checkError(t, err, `"big"`)
	readOnly := testenv.FS(t, "ext4", testenv.Size(64<<20), testenv.MountOptions("ro"))
	err = Apply(t.Context(), readOnly, bytes.NewReader(big), ApplyOptions{Volatile: true})
	if !errdefs.IsPermissionDenied(err) || !errors.Is(err, syscall.EROFS) {
		t.Errorf("read-only: %v", err)
	}
	err = Apply(t.Context(), small+"/nowhere", bytes.NewReader(big), ApplyOptions{Volatile: true})
	if !errdefs.IsNotFound(err) {
		t.Errorf("no target: %v", err)
	}
}

// A cancelled context ends it, and a step that fails does; nothing is left open.
func TestApplyCancelled(t *testing.T) {
	testenv.Leaks(t)
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	a := newTar()
	for i := range 2000 {
		a.file(fmt.Sprintf("d%d/f", i), strings.Repeat("x", 1000))
	}
	archive := a.bytes()
	ctx, cancel := context.WithCancel(t.Context())
	o := ApplyOptions{Volatile: true, Progress: func(n int64) {
		if n > 1<<20 {
			cancel()
		}
	}}
	if err := Apply(ctx, dir, bytes.NewReader(archive), o); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	broken := errors.New("step")
	for _, step := range []string{"layer: apply: unpacked", "layer: apply: flushed"} {
		ctx := faults.With(t.Context(), func(s string) error {
			if s == step {
				return broken
			}
			return nil
		})
		if err := Apply(ctx, dir, bytes.NewReader(archive), ApplyOptions{}); !errors.Is(err, broken) {
			t.Errorf("%s: %v", step, err)
		}
	}
}
