package metadata

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// readAll reads all that there is to read and returns the first error.
func readAll(p *Pool) error {
	var errs []error
	var ids []ID
	for d, err := range p.Devices() {
		if errs = append(errs, err); err == nil && len(ids) < 4 { // damage may make hundreds
			ids = append(ids, d.ID)
		}
	}
	ids = append(ids, 1, 2, 3)
	for i, id := range ids {
		_, err := p.Device(id)
		errs = append(errs, err)
		for _, err := range p.Mappings(id) {
			errs = append(errs, err)
		}
		for _, other := range ids[:i] {
			for _, err := range p.Delta(other, id) {
				errs = append(errs, err)
			}
			_, err := p.Exclusive(id, other)
			errs = append(errs, err)
		}
	}
	for _, err := range errs {
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// small is a pool with two devices, 2 a snapshot of 1 with a few blocks of its own.
func small(t testing.TB) *image {
	im := newImage(t, 128, 3)
	im.create(1)
	for v := range uint64(12) {
		im.set(1, 10*v, v)
	}
	im.snapshot(2, 1)
	im.set(2, 20, 100)
	im.set(2, 45, 101)
	im.commit()
	return im
}

func TestDamageIsAnErrorThatNamesTheBlock(t *testing.T) {
	for _, c := range []struct {
		what string
		do   func(im *image, root, leaf uint64)
		want string
	}{
		{"flipped bit", func(im *image, _, leaf uint64) { im.block(leaf)[900] ^= 1 }, "has checksum"},
		{"another block's content", func(im *image, root, leaf uint64) { copy(im.block(leaf), im.block(root)) }, "says that it is block"},
		{"root beyond the end", func(im *image, _, _ uint64) {
			im.roots[1] = 1 << 50
			im.commit()
		}, "beyond the end of the metadata"},
		{"end of the device", func(im *image, _, leaf uint64) { im.b = im.b[:leaf*BlockSize] }, "beyond the end of the device"},
		{"loop", func(im *image, root, _ uint64) {
			nd := im.load(root)
			nd.vals[0] = root
			im.rewrite(root, nd)
		}, "loop"},
		{"loop to the right", func(im *image, root, _ uint64) {
			nd := im.load(root)
			nd.vals[1] = root
			im.rewrite(root, nd)
		}, "out of order"},
		{"a leaf twice", func(im *image, root, _ uint64) {
			nd := im.load(root)
			nd.vals[1] = nd.vals[0]
			im.rewrite(root, nd)
		}, "out of order"},
		{"leaf among internal nodes", func(im *image, root, leaf uint64) {
			nd := im.load(root)
			nd.vals[0] = leaf
			im.rewrite(root, nd)
		}, "another depth"},
		{"keys out of order", func(im *image, _, leaf uint64) {
			nd := im.load(leaf)
			nd.keys[1] = nd.keys[0]
			im.rewrite(leaf, nd)
		}, "out of order"},
		{"empty leaf", func(im *image, _, leaf uint64) { im.rewrite(leaf, &mem{leaf: true}) }, "empty"},
		{"too many entries", func(im *image, _, leaf uint64) {
			le.PutUint32(im.block(leaf)[16:], 200)
			im.seal(leaf, nodeXor)
		}, "has 200 entries"},
		{"too much room", func(im *image, _, leaf uint64) {
			le.PutUint32(im.block(leaf)[20:], 1<<31)
			im.seal(leaf, nodeXor)
		}, "do not fit"},
		{"wrong size of values", func(im *image, _, leaf uint64) {
			le.PutUint32(im.block(leaf)[24:], 1<<31)
			im.seal(leaf, nodeXor)
		}, "values of"},
		{"no kind", func(im *image, _, leaf uint64) {
			le.PutUint32(im.block(leaf)[4:], 4)
			im.seal(leaf, nodeXor)
		}, "neither"},
		{"data block beyond the end", func(im *image, _, leaf uint64) {
			nd := im.load(leaf)
			nd.vals[0] = dataBlocks << 24
			im.rewrite(leaf, nd)
		}, "data block 1048576 of"},
	} {
		im := small(t)
		root := im.roots[1]
		c.do(im, root, im.firstLeaf(root))
		p, err := Open(im)
		if err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		if err := readAll(p); err == nil || !errors.Is(err, errdefs.ErrDataLoss) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; should speak of %q", c.what, err, c.want)
		}
	}
}

// firstLeaf is the block of the first leaf of a tree.
func (m *image) firstLeaf(root uint64) uint64 {
	n := root
	for nd := m.load(n); !nd.leaf; nd = m.load(n) {
		n = nd.vals[0]
	}
	return n
}

// rewrite changes a node in place, whoever has it.
func (m *image) rewrite(n uint64, nd *mem) {
	m.own[n] = m.cur
	m.put(n, nd)
}

func TestWhatIsNoMetadata(t *testing.T) {
	sb := func(do func(b []byte)) []byte {
		im := small(t)
		do(im.block(0))
		im.seal(0, superblockXor)
		return im.b
	}
	for _, c := range []struct {
		what string
		b    []byte
		is   error
	}{
		{"empty", nil, errdefs.ErrInvalidArgument},
		{"short", make([]byte, 100), errdefs.ErrInvalidArgument},
		{"zeros", make([]byte, 1<<20), errdefs.ErrInvalidArgument},
		{"version 3", sb(func(b []byte) { b[40] = 3 }), errdefs.ErrNotImplemented},
		{"unknown feature", sb(func(b []byte) { b[360] = 1 }), errdefs.ErrNotImplemented},
		{"block size", sb(func(b []byte) { b[340] = 16 }), errdefs.ErrDataLoss},
		{"no data block size", sb(func(b []byte) { b[336] = 0 }), errdefs.ErrDataLoss},
		{"endless", sb(func(b []byte) { b[199] = 255 }), errdefs.ErrDataLoss},
	} {
		if _, err := Open(bytes.NewReader(c.b)); !errors.Is(err, c.is) {
			t.Errorf("%s: %v, should wrap %v", c.what, err, c.is)
		}
	}
	b := small(t).b
	b[100] ^= 1
	if _, err := Open(bytes.NewReader(b)); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("checksum: %v", err)
	}
	held := sb(func(b []byte) { b[56] = 41 })
	p, err := Open(bytes.NewReader(held))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Snapshot(); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("metadata snapshot in a node: %v", err)
	}
	if _, err := p.Exclusive(1, 99); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "99") {
		t.Errorf("no such parent: %v", err)
	}
}

// FuzzRead changes metadata at a few places, gives each block the checksum that it
// should have, and reads all of it: an error or not, but no panic, and no more reads
// than trees of that many blocks can need.
func FuzzRead(f *testing.F) {
	im := small(f)
	f.Add([]byte{})
	f.Add([]byte{41, 0, 16, 200, 42, 0, 40, 41})
	f.Fuzz(func(t *testing.T, patches []byte) {
		c := &image{b: bytes.Clone(im.b)}
		for ; len(patches) >= 4; patches = patches[4:] {
			off := int(patches[0])<<12 | int(patches[1])<<8 | int(patches[2])
			c.b[off%len(c.b)] = patches[3]
		}
		c.seal(0, superblockXor)
		for n := uint64(1); n < uint64(len(c.b)/BlockSize); n++ {
			c.seal(n, nodeXor)
		}
		p, err := Open(c)
		if err != nil {
			return
		}
		_, _ = p.Snapshot()
		_ = readAll(p)
		c.reads = 0
		if _, err := p.Check(t.Context()); err != nil || c.reads > 3*len(c.b)/BlockSize {
			t.Errorf("check: %d reads in %d blocks, %v", c.reads, len(c.b)/BlockSize, err)
		}
		for id := range ID(4) {
			c.reads = 0
			for range p.Mappings(id) {
			}
			if most := len(c.b)/BlockSize + 3*maxHeight; c.reads > most {
				t.Errorf("device %d: %d reads in %d blocks", id, c.reads, len(c.b)/BlockSize)
			}
		}
	})
}
