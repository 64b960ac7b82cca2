package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"time"
)

var benchContext = context.Background()

// testTar makes archives in memory, for tests.
type testTar struct {
	buf bytes.Buffer
	w   *tar.Writer
}

func newTar() *testTar {
	a := &testTar{}
	a.w = tar.NewWriter(&a.buf)
	return a
}

var testTime = time.Unix(1_600_000_000, 123_456_789)

// add writes one entry; what the header leaves out gets a usual value.
func (a *testTar) add(h tar.Header, content ...string) *testTar {
	if h.ModTime.IsZero() {
		h.ModTime = testTime
	}
	if h.Mode == 0 {
		h.Mode = 0o644
	}
	h.Format = tar.FormatPAX
	for _, c := range content {
		h.Size += int64(len(c))
	}
	if err := a.w.WriteHeader(&h); err != nil {
		panic(err)
	}
	for _, c := range content {
		if _, err := a.w.Write([]byte(c)); err != nil {
			panic(err)
		}
	}
	return a
}

func (a *testTar) file(name, content string) *testTar {
	return a.add(tar.Header{Name: name, Typeflag: tar.TypeReg}, content)
}

func (a *testTar) dir(name string) *testTar { return a.add(dirHeader(name)) }

func (a *testTar) link(name, target string) *testTar {
	return a.add(tar.Header{Name: name, Linkname: target, Typeflag: tar.TypeLink})
}

func (a *testTar) symlink(name, target string) *testTar {
	return a.add(tar.Header{Name: name, Linkname: target, Typeflag: tar.TypeSymlink})
}

// white writes an empty file, as whiteouts are.
func (a *testTar) white(name string) *testTar { return a.file(name, "") }

func (a *testTar) bytes() []byte {
	if err := a.w.Close(); err != nil {
		panic(err)
	}
	return a.buf.Bytes()
}

func dirHeader(name string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}
}

func sha256Sum(b []byte) [32]byte { return sha256.Sum256(b) }
