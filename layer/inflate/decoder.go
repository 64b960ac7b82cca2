package inflate

import (
	"encoding/binary"
)

const (
	window = 32 << 10
	// outSize is much more than the window, so that what moves that to the front moves
	// little of all; and slack.
	outSize = 192<<10 + slack
	// slack is more than one turn of the fast loop writes: two words of literals, a match,
	// and the rest of its last word.
	slack = 2*wordBytes + 258 + wordBytes
)

// A stage of the decoder is what comes next in the stream.
type stage uint8

const (
	atBlock  stage = iota
	inStored       // left bytes are to be copied
	inCodes
)

// decoder turns the bits of a DEFLATE stream into bytes, out[:to].
type decoder struct {
	out    []byte
	to     int
	origin int // where the stream's bytes begin in out, or 0

	// hold has the next count bits of the stream, the first of them lowest. Above them
	// are further ones, which the next read from the input puts there again, or zeros.
	hold  uint64
	count uint

	stage stage
	last  bool // block
	left  int

	*tables // of the block
	own     tables
}

func newDecoder() decoder { return decoder{out: make([]byte, outSize)} }

// restart begins another stream.
func (d *decoder) restart() {
	d.origin, d.hold, d.count, d.stage, d.last = d.to, 0, 0, atBlock, false
}

// slide makes room, where there is none, by letting go what is before the window.
func (d *decoder) slide() {
	if d.to >= outSize-slack {
		copy(d.out, d.out[d.to-window:d.to])
		d.origin = max(d.origin-(d.to-window), 0)
		d.to = window
	}
}

// decode goes on until the stream ends, which it reports, or there is no more room.
func (d *decoder) decode(in *input) (done bool, err error) {
	for d.to < outSize-slack && err == nil {
		switch d.stage {
		case atBlock:
			if d.last {
				return true, nil
			}
			err = d.block(in)
		case inStored:
			err = d.stored(in)
		case inCodes:
			in.more(fastBytes)
			if in.end-in.pos >= fastBytes {
				err = d.fast(in)
			} else {
				err = d.slow(in)
			}
		}
	}
	return false, err
}

// need has at least n bits in hold, n at most 32.
func (d *decoder) need(in *input, n uint) error {
	for d.count < n {
		in.more(1)
		if in.pos == in.end {
			return noEOF(in.err)
		}
		d.hold |= uint64(in.in[in.pos]) << d.count
		in.pos++
		d.count += 8
	}
	return nil
}

// take returns the next n bits, of those that are in hold.
func (d *decoder) take(n uint) uint32 {
	v := uint32(d.hold & (1<<n - 1))
	d.hold >>= n
	d.count -= n
	return v
}

// bits reads n bits.
func (d *decoder) bits(in *input, n uint) (uint32, error) {
	if err := d.need(in, n); err != nil {
		return 0, err
	}
	return d.take(n), nil
}

// alignToByte lets go what is left of a byte, and gives whole bytes back to the input.
func (d *decoder) alignToByte(in *input) {
	in.pos -= int(d.count / 8)
	d.hold, d.count = 0, 0
}

// block reads how a block begins.
func (d *decoder) block(in *input) error {
	h, err := d.bits(in, 3)
	if err != nil {
		return err
	}
	d.last = h&1 != 0
	switch h >> 1 {
	case 0:
		return d.storedHeader(in)
	case 1:
		d.tables, d.stage = fixed, inCodes
		return nil
	case 2:
		d.tables, d.stage = &d.own, inCodes
		return d.readTables(in)
	}
	return in.corrupt()
}

func (d *decoder) storedHeader(in *input) error {
	d.alignToByte(in)
	var h [4]byte
	if err := in.full(h[:]); err != nil {
		return noEOF(err)
	}
	n := binary.LittleEndian.Uint16(h[:])
	if binary.LittleEndian.Uint16(h[2:]) != ^n {
		return in.corrupt()
	}
	d.left, d.stage = int(n), inStored
	return nil
}

// stored copies of a stored block what is there and has room.
func (d *decoder) stored(in *input) error {
	if d.left == 0 {
		d.stage = atBlock
		return nil
	}
	in.more(1)
	n := min(d.left, in.end-in.pos, outSize-slack-d.to)
	if n == 0 {
		return noEOF(in.err)
	}
	d.to += copy(d.out[d.to:], in.in[in.pos:in.pos+n])
	in.pos += n
	d.left -= n
	return nil
}

// lengthOrder is how the lengths of the code of lengths follow (RFC 1951, 3.2.7).
var lengthOrder = [...]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// readTables reads the codes of a block that brings its own.
func (d *decoder) readTables(in *input) error {
	h, err := d.bits(in, 14)
	if err != nil {
		return err
	}
	lits, dists, n := 257+int(h&31), 1+int(h>>5&31), 4+int(h>>10)
	if lits > codesOfLit || dists > codesOfDist {
		return in.corrupt()
	}
	var ofLengths [len(lengthOrder)]uint8
	for _, s := range lengthOrder[:n] {
		v, err := d.bits(in, 3)
		if err != nil {
			return err
		}
		ofLengths[s] = uint8(v)
	}
	var code [1 << lengthBits]uint32
	if !build(code[:], lengthBits, ofLengths[:], lengthEntries[:]) {
		return in.corrupt()
	}
	var lengths [codesOfLit + codesOfDist]uint8
	if err := d.lengths(in, &code, lengths[:lits+dists]); err != nil {
		return err
	}
	if !d.own.set(lengths[:lits], lengths[lits:lits+dists]) {
		return in.corrupt()
	}
	return nil
}

// lengths reads the lengths of the codes of literals and of distances.
func (d *decoder) lengths(in *input, code *[1 << lengthBits]uint32, lengths []uint8) error {
	for i := 0; i < len(lengths); {
		e, err := d.symbol(in, code[:], lengthBits)
		if err != nil {
			return err
		}
		s := e >> 16
		if s < 16 {
			lengths[i] = uint8(s)
			i++
			continue
		}
		again := uint8(0)
		if s == 16 {
			if i == 0 {
				return in.corrupt()
			}
			again = lengths[i-1]
		}
		r := repeats[s-16]
		more, err := d.bits(in, r.bits)
		if err != nil {
			return err
		}
		end := i + r.least + int(more)
		if end > len(lengths) {
			return in.corrupt()
		}
		for ; i < end; i++ {
			lengths[i] = again
		}
	}
	return nil
}

// repeats are the symbols from 16 of the code of lengths.
var repeats = [3]struct {
	least int
	bits  uint
}{{3, 2}, {3, 3}, {11, 7}}

// symbol reads a code by its table, bit by bit where it must, and returns the entry.
func (d *decoder) symbol(in *input, table []uint32, first uint) (uint32, error) {
	for {
		e := table[d.hold&(1<<first-1)]
		if e&isTable != 0 {
			e = table[e>>16+uint32(d.hold>>first)&(1<<entryExtra(e)-1)]
		}
		if n := entryBits(e); n <= d.count {
			if e&isWrong != 0 {
				return 0, in.corrupt()
			}
			d.take(n)
			return e, nil
		}
		if err := d.need(in, d.count+1); err != nil {
			return 0, err
		}
	}
}

// slow reads one symbol with all that belongs to it, and takes no bit that is not there.
// Each block has the code of its end before it: as compress/flate does it asks for as many
// bits before it looks at one.
func (d *decoder) slow(in *input) error {
	if err := d.need(in, d.end); err != nil {
		return err
	}
	e, err := d.symbol(in, d.lit[:], litBits)
	switch {
	case err != nil:
		return err
	case e&isLiteral != 0:
		d.out[d.to] = byte(e >> 16)
		d.to++
		return nil
	case e&isOther != 0:
		d.stage = atBlock
		return nil
	}
	more, err := d.bits(in, entryExtra(e))
	if err != nil {
		return err
	}
	length := int(e>>16 + more)
	if e, err = d.symbol(in, d.dist[:], distBits); err != nil {
		return err
	}
	if more, err = d.bits(in, entryExtra(e)); err != nil {
		return err
	}
	return d.match(in, length, int(e>>16+more))
}

func (d *decoder) match(in *input, length, distance int) error {
	if distance > d.to-d.origin {
		return in.corrupt()
	}
	for range length {
		d.out[d.to] = d.out[d.to-distance]
		d.to++
	}
	return nil
}
