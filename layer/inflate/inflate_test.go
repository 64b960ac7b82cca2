package inflate

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"testing/iotest"

	klauspost "github.com/klauspost/compress/gzip"
)

func read(z io.Reader, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

// class is an error without the place where it was met.
func class(err error) string {
	var c flate.CorruptInputError
	switch {
	case err == nil:
		return "none"
	case errors.As(err, &c):
		return "corrupt"
	}
	return err.Error()
}

// same has the standard library and us read a stream, and compares bytes and errors.
func same(t *testing.T, b []byte) int {
	t.Helper()
	std, stdErr := gzip.NewReader(bytes.NewReader(b))
	want, wantErr := read(std, stdErr)
	for _, c := range []struct {
		how string
		get func() ([]byte, error)
	}{
		{"read", func() ([]byte, error) { z, err := NewReader(bytes.NewReader(b)); return read(z, err) }},
		{"read in small pieces", func() ([]byte, error) { z, err := NewReader(pieces(b)); return read(z, err) }},
	} {
		got, err := c.get()
		if class(err) != class(wantErr) {
			t.Fatalf("%s: %v after %d bytes, compress/gzip has %v after %d", c.how, err, len(got), wantErr, len(want))
		}
		if !bytes.Equal(got, want) {
			i := 0
			for i < min(len(got), len(want)) && got[i] == want[i] {
				i++
			}
			t.Fatalf("%s: %d bytes (%v), compress/gzip has %d (%v); equal up to %d", c.how, len(got), err, len(want), wantErr, i)
		}
	}
	return len(want)
}

// pieces gives few bytes at a time, and the last with the end.
func pieces(b []byte) io.Reader {
	return iotest.DataErrReader(&few{b: b, r: rand.New(rand.NewPCG(uint64(len(b)), 0))})
}

type few struct {
	b []byte
	r *rand.Rand
}

func (f *few) Read(p []byte) (int, error) {
	if len(f.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, f.b[:min(len(f.b), 1+f.r.IntN(1<<f.r.IntN(15)))])
	f.b = f.b[n:]
	return n, nil
}

// volume is how many bytes random tests read: LAYERCTL_INFLATE_MB, or a few.
func volume() int {
	mb, err := strconv.Atoi(os.Getenv("LAYERCTL_INFLATE_MB"))
	if err != nil {
		return 30 << 20
	}
	return mb << 20
}

// damaged are the stream, one of it with a bit changed, one cut short, and one with
// something after it.
func damaged(r *rand.Rand, b []byte) [][]byte {
	flipped := bytes.Clone(b)
	flipped[r.IntN(len(b))] ^= 1 << r.IntN(8)
	return [][]byte{b, flipped, b[:r.IntN(len(b))], append(bytes.Clone(b), make([]byte, r.IntN(20))...)}
}

// TestCompressed: what compressors write, at all levels, and damaged.
func TestCompressed(t *testing.T) {
	seed := rand.Uint64()
	most := volume()
	t.Logf("seed %d, %d MB", seed, most>>20)
	r := rand.New(rand.NewPCG(seed, 1))
	for n := 0; n < most; {
		plain := text(r)
		var b bytes.Buffer
		level := r.IntN(12) - 2
		w, err := gzip.NewWriterLevel(&b, level%10)
		if err != nil {
			t.Fatal(err)
		}
		k, err := klauspost.NewWriterLevel(&b, level%10)
		if err != nil {
			t.Fatal(err)
		}
		for _, z := range []io.WriteCloser{w, k}[:1+r.IntN(2)] {
			if _, err := z.Write(plain); err != nil {
				t.Fatal(err)
			}
			if err := z.Close(); err != nil {
				t.Fatal(err)
			}
		}
		for _, b := range damaged(r, b.Bytes()) {
			n += same(t, b)
		}
	}
}

// text is bytes of a random alphabet with repeats of random lengths and distances.
func text(r *rand.Rand) []byte {
	b := make([]byte, r.IntN(1<<r.IntN(20)))
	alphabet, far := 1+r.IntN(256), 1+r.IntN(40_000)
	for i := 0; i < len(b); {
		b[i] = byte(r.IntN(alphabet))
		i++
		if r.IntN(4) == 0 {
			for from := max(i-1-r.IntN(far), 0); i < len(b) && r.IntN(30) > 0; i++ {
				b[i] = b[from]
				from++
			}
		}
	}
	return b
}

// TestStrange: streams with everything that the format allows, with mistakes, and damaged.
func TestStrange(t *testing.T) {
	seed := rand.Uint64()
	most := volume()
	t.Logf("seed %d, %d MB", seed, most>>20)
	r := rand.New(rand.NewPCG(seed, 2))
	whole := 0
	for n := 0; n < most; {
		w := &streamWriter{Rand: r, wrong: r.IntN(2) == 0}
		for range 1 + r.IntN(3) {
			w.member()
		}
		if !w.wrong {
			z, err := NewReader(bytes.NewReader(w.b))
			if errors.Is(err, gzip.ErrHeader) {
				n += same(t, w.b) // of a name that is too long
				continue
			}
			got, err := read(z, err)
			if err == nil && bytes.HasSuffix(got, w.plain) {
				whole++
			} else if !errors.Is(err, gzip.ErrHeader) {
				t.Fatalf("of %d bytes: %d, %v", len(w.plain), len(got), err)
			}
		}
		for _, b := range damaged(r, w.b) {
			n += same(t, b)
		}
	}
	if whole < 20 {
		t.Errorf("%d streams without a mistake were read whole", whole)
	}
}

// TestFailingReader: an error of the reader below is returned as it is.
func TestFailingReader(t *testing.T) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(text(rand.New(rand.NewPCG(3, 3)))); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for n := range b.Len() {
		_, err := read(NewReader(io.MultiReader(bytes.NewReader(b.Bytes()[:n]), iotest.ErrReader(io.ErrClosedPipe))))
		if err != io.ErrClosedPipe {
			t.Fatalf("after %d of %d bytes: %v", n, b.Len(), err)
		}
	}
}

func FuzzReader(f *testing.F) {
	for seed := range uint64(20) {
		w := &streamWriter{Rand: rand.New(rand.NewPCG(seed, 4)), wrong: seed%2 == 0}
		w.member()
		if len(w.b) < 4096 {
			f.Add(w.b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) { same(t, b) })
}
