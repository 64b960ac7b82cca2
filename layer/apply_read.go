package layer

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// item is one entry of the archive, checked, its name not yet resolved.
type item struct {
	name   string // as the archive spells it
	kind   itemKind
	victim string // of a whiteout
	// e is what the entry says; Path is unset, and Linkname of a hard link is the
	// name of its target as the archive spells it.
	e      Entry
	xattrs []xattr // in order of their names
	offset int64   // where its header begins
}

type xattr struct{ name, value string }

type itemKind byte

const (
	itemFile itemKind = iota // of any type that a tree has
	itemLink
	itemWhiteout
	itemOpaque
	itemAUFS
)

// op is one step for the writer: an entry, with all or the first part of its
// content, or a further part.
type op struct {
	it   *item // nil for a further part
	data []byte
	more bool // further parts follow
	sum  digest.Digest
}

// batch is steps whose data shares one buffer.
type batch struct {
	ops []op
	buf []byte // its length is what is in use
}

const (
	batchBytes = 1 << 20
	batchOps   = 512
	batches    = 4
	// leastPart is how much room a large file must find in a batch that has
	// something already; else it begins a new one.
	leastPart = 128 << 10
)

// archive reads a tar and hands its entries to the writer.
type archive struct {
	ctx     context.Context
	tr      *tar.Reader
	in      *meter
	lim     Limits
	noKeep  string // the xattr of OverrideStat, which an archive may not bring
	hash    hash.Hash
	full    chan *batch
	free    chan *batch
	failed  chan struct{} // closed by the writer when it gives up
	cur     *batch
	entries int64
	sparse  int64
	last    string // name of the entry before, for errors
}

// errWriter says that the writer has failed; its error is the one that counts.
var errWriter = errors.New("the writer failed")

// run unpacks the archive: this goroutine parses and hashes, another writes, and
// a third reads ahead where reading is work.
func (u *unpacker) run(ctx context.Context, r io.Reader) error {
	_, verified := r.(*BlobReader)
	in, stop := readSource(r)
	defer stop()
	a := u.newArchive(ctx, in)
	written := make(chan error, 1)
	go func() { written <- u.write(ctx, a) }()
	err := a.read(u.o.Unterminated || verified)
	close(a.full)
	if werr := <-written; werr != nil {
		return werr // it is about an earlier entry
	}
	return err
}

func (u *unpacker) newArchive(ctx context.Context, r io.Reader) *archive {
	in := &meter{ctx: ctx, r: r, limit: u.lim.Size, progress: u.o.Progress}
	a := &archive{
		ctx: ctx, tr: tar.NewReader(in), in: in, lim: u.lim,
		full: make(chan *batch, batches), free: make(chan *batch, batches), failed: make(chan struct{}),
	}
	if u.o.Listing != nil {
		a.hash = sha256.New()
	}
	if u.o.OverrideStat {
		a.noKeep = overrideXattr
	}
	for range batches {
		a.free <- nil // made when it is needed: most layers are small
	}
	return a
}

// read goes through the archive to the end of the stream, so that whatever
// checks the stream has seen all of it.
func (a *archive) read(unterminated bool) error {
	for {
		begin := a.in.header()
		h, err := a.tr.Next()
		if err == io.EOF {
			if !a.in.ended() && !unterminated {
				return a.cut()
			}
			break
		}
		if err != nil {
			return a.broken(begin, err)
		}
		if err := a.entry(h, begin); err != nil {
			if errors.Is(err, errWriter) {
				return err
			}
			return located(h.Name, begin, err)
		}
		a.last = h.Name
	}
	if err := a.flush(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, a.in)
	if err != nil {
		return fmt.Errorf("after the archive's end, at byte %d: %w", a.in.n, err)
	}
	return nil
}

// blockSize is what a tar is made of.
const blockSize = 512

func (a *archive) cut() error {
	return fmt.Errorf("the archive ends at byte %d, after %s, without its end mark: %w: %w",
		a.in.n, a.after(), io.ErrUnexpectedEOF, errdefs.ErrDataLoss)
}

func (a *archive) after() string {
	if a.entries == 0 {
		return "no entry"
	}
	return quoteName(a.last)
}

// broken is an error of the tar reader between entries.
func (a *archive) broken(begin int64, err error) error {
	return fmt.Errorf("header at byte %d, after %s: %w", begin, a.after(), streamError(err))
}

// streamError marks what the archive's own bytes are to blame for.
func streamError(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	return err
}

// located says which entry an error is about, once.
func located(name string, offset int64, err error) error {
	return fmt.Errorf("%s (header at byte %d): %w", quoteName(name), offset, err)
}

// quoteName quotes a path for an error, cut where it is absurdly long.
func quoteName(name string) string {
	const most = 300
	if len(name) > most {
		return fmt.Sprintf("%q... (%d bytes)", name[:most], len(name))
	}
	return fmt.Sprintf("%q", name)
}

// entry checks one header and hands it on with its content.
func (a *archive) entry(h *tar.Header, begin int64) error {
	a.entries++
	if err := within("Entries", a.entries, a.lim.Entries, "entries"); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return globalHeader(h)
	}
	it, err := a.item(h)
	if err != nil {
		return err
	}
	it.offset = begin
	if it.kind == itemFile && it.e.Type == TypeReg {
		return a.content(it)
	}
	if h.Size > 0 { // a whiteout that has content: nobody wants it
		if _, err := io.Copy(io.Discard, a.tr); err != nil {
			return a.noContent(err)
		}
	}
	return a.put(op{it: it})
}

// noContent is an error of reading an entry's content.
func (a *archive) noContent(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("content at byte %d: %w", a.in.n, streamError(err))
}

// globalHeader refuses PAX global records that would change later entries;
// archive/tar does not apply them. git writes a comment.
func globalHeader(h *tar.Header) error {
	for k := range h.PAXRecords {
		if k != "comment" {
			return fmt.Errorf("global PAX record %q is not supported: %w", k, errdefs.ErrNotImplemented)
		}
	}
	return nil
}

// item makes of a header what the writer needs.
func (a *archive) item(h *tar.Header) (*item, error) {
	it := &item{name: h.Name}
	if err := a.checkSizes(h); err != nil {
		return nil, err
	}
	if err := it.classify(); err != nil || it.kind != itemFile {
		return it, err
	}
	if err := it.fill(h); err != nil {
		return nil, err
	}
	if it.kind == itemLink {
		return it, nil
	}
	attrs, err := a.xattrs(h.PAXRecords)
	it.xattrs = attrs
	return it, err
}

func (a *archive) checkSizes(h *tar.Header) error {
	pax := 0
	for k, v := range h.PAXRecords {
		pax += len(k) + len(v)
	}
	err := cmp.Or(
		within("PathBytes", len(h.Name), a.lim.PathBytes, "bytes of the name"),
		within("PathBytes", len(h.Linkname), a.lim.PathBytes, "bytes of the link name"),
		within("Depth", depth(h.Name), a.lim.Depth, "components of the name"),
		within("FileSize", h.Size, a.lim.FileSize, "bytes of the file"),
		within("PAXBytes", pax, a.lim.PAXBytes, "bytes of PAX records"),
	)
	if err == nil && isSparse(h) {
		a.sparse += h.Size
		err = within("Sparse", a.sparse, a.lim.Sparse, "bytes of sparse files")
	}
	return err
}

func depth(path string) int { return strings.Count(strings.Trim(path, "/"), "/") + 1 }

// isSparse reports whether the entry's size is more than what the archive has of it.
func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// classify finds the names that OCI gives a meaning. One of them in the middle
// of a path would make a file that no layer can carry.
func (it *item) classify() error {
	parent, base := splitPath(it.name)
	for c := range strings.SplitSeq(parent, "/") {
		if strings.HasPrefix(c, aufsPrefix) {
			it.kind = itemAUFS
			return nil
		}
		if strings.HasPrefix(c, WhiteoutPrefix) {
			return fmt.Errorf("a path through the reserved name %q: %w", c, errdefs.ErrInvalidArgument)
		}
	}
	kind, victim, err := ParseTarName(base)
	switch kind {
	case NameWhiteout:
		it.kind, it.victim = itemWhiteout, victim
	case NameOpaque:
		it.kind = itemOpaque
	case NameAUFS:
		it.kind = itemAUFS
	}
	return err
}

// splitPath cuts a path before its last component; "" is the root.
func splitPath(path string) (parent, base string) {
	path = strings.TrimRight(path, "/")
	for strings.HasSuffix(path, "/.") {
		path = strings.TrimRight(path[:len(path)-2], "/")
	}
	i := strings.LastIndexByte(path, '/')
	if base = path[i+1:]; base == "." {
		base = ""
	}
	return path[:max(i, 0)], base
}

var tarTypes = map[byte]FileType{
	tar.TypeReg: TypeReg, tar.TypeGNUSparse: TypeReg, tar.TypeCont: TypeReg,
	tar.TypeDir: TypeDir, tar.TypeSymlink: TypeSymlink, tar.TypeLink: 0,
	tar.TypeChar: TypeChar, tar.TypeBlock: TypeBlock, tar.TypeFifo: TypeFifo,
}

// fill takes type and metadata from a header.
func (it *item) fill(h *tar.Header) error {
	typ, ok := tarTypes[h.Typeflag]
	if !ok {
		return fmt.Errorf("entry of unknown type %q: %w", h.Typeflag, errdefs.ErrInvalidArgument)
	}
	if h.Typeflag == tar.TypeLink {
		it.kind, it.e.Linkname = itemLink, h.Linkname
		return nil
	}
	it.e = Entry{
		Type: typ, Mode: uint32(h.Mode & 0o7777), UID: uint32(h.Uid), GID: uint32(h.Gid),
		ModTime: Timespec{h.ModTime.Unix(), uint32(h.ModTime.Nanosecond())},
	}
	if int64(it.e.UID) != int64(h.Uid) || int64(it.e.GID) != int64(h.Gid) || it.e.UID == math.MaxUint32 || it.e.GID == math.MaxUint32 {
		return fmt.Errorf("owner %d:%d is out of range: %w", h.Uid, h.Gid, errdefs.ErrInvalidArgument)
	}
	return it.fillType(h)
}

func (it *item) fillType(h *tar.Header) error {
	switch it.e.Type {
	case TypeReg:
		it.e.Size = h.Size
	case TypeSymlink:
		it.e.Linkname, it.e.Mode = h.Linkname, 0o777 // as the kernel has every symlink
		if h.Linkname == "" {
			return fmt.Errorf("a symlink to nothing: %w", errdefs.ErrInvalidArgument)
		}
	case TypeChar, TypeBlock:
		// The kernel's dev_t has 12 bits of major and 20 of minor.
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return fmt.Errorf("device %d:%d is out of range: %w", h.Devmajor, h.Devminor, errdefs.ErrInvalidArgument)
		}
		it.e.Major, it.e.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	}
	return nil
}

// The two spellings of xattrs in PAX records: star's, with the value as it is,
// and libarchive's, with the name URL-encoded and the value in base64. bsdtar
// writes both.
const (
	paxSchily     = "SCHILY.xattr."
	paxLibarchive = "LIBARCHIVE.xattr."
)

func (a *archive) xattrs(pax map[string]string) ([]xattr, error) {
	var all []xattr
	for k, v := range pax {
		name, value, err := paxXattr(k, v, pax)
		if err != nil {
			return nil, err
		}
		if name == "" || !keepXattr(name) || name == a.noKeep {
			continue
		}
		if err := within("XattrSize", len(value), a.lim.XattrSize, "bytes of xattr "+quoteName(name)); err != nil {
			return nil, err
		}
		all = append(all, xattr{name, value})
	}
	slices.SortFunc(all, func(x, y xattr) int { return strings.Compare(x.name, y.name) })
	return all, within("Xattrs", len(all), a.lim.Xattrs, "xattrs")
}

// paxXattr is the xattr that one PAX record holds; name "" if it holds none.
func paxXattr(k, v string, pax map[string]string) (name, value string, err error) {
	if name, ok := strings.CutPrefix(k, paxSchily); ok {
		return name, v, nil
	}
	if attr, ok := paxACLs[k]; ok {
		return paxACL(attr, v, pax)
	}
	encoded, ok := strings.CutPrefix(k, paxLibarchive)
	if !ok {
		return "", "", nil
	}
	if name, err = url.PathUnescape(encoded); err != nil {
		return "", "", fmt.Errorf("PAX record %q: %w: %w", k, err, errdefs.ErrInvalidArgument)
	}
	if _, twice := pax[paxSchily+name]; twice {
		return "", "", nil
	}
	b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(v, "="))
	if err != nil {
		return "", "", fmt.Errorf("PAX record %q: %w: %w", k, err, errdefs.ErrInvalidArgument)
	}
	return name, string(b), nil
}

// paxACL is the ACL that a record holds as text; name "" where the xattr is
// there, too, or the mode says it all.
func paxACL(attr, text string, pax map[string]string) (name, value string, err error) {
	if _, twice := pax[paxSchily+attr]; twice {
		return "", "", nil
	}
	value, err = parseACL(text)
	if err != nil || attr == "system.posix_acl_access" && minimalACL(value) || len(value) == 4 {
		return "", "", err
	}
	return attr, value, nil
}

// content hands on a regular file, in one part if it is small.
func (a *archive) content(it *item) error {
	if a.hash != nil {
		a.hash.Reset()
	}
	o := op{it: it}
	for left := it.e.Size; ; o.it = nil {
		if err := a.room(left); err != nil {
			return err
		}
		n := len(a.cur.buf)
		part := int(min(left, int64(cap(a.cur.buf)-n)))
		if int64(part) < left {
			part &^= holeBlock - 1 // parts begin where holes may
		}
		o.data = a.cur.buf[n : n+part]
		if _, err := io.ReadFull(a.tr, o.data); err != nil {
			return a.noContent(err)
		}
		a.cur.buf = a.cur.buf[:n+part]
		left -= int64(part)
		o.more = left > 0
		o.sum = a.digest(o.data, o.more)
		if err := a.put(o); err != nil || !o.more {
			return err
		}
	}
}

// room sees to it that the current batch has place for a part of so many bytes.
func (a *archive) room(left int64) error {
	if a.cur != nil {
		free := int64(cap(a.cur.buf) - len(a.cur.buf))
		if free < left && free < leastPart {
			if err := a.flush(); err != nil {
				return err
			}
		}
	}
	return a.open()
}

func (a *archive) digest(data []byte, more bool) digest.Digest {
	if a.hash == nil {
		return ""
	}
	a.hash.Write(data)
	if more {
		return ""
	}
	return digest.NewDigest(digest.SHA256, a.hash)
}

// open makes sure that there is a batch to fill.
func (a *archive) open() error {
	if a.cur != nil {
		return nil
	}
	select {
	case b := <-a.free:
		if b == nil {
			b = &batch{buf: make([]byte, 0, batchBytes), ops: make([]op, 0, batchOps)}
		}
		b.ops, b.buf = b.ops[:0], b.buf[:0]
		a.cur = b
		return nil
	case <-a.failed:
		return errWriter
	}
}

func (a *archive) put(o op) error {
	if err := a.open(); err != nil {
		return err
	}
	a.cur.ops = append(a.cur.ops, o)
	if len(a.cur.ops) >= batchOps {
		return a.flush()
	}
	return nil
}

// flush gives the current batch to the writer.
func (a *archive) flush() error {
	if a.cur == nil {
		return nil
	}
	select {
	case <-a.failed:
		return errWriter
	default:
		a.full <- a.cur // has a place for every batch
		a.cur = nil
		return nil
	}
}
