package metadata

import (
	"fmt"
	"iter"
)

// Kind says how a range of virtual blocks differs between two devices.
type Kind int

// The kinds.
const (
	LeftOnly  Kind = iota + 1 // only the first device has it mapped
	RightOnly                 // only the second
	Differ                    // both, to different data blocks
)

func (k Kind) String() string {
	switch k {
	case LeftOnly:
		return "left only"
	case RightOnly:
		return "right only"
	case Differ:
		return "differ"
	}
	return fmt.Sprintf("kind %d", int(k))
}

// Range is a range of virtual blocks that differ in one way. Blocks that are mapped
// to different data blocks may hold the same bytes; those that are not listed are the
// same or mapped in neither.
type Range struct {
	Kind   Kind
	Begin  uint64
	Length uint64
}

// Delta lists the virtual blocks at which the mappings of two devices differ, in
// order. It reads the nodes that one of them has for itself, and what leads there. An
// error ends the sequence.
func (p *Pool) Delta(left, right ID) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		var r Range
		more := true
		err := p.differences(left, right, func(k Kind, block uint64) bool {
			if r.Kind == k && block == r.Begin+r.Length {
				r.Length++
				return true
			}
			more = r.Length == 0 || yield(r, nil)
			r = Range{Kind: k, Begin: block, Length: 1}
			return more
		})
		if more && r.Length > 0 {
			more = yield(r, nil)
		}
		if more && err != nil {
			yield(Range{}, fmt.Errorf("devices %d and %d: %w", left, right, err))
		}
	}
}

// Exclusive counts the data blocks that a device does not share with its parent: what
// it costs beside the parent. One without a parent costs Device.Mapped.
func (p *Pool) Exclusive(id, parent ID) (blocks uint64, err error) {
	err = p.differences(parent, id, func(k Kind, _ uint64) bool {
		if k != LeftOnly {
			blocks++
		}
		return true
	})
	if err != nil {
		return 0, fmt.Errorf("device %d and its parent %d: %w", id, parent, err)
	}
	return blocks, nil
}

// differences calls do for each virtual block, until it returns false.
func (p *Pool) differences(left, right ID, do func(k Kind, block uint64) bool) error {
	l, err := p.mappings(left)
	if err != nil {
		return err
	}
	r, err := p.mappings(right)
	if err != nil || l.root == r.root {
		return err
	}
	w := walk{p: p, do: do}
	if w.left, err = l.cursor(); err != nil {
		return err
	}
	if w.right, err = r.cursor(); err != nil {
		return err
	}
	for more := true; more && err == nil; {
		more, err = w.step()
	}
	return err
}

// walk is two cursors on their way through two trees.
type walk struct {
	p           *Pool
	left, right *cursor
	do          func(k Kind, block uint64) bool
}

// step brings one cursor, or both, on; false at the end.
func (w *walk) step() (bool, error) {
	l, r := w.left, w.right
	switch {
	case !l.ok && !r.ok:
		return false, nil
	case !r.ok:
		return w.alone(l, LeftOnly)
	case !l.ok:
		return w.alone(r, RightOnly)
	case !l.entry && !r.entry && l.block == r.block:
		l.next() // the same tree: as nodes are never changed while they are shared
		r.next()
		return true, nil
	case l.entry && r.entry && l.low == r.low:
		return w.pair()
	case first(l, r):
		return w.alone(l, LeftOnly)
	}
	return w.alone(r, RightOnly)
}

// first reports whether l is the one to go on with: the one with the lower keys, so
// that an entry met there is one that the other has not; at the same key the taller,
// so that the two come to stand at subtrees of the same height, which may be one.
func first(l, r *cursor) bool {
	if l.low != r.low {
		return l.low < r.low
	}
	return r.entry || !l.entry && l.height >= r.height
}

// alone takes an entry that only one side can have, or goes one step into a
// subtree. A look at its first key comes before: the key under which a parent has a
// subtree may be lower, and differ between two parents that share it.
func (w *walk) alone(c *cursor, k Kind) (bool, error) {
	if c.entry {
		if _, _, err := w.p.mapping(c.value); err != nil {
			return false, err
		}
		more := w.do(k, c.low)
		c.next()
		return more, nil
	}
	if c.node == nil {
		return true, c.read()
	}
	return true, c.enter()
}

func (w *walk) pair() (bool, error) {
	l, _, err := w.p.mapping(w.left.value)
	if err != nil {
		return false, err
	}
	r, _, err := w.p.mapping(w.right.value)
	if err != nil {
		return false, err
	}
	more := l == r || w.do(Differ, w.left.low)
	w.left.next()
	w.right.next()
	return more, nil
}
