package metadata

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/testenv"
)

// checked is what Check finds, as words.
func checked(t testing.TB, b []byte) (Report, string) {
	t.Helper()
	p, err := Open(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.Check(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var s []string
	for _, p := range append(r.Problems, r.Leaks...) {
		s = append(s, p.Error())
	}
	return r, strings.Join(s, "\n")
}

// sound fails the test unless Check finds nothing in all of b.
func sound(t testing.TB, what string, b []byte, m model) {
	t.Helper()
	r, found := checked(t, b)
	if found != "" || !r.Accounted {
		t.Fatalf("%s: accounted %v, found\n%s", what, r.Accounted, found)
	}
	same(t, what+": devices", len(r.Devices), len(m))
	for _, d := range r.Devices {
		end := uint64(0)
		for v := range m[d.ID] {
			end = max(end, v+1)
		}
		same(t, fmt.Sprint(what, ": device ", d.ID), []any{d.End, d.Whole, d.Mapped}, []any{end, true, uint64(len(m[d.ID]))})
	}
}

// thinCheckFails reports whether thin_check finds something, too.
func thinCheckFails(t testing.TB, b []byte) (bool, string) {
	t.Helper()
	name := filepath.Join(testenv.Scratch(t), "metadata")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	file, done := forTools(t, name)
	defer done()
	out, err := exec.Command(testenv.Program(t, "thin_check", "thin-provisioning-tools"), file).CombinedOutput()
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return err != nil, string(out)
}

// few is a model of two devices that share blocks.
func few() model {
	m := model{1: {}, 2: {}}
	for v := range uint64(400) {
		m[1][3*v] = [2]uint64{10 + v, 1}
		m[2][3*v] = [2]uint64{10 + v + v%5*1000, 1}
	}
	return m
}

// Each fault in sound metadata is found, by thin_check, too, and named.
func TestCheckFindsEachFault(t *testing.T) {
	testenv.AnyKernel(t)
	whole := restore(t, few().xml(), 4<<20)
	sound(t, "whole", whole, few())
	for _, c := range []struct {
		what, want string
		do         func(im *image, p *Pool)
		ours       bool // thin_check 0.9 does not look at it
	}{
		{"a block in use for nobody", "1 blocks of data, the first is 9: the space map counts more", func(im *image, p *Pool) { im.count(im.dataBitmap(p), 9, 1) }, true},
		{"a block that may be given out twice", "1 blocks of data, the first is 10: the space map counts fewer", func(im *image, p *Pool) { im.count(im.dataBitmap(p), 10, 1) }, true},
		{"a block free that is in use", "the first is 11: the space map counts fewer", func(im *image, p *Pool) { im.count(im.dataBitmap(p), 11, 0) }, true},
		{"a number that is wrong", "the superblock counts 7 blocks of data in use, the space map ", func(im *image, p *Pool) {
			le.PutUint64(im.block(0)[72:], 7)
			im.seal(0, superblockXor)
		}, true},
		{"metadata in use for nobody", "1 blocks of metadata, the first is 1000: the space map counts more", func(im *image, p *Pool) {
			im.count(le.Uint64(im.block(p.sb.MetadataSpace.Bitmaps)[spaceHead:]), 1000, 2)
		}, false},
		{"a tree that is free", "the space map counts fewer", func(im *image, p *Pool) {
			im.count(le.Uint64(im.block(p.sb.MetadataSpace.Bitmaps)[spaceHead:]), p.sb.MappingRoot, 0)
		}, false},
		{"a record that counts wrong", "device 1 has 399 blocks by its record and 400 by its tree", func(im *image, p *Pool) {
			le.PutUint64(im.details(p, 0), 399)
			im.seal(p.sb.DetailsRoot, nodeXor)
		}, true},
		{"a mapping out of the pool", "device 1: thin metadata: a mapping to data block 1048576 of 1048576", func(im *image, p *Pool) {
			leaf := im.leaf(p, 1)
			nd := im.load(leaf)
			nd.vals[3] = dataBlocks << 24
			im.overwrite(leaf, nd)
		}, true},
		{"a torn node", "has checksum", func(im *image, p *Pool) { im.block(im.leaf(p, 2))[77] ^= 4 }, false},
		{"a torn bitmap", "space map of data: ", func(im *image, p *Pool) { im.block(im.dataBitmap(p))[77] ^= 4 }, false},
		{"a torn index", "space map of metadata: ", func(im *image, p *Pool) { im.block(p.sb.MetadataSpace.Bitmaps)[77] ^= 4 }, false},
		{"torn records", "records of devices: ", func(im *image, p *Pool) { im.block(p.sb.DetailsRoot)[77] ^= 4 }, false},
	} {
		im := &image{b: bytes.Clone(whole), max: 252}
		p, err := Open(im)
		if err != nil {
			t.Fatal(err)
		}
		c.do(im, p)
		_, found := checked(t, im.b)
		if !strings.Contains(found, c.want) {
			t.Errorf("%s: found %q, should speak of %q", c.what, found, c.want)
		}
		if fails, out := thinCheckFails(t, im.b); !fails && !c.ours {
			t.Errorf("%s: thin_check finds nothing:\n%s", c.what, out)
		}
	}
}

// dataBitmap is the block of the first bitmap of data.
func (m *image) dataBitmap(p *Pool) uint64 {
	b := m.block(p.sb.DataSpace.Bitmaps)
	return le.Uint64(b[nodeHeader+8*le.Uint32(b[20:]):])
}

// count sets what a bitmap says of a block.
func (m *image) count(bitmap, block uint64, n byte) {
	b := m.block(bitmap)
	at := spaceHead + block/4
	shift := block % 4 * 2
	b[at] = b[at]&^(3<<shift) | (n>>1|n&1<<1)<<shift
	m.seal(bitmap, bitmapXor)
}

// details is the i'th record of a device.
func (m *image) details(p *Pool, i int) []byte {
	b := m.block(p.sb.DetailsRoot)
	return b[nodeHeader+8*int(le.Uint32(b[20:]))+detailsSize*i:]
}

// leaf is the first one of a device.
func (m *image) leaf(p *Pool, id ID) uint64 {
	t, err := p.mappings(id)
	if err != nil {
		panic(err)
	}
	return m.firstLeaf(t.root)
}

// overwrite puts a node where it was, with the room that it had.
func (m *image) overwrite(n uint64, nd *mem) {
	m.own, m.max = map[uint64]ID{n: m.cur}, int(le.Uint32(m.block(n)[20:]))
	m.put(n, nd)
}

// Damage of a tree's form is found wherever a reader would meet it, and once however many devices
// have the block; the others' trees are read all the same.
func TestCheckOfDamagedTrees(t *testing.T) {
	for _, c := range []struct {
		what, want string
		do         func(im *image, root, leaf uint64)
	}{
		{"loop", "loop", func(im *image, root, _ uint64) {
			nd := im.load(root)
			nd.vals[0] = root
			im.rewrite(root, nd)
		}},
		{"a leaf twice", "out of what block", func(im *image, root, _ uint64) {
			nd := im.load(root)
			nd.vals[1] = nd.vals[0]
			im.rewrite(root, nd)
		}},
		{"leaf among internal nodes", "another depth", func(im *image, root, leaf uint64) {
			nd := im.load(root)
			last := len(nd.keys) - 1
			nd.vals[last] = im.put(0, &mem{leaf: true, keys: []uint64{nd.keys[last]}, vals: []uint64{1 << 24}})
			im.rewrite(root, nd)
		}},
		{"keys out of order", "out of order", func(im *image, _, leaf uint64) {
			nd := im.load(leaf)
			nd.keys[1] = nd.keys[0]
			im.rewrite(leaf, nd)
		}},
		{"empty leaf", "empty", func(im *image, _, leaf uint64) { im.rewrite(leaf, &mem{leaf: true}) }},
		{"tree of another kind", "is in a tree of details and in one of mappings", func(im *image, root, _ uint64) {
			nd := im.load(root)
			nd.vals[0] = le.Uint64(im.block(0)[328:])
			im.rewrite(root, nd)
		}},
		{"beyond the end", "beyond the end of the metadata", func(im *image, root, _ uint64) {
			nd := im.load(root)
			nd.vals[0] = 1 << 40
			im.rewrite(root, nd)
		}},
	} {
		im := small(t)
		root := im.roots[1]
		c.do(im, root, im.firstLeaf(root))
		r, found := checked(t, im.b)
		if !strings.Contains(found, c.want) || r.Accounted {
			t.Errorf("%s: accounted %v, found %q, should speak of %q", c.what, r.Accounted, found, c.want)
		}
		for _, p := range r.Problems {
			if !errors.Is(p, errdefs.ErrDataLoss) {
				t.Errorf("%s: %v is not ErrDataLoss", c.what, p)
			}
		}
		if len(r.Devices) != 2 {
			t.Errorf("%s: devices %+v", c.what, r.Devices)
		}
	}
}

// A device of the pool without a record, and one with a record alone.
func TestCheckOfDevicesWithoutTheOther(t *testing.T) {
	im := small(t) // whose records of devices are those of thin_restore: none
	_, found := checked(t, im.b)
	if !strings.Contains(found, "device 1 has a tree and no record") || !strings.Contains(found, "device 2 has a tree and no record") {
		t.Errorf("found %q", found)
	}
	b := restore(t, few().xml(), 4<<20)
	le.PutUint64(b[320:], le.Uint64(restore(t, model{}.xml(), 4<<20)[320:]))
	im = &image{b: b}
	im.seal(0, superblockXor)
	p, err := Open(im)
	if err != nil {
		t.Fatal(err)
	}
	clear(im.block(p.sb.MappingRoot))
	im.own, im.max = map[uint64]ID{p.sb.MappingRoot: 0}, 252
	im.put(p.sb.MappingRoot, &mem{leaf: true})
	if _, found := checked(t, im.b); !strings.Contains(found, "device 1 has a record and no tree") {
		t.Errorf("found %q", found)
	}
}

func TestCheckEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	p, err := Open(small(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Check(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// What a space map counts too often is a leak and no damage, and thin_repair, of which
// `layerctl check` tells, gives it back.
func TestLeaksAreRepairedByThinRepair(t *testing.T) {
	testenv.AnyKernel(t)
	im := &image{b: restore(t, few().xml(), 4<<20)}
	p, err := Open(im)
	if err != nil {
		t.Fatal(err)
	}
	im.count(im.dataBitmap(p), 9, 2)
	le.PutUint64(im.block(0)[72:], p.sb.DataSpace.Allocated+1)
	im.seal(0, superblockXor)
	if r, found := checked(t, im.b); len(r.Leaks) != 1 || len(r.Problems) != 0 || !r.Accounted {
		t.Errorf("found %q", found)
	}
	dir := testenv.Scratch(t)
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	if err := errors.Join(os.WriteFile(in, im.b, 0o600), os.WriteFile(out, nil, 0o600), os.Truncate(out, 4<<20)); err != nil {
		t.Fatal(err)
	}
	inName, inDone := forTools(t, in)
	outName, outDone := forTools(t, out)
	tool(t, "thin_repair", "-i", inName, "-o", outName)
	inDone()
	outDone()
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	sound(t, "repaired", b, few())
}
