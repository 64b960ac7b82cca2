package layer

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/layerctl/layerctl/layer/inflate"
)

// Compression is how a layer blob is compressed.
type Compression string

// The compressions that OCI has for layers.
const (
	None Compression = "none"
	Gzip Compression = "gzip"
	Zstd Compression = "zstd"
)

// ParseCompression reads a Compression by its name; ErrInvalidArgument names
// those there are.
func ParseCompression(s string) (Compression, error) {
	switch c := Compression(s); c {
	case None, Gzip, Zstd:
		return c, nil
	}
	return "", fmt.Errorf("layer: compression %q: %w (known: none, gzip, zstd)", s, errdefs.ErrInvalidArgument)
}

// magics are how streams begin. Those without a Compression are recognized only
// to be refused by name.
var magics = []struct {
	magic string
	c     Compression
	name  string
}{
	{"\x1f\x8b\x08", Gzip, "gzip"},
	{"\x28\xb5\x2f\xfd", Zstd, "zstd"},
	{"BZh", "", "bzip2"},
	{"\xfd7zXZ\x00", "", "xz"},
	{"LZIP", "", "lzip"},
	{"\x04\x22\x4d\x18", "", "lz4"},
	{"\x1f\x9d", "", "compress (.Z)"},
	{"\x5d\x00\x00\x80\x00", "", "lzma"},
	{"PK\x03\x04", "", "zip"},
	{"7z\xbc\xaf\x27\x1c", "", "7z"},
	{"\xff\x06\x00\x00sNaPpY", "", "snappy"},
}

// zstdSkippable is how a skippable zstd frame begins, but for the low four bits
// (RFC 8878, 3.1.2).
const zstdSkippable = "\x2a\x4d\x18"

// tarMagic stands at byte 257 of a tar, but of a V7 one.
const (
	tarMagic   = "ustar"
	tarMagicAt = 257
)

func detect(begin []byte) (c Compression, name string) {
	if len(begin) >= tarMagicAt+len(tarMagic) && string(begin[tarMagicAt:tarMagicAt+len(tarMagic)]) == tarMagic {
		return None, "tar" // a file's name may begin like anything
	}
	if len(begin) >= 4 && begin[0]&0xf0 == 0x50 && string(begin[1:4]) == zstdSkippable {
		return Zstd, "zstd"
	}
	for _, m := range magics {
		if bytes.HasPrefix(begin, []byte(m.magic)) {
			return m.c, m.name
		}
	}
	return None, "tar"
}

// mostWindow is the largest window that the format has (RFC 8878, 3.1.1.1.2).
const mostWindow = 1<<41 + 7<<38

// readBuffer is how much is read of a blob at a time.
const readBuffer = 128 << 10

// Decompress finds out by its first bytes how r is compressed and returns the
// uncompressed stream. Streams that follow one another (gzip members, zstd
// frames) are one. Another compression wraps ErrNotImplemented and is named; a
// corrupt stream wraps ErrDataLoss when it is read, and a window above lim.Window
// is a *LimitError then; the other limits are Apply's. Closing frees buffers and
// does not close r.
func Decompress(r io.Reader, lim Limits) (io.ReadCloser, Compression, error) {
	src := &source{r: r}
	in := bufio.NewReaderSize(src, readBuffer)
	begin, err := in.Peek(blockSize)
	if err != nil && err != io.EOF {
		return nil, "", fmt.Errorf("layer: decompress: %w", err)
	}
	c, name := detect(begin)
	d := &decompressor{src: src, name: name}
	src.window, src.most = firstWindow(begin), lim.orDefaults().Window
	switch c {
	case None:
		return io.NopCloser(in), None, nil
	case Gzip:
		z, err := inflate.NewReader(in)
		if err != nil {
			return nil, "", fmt.Errorf("layer: decompress: %w", src.blame(name, err))
		}
		d.r, d.close = z, z.Close
		return d, Gzip, nil
	case Zstd:
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(decoderWindow(src.most)))
		if err != nil {
			return nil, "", fmt.Errorf("layer: decompress: %w", src.blame(name, err))
		}
		d.r, d.close = z, func() error { z.Close(); return nil }
		return d, Zstd, nil
	}
	return nil, "", fmt.Errorf("layer: decompress: %s is no compression of layers (gzip, zstd): %w", name, errdefs.ErrNotImplemented)
}

// decoderWindow is a limit as the decoder takes it.
func decoderWindow(most int64) uint64 {
	if most < 0 {
		return mostWindow
	}
	return uint64(min(max(most, zstd.MinWindowSize), mostWindow))
}

// firstWindow returns the window of the first zstd frame, if begin shows it, for
// what a refusal says; else 0.
func firstWindow(begin []byte) int64 {
	var h zstd.Header
	if err := h.Decode(begin); err != nil || h.Skippable {
		return 0
	}
	window := h.WindowSize
	if h.SingleSegment {
		window = h.FrameContentSize // the frame is its own window
	}
	return int64(min(window, math.MaxInt64))
}

// decompressor names its errors.
type decompressor struct {
	r     io.Reader
	src   *source
	close func() error
	name  string
}

func (d *decompressor) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	if err != nil && err != io.EOF {
		err = d.src.blame(d.name, err)
	}
	return n, err
}

func (d *decompressor) Close() error { return d.close() }

// source remembers how the stream below a decoder failed.
type source struct {
	r      io.Reader
	err    error
	window int64 // of the first zstd frame, if known
	most   int64 // that a window may be
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// blame says whose fault a decoder's error is: the stream below failed, it needs
// too much memory, or else it is corrupt.
func (s *source) blame(name string, err error) error {
	switch {
	case s.err != nil:
		return s.err
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		tooLarge := &LimitError{Limit: "Window", What: "bytes of memory for the window of a frame", Most: s.most}
		if s.window > s.most { // else it was a later frame's
			tooLarge.N = s.window
		}
		return fmt.Errorf("%s: %w", name, tooLarge)
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrDataLoss)
}

// NewCompressor compresses what is written to it, to w. The same bytes give the
// same output, however they are cut into writes and however many CPUs there are,
// with one version of the library. Close ends the stream and does not close w.
func NewCompressor(w io.Writer, c Compression) (io.WriteCloser, error) {
	switch c {
	case None:
		return nopWriteCloser{w}, nil
	case Gzip:
		z, err := gzip.NewWriterLevel(w, gzip.DefaultCompression)
		if err != nil {
			return nil, fmt.Errorf("layer: compress: gzip: %w", err)
		}
		return z, nil
	case Zstd:
		z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
		if err != nil {
			return nil, fmt.Errorf("layer: compress: zstd: %w", err)
		}
		return z, nil
	}
	return nil, fmt.Errorf("layer: compress: %q: %w", c, errdefs.ErrInvalidArgument)
}

type nopWriteCloser struct{ io.Writer }

func (nopWriteCloser) Close() error { return nil }
