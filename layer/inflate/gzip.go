package inflate

import (
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"hash/crc32"
	"io"
)

// Reader gives the uncompressed bytes of gzip members that follow one another, and
// checks their sums. It reads ahead of what it gives. Its errors are those of compress/gzip:
// gzip.ErrHeader of what follows a member and is none, too, gzip.ErrChecksum,
// io.ErrUnexpectedEOF, a flate.CorruptInputError, and those of the reader below. What was
// decoded before an error is given first.
type Reader struct {
	input
	decoder
	from   int // out[from:to] is decoded and not given
	summed int // out[:summed] is in sum
	sum    uint32
	size   uint32
	inside bool // a member, of which the header is read
	err    error
}

// The flags of a member's header.
const (
	headerSum = 1 << 1 << iota
	headerExtra
	headerName
	headerComment
)

// longestString is what compress/gzip takes of a name or comment.
const longestString = 512

// NewReader reads the header of the first member; io.EOF of an empty stream.
func NewReader(r io.Reader) (*Reader, error) {
	z := &Reader{input: newInput(r), decoder: newDecoder()}
	if err := z.begin(); err != nil {
		return nil, err
	}
	return z, nil
}

// Close ends the use of a Reader. It does not close the reader below.
func (z *Reader) Close() error { return nil }

// Read implements io.Reader.
func (z *Reader) Read(p []byte) (int, error) {
	for z.from == z.to {
		if z.err != nil {
			return 0, z.err
		}
		if len(p) == 0 {
			return 0, nil
		}
		z.fill()
	}
	n := copy(p, z.out[z.from:z.to])
	z.from += n
	return n, nil
}

// fill decodes until there is something to give, or an error.
func (z *Reader) fill() {
	z.slide()
	z.from, z.summed = z.to, z.to
	for z.err == nil && z.to == z.from {
		if !z.inside {
			z.err = z.begin()
			continue
		}
		done, err := z.decode(&z.input)
		z.addSum()
		if err == nil && done {
			z.inside = false
			err = z.end()
		}
		z.err = err
	}
}

func (z *Reader) addSum() {
	z.sum = crc32.Update(z.sum, crc32.IEEETable, z.out[z.summed:z.to])
	z.size += uint32(z.to - z.summed)
	z.summed = z.to
}

// begin reads a member's header; io.EOF if there is none.
func (z *Reader) begin() error {
	var head [10]byte
	if err := z.full(head[:]); err != nil {
		return err
	}
	if head[0] != 0x1f || head[1] != 0x8b || head[2] != 8 {
		return gzip.ErrHeader
	}
	sum := crc32.ChecksumIEEE(head[:])
	if err := z.rest(head[3], &sum); err != nil {
		return noEOF(err)
	}
	z.sum, z.size, z.inside = 0, 0, true
	z.restart()
	return nil
}

// rest reads what follows the fixed part of a header.
func (z *Reader) rest(flags byte, sum *uint32) error {
	var two [2]byte
	take := func(p []byte) error {
		err := z.full(p)
		*sum = crc32.Update(*sum, crc32.IEEETable, p)
		return err
	}
	if flags&headerExtra != 0 {
		if err := take(two[:]); err != nil {
			return err
		}
		if err := take(make([]byte, binary.LittleEndian.Uint16(two[:]))); err != nil {
			return err
		}
	}
	for _, flag := range []byte{headerName, headerComment} {
		for n := 0; flags&flag != 0; n++ {
			if n == longestString {
				return gzip.ErrHeader
			}
			if err := take(two[:1]); err != nil {
				return err
			}
			if two[0] == 0 {
				break
			}
		}
	}
	if flags&headerSum != 0 {
		if err := z.full(two[:]); err != nil {
			return err
		}
		if binary.LittleEndian.Uint16(two[:]) != uint16(*sum) {
			return gzip.ErrHeader
		}
	}
	return nil
}

// end reads and checks the trailer of a member.
func (z *Reader) end() error {
	z.alignToByte(&z.input)
	var tail [8]byte
	if err := z.full(tail[:]); err != nil {
		return noEOF(err)
	}
	if binary.LittleEndian.Uint32(tail[:]) != z.sum || binary.LittleEndian.Uint32(tail[4:]) != z.size {
		return gzip.ErrChecksum
	}
	return nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// corrupt is an error of the stream at the place where reading is.
func (in *input) corrupt() error { return flate.CorruptInputError(in.before + int64(in.pos)) }
