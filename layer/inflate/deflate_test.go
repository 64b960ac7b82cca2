package inflate

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"
	"math/rand/v2"
	"slices"
)

// A streamWriter writes gzip members that no compressor would: codes of any shape, of one
// symbol or none, all lengths and distances, blocks without bytes, and at times
// what is not allowed.
type streamWriter struct {
	*rand.Rand
	b     []byte
	hold  uint64
	count uint
	plain []byte
	wrong bool // makes mistakes
}

func (w *streamWriter) bits(v uint64, n uint) {
	w.hold |= v << w.count
	for w.count += n; w.count >= 8; w.count -= 8 {
		w.b = append(w.b, byte(w.hold))
		w.hold >>= 8
	}
}

func (w *streamWriter) align() {
	if w.count > 0 {
		w.bits(0, 8-w.count)
	}
}

func (w *streamWriter) mistake(oneIn int) bool { return w.wrong && w.IntN(oneIn) == 0 }

// lengths makes the lengths of a complete code for the symbols, by splitting leaves.
func (w *streamWriter) lengths(symbols []int, n, longest int) []uint8 {
	l := make([]uint8, n)
	if len(symbols) == 1 {
		l[symbols[0]] = 1
		return l
	}
	leaves := []int{1, 1}
	for len(leaves) < len(symbols) {
		i := w.IntN(len(leaves))
		if w.IntN(3) > 0 {
			i = len(leaves) - 1 // a deep code
		}
		if leaves[i] == longest {
			i = slices.Index(leaves, slices.Min(leaves))
		}
		leaves[i]++
		leaves = append(leaves, leaves[i])
	}
	w.Shuffle(len(leaves), func(i, j int) { leaves[i], leaves[j] = leaves[j], leaves[i] })
	for i, s := range symbols {
		l[s] = uint8(leaves[i])
	}
	if w.mistake(20) {
		l[symbols[0]] = uint8(w.IntN(longest + 1))
	}
	return l
}

// codesOf are the codes of the lengths, reversed as they are written.
func codesOf(l []uint8) []uint64 {
	codes := make([]uint64, len(l))
	code := uint16(0)
	for n := uint8(1); n <= longestCode; n++ {
		for s, m := range l {
			if m == n {
				codes[s] = uint64(bits.Reverse16(code) >> (16 - n))
				code++
			}
		}
		code <<= 1
	}
	return codes
}

// some picks symbols below n, and those that must be.
func (w *streamWriter) some(n int, must ...int) []int {
	all := w.Perm(n)
	k := 1 + w.IntN(n)
	if w.IntN(2) == 0 {
		k = 1 + w.IntN(4)
	}
	s := append(must, all[:k]...)
	slices.Sort(s)
	return slices.Compact(s)
}

func every(n int) (all []int) {
	for s := range n {
		all = append(all, s)
	}
	return all
}

// dynamic writes a block with codes of its own.
func (w *streamWriter) dynamic() {
	lits := w.lengths(w.some(codesOfLit, endOfBlock), codesOfLit, longestCode)
	dists := w.lengths(w.some(codesOfDist), codesOfDist, longestCode)
	if w.IntN(4) == 0 {
		clear(dists)
	}
	w.bits(uint64(codesOfLit-257), 5)
	w.bits(uint64(codesOfDist-1), 5)
	w.bits(uint64(len(lengthOrder)-4), 4)
	l := w.lengths(every(19), 19, 7)
	for _, s := range lengthOrder {
		w.bits(uint64(l[s]), 3)
	}
	w.codeLengths(append(slices.Clone(lits), dists...), l)
	w.symbols(lits, dists)
}

// codeLengths writes lengths with repeats where there are some.
func (w *streamWriter) codeLengths(all, l []uint8) {
	codes := codesOf(l)
	put := func(s int) { w.bits(codes[s], uint(l[s])) }
	for i := 0; i < len(all); {
		n := 1
		for i+n < len(all) && all[i+n] == all[i] {
			n++
		}
		switch {
		case all[i] == 0 && n >= 11 && w.IntN(8) > 0:
			n = min(n, 138)
			put(18)
			w.bits(uint64(n-11), 7)
		case all[i] == 0 && n >= 3 && w.IntN(8) > 0:
			n = min(n, 10)
			put(17)
			w.bits(uint64(n-3), 3)
		case i > 0 && all[i-1] == all[i] && n >= 3 && w.IntN(8) > 0:
			n = min(n, 6)
			put(16)
			w.bits(uint64(n-3), 2)
		default:
			n = 1
			put(int(all[i]))
		}
		i += n
	}
}

// symbols writes bytes and matches by codes of these lengths.
func (w *streamWriter) symbols(lits, dists []uint8) {
	litCodes, distCodes := codesOf(lits), codesOf(dists)
	for range w.IntN(1 << w.IntN(14)) {
		s := w.IntN(len(lits))
		if lits[s] == 0 || s == endOfBlock {
			continue
		}
		if s < 256 {
			w.bits(litCodes[s], uint(lits[s]))
			w.plain = append(w.plain, byte(s))
			continue
		}
		d := w.IntN(len(dists))
		if dists[d] == 0 || s >= codesOfLit || d >= codesOfDist {
			if !w.mistake(50) {
				continue
			}
		}
		w.match(s, d, lits, dists, litCodes, distCodes)
	}
	w.bits(litCodes[endOfBlock], uint(lits[endOfBlock]))
}

func (w *streamWriter) match(s, d int, lits, dists []uint8, litCodes, distCodes []uint64) {
	le, de := litEntries[s], distEntries[d]
	lm, dm := w.Uint32N(1<<entryExtra(le)), w.Uint32N(1<<entryExtra(de))
	length, distance := int(le>>16+lm), int(de>>16+dm)
	if distance > len(w.plain) && !w.mistake(50) {
		return
	}
	w.bits(litCodes[s], uint(lits[s]))
	w.bits(uint64(lm), entryExtra(le))
	w.bits(distCodes[d], uint(dists[d]))
	w.bits(uint64(dm), entryExtra(de))
	for range length {
		b := byte(0)
		if distance > 0 && distance <= len(w.plain) {
			b = w.plain[len(w.plain)-distance]
		}
		w.plain = append(w.plain, b)
	}
}

func (w *streamWriter) stored() {
	w.align()
	p := make([]byte, w.IntN(1<<w.IntN(17)))
	for i := range p {
		p[i] = byte(w.Uint32())
	}
	n := uint16(len(p))
	w.b = binary.LittleEndian.AppendUint16(w.b, n)
	not := ^n
	if w.mistake(20) {
		not++
	}
	w.b = append(binary.LittleEndian.AppendUint16(w.b, not), p...)
	w.plain = append(w.plain, p...)
}

var fixedLits = slices.Concat(slices.Repeat([]uint8{8}, 144), slices.Repeat([]uint8{9}, 112), slices.Repeat([]uint8{7}, 24), slices.Repeat([]uint8{8}, 8))

// member writes a whole one.
func (w *streamWriter) member() {
	w.plain = nil
	w.header()
	for last := uint64(0); last == 0; {
		last = uint64(w.IntN(5) / 4)
		kind := w.IntN(3)
		if w.mistake(40) {
			kind = 3
		}
		w.bits(last|uint64(kind)<<1, 3)
		switch kind {
		case 0:
			w.stored()
		case 1:
			w.symbols(fixedLits, slices.Repeat([]uint8{5}, 32))
		case 2:
			w.dynamic()
		}
	}
	w.align()
	sum := crc32.ChecksumIEEE(w.plain)
	if w.mistake(10) {
		sum++
	}
	w.b = binary.LittleEndian.AppendUint32(w.b, sum)
	w.b = binary.LittleEndian.AppendUint32(w.b, uint32(len(w.plain)))
}

func (w *streamWriter) header() {
	at := len(w.b)
	flags := byte(w.IntN(32))
	w.b = append(w.b, 0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 255)
	if flags&headerExtra != 0 {
		w.b = append(w.b, 3, 0, 'a', 'b', 'c')
	}
	for _, f := range []byte{headerName, headerComment} {
		if flags&f != 0 {
			for range w.IntN(1 << w.IntN(11)) {
				w.b = append(w.b, byte(1+w.IntN(255)))
			}
			w.b = append(w.b, 0)
		}
	}
	if flags&headerSum != 0 {
		sum := uint16(crc32.ChecksumIEEE(w.b[at:]))
		if w.mistake(10) {
			sum++
		}
		w.b = binary.LittleEndian.AppendUint16(w.b, sum)
	}
}
