package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// smallEntry is the size up to which an entry of a stream is kept in memory (all
// together at most smallTotal) instead of in a file.
const (
	smallEntry = 64 << 10
	smallTotal = 16 << 20
)

// nameBytes is how many bytes of names an archive may have for each entry that
// Limits.Entries lets it have: names stay in memory.
const nameBytes = 320

// maxLinks bounds a chain of links inside an archive.
const maxLinks = 16

// archive gives random access to the entries of a tar: where they are in a plain
// tar file, or in files of their own where the tar came as a stream. No name in
// it is ever used as a path outside it.
type archive struct {
	entries map[string]entry // by clean name; immutable once read
	file    *os.File         // the plain tar; nil for a stream
}

// entry is a regular file or a link of an archive.
type entry struct {
	size   int64
	offset int64         // in archive.file
	data   []byte        // small entry of a stream
	path   string        // large entry of a stream: the file that has it
	digest digest.Digest // of data or path; "" if not known
	link   string        // clean name of what this entry is a link to
}

// openArchive reads the table of contents of a plain tar. It takes f.
func openArchive(ctx context.Context, f *os.File, lim Limits) (*archive, error) {
	a := &archive{entries: map[string]entry{}, file: f}
	err := a.scan(ctx, tar.NewReader(f), lim, func(hdr *tar.Header, _ io.Reader) (entry, error) {
		// archive/tar reads whole blocks and no further, so the file stands at the
		// entry's first byte.
		off, err := f.Seek(0, io.SeekCurrent)
		return entry{size: hdr.Size, offset: off}, err
	})
	if err != nil {
		f.Close()
		return nil, err
	}
	return a, nil
}

// spoolArchive reads a tar stream to its end, its larger entries into files in
// dir, each hashed on the way.
func spoolArchive(ctx context.Context, r io.Reader, dir string, lim Limits) (*archive, error) {
	a := &archive{entries: map[string]entry{}}
	sp := &spool{ctx: ctx, dir: dir, buf: make([]byte, copyBuffer)}
	if err := a.scan(ctx, tar.NewReader(r), lim, sp.entry); err != nil {
		return nil, err
	}
	// The padding after the tar, and a compressor's checksum, are read as well: a
	// writer at the other end of a pipe must not die of us.
	_, err := io.CopyBuffer(io.Discard, io.LimitReader(ctxReader{ctx, r}, 64<<20), sp.buf)
	return a, err
}

// scan goes through a tar and notes each regular file, of which keep makes an
// entry, and each link.
func (a *archive) scan(ctx context.Context, tr *tar.Reader, lim Limits, keep func(*tar.Header, io.Reader) (entry, error)) error {
	var total, names int64
	for n := 0; ; n++ {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("entry %d: %w: %w", n+1, err, errdefs.ErrInvalidArgument)
		}
		total += max(hdr.Size, 0)
		if over(n+1, lim.Entries) || over(total, lim.Size) {
			return fmt.Errorf("entry %q: more than %d entries or %d bytes: %w", hdr.Name, lim.Entries, lim.Size, errdefs.ErrResourceExhausted)
		}
		if names += int64(len(hdr.Name) + len(hdr.Linkname)); over(names, int64(lim.Entries)*nameBytes) {
			return fmt.Errorf("entry %d: names of more than %d bytes in all: %w", n+1, int64(lim.Entries)*nameBytes, errdefs.ErrResourceExhausted)
		}
		err = a.note(hdr, tr, keep)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return fmt.Errorf("entry %q: %w", hdr.Name, err)
		}
	}
}

// note files one header; of two entries with one name the later wins, as tar
// has it.
func (a *archive) note(hdr *tar.Header, r io.Reader, keep func(*tar.Header, io.Reader) (entry, error)) error {
	name, err := cleanName(hdr.Name)
	if err != nil {
		return err
	}
	var e entry
	switch {
	case isSparse(hdr):
		return fmt.Errorf("sparse entries are not for image archives: %w", errdefs.ErrNotImplemented)
	case hdr.Typeflag == tar.TypeReg:
		e, err = keep(hdr, r)
	case hdr.Typeflag == tar.TypeLink:
		e.link, err = cleanName(hdr.Linkname)
	case hdr.Typeflag == tar.TypeSymlink:
		e.link, err = cleanLink(name, hdr.Linkname)
	default: // directories; anything else holds nothing of an image
		return nil
	}
	if err != nil {
		return err
	}
	a.entries[name] = e
	return nil
}

// isSparse reports whether an entry's bytes in the archive are not its content.
func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range hdr.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// cleanName returns an entry's name relative to the archive's root and refuses
// one that leads out of it.
func cleanName(name string) (string, error) {
	clean := path.Clean(strings.TrimLeft(name, "/"))
	if clean == ".." || strings.HasPrefix(clean, "../") {
		return "", fmt.Errorf("%q leads out of the archive: %w", name, errdefs.ErrInvalidArgument)
	}
	return clean, nil
}

// cleanLink returns what a symlink at name points to.
func cleanLink(name, target string) (string, error) {
	if strings.HasPrefix(target, "/") {
		return cleanName(target)
	}
	return cleanName(path.Dir(name) + "/" + target)
}

// spool keeps the entries of a stream.
type spool struct {
	ctx   context.Context
	dir   string
	buf   []byte
	small int64 // bytes in memory
	files int
}

func (s *spool) entry(hdr *tar.Header, r io.Reader) (entry, error) {
	if hdr.Size <= smallEntry && s.small+hdr.Size <= smallTotal {
		b, err := io.ReadAll(r)
		s.small += int64(len(b))
		return entry{size: int64(len(b)), data: b, digest: digest.FromBytes(b)}, err
	}
	s.files++
	p := s.dir + "/" + strconv.Itoa(s.files)
	f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return entry{}, err
	}
	h := sha256.New()
	n, err := io.CopyBuffer(io.MultiWriter(onlyWriter{f}, h), ctxReader{s.ctx, r}, s.buf)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return entry{size: n, path: p, digest: digest.NewDigest(digest.SHA256, h)}, err
}

func (a *archive) Close() error {
	if a.file == nil {
		return nil
	}
	return a.file.Close()
}

func (a *archive) has(name string) bool { _, ok := a.entries[name]; return ok }

// lookup finds the regular file that name, which may be a link, stands for.
func (a *archive) lookup(name string) (entry, error) {
	_, e, err := a.resolve(name)
	return e, err
}

// resolve is lookup that tells the file's own name, too.
func (a *archive) resolve(name string) (string, entry, error) {
	clean, err := cleanName(name)
	if err != nil {
		return "", entry{}, err
	}
	for range maxLinks {
		e, ok := a.entries[clean]
		if !ok {
			return "", entry{}, fmt.Errorf("%q: not in the archive: %w", name, errdefs.ErrNotFound)
		}
		if e.link == "" {
			return clean, e, nil
		}
		clean = e.link
	}
	return "", entry{}, fmt.Errorf("%q: more than %d links: %w", name, maxLinks, errdefs.ErrInvalidArgument)
}

// readFile returns the content of a small file.
func (a *archive) readFile(name string, limit int64) ([]byte, error) {
	e, err := a.lookup(name)
	if err != nil {
		return nil, err
	}
	if over(e.size, limit) {
		return nil, fmt.Errorf("%s: %d bytes, more than %d: %w", name, e.size, limit, errdefs.ErrResourceExhausted)
	}
	ra, err := a.open(e)
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	return io.ReadAll(content.NewReader(ra))
}

func (a *archive) open(e entry) (content.ReaderAt, error) {
	switch {
	case e.path != "":
		f, err := os.Open(e.path)
		return blobFile{f, e.size}, err
	case a.file == nil:
		return section{io.NewSectionReader(bytes.NewReader(e.data), 0, e.size)}, nil
	default:
		return section{io.NewSectionReader(a.file, e.offset, e.size)}, nil
	}
}

// section is part of something that stays open.
type section struct{ *io.SectionReader }

func (section) Close() error { return nil }

// ReaderAt implements content.Provider for an archive of an image layout.
func (a *archive) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	e, err := a.lookup(blobPath(desc.Digest))
	if errdefs.IsNotFound(err) {
		return nil, missing(desc.Digest)
	}
	if err != nil {
		return nil, err
	}
	return a.open(e)
}

// adopt implements adopter: a spooled file whose digest was taken as it came.
func (a *archive) adopt(d digest.Digest, size int64) string {
	e, err := a.lookup(blobPath(d))
	if err != nil {
		return ""
	}
	return e.adoptable(d, size)
}

func (e entry) adoptable(d digest.Digest, size int64) string {
	if e.digest != d || e.size != size {
		return ""
	}
	return e.path
}
