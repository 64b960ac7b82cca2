package ext4

import (
	"cmp"
	"slices"
	"sort"
)

// span is a run of blocks, end excluded.
type span struct{ start, end uint64 }

// spans are in order and do not touch, once normal has been called.
type spans []span

func (s *spans) add(start, length uint64) {
	if length > 0 {
		*s = append(*s, span{start, start + length})
	}
}

// normal brings them into order and joins those that touch.
func (s spans) normal() spans {
	slices.SortFunc(s, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	out := s[:0]
	for _, p := range s {
		if n := len(out); n > 0 && p.start <= out[n-1].end {
			out[n-1].end = max(out[n-1].end, p.end)
			continue
		}
		out = append(out, p)
	}
	return out
}

// from is the place of the first span that ends after a block.
func (s spans) from(block uint64) int {
	return sort.Search(len(s), func(i int) bool { return s[i].end > block })
}

func (s spans) has(block uint64) bool {
	i := s.from(block)
	return i < len(s) && s[i].start <= block
}

// within is the part of s between two blocks.
func (s spans) within(start, end uint64) spans {
	var out spans
	for i := s.from(start); i < len(s) && s[i].start < end; i++ {
		out = append(out, span{max(start, s[i].start), min(end, s[i].end)})
	}
	return out
}

// without is what is in s and not in t.
func (s spans) without(t spans) spans {
	var out spans
	for _, p := range s {
		for i := t.from(p.start); i < len(t) && t[i].start < p.end; i++ {
			if t[i].start > p.start {
				out = append(out, span{p.start, t[i].start})
			}
			p.start = min(t[i].end, p.end)
		}
		if p.start < p.end {
			out = append(out, p)
		}
	}
	return out
}
