package layer

import (
	"bufio"
	"cmp"
	"container/heap"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"slices"

	"github.com/layerctl/layerctl/internal/sys"
)

// sorter sorts records by path, then number, then kind, in bounded memory: full
// buffers go sorted to runs in temporary files, which merge reads side by side.
type sorter struct {
	dir  string // of temporary files; "" means /var/tmp, else os.TempDir
	full int    // bytes of a full buffer; a single record may be larger
	data []byte // encoded records
	at   []uint32
	runs []run
	file *os.File
	end  int64
}

// sortRecord is one record; it is valid until the next one is read.
type sortRecord struct {
	path    []byte
	seq     uint32
	op      byte
	payload []byte
}

type run struct{ off, size int64 }

const sortBuffer = 4 << 20

func newSorter(dir string) *sorter { return &sorter{dir: dir, full: sortBuffer} }

func (s *sorter) tempDir() string {
	if s.dir != "" {
		return s.dir
	}
	if st, err := os.Stat("/var/tmp"); err == nil && st.IsDir() {
		return "/var/tmp"
	}
	return os.TempDir()
}

// tempFile makes a file without a name, which is gone when it is closed.
func tempFile(dir string) (*os.File, error) {
	fd, err := sys.Open(dir, sys.O_RDWR|sys.O_TMPFILE, 0o600)
	if err == nil {
		return fd.File(), nil
	}
	f, err := os.CreateTemp(dir, "layerctl-listing-") // a file system without O_TMPFILE
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (s *sorter) close() {
	s.data, s.at = nil, nil
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// A record is: number 4 bytes, kind 1, path's length 4, payload's 4, path,
// payload.
const sortHeader = 13

func (s *sorter) add(path string, seq uint32, op byte, payload []byte) error {
	size := sortHeader + len(path) + len(payload)
	if len(s.data) > 0 && len(s.data)+size > s.full {
		if err := s.spill(); err != nil {
			return err
		}
	}
	if s.data == nil {
		s.data = make([]byte, 0, s.full)
	}
	s.at = append(s.at, uint32(len(s.data)))
	b := binary.LittleEndian.AppendUint32(s.data, seq)
	b = append(b, op)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(path)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	s.data = append(append(b, path...), payload...)
	return nil
}

func decodeRecord(b []byte) sortRecord {
	p := sortHeader + int(binary.LittleEndian.Uint32(b[5:]))
	return sortRecord{
		seq: binary.LittleEndian.Uint32(b), op: b[4], path: b[sortHeader:p],
		payload: b[p : p+int(binary.LittleEndian.Uint32(b[9:]))],
	}
}

func (r *sortRecord) compare(o *sortRecord) int {
	if c := comparePaths(r.path, o.path); c != 0 {
		return c
	}
	return cmp.Or(cmp.Compare(r.seq, o.seq), cmp.Compare(r.op, o.op))
}

func (s *sorter) order() {
	slices.SortFunc(s.at, func(a, b uint32) int {
		x, y := decodeRecord(s.data[a:]), decodeRecord(s.data[b:])
		return x.compare(&y)
	})
}

// spill writes the buffer as a run.
func (s *sorter) spill() error {
	if s.file == nil {
		f, err := tempFile(s.tempDir())
		if err != nil {
			return err
		}
		s.file = f
	}
	s.order()
	w := bufio.NewWriterSize(io.NewOffsetWriter(s.file, s.end), 64<<10)
	for _, at := range s.at {
		r := decodeRecord(s.data[at:])
		w.Write(s.data[at : int(at)+sortHeader+len(r.path)+len(r.payload)])
	}
	if err := w.Flush(); err != nil {
		return err
	}
	s.runs = append(s.runs, run{s.end, int64(len(s.data))})
	s.end += int64(len(s.data))
	s.data, s.at = s.data[:0], s.at[:0]
	if cap(s.data) > 2*s.full {
		s.data = nil
	}
	return nil
}

// merge goes through all records in order. It may be called again.
func (s *sorter) merge() (*merger, error) {
	if len(s.runs) > 0 && len(s.data) > 0 {
		if err := s.spill(); err != nil {
			return nil, err
		}
		s.data, s.at = nil, nil // the runs' readers need the room
	}
	if len(s.runs) == 0 {
		s.order()
		return &merger{memory: s}, nil
	}
	m := &merger{}
	size := max(4<<10, (2<<20)/len(s.runs))
	for _, r := range s.runs {
		in := &runReader{in: bufio.NewReaderSize(io.NewSectionReader(s.file, r.off, r.size), size)}
		switch err := in.next(); err {
		case nil:
			m.heap = append(m.heap, in)
		case io.EOF:
		default:
			return nil, err
		}
	}
	heap.Init(&m.heap)
	return m, nil
}

// merger yields the records of all runs in order.
type merger struct {
	memory *sorter // all records, sorted, if there are no runs
	pos    int
	heap   runHeap
	taken  bool // the first run's record was yielded
	rec    sortRecord
}

// next yields a record that is valid until the next call; io.EOF after the last.
func (m *merger) next() (*sortRecord, error) {
	if m.memory != nil {
		if m.pos == len(m.memory.at) {
			return nil, io.EOF
		}
		m.rec = decodeRecord(m.memory.data[m.memory.at[m.pos]:])
		m.pos++
		return &m.rec, nil
	}
	if m.taken {
		if err := m.advance(); err != nil {
			return nil, err
		}
	}
	if m.taken = len(m.heap) > 0; !m.taken {
		return nil, io.EOF
	}
	return &m.heap[0].rec, nil
}

func (m *merger) advance() error {
	switch err := m.heap[0].next(); err {
	case nil:
		heap.Fix(&m.heap, 0)
	case io.EOF:
		heap.Pop(&m.heap)
	default:
		return err
	}
	return nil
}

type runReader struct {
	in  *bufio.Reader
	buf []byte
	rec sortRecord
}

func (r *runReader) next() error {
	var h [sortHeader]byte
	if _, err := io.ReadFull(r.in, h[:]); err != nil {
		return err
	}
	size := sortHeader + int(binary.LittleEndian.Uint32(h[5:])) + int(binary.LittleEndian.Uint32(h[9:]))
	r.buf = append(slices.Grow(r.buf[:0], size), h[:]...)[:size]
	if _, err := io.ReadFull(r.in, r.buf[sortHeader:]); err != nil {
		return errors.Join(io.ErrUnexpectedEOF, err)
	}
	r.rec = decodeRecord(r.buf)
	return nil
}

type runHeap []*runReader

func (h runHeap) Len() int           { return len(h) }
func (h runHeap) Less(i, j int) bool { return h[i].rec.compare(&h[j].rec) < 0 }
func (h runHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *runHeap) Push(x any)        { *h = append(*h, x.(*runReader)) }
func (h *runHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	*h = old[:len(old)-1]
	return last
}
