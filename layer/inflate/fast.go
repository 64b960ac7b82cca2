package inflate

import "encoding/binary"

// fastBytes is what one turn of fast reads of the input at most.
const fastBytes = 2 * wordBytes

// fast reads symbols while two words of input can be read, and there is room for the
// most that a turn writes. After a word is read into hold there are 56 bits at least:
// three entries of literals, of 11 bits at most, and a length with its bits take 53, a distance
// with its bits 28.
func (d *decoder) fast(in *input) error {
	src, pos, last := in.in, in.pos, in.end-fastBytes
	out, to, full := d.out, d.to, outSize-slack
	pairs, lit, dist := &d.pairs, &d.lit, &d.dist
	origin, hold, count := d.origin, d.hold, d.count
	corrupt := false
	for pos <= last && to < full {
		hold |= binary.LittleEndian.Uint64(src[pos:]) << (count & 63)
		pos += int(63-count) >> 3
		count |= 56
		e := pairs[hold&(1<<litBits-1)]
		for i := 0; i < 3 && e&isLiteral != 0; i++ {
			hold >>= e & 63
			count -= uint(e & 63)
			binary.LittleEndian.PutUint16(out[to:], uint16(e>>16))
			to += entryLiterals(e)
			e = pairs[hold&(1<<litBits-1)]
		}
		if e&isTable != 0 && e&isOther != 0 {
			e = lit[e>>16+uint32(hold>>litBits)&(1<<entryExtra(e)-1)]
		}
		if e&(isLiteral|isOther) != 0 {
			if corrupt = e&isWrong != 0; corrupt {
				break
			}
			hold >>= e & 63
			count -= uint(e & 63)
			if e&isOther != 0 {
				d.stage = atBlock
				break
			}
			binary.LittleEndian.PutUint16(out[to:], uint16(e>>16))
			to += entryLiterals(e)
			continue
		}
		hold >>= e & 63
		more := uint32(hold) & (1<<entryExtra(e) - 1)
		length := int(e>>16 + more)
		hold >>= entryExtra(e)
		count -= uint(e&63) + entryExtra(e)
		if count < 28 {
			hold |= binary.LittleEndian.Uint64(src[pos:]) << (count & 63)
			pos += int(63-count) >> 3
			count |= 56
		}
		e = dist[hold&(1<<distBits-1)]
		if e&isOther != 0 {
			if e&isTable != 0 {
				e = dist[e>>16+uint32(hold>>distBits)&(1<<entryExtra(e)-1)]
			}
			if corrupt = e&isOther != 0; corrupt {
				break
			}
		}
		hold >>= e & 63
		more = uint32(hold) & (1<<entryExtra(e) - 1)
		distance := int(e>>16 + more)
		hold >>= entryExtra(e)
		count -= uint(e&63) + entryExtra(e)
		if corrupt = distance > to-origin; corrupt {
			break
		}
		copyMatch(out, to, distance, length)
		to += length
	}
	in.pos, d.to, d.hold, d.count = pos, to, hold, count
	if corrupt {
		return in.corrupt()
	}
	return nil
}

// copyMatch copies by words, and writes up to a word less one byte too far.
func copyMatch(out []byte, to, distance, length int) {
	from, end := to-distance, to+length
	for distance < wordBytes { // what is copied is a period, and then two
		binary.LittleEndian.PutUint64(out[to:], binary.LittleEndian.Uint64(out[from:]))
		to += distance
		distance *= 2
	}
	for to < end {
		binary.LittleEndian.PutUint64(out[to:], binary.LittleEndian.Uint64(out[from:]))
		to += wordBytes
		from += wordBytes
	}
}
