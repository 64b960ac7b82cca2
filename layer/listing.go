package layer

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// ListingRecord is one record of a listing: what a layer says of one path.
type ListingRecord struct {
	// Entry is the path's state. For a deletion only Path is set; for a name of a
	// link group that is not the first only Path, Hardlink and Type.
	Entry Entry
	// Deleted marks a path that the layer removes, with all below it.
	Deleted bool
	// Replaced marks a directory in whose place the layer removed something first:
	// of what was below it only what the layer brings is left.
	Replaced bool
	// Digest is that of a regular file's content (no Hardlink); "" otherwise.
	Digest digest.Digest
}

// The text of a listing, which ARCHITECTURE.md specifies: a first line with the
// version, a line for each path in path order, a last line with their number.
// Its canonical form is unique, as its digest names a layer's tree.
const (
	listingFirst = "layerctl listing 1\n"
	listingEnd   = "end "
)

// The letters that begin a record.
const (
	recDeleted  = 'D'
	recReplaced = 'R'
	recLink     = 'h'
)

var recLetters = map[FileType]byte{
	TypeDir: 'd', TypeReg: 'f', TypeSymlink: 'l', TypeFifo: 'p', TypeChar: 'c', TypeBlock: 'b',
}

var recTypes = func() map[byte]FileType {
	m := map[byte]FileType{recReplaced: TypeDir}
	for t, l := range recLetters {
		m[l] = t
	}
	return m
}()

const hexDigits = "0123456789abcdef"

// appendEscaped appends s with every byte outside "!" to "~", and "\" and "=",
// as \xHH: fields end at a space, an xattr's name at "=".
func appendEscaped(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' || c == '\\' || c == '=' {
			b = append(b, '\\', 'x', hexDigits[c>>4], hexDigits[c&15])
		} else {
			b = append(b, c)
		}
	}
	return b
}

// unescape is the inverse of appendEscaped, and refuses what that does not write.
func unescape(s string) (string, error) {
	if strings.IndexByte(s, '\\') < 0 && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '=' }) {
		return s, nil
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '\\' {
			if i+3 >= len(s) || s[i+1] != 'x' {
				return "", badListing("escape in %q", s)
			}
			hi, lo := strings.IndexByte(hexDigits, s[i+2]), strings.IndexByte(hexDigits, s[i+3])
			if hi < 0 || lo < 0 {
				return "", badListing("escape in %q", s)
			}
			c, i = byte(hi<<4|lo), i+3
		}
		b = append(b, c)
	}
	if string(appendEscaped(nil, string(b))) != s {
		return "", badListing("%q is not in canonical form", s)
	}
	return string(b), nil
}

func badListing(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// appendState appends the fields of an entry after its path, each after a space.
func appendState(b []byte, e *Entry, content digest.Digest) []byte {
	b = append(b, ' ')
	b = appendOctal(b, e.Mode)
	for _, id := range [...]uint32{e.UID, e.GID} {
		b = append(b, ' ')
		b = strconv.AppendUint(b, uint64(id), 10)
	}
	b = append(b, ' ')
	b = strconv.AppendInt(b, e.ModTime.Sec, 10)
	b = append(b, '.')
	nsec := strconv.AppendUint(nil, uint64(e.ModTime.Nsec)+1_000_000_000, 10)
	b = append(b, nsec[1:]...)
	switch e.Type {
	case TypeReg:
		b = append(b, ' ')
		b = strconv.AppendInt(b, e.Size, 10)
		b = append(b, ' ')
		b = append(b, content.Encoded()...)
	case TypeSymlink:
		b = append(b, ' ')
		b = appendEscaped(b, e.Linkname)
	case TypeChar, TypeBlock:
		b = append(b, ' ')
		b = strconv.AppendUint(b, uint64(e.Major), 10)
		b = append(b, ':')
		b = strconv.AppendUint(b, uint64(e.Minor), 10)
	}
	for _, n := range slices.Sorted(maps.Keys(e.Xattrs)) {
		b = append(b, ' ')
		b = appendEscaped(b, n)
		b = append(b, '=')
		b = appendEscaped(b, e.Xattrs[n])
	}
	return b
}

func appendOctal(b []byte, mode uint32) []byte {
	return append(b, '0'+byte(mode>>9&7), '0'+byte(mode>>6&7), '0'+byte(mode>>3&7), '0'+byte(mode&7))
}

// appendRecord appends the record's line.
func appendRecord(b []byte, r *ListingRecord) []byte {
	letter := recLetters[r.Entry.Type]
	switch {
	case r.Deleted:
		letter = recDeleted
	case r.Entry.Hardlink != "":
		b = append(b, recLink, letter, ' ')
		b = appendEscaped(b, r.Entry.Path)
		b = append(b, ' ')
		b = appendEscaped(b, r.Entry.Hardlink)
		return append(b, '\n')
	case r.Replaced:
		letter = recReplaced
	}
	b = append(b, letter, ' ')
	b = appendEscaped(b, r.Entry.Path)
	if !r.Deleted {
		b = appendState(b, &r.Entry, r.Digest)
	}
	return append(b, '\n')
}

// fields takes a line apart.
type fields struct {
	rest string
	err  error
}

func (f *fields) next() string {
	s, rest, more := strings.Cut(f.rest, " ")
	if s == "" && f.err == nil {
		f.err = badListing("a field is missing")
	}
	if f.rest = rest; more && rest == "" && f.err == nil {
		f.err = badListing("a space at the end")
	}
	return s
}

func (f *fields) path() string {
	s := f.text()
	if f.err == nil && !isCleanPath(s) {
		f.err = badListing("%q is not a clean relative path", s)
	}
	return s
}

// isCleanPath reports whether p is a path as Entry.Path has them.
func isCleanPath(p string) bool {
	if p == "." {
		return true
	}
	for c := range strings.SplitSeq(p, "/") {
		if c == "" || c == "." || c == ".." || strings.IndexByte(c, 0) >= 0 {
			return false
		}
	}
	return true
}

func (f *fields) text() string {
	s, err := unescape(f.next())
	f.note(err)
	return s
}

func (f *fields) note(err error) {
	if f.err == nil {
		f.err = err
	}
}

// number reads a canonical decimal below limit.
func (f *fields) number(s string, limit uint64) uint64 {
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil || v > limit || strconv.FormatUint(v, 10) != s {
		f.note(badListing("number %q", s))
	}
	return v
}

const maxUint32 = 1<<32 - 1

func (f *fields) state(e *Entry) digest.Digest {
	mode := f.next()
	m, err := strconv.ParseUint(mode, 8, 12)
	if err != nil || len(mode) != 4 {
		f.note(badListing("mode %q", mode))
	}
	e.Mode = uint32(m)
	e.UID, e.GID = uint32(f.number(f.next(), maxUint32)), uint32(f.number(f.next(), maxUint32))
	e.ModTime = f.time(f.next())
	var sum digest.Digest
	switch e.Type {
	case TypeReg:
		e.Size = int64(f.number(f.next(), 1<<63-1))
		sum = digest.NewDigestFromEncoded(digest.SHA256, f.next())
		if f.err == nil {
			f.note(badDigest(sum))
		}
	case TypeSymlink:
		e.Linkname = f.text()
	case TypeChar, TypeBlock:
		major, minor, _ := strings.Cut(f.next(), ":")
		e.Major, e.Minor = uint32(f.number(major, maxUint32)), uint32(f.number(minor, maxUint32))
	}
	f.xattrs(e)
	return sum
}

func badDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return badListing("%w", err)
	}
	return nil
}

func (f *fields) time(s string) Timespec {
	sec, nsec, _ := strings.Cut(s, ".")
	n, err := strconv.ParseInt(sec, 10, 64)
	if err != nil || strconv.FormatInt(n, 10) != sec || len(nsec) != 9 {
		f.note(badListing("time %q", s))
	}
	frac, err := strconv.ParseUint(nsec, 10, 32)
	if err != nil {
		f.note(badListing("time %q", s))
	}
	return Timespec{n, uint32(frac)}
}

func (f *fields) xattrs(e *Entry) {
	for last := ""; f.rest != "" && f.err == nil; {
		name, value, ok := strings.Cut(f.next(), "=")
		n, err1 := unescape(name)
		v, err2 := unescape(value)
		if !ok || err1 != nil || err2 != nil || n <= last {
			f.note(badListing("xattr %q", name))
			return
		}
		if e.Xattrs == nil {
			e.Xattrs = map[string]string{}
		}
		e.Xattrs[n], last = v, n
	}
}

// parseRecord reads one line, without its newline.
func parseRecord(line string) (ListingRecord, error) {
	f := fields{rest: line}
	kind := f.next()
	var r ListingRecord
	if len(kind) == 2 && kind[0] == recLink {
		r.Entry.Type = recTypes[kind[1]]
		r.Entry.Path, r.Entry.Hardlink = f.path(), f.path()
		if r.Entry.Type == 0 || r.Entry.Type == TypeDir || kind[1] == recReplaced {
			f.note(badListing("record of kind %q", kind))
		}
		return r, f.end()
	}
	if len(kind) != 1 {
		f.note(badListing("record of kind %q", kind))
		return r, f.err
	}
	r.Entry.Path = f.path()
	if kind[0] == recDeleted {
		r.Deleted = true
		return r, f.end()
	}
	r.Replaced = kind[0] == recReplaced
	if r.Entry.Type = recTypes[kind[0]]; r.Entry.Type == 0 {
		f.note(badListing("record of kind %q", kind))
	}
	r.Digest = f.state(&r.Entry)
	return r, f.end()
}

func (f *fields) end() error {
	if f.rest != "" {
		f.note(badListing("something follows: %q", cut(f.rest, 80)))
	}
	return f.err
}

// maxListingLine bounds one record: 256 xattrs of 64 KiB with every byte
// escaped, and then some. More is not read.
const maxListingLine = 80 << 20

// ReadListing reads a listing, compressed with zstd or not, and checks that it
// is in canonical form. A listing that is cut off, out of order or not canonical
// is an error that wraps ErrInvalidArgument and names the line. Memory is
// bounded by the longest record.
func ReadListing(r io.Reader) iter.Seq2[ListingRecord, error] {
	return readListing(r, nil, "")
}

// ReadListingDigest is ReadListing and ends with an error that wraps ErrDataLoss
// if the listing's text has another digest than want.
func ReadListingDigest(r io.Reader, want digest.Digest) iter.Seq2[ListingRecord, error] {
	return readListing(r, sha256.New(), want)
}

func readListing(r io.Reader, h hash.Hash, want digest.Digest) iter.Seq2[ListingRecord, error] {
	return func(yield func(ListingRecord, error) bool) {
		text, done, err := listingText(r)
		if err != nil {
			yield(ListingRecord{}, fmt.Errorf("layer: read listing: %w", err))
			return
		}
		defer done()
		l := listingReader{in: text, hash: h}
		err = l.read(func(rec ListingRecord) bool { return yield(rec, nil) })
		if err == nil && h != nil {
			if got := digest.NewDigest(digest.SHA256, h); got != want {
				err = fmt.Errorf("digest is %s, expected %s: %w", got, want, errdefs.ErrDataLoss)
			}
		}
		if err != nil && err != errStop {
			yield(ListingRecord{}, fmt.Errorf("layer: read listing: line %d: %w", l.line, err))
		}
	}
}

// listingText is the uncompressed text of r.
func listingText(r io.Reader) (*bufio.Reader, func(), error) {
	in := bufio.NewReaderSize(r, 64<<10)
	magic, err := in.Peek(4)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	if !bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}) { // RFC 8878, 3.1.1
		return in, func() {}, nil
	}
	d, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, nil, err
	}
	return bufio.NewReaderSize(d, 64<<10), d.Close, nil
}

type listingReader struct {
	in   *bufio.Reader
	hash hash.Hash
	line int64
	buf  []byte
}

// next reads a line, without its newline, valid until the next call.
func (l *listingReader) next() ([]byte, error) {
	l.line++
	l.buf = l.buf[:0]
	for {
		part, err := l.in.ReadSlice('\n')
		if l.hash != nil {
			l.hash.Write(part)
		}
		l.buf = append(l.buf, part...)
		switch {
		case err == nil:
			return l.buf[:len(l.buf)-1], nil
		case err == io.EOF:
			return nil, badListing("it ends without its last line")
		case err != bufio.ErrBufferFull:
			return nil, err
		case len(l.buf) > maxListingLine:
			return nil, badListing("a record of more than %d bytes", maxListingLine)
		}
	}
}

func (l *listingReader) read(yield func(ListingRecord) bool) error {
	first, err := l.next()
	if err != nil {
		return err
	}
	if string(first)+"\n" != listingFirst {
		return badListing("it begins with %q and not %q: not a listing, or of a newer version", cut(string(first), 40), listingFirst)
	}
	last := ""
	for n := uint64(0); ; n++ {
		line, err := l.next()
		if err != nil {
			return err
		}
		if count, ok := strings.CutPrefix(string(line), listingEnd); ok {
			return l.last(count, n)
		}
		rec, err := parseRecord(string(line))
		if err != nil {
			return err
		}
		if last != "" && ComparePaths(last, rec.Entry.Path) >= 0 {
			return badListing("%q comes after %q", rec.Entry.Path, last)
		}
		last = rec.Entry.Path
		if !yield(rec) {
			return errStop
		}
	}
}

func (l *listingReader) last(count string, n uint64) error {
	if count != strconv.FormatUint(n, 10) {
		return badListing("it ends with %q after %d records", count, n)
	}
	if _, err := l.in.ReadByte(); err != io.EOF {
		return badListing("something follows its last line (%v)", err)
	}
	return nil
}

// ListChanges adds every change to a listing and hashes the content of files: for
// commits that were made by hand. It stops at the sequence's first error, and
// leaves Close to the caller.
func ListChanges(ctx context.Context, changes iter.Seq2[Change, error], l *ListingWriter) error {
	buf := make([]byte, 128<<10)
	for c, err := range changes {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		if err := listChange(ctx, &c, l, buf); err != nil {
			return fmt.Errorf("layer: list %s: %w", c.Entry.Path, err)
		}
	}
	return nil
}

func listChange(ctx context.Context, c *Change, l *ListingWriter, buf []byte) error {
	if c.Kind == Deleted {
		return l.Delete(c.Entry.Path)
	}
	if c.Entry.Type != TypeReg || c.Entry.Hardlink != "" {
		return l.Add(c.Entry, "")
	}
	sum, err := contentDigest(ctx, c, buf)
	if err != nil {
		return err
	}
	return l.Add(c.Entry, sum)
}

func contentDigest(ctx context.Context, c *Change, buf []byte) (digest.Digest, error) {
	if c.Open == nil {
		return "", badListing("a regular file without content")
	}
	f, err := c.Open()
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum, n, err := contentHash(ctx, f, buf)
	if err == nil && n != c.Entry.Size {
		err = fmt.Errorf("it had %d bytes when it was met and %d when it was read: %w", c.Entry.Size, n, errdefs.ErrAborted)
	}
	return sum, err
}
