package layer

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// ListingWriter makes the canonical listing of a layer from records in any
// order, of which the later one wins: a path may come again, and a deletion or
// anything but a directory takes with it what came before below its path. Its
// memory does not grow with the number of records but for some 40 bytes for each
// hard link: beyond a few MiB they are sorted in a temporary file without a name.
// It is not safe for concurrent use; after an error every call returns that error.
type ListingWriter struct {
	w    io.Writer
	sort *sorter
	seq  uint32
	// links has for each record that is a hard link, in order, the record that its
	// file came with; see resolve.
	links  int
	linked []linkOf
	err    error
	closed bool
}

// linkOf says that record link is another name of the file of record of.
type linkOf struct{ link, of uint32 }

// NewListingWriter returns a writer whose listing goes to w, compressed with
// zstd, at Close. Close must be called.
func NewListingWriter(w io.Writer) *ListingWriter {
	return &ListingWriter{w: w, sort: newSorter("")}
}

// TempDir sets the directory of temporary files, before the first record. The
// default is /var/tmp: os.TempDir is memory on many machines.
func (l *ListingWriter) TempDir(dir string) { l.sort.dir = dir }

// The kinds of records on the way to a listing, in the order in which records
// of one number apply.
const (
	opRef    byte = iota // a hard link, whose number this is, names this path
	opDelete             // the path is removed
	opDir                // payload: state
	opFile               // anything but a directory; payload: letter, state
	opLink               // payload: letter, target's path
)

// Add records that the layer leaves e at e.Path, with the content digest of a
// regular file. An entry with Hardlink is a further name of the file that the
// path e.Hardlink names at this moment; only its Path, Hardlink and Type count.
// Where a path below a deletion or a file is added, its directories are, too.
func (l *ListingWriter) Add(e Entry, content digest.Digest) error {
	if err := l.check(&e, content); err != nil {
		return err
	}
	letter := recLetters[e.Type]
	switch {
	case e.Hardlink != "":
		l.links++
		l.put(opRef, e.Hardlink, nil)
		l.put(opLink, e.Path, append([]byte{letter}, e.Hardlink...))
	case e.Type == TypeDir:
		l.put(opDir, e.Path, appendState(nil, &e, ""))
	default:
		l.put(opFile, e.Path, appendState([]byte{letter}, &e, content))
	}
	l.seq++
	return l.err
}

func (l *ListingWriter) check(e *Entry, content digest.Digest) error {
	if l.err != nil {
		return l.err
	}
	switch {
	case !isCleanPath(e.Path) || e.Hardlink != "" && !isCleanPath(e.Hardlink):
		l.err = badListing("%q is not a clean relative path", e.Path)
	case recLetters[e.Type] == 0 || e.Hardlink != "" && (e.Type == TypeDir || e.Path == e.Hardlink):
		l.err = badListing("%q has type %#o", e.Path, uint32(e.Type))
	case e.Type == TypeReg && e.Hardlink == "" && (content.Validate() != nil || content.Algorithm() != digest.SHA256):
		l.err = badListing("%q has content digest %q", e.Path, content)
	case l.seq == 1<<32-1:
		l.err = fmt.Errorf("too many records: %w", errdefs.ErrResourceExhausted)
	}
	if l.err != nil {
		l.err = fmt.Errorf("layer: listing: %w", l.err)
	}
	return l.err
}

// Delete records that the layer removes path and all below it.
func (l *ListingWriter) Delete(path string) error {
	if err := l.check(&Entry{Path: path, Type: TypeDir}, ""); err != nil {
		return err
	}
	l.put(opDelete, path, nil)
	l.seq++
	return l.err
}

func (l *ListingWriter) put(op byte, path string, payload []byte) {
	if l.err == nil {
		l.err = l.sort.add(path, l.seq, op, payload)
	}
}

// Close writes the listing and returns its digest, the layer's tree digest:
// the SHA-256 of the listing's uncompressed text. It frees what the writer
// holds and must be called, after an error too; then, and when it is called
// again, it writes nothing.
func (l *ListingWriter) Close() (digest.Digest, error) {
	if l.closed {
		return "", errors.Join(l.err, fmt.Errorf("layer: listing: closed twice: %w", errdefs.ErrFailedPrecondition))
	}
	l.closed = true
	defer l.sort.close()
	if l.err != nil {
		return "", l.err
	}
	sum, err := l.write()
	if err != nil {
		l.err = fmt.Errorf("layer: listing: %w", err)
		return "", l.err
	}
	l.err = fmt.Errorf("layer: listing: closed: %w", errdefs.ErrFailedPrecondition)
	return sum, nil
}

// Abort frees what the writer holds without writing anything.
func (l *ListingWriter) Abort() {
	if l.closed {
		return
	}
	l.closed = true
	l.sort.close()
	l.err = fmt.Errorf("layer: listing: aborted: %w", errdefs.ErrFailedPrecondition)
}

func (l *ListingWriter) write() (digest.Digest, error) {
	var states *stateFile
	if l.links > 0 {
		var err error
		if states, err = l.resolve(); err != nil {
			return "", err
		}
		defer states.close()
	}
	z, err := zstd.NewWriter(l.w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(512<<10), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return "", err
	}
	out := textWriter{hash: sha256.New()}
	out.w = bufio.NewWriterSize(io.MultiWriter(z, out.hash), 32<<10)
	out.put([]byte(listingFirst))
	if err := l.records(&out, states); err != nil {
		return "", errors.Join(err, z.Close())
	}
	out.put(strconv.AppendUint([]byte(listingEnd), out.count, 10))
	out.put([]byte{'\n'})
	if err := errors.Join(out.w.Flush(), z.Close()); err != nil {
		return "", err
	}
	return digest.NewDigest(digest.SHA256, out.hash), nil
}

type textWriter struct {
	w     *bufio.Writer
	hash  hash.Hash
	count uint64
	line  []byte
}

func (o *textWriter) put(b []byte) { o.w.Write(b) } // errors stay until Flush

// record writes a line: letters, path and what follows.
func (o *textWriter) record(letters, path string, rest []byte) {
	o.count++
	o.line = append(append(o.line[:0], letters...), ' ')
	o.line = appendEscaped(o.line, path)
	o.line = append(append(o.line, rest...), '\n')
	o.put(o.line)
}

// outcome is what is left of the records of one path.
type outcome struct {
	path     string
	op       byte // of the last record; opRef if nothing is left
	seq      uint32
	payload  []byte
	replaced bool
}

// outcomes goes through all paths in order and yields what is left of each, and
// before it each record that the path had, killed ones too, to every.
func (l *ListingWriter) outcomes(every func(*sortRecord) error, yield func(*outcome) error) error {
	m, err := l.sort.merge()
	if err != nil {
		return err
	}
	var above killers
	var o outcome
	started := false
	finish := func() error {
		if !started || o.op == opRef {
			return nil
		}
		return yield(&o)
	}
	for {
		r, err := m.next()
		if err == io.EOF {
			return finish()
		}
		if err != nil {
			return err
		}
		if !started || string(r.path) != o.path {
			if err := finish(); err != nil {
				return err
			}
			started = true
			o = outcome{path: string(r.path), payload: o.payload[:0]}
			above.enter(o.path)
		}
		if every != nil {
			if err := every(r); err != nil {
				return err
			}
		}
		if r.op != opRef {
			o.take(r, &above)
		}
	}
}

// take lets a record replace what came before it at its path, unless a later
// record above has removed it.
func (o *outcome) take(r *sortRecord, above *killers) {
	if above.kills(r.seq) {
		return
	}
	o.replaced = r.op == opDir && (o.replaced || o.op == opDelete || o.op == opFile || o.op == opLink)
	o.op, o.seq = r.op, r.seq
	o.payload = append(o.payload[:0], r.payload...)
	if r.op != opDir {
		above.kill(r.seq)
	}
}

// killers are the ancestors of a path, with the number of the last record at
// each that removed what was below it.
type killers struct {
	paths []string
	seqs  []int64 // with those of the ancestors
}

func (k *killers) enter(path string) {
	for len(k.paths) > 0 && !liesBelow(path, k.paths[len(k.paths)-1]) {
		k.paths, k.seqs = k.paths[:len(k.paths)-1], k.seqs[:len(k.seqs)-1]
	}
	seq := int64(-1)
	if n := len(k.seqs); n > 0 {
		seq = k.seqs[n-1]
	}
	k.paths, k.seqs = append(k.paths, path), append(k.seqs, seq)
}

func liesBelow(path, dir string) bool {
	if dir == "." {
		return path != "."
	}
	return len(path) > len(dir) && path[len(dir)] == '/' && path[:len(dir)] == dir
}

// kills reports whether a record at the current path was removed from above.
func (k *killers) kills(seq uint32) bool {
	n := len(k.seqs) - 1
	return n > 0 && int64(seq) < k.seqs[n-1]
}

func (k *killers) kill(seq uint32) {
	n := len(k.seqs) - 1
	k.seqs[n] = max(k.seqs[n], int64(seq))
}

// records writes every line. states has the files with several names; nil if
// there are no links.
func (l *ListingWriter) records(out *textWriter, states *stateFile) error {
	return l.outcomes(nil, func(o *outcome) error {
		switch o.op {
		case opDelete:
			out.record(string(recDeleted), o.path, nil)
			return nil
		case opDir:
			letter := string(recLetters[TypeDir])
			if o.replaced {
				letter = string(recReplaced)
			}
			out.record(letter, o.path, o.payload)
			return nil
		}
		id := o.seq
		if o.op == opLink {
			id = l.fileOf(o.seq)
		}
		return l.name(out, states, id, o)
	})
}

// name writes a name of file id: with its state, or as a link to the first one.
func (l *ListingWriter) name(out *textWriter, states *stateFile, id uint32, o *outcome) error {
	letter, rest := o.payload[0], string(o.payload[1:])
	link := func(to string) error {
		out.record(string([]byte{recLink, letter}), o.path, appendEscaped([]byte{' '}, to))
		return nil
	}
	if states == nil || !states.has(id) {
		if o.op == opLink {
			return link(rest) // to a file that no record has: one of a layer below
		}
		out.record(string(letter), o.path, o.payload[1:])
		return nil
	}
	head, state, err := states.read(id)
	if err != nil {
		return err
	}
	if head != "" {
		return link(head)
	}
	out.record(string(state[:1]), o.path, state[1:])
	return states.setHead(id, o.path)
}

// fileOf is the record that a link's file came with; the link itself where no
// record has it.
func (l *ListingWriter) fileOf(link uint32) uint32 {
	i, ok := slices.BinarySearchFunc(l.linked, link, func(x linkOf, link uint32) int { return cmp.Compare(x.link, link) })
	if !ok {
		return link
	}
	return l.linked[i].of
}

// resolve finds for every hard link the record that its file came with, and
// keeps the states of such files at hand: in one pass what each link's target
// was at its time, a link perhaps, which is followed by going through the links
// in order; in another the states.
func (l *ListingWriter) resolve() (*stateFile, error) {
	l.linked = make([]linkOf, 0, l.links)
	cur := currentFile{}
	err := l.outcomes(func(r *sortRecord) error {
		if of, ok := cur.see(r); ok {
			l.linked = append(l.linked, linkOf{r.seq, of})
		}
		return nil
	}, func(*outcome) error { return nil })
	if err != nil {
		return nil, err
	}
	slices.SortFunc(l.linked, func(a, b linkOf) int { return cmp.Compare(a.link, b.link) })
	for i := range l.linked {
		l.linked[i].of = l.fileOf(l.linked[i].of) // an earlier one, resolved by now
	}
	states, err := newStateFile(l.sort.tempDir(), l.linked)
	if err != nil {
		return nil, err
	}
	err = l.outcomes(func(r *sortRecord) error {
		if r.op != opFile {
			return nil
		}
		return states.write(r.seq, r.payload)
	}, func(*outcome) error { return nil })
	if err != nil {
		states.close()
		return nil, err
	}
	return states, nil
}

// currentFile follows which record stands at the path that is gone through.
type currentFile struct {
	path string
	seq  uint32
	ok   bool
}

// see takes the next record; for a link's reference it gives the record that it
// names, false if there is none.
func (c *currentFile) see(r *sortRecord) (uint32, bool) {
	if string(r.path) != c.path {
		c.path, c.ok = string(r.path), false
	}
	switch r.op {
	case opRef:
		return c.seq, c.ok
	case opFile, opLink:
		c.seq, c.ok = r.seq, true
	default:
		c.ok = false
	}
	return 0, false
}

// stateFile holds, in a temporary file, the states of files with several names,
// and of each the first name that is left once that was met.
type stateFile struct {
	f     *os.File
	end   int64
	ids   []uint32 // in order
	state []extent // parallel to ids
	head  []extent
}

// extent is a piece of a file; zero where there is none.
type extent struct {
	off  int64
	size uint32
}

func newStateFile(dir string, links []linkOf) (*stateFile, error) {
	s := &stateFile{}
	for _, l := range links {
		s.ids = append(s.ids, l.of)
	}
	slices.Sort(s.ids)
	s.ids = slices.Compact(s.ids)
	s.state, s.head = make([]extent, len(s.ids)), make([]extent, len(s.ids))
	var err error
	s.f, err = tempFile(dir)
	return s, err
}

func (s *stateFile) close() { s.f.Close() }

func (s *stateFile) index(id uint32) (int, bool) { return slices.BinarySearch(s.ids, id) }

// has reports whether the file's state is there.
func (s *stateFile) has(id uint32) bool {
	i, ok := s.index(id)
	return ok && s.state[i].size > 0
}

// write keeps the state of a file if it has several names.
func (s *stateFile) write(id uint32, state []byte) (err error) {
	if i, ok := s.index(id); ok {
		s.state[i], err = s.put(state)
	}
	return err
}

func (s *stateFile) setHead(id uint32, path string) (err error) {
	i, _ := s.index(id)
	s.head[i], err = s.put([]byte(path))
	return err
}

func (s *stateFile) put(b []byte) (extent, error) {
	x := extent{s.end, uint32(len(b))}
	_, err := s.f.WriteAt(b, x.off)
	s.end += int64(len(b))
	return x, err
}

// read gives the first name, or the state as long as there is no first name.
func (s *stateFile) read(id uint32) (head string, state []byte, err error) {
	i, _ := s.index(id)
	x := s.head[i]
	if x.size == 0 {
		x = s.state[i]
	}
	b := make([]byte, x.size)
	if _, err := s.f.ReadAt(b, x.off); err != nil {
		return "", nil, err
	}
	if s.head[i].size > 0 {
		return string(b), nil, nil
	}
	return "", b, nil
}
