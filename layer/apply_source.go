package layer

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
)

// readSource reads r in large pieces: ahead, on another goroutine, but for a
// file, of which large contents are then read to where they are hashed and
// written from.
func readSource(r io.Reader) (in io.Reader, stop func()) {
	if f, ok := r.(*os.File); ok {
		return bufio.NewReaderSize(f, aheadBlock), func() {}
	}
	a := newReadAhead(r)
	return a, a.close
}

// readAhead reads a stream on a goroutine of its own, some blocks ahead of who
// consumes it, so that decompressing or checking it runs beside parsing.
type readAhead struct {
	full chan block
	free chan []byte
	stop chan struct{}
	done chan struct{}
	cur  []byte // of the block being consumed
	own  []byte // that block whole, to be given back
	err  error  // once cur is consumed
}

type block struct {
	data []byte
	err  error
}

const (
	aheadBlock  = 256 << 10
	aheadBlocks = 4
)

func newReadAhead(r io.Reader) *readAhead {
	a := &readAhead{
		full: make(chan block, aheadBlocks), free: make(chan []byte, aheadBlocks),
		stop: make(chan struct{}), done: make(chan struct{}),
	}
	for range aheadBlocks {
		a.free <- nil // made when it is needed
	}
	go a.fill(r)
	return a
}

func (a *readAhead) fill(r io.Reader) {
	defer close(a.done)
	for {
		var buf []byte
		select {
		case buf = <-a.free:
		case <-a.stop:
			return
		}
		if buf == nil {
			buf = make([]byte, aheadBlock)
		}
		n, err := fillBlock(r, buf, a.stop)
		a.full <- block{buf[:n], err} // never blocks: there are as many places as blocks
		if err != nil {
			return
		}
	}
}

// fillBlock reads until buf is full, the stream ends or nobody wants more.
func fillBlock(r io.Reader, buf []byte, stop <-chan struct{}) (int, error) {
	n := 0
	for n < len(buf) {
		m, err := r.Read(buf[n:])
		n += m
		if err != nil {
			return n, err
		}
		select {
		case <-stop:
			return n, context.Canceled
		default:
		}
	}
	return n, nil
}

// Read implements io.Reader for one goroutine.
func (a *readAhead) Read(p []byte) (int, error) {
	for len(a.cur) == 0 {
		if a.err != nil {
			return 0, a.err
		}
		if a.own != nil {
			a.free <- a.own[:cap(a.own)]
			a.own = nil
		}
		b := <-a.full
		a.own, a.cur, a.err = b.data, b.data, b.err
	}
	n := copy(p, a.cur)
	a.cur = a.cur[n:]
	return n, nil
}

// close ends the goroutine; it waits for a read of the stream in progress.
func (a *readAhead) close() {
	close(a.stop)
	<-a.done
}

// meter counts the bytes that the tar reader takes, so that errors can say
// where, and stops it at a limit or when ctx is done.
type meter struct {
	ctx      context.Context
	r        io.Reader
	n        int64
	limit    int64
	progress func(int64)
	told     int64
	begin    int64 // where the header that is being read begins
	data     bool  // something but zeros has come since
}

// header says that the tar reader goes on to the next header, which it returns.
func (m *meter) header() int64 {
	m.begin, m.data = (m.n+blockSize-1)&^(blockSize-1), false
	return m.begin
}

// ended reports whether nothing but the archive's end mark has come since the
// header began: a block of zeros or two. archive/tar does not tell it from a
// stream that just stops, after a PAX header too.
func (m *meter) ended() bool { return m.n >= m.begin+blockSize && !m.data }

// watch looks for data in what was just read.
func (m *meter) watch(p []byte) {
	if skip := m.begin - m.n; skip > 0 { // padding of the entry before
		p = p[min(skip, int64(len(p))):]
	}
	m.data = bytes.ContainsFunc(p, func(r rune) bool { return r != 0 })
}

// progressStep is how many bytes lie between two reports of progress.
const progressStep = 1 << 20

func (m *meter) Read(p []byte) (int, error) {
	if err := m.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := m.r.Read(p)
	if !m.data {
		m.watch(p[:n])
	}
	m.n += int64(n)
	if m.progress != nil && (m.n-m.told >= progressStep || errors.Is(err, io.EOF)) {
		m.told = m.n
		m.progress(m.n)
	}
	if lerr := within("Size", m.n, m.limit, "bytes of the layer"); lerr != nil {
		return n, lerr
	}
	return n, err
}
