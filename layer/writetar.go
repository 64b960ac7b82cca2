package layer

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"iter"
	"path"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// TarOptions say how a changeset becomes a tar. The zero value is right.
type TarOptions struct {
	// Epoch dates the entries that stand for no file, whiteouts, in seconds since
	// 1970: the place for SOURCE_DATE_EPOCH.
	Epoch int64
	// SkipWhiteoutNames leaves out names that begin with ".wh." and reports them;
	// otherwise such a name is an error that wraps ErrInvalidArgument.
	SkipWhiteoutNames bool
	// Skipped, if not nil, is told of each change that was left out, and why.
	Skipped func(path, reason string)
	// Progress, if not nil, is told the bytes written so far.
	Progress func(bytes int64)
	// Listing, if not nil, receives a record of every change in the same pass.
	// The caller closes it.
	Listing *ListingWriter
}

// TarResult is what WriteTar made.
type TarResult struct {
	DiffID  digest.Digest // SHA-256 of the tar
	Size    int64         // bytes of the tar
	Entries int64         // entries in it, whiteouts among them
	Skipped int64         // changes left out, each told to TarOptions.Skipped
}

// WriteTar writes a changeset as an uncompressed OCI layer tar, the same bytes
// for the same changes: entries in the order of the changes, which is that of
// ComparePaths, ustar headers with PAX records only where needed. It stops at
// the sequence's first error. A file that grows or shrinks while it is read is
// an error that wraps ErrAborted, a changeset out of order one that wraps
// ErrInvalidArgument. After an error what w has is not a whole tar.
func WriteTar(ctx context.Context, w io.Writer, changes iter.Seq2[Change, error], o TarOptions) (TarResult, error) {
	t := tarWriter{ctx: ctx, o: o, out: newHashedWriter(w, o.Progress)}
	if o.Listing != nil {
		t.content = sha256.New()
	}
	err := t.changes(changes)
	if werr := t.out.close(); err == nil && werr != nil {
		err = fmt.Errorf("layer: write tar: %w", werr)
	}
	if err != nil {
		return t.res, err
	}
	t.res.DiffID = digest.NewDigest(digest.SHA256, t.out.hash)
	t.res.Size = t.out.size
	return t.res, nil
}

// tarBuffer is how much is hashed and written at a time: files are read straight
// into it, small ones many to a write.
const tarBuffer = 256 << 10

var zeros [2 * blockSize]byte

type tarWriter struct {
	ctx     context.Context
	o       TarOptions
	out     *hashedWriter
	content hash.Hash // of one file, for the listing; nil for none
	res     TarResult
	last    string // path of the change before
}

func (t *tarWriter) changes(s iter.Seq2[Change, error]) error {
	for c, err := range s {
		if err != nil {
			return err
		}
		if err := t.change(&c); err != nil {
			return fmt.Errorf("layer: write tar: %s: %w", c.Entry.Path, err)
		}
	}
	t.out.append(zeros[:])
	if err := t.out.flush(); err != nil {
		return fmt.Errorf("layer: write tar: %w", err)
	}
	return nil
}

func (t *tarWriter) change(c *Change) error {
	if err := t.ctx.Err(); err != nil {
		return err
	}
	e := &c.Entry
	if t.last != "" && ComparePaths(t.last, e.Path) >= 0 {
		return fmt.Errorf("it comes after %s: %w", t.last, errdefs.ErrInvalidArgument)
	}
	t.last = e.Path
	if skip, err := t.refuse(e); skip || err != nil {
		return err
	}
	if c.Kind == Deleted {
		return t.whiteout(e.Path)
	}
	h, err := headerOf(e)
	if err != nil {
		return err
	}
	if err := t.header(&h); err != nil {
		return err
	}
	var sum digest.Digest
	if h.flag == tarReg {
		if sum, err = t.file(c); err != nil {
			return err
		}
	}
	return t.record(func(l *ListingWriter) error { return l.Add(*e, sum) })
}

// refuse skips or refuses what a layer cannot carry.
func (t *tarWriter) refuse(e *Entry) (skip bool, err error) {
	reason := ""
	switch {
	case e.Type == TypeSocket:
		reason = SkippedSocket
	case !hasWhiteoutName(e.Path):
		return false, nil
	case !t.o.SkipWhiteoutNames:
		return false, fmt.Errorf("%s: %w", SkippedWhiteoutName, errdefs.ErrInvalidArgument)
	default:
		reason = SkippedWhiteoutName
	}
	t.res.Skipped++
	if t.o.Skipped != nil {
		t.o.Skipped(e.Path, reason)
	}
	return true, nil
}

// whiteout writes a deletion: an empty file with fixed metadata.
func (t *tarWriter) whiteout(p string) error {
	if p == "." {
		return fmt.Errorf("the root cannot be deleted: %w", errdefs.ErrInvalidArgument)
	}
	h := tarHeader{name: join(path.Dir(p), WhiteoutPrefix+path.Base(p)), flag: tarReg, mtime: Timespec{Sec: t.o.Epoch}}
	if err := t.header(&h); err != nil {
		return err
	}
	return t.record(func(l *ListingWriter) error { return l.Delete(p) })
}

func (t *tarWriter) record(f func(*ListingWriter) error) error {
	if t.o.Listing == nil {
		return nil
	}
	return f(t.o.Listing)
}

func (t *tarWriter) header(h *tarHeader) error {
	t.res.Entries++
	if room := cap(t.out.buf) - len(t.out.buf); room < 8*blockSize {
		if err := t.out.flush(); err != nil {
			return err
		}
	}
	t.out.buf = h.append(t.out.buf)
	return nil
}

// file writes the content of a regular file, exactly as many bytes as its header
// says, and returns its digest where a listing wants it.
func (t *tarWriter) file(c *Change) (digest.Digest, error) {
	if t.content != nil {
		t.content.Reset()
	}
	if c.Entry.Size > 0 {
		if err := t.copy(c); err != nil {
			return "", err
		}
		t.out.append(zeros[:padding(c.Entry.Size)])
	}
	if t.content == nil {
		return "", nil
	}
	return digest.NewDigest(digest.SHA256, t.content), nil
}

func (t *tarWriter) copy(c *Change) error {
	if c.Open == nil {
		return fmt.Errorf("a regular file without content: %w", errdefs.ErrInvalidArgument)
	}
	r, err := c.Open()
	if err != nil {
		return err
	}
	err = t.copyFrom(r, c.Entry.Size)
	return errors.Join(err, r.Close())
}

func (t *tarWriter) copyFrom(r io.Reader, size int64) error {
	for left := size; left > 0; {
		n, err := t.out.readFrom(r, left)
		if n == 0 && err == io.EOF {
			return fmt.Errorf("it shrank from %d to %d bytes while it was read: %w", size, size-left, errdefs.ErrAborted)
		}
		if err != nil && err != io.EOF {
			return err
		}
		if t.content != nil {
			t.content.Write(t.out.buf[len(t.out.buf)-n:])
		}
		left -= int64(n)
		if err := t.ctx.Err(); err != nil {
			return err
		}
	}
	var more [1]byte
	n, err := io.ReadFull(r, more[:])
	if n > 0 {
		return fmt.Errorf("it grew beyond %d bytes while it was read: %w", size, errdefs.ErrAborted)
	}
	return notEOF(err)
}

// hashedWriter gathers what goes to w; another goroutine hashes and writes it,
// while the caller reads the next files.
type hashedWriter struct {
	w        io.Writer
	hash     hash.Hash
	buf      []byte
	size     int64 // bytes handed over
	progress func(int64)
	full     chan []byte
	free     chan []byte
	failed   chan struct{} // closed when err is set
	done     chan struct{} // closed when the goroutine has ended
	err      error         // set before failed is closed
}

func newHashedWriter(w io.Writer, progress func(int64)) *hashedWriter {
	h := &hashedWriter{
		w: w, hash: sha256.New(), buf: make([]byte, 0, tarBuffer), progress: progress,
		full: make(chan []byte, 1), free: make(chan []byte, 3), failed: make(chan struct{}), done: make(chan struct{}),
	}
	h.free <- make([]byte, 0, tarBuffer)
	h.free <- make([]byte, 0, tarBuffer)
	go h.run()
	return h
}

func (h *hashedWriter) run() {
	defer close(h.done)
	for b := range h.full {
		if h.err == nil {
			h.hash.Write(b)
			n, err := h.w.Write(b)
			if err == nil && n < len(b) {
				err = io.ErrShortWrite
			}
			if err != nil {
				h.err = err
				close(h.failed)
			}
		}
		if cap(b) > 2*tarBuffer { // a header with huge PAX records made it grow
			b = make([]byte, 0, tarBuffer)
		}
		h.free <- b[:0]
	}
}

func (h *hashedWriter) append(p []byte) { h.buf = append(h.buf, p...) }

// readFrom reads once, at most left bytes, to the end of the buffer.
func (h *hashedWriter) readFrom(r io.Reader, left int64) (int, error) {
	if cap(h.buf)-len(h.buf) < 4*blockSize {
		if err := h.flush(); err != nil {
			return 0, err
		}
	}
	n := len(h.buf)
	room := int(min(int64(cap(h.buf)-n-2*blockSize), left)) // keeps room for padding and the end
	got, err := r.Read(h.buf[n : n+room])
	h.buf = h.buf[:n+got]
	return got, err
}

// flush hands the buffer over and takes an empty one.
func (h *hashedWriter) flush() error {
	h.size += int64(len(h.buf))
	h.full <- h.buf
	h.buf = <-h.free
	if h.progress != nil {
		h.progress(h.size)
	}
	select {
	case <-h.failed:
		return h.err
	default:
		return nil
	}
}

// close waits until all that was handed over is written. Nothing uses w or hash
// from then on.
func (h *hashedWriter) close() error {
	close(h.full)
	<-h.done
	return h.err
}
