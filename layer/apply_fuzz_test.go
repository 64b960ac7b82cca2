package layer

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// fuzzLimits keep one input cheap.
var fuzzLimits = Limits{Entries: 200, Depth: 20, PathBytes: 2000, FileSize: 1 << 20, Size: 1 << 20, Sparse: 1 << 20, Xattrs: 8}

func fuzzJail(t *testing.T) *jail {
	dir, err := os.MkdirTemp("", "fuzz")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeFuzz(t, dir) })
	return newJail(t, dir)
}

// removeFuzz removes a tree of any depth and modes.
func removeFuzz(t *testing.T, dir string) {
	parent, err := sys.OpenDir(filepath.Dir(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer parent.Close()
	if err := removeTree(parent, filepath.Base(dir)); err != nil {
		t.Error(err)
	}
}

// FuzzApply: no bytes get out of the root, panic, or hang, in any of the modes.
func FuzzApply(f *testing.F) {
	for _, c := range escapes {
		f.Add(parseTar(c.layer))
	}
	for _, c := range applyCases {
		f.Add(parseTar(c.lower + "\n" + c.layer))
	}
	f.Add(truncatedTar())
	f.Add(sparseTar(1 << 19))
	f.Fuzz(func(t *testing.T, data []byte) {
		j := fuzzJail(t)
		for _, o := range []ApplyOptions{{}, {Whiteouts: WhiteoutsUser, Lower: j.lower}, {Whiteouts: WhiteoutsUser}} {
			o.Volatile, o.Limits, o.Skipped = true, fuzzLimits, func(string, string) {}
			o.Listing = NewListingWriter(io.Discard)
			_ = Apply(t.Context(), j.root, bytes.NewReader(data), o)
			_, _ = o.Listing.Close()
			j.check(t, "fuzz")
		}
	})
}

// FuzzWhiteout: names and orders of whiteouts and entries, on both forms of a
// tree: whatever the letters say, the overlay upper shows what the plain tree is.
func FuzzWhiteout(f *testing.F) {
	for _, c := range applyCases {
		f.Add(c.lower, c.layer)
	}
	f.Fuzz(func(t *testing.T, lower, layer string) {
		low, high := fuzzLines(lower), fuzzLines(layer)
		if os.Getuid() != 0 || low == "" || high == "" {
			t.Skip()
		}
		testenv.Root(t)
		s := newStack(t, fuzzFS(t), "s", WhiteoutsTrusted)
		if !s.applyTar(parseTar(low), low) {
			return
		}
		s.commit()
		if s.applyTar(parseTar(high), high) {
			s.compare(t, low+"\n--\n"+high)
		}
	})
}

func fuzzFS(t *testing.T) string { return testenv.FS(t, "tmpfs", testenv.Size(16<<20)) }

// fuzzLines keeps what parseTar reads, at most a few lines with short paths of
// common names.
func fuzzLines(s string) string {
	var out []string
	for line := range strings.Lines(s) {
		line = strings.TrimSpace(line)
		kind, rest, ok := strings.Cut(line, " ")
		if !ok || len(kind) != 1 || !strings.Contains("dflhpwo", kind) || len(rest) > 40 || len(out) > 12 {
			continue
		}
		name, to, arrow := strings.Cut(rest, "->")
		if name == "" || strings.ContainsAny(rest, "\x00\n\r") || arrow && to == "" || strings.Contains("lh", kind) && !arrow {
			continue
		}
		if file, _, _ := strings.Cut(name, "="); strings.HasSuffix(file, "/") || file == "" {
			continue // archive/tar writes no such name
		}
		if kind == "h" { // an old link group is not the archive's business
			continue
		}
		out = append(out, line)
	}
	return strings.Join(out, "\n")
}

// FuzzDecompress: any bytes are a stream or an error, and what a BlobReader
// passes as a digest is one.
func FuzzDecompress(f *testing.F) {
	for _, c := range compressions {
		f.Add(compress(f, c, truncatedTar()))
	}
	f.Add([]byte("\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := NewBlobReader(bytes.NewReader(data), Blob{Size: int64(len(data))}, Limits{})
		if err != nil {
			return
		}
		defer b.Close()
		n, err := io.Copy(io.Discard, io.LimitReader(b, 16<<20))
		if err == nil && n < 16<<20 && (b.DiffID() == "" || b.Size() != int64(len(data))) {
			t.Errorf("%d bytes read of %d, DiffID %q", b.Size(), len(data), b.DiffID())
		}
		if errors.Is(err, io.EOF) {
			t.Error("io.EOF as an error")
		}
	})
}
