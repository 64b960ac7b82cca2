package inflate

import (
	"math/bits"
	"slices"
)

const (
	litBits  = 11
	distBits = 8
	// The most that tables of complete codes of up to 15 bits take, with the tables
	// behind them.
	litSize  = 1<<litBits + 512
	distSize = 1<<distBits + 256

	longestCode = 15
	codesOfLit  = 286 // as a stream may declare; the fixed code has two more
	codesOfDist = 30
	endOfBlock  = 256
)

// An entry of a table, from its lowest bits: 8, how many bits the code has; 8, what
// it is; 16, its value. What it is:
//
//	isLiteral | n     one literal or two, n, in the value
//	isOther | 0       the end of a block
//	isOther | isTable | n  the table behind, at the value, indexed by n further bits
//	isOther | isWrong no symbol has this code
//	n                 a length or a distance: the value and n further bits
const (
	isLiteral = 0x80 << 8
	isOther   = 0x40 << 8
	isTable   = 0x20 << 8
	isWrong   = 0x10 << 8

	wrong uint32 = isOther | isWrong
)

func entryBits(e uint32) uint      { return uint(e & 63) }
func entryExtra(e uint32) uint     { return uint(e >> 8 & 15) }
func entryLiterals(e uint32) int   { return int(e >> 8 & 3) }
func literal(b byte, n int) uint32 { return uint32(b)<<16 | isLiteral | 1<<8 | uint32(n) }

// litEntries and distEntries are the entries of symbols, without the code's bits.
var (
	litEntries  = makeLitEntries()
	distEntries = makeDistEntries()
)

func makeLitEntries() (t [288]uint32) {
	for b := range 256 {
		t[b] = literal(byte(b), 0)
	}
	t[endOfBlock] = isOther
	base := uint32(3)
	for s := 257; s < 285; s++ {
		extra := uint32(max(s-261, 0) / 4)
		t[s] = base<<16 | extra<<8
		base += 1 << extra
	}
	t[285] = 258 << 16
	t[286], t[287] = wrong, wrong
	return t
}

func makeDistEntries() (t [32]uint32) {
	base := uint32(1)
	for s := range codesOfDist {
		extra := uint32(max(s-2, 0) / 2)
		t[s] = base<<16 | extra<<8
		base += 1 << extra
	}
	t[30], t[31] = wrong, wrong
	return t
}

// build makes the table of a code from the lengths of its symbols' codes, 0 for no code.
// It reports false where the code has too many codes or too few, but for one of no code
// at all or of one with one bit. The table's first 1<<first entries are indexed by the
// next bits of the stream.
func build(table []uint32, first uint, lengths []uint8, entries []uint32) bool {
	var count, next [longestCode + 2]uint16
	for _, n := range lengths {
		count[n]++
	}
	count[0] = 0
	code, longest := uint16(0), uint(0)
	room := 1
	for n := 1; n <= longestCode; n++ {
		next[n] = code
		code = (code + count[n]) << 1
		room = room<<1 - int(count[n])
		if room < 0 {
			return false
		}
		if count[n] > 0 {
			longest = uint(n)
		}
	}
	if alone := longest == 1 && count[1] == 1; room > 0 && !alone && longest > 0 {
		return false
	}
	if room > 0 {
		for i := range table[:1<<first] {
			table[i] = wrong | uint32(longest)
		}
	}
	b := builder{table: table, first: first}
	if longest > first {
		b.reserve(lengths, next)
	}
	for s, n := range lengths {
		if n != 0 {
			b.put(bits.Reverse16(next[n])>>(16-n), uint(n), entries[s]+uint32(n))
			next[n]++
		}
	}
	return true
}

// builder puts entries into a table.
type builder struct {
	table []uint32
	first uint
}

// reserve makes the tables behind the first one.
func (b *builder) reserve(lengths []uint8, next [longestCode + 2]uint16) {
	var deepest [1 << litBits]uint8
	for _, n := range lengths {
		if uint(n) <= b.first {
			continue
		}
		at := bits.Reverse16(next[n]) >> (16 - n) & (1<<b.first - 1)
		next[n]++
		deepest[at] = max(deepest[at], n)
	}
	free := uint32(1) << b.first
	for at, n := range deepest[:1<<b.first] {
		if n != 0 {
			more := uint32(n) - uint32(b.first)
			b.table[at] = free<<16 | isOther | isTable | more<<8 | uint32(b.first)
			free += 1 << more
		}
	}
}

// put fills every place whose index ends in a code, which is reversed.
func (b *builder) put(code uint16, n uint, e uint32) {
	to, step, size := b.table, 1<<n, 1<<b.first
	at := int(code)
	if n > b.first {
		t := b.table[code&(1<<b.first-1)]
		to = b.table[t>>16:]
		at, step, size = int(code>>b.first), 1<<(n-b.first), 1<<(t>>8&15)
	}
	for ; at < size; at += step {
		to[at] = e
	}
}

// pairUp makes of a table of literals and lengths the one in which a literal whose code
// leaves bits enough is followed by the next.
func (t *tables) pairUp() {
	for i, e := range t.lit[:1<<litBits] {
		if n := entryBits(e); e&isLiteral != 0 && n < litBits {
			next := t.lit[i>>n]
			if both := n + entryBits(next); next&isLiteral != 0 && both <= litBits {
				e = next>>16<<24 | e&0xff0000 | isLiteral | 2<<8 | uint32(both)
			}
		}
		t.pairs[i] = e
	}
}

const lengthBits = 7

// lengthEntries are those of the code of lengths, whose symbols are their values.
var lengthEntries = func() (t [19]uint32) {
	for s := range t {
		t[s] = uint32(s) << 16
	}
	return t
}()

// tables are the codes of a block.
type tables struct {
	pairs [1 << litBits]uint32 // lit with two literals in an entry; for what is no literal it leads to lit
	lit   [litSize]uint32
	dist  [distSize]uint32
	end   uint // bits of the code of endOfBlock
}

// set makes the tables from the lengths of the codes.
func (t *tables) set(lits, dists []uint8) bool {
	if !build(t.lit[:], litBits, lits, litEntries[:]) || !build(t.dist[:], distBits, dists, distEntries[:]) {
		return false
	}
	t.pairUp()
	t.end = uint(lits[endOfBlock])
	return true
}

// fixed are the codes of blocks that bring none.
var fixed = func() *tables {
	lits := slices.Concat(slices.Repeat([]uint8{8}, 144), slices.Repeat([]uint8{9}, 112), slices.Repeat([]uint8{7}, 24), slices.Repeat([]uint8{8}, 8))
	t := new(tables)
	t.set(lits, slices.Repeat([]uint8{5}, 32))
	return t
}()
