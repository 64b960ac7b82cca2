package layer

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"

	"github.com/layerctl/layerctl/internal/testenv"
)

// zstdFrame is a frame that asks for a window of 1<<windowLog bytes and holds
// content, uncompressed (RFC 8878, 3.1.1).
func zstdFrame(windowLog int, content string) string {
	n := len(content)<<3 | 1 // the last block, raw
	return "\x28\xb5\x2f\xfd\x00" + string([]byte{byte(windowLog-10) << 3, byte(n), byte(n >> 8), byte(n >> 16)}) + content
}

// TestZstdWindow: a frame that asks for more memory than the limit is refused
// before it gets any, whether it is the first or a later one, and whether it asks
// by a window or as a single segment.
func TestZstdWindow(t *testing.T) {
	single := "\x28\xb5\x2f\xfd\xe0\x00\x00\x00\x00\x08\x00\x00\x00\x01\x00\x00" // 32 GiB of content, which is the window
	for _, c := range []struct {
		name, blob string
		lim        int64
		says       string // "": none
	}{
		{"default", zstdFrame(25, "x"), 0, ""},
		{"above the default", zstdFrame(26, "x"), 0, "window of a frame: 67108864, more than the limit of 33554432"},
		{"raised", zstdFrame(26, "x"), 64 << 20, ""},
		{"above what was raised", zstdFrame(27, "x"), 64 << 20, "134217728, more than the limit of 67108864"},
		{"no limit", zstdFrame(27, "x"), -1, ""},
		{"the largest there is", zstdFrame(41, "x"), 0, "2199023255552, more than"},
		{"a later frame", zstdFrame(20, "x") + zstdFrame(28, "x"), 0, "window of a frame: more than the limit of 33554432"},
		{"single segment", single, 0, "34359738368, more than"},
	} {
		r, comp, err := Decompress(strings.NewReader(c.blob), Limits{Window: c.lim})
		if err != nil || comp != Zstd {
			t.Errorf("%s: %s %v", c.name, comp, err) // detecting is not decoding
			continue
		}
		_, err = io.Copy(io.Discard, r)
		r.Close()
		var le *LimitError
		switch {
		case c.says == "" && err == nil:
		case c.says == "" || !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), c.says) || !errors.As(err, &le) || le.Limit != "Window":
			t.Errorf("%s: %v, not %q", c.name, err, c.says)
		}
	}
}

// TestDecompressMemory: what decoding takes is the window and little more,
// however much is decoded.
func TestDecompressMemory(t *testing.T) {
	if testing.Short() || raceEnabled {
		testenv.Optional(t, "memory is measured without -short and -race")
	}
	noise := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(noise)
	for _, c := range []struct {
		name  string
		limit uint64
		pack  func(w io.Writer) io.WriteCloser
	}{
		{"gzip", 1 << 20, func(w io.Writer) io.WriteCloser { z, _ := NewCompressor(w, Gzip); return z }},
		{"zstd", 10 << 20, func(w io.Writer) io.WriteCloser { z, _ := NewCompressor(w, Zstd); return z }},
		{"zstd of the largest window", 34 << 20, func(w io.Writer) io.WriteCloser {
			z, _ := zstd.NewWriter(w, zstd.WithWindowSize(defaultWindow), zstd.WithEncoderConcurrency(1))
			return z
		}},
	} {
		var blob bytes.Buffer
		z := c.pack(&blob)
		for range 80 { // more than two windows
			z.Write(noise)
		}
		z.Close()
		var before, m runtime.MemStats
		runtime.ReadMemStats(&before)
		r, _, err := Decompress(&blob, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, r)
		runtime.ReadMemStats(&m)
		if err != nil || n != 80<<20 {
			t.Errorf("%s: %d bytes, %v", c.name, n, err)
		}
		taken := m.TotalAlloc - before.TotalAlloc
		t.Logf("%s: %d KiB", c.name, taken>>10)
		if taken > c.limit {
			t.Errorf("%s: decoding took %d KiB", c.name, taken>>10)
		}
		r.Close()
	}
}
