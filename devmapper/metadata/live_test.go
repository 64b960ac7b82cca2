package metadata

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/devmapper/dmtest"
	"github.com/layerctl/layerctl/internal/testenv"
)

const (
	thinBlock  = dmtest.BlockBytes
	thinBlocks = 1024
	poolName   = "lt-meta-pool"
)

// pool is one of the kernel's, with its active thin devices open.
type pool struct {
	*dmtest.Pool
	t     *testing.T
	nodes map[ID]*os.File
}

func newPool(t *testing.T) *pool {
	t.Helper()
	return &pool{t: t, Pool: dmtest.New(t, poolName, thinBlocks*thinBlock), nodes: map[ID]*os.File{}}
}

func (p *pool) check(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

// open opens an active thin device.
func (p *pool) open(id ID, node string) {
	p.Helper()
	f, err := os.OpenFile(node, os.O_RDWR, 0)
	p.check(err)
	p.Cleanup(func() { f.Close() })
	p.nodes[id] = f
}

func (p *pool) snapshot(id, origin ID) {
	p.Helper()
	p.open(id, p.Snapshot(uint32(id), uint32(origin)))
}

// change writes to blocks and discards some.
func (p *pool) change(r *rand.Rand, id ID, n int) {
	p.Helper()
	for range n {
		at := int64(r.IntN(thinBlocks-64)) * thinBlock
		for range 1 + r.IntN(8) {
			buf := bytes.Repeat([]byte{byte(r.Uint32())}, 4096)
			_, err := p.nodes[id].WriteAt(buf, at+int64(r.IntN(16))*4096)
			p.check(err)
			at += thinBlock
		}
	}
	p.check(p.nodes[id].Sync())
	for range n / 8 {
		at, length := int64(r.IntN(thinBlocks-8))*thinBlock, int64(1+r.IntN(8))*thinBlock
		out, err := exec.Command(testenv.Program(p, "blkdiscard", "util-linux"), "-f", "-o", fmt.Sprint(at), "-l", fmt.Sprint(length), p.nodes[id].Name()).CombinedOutput()
		if err != nil {
			p.Fatalf("blkdiscard: %v %s", err, out)
		}
	}
}

// TestTheKernelsOwnTrees: what the kernel makes of writes, discards and snapshots is
// read from the metadata snapshot of the running pool as thin_delta reads it, and
// blocks that no Delta names hold the same bytes.
func TestTheKernelsOwnTrees(t *testing.T) {
	p := newPool(t)
	r := rand.New(rand.NewPCG(1, 4))
	p.Say("create_thin 0")
	p.open(0, p.Thin(0))
	p.change(r, 0, 100)
	for id := ID(1); id < 4; id++ {
		p.snapshot(id, ID(r.Uint32N(uint32(id))))
		p.change(r, id, 1+30*int(id%3))
		p.change(r, ID(r.Uint32N(uint32(id))), 3)
	}
	p.Say("set_transaction_id 0 11")
	p.Say("reserve_metadata_snap")
	contents := map[ID][]byte{}
	for id := range p.nodes {
		contents[id] = p.content(id)
	}
	p.change(r, 3, 40)
	p.Say("set_transaction_id 11 12")
	p.compare(r, contents)
	p.Say("release_metadata_snap")
}

func (p *pool) content(id ID) []byte {
	p.Helper()
	b := make([]byte, thinBlocks*thinBlock)
	_, err := p.nodes[id].ReadAt(b, 0)
	p.check(err)
	return b
}

// compare holds the metadata snapshot against thin_dump, thin_delta and the content.
func (p *pool) compare(r *rand.Rand, contents map[ID][]byte) {
	p.Helper()
	status, err := p.Status(poolName, false) // commits
	p.check(err)
	b, err := os.ReadFile(p.Metadata)
	p.check(err)
	whole, err := Open(bytes.NewReader(b))
	p.check(err)
	snap, err := whole.Snapshot()
	p.check(err)
	if f := strings.Fields(status[0].Params); len(f) < 4 || f[0] != "12" || f[3] != fmt.Sprint(snap.Superblock().Block) {
		p.Errorf("status %v; the snapshot is in block %d", f, snap.Superblock().Block)
	}
	same(p, "transactions", []uint64{snap.Superblock().Transaction, whole.Superblock().Transaction}, []uint64{11, 12})
	m := model{}
	for d, err := range snap.Devices() {
		p.check(err)
		m[d.ID] = map[uint64][2]uint64{}
		for run, err := range snap.Mappings(d.ID) {
			p.check(err)
			for i := range run.Length {
				m[d.ID][run.Virtual+i] = [2]uint64{run.Data + i, uint64(run.Time)}
			}
		}
		same(p, "mapped blocks", len(m[d.ID]), int(d.Mapped))
	}
	same(p, "devices", len(m), len(contents))
	if r, found := checked(p, b); found != "" || !r.Accounted {
		p.Errorf("accounted %v, found %s", r.Accounted, found)
	}
	if r, err := snap.Check(p.t.Context()); err != nil || len(r.Problems) > 0 || r.Accounted || len(r.Devices) != len(m) {
		p.Errorf("the snapshot: %+v, %v", r, err)
	}
	agree(p.t, r, b, snap, m, "-m")
	for left := range contents {
		for right := range contents {
			p.sameElsewhere(snap, left, right, contents)
		}
	}
}

// sameElsewhere: only what Delta names may differ.
func (p *pool) sameElsewhere(s *Pool, left, right ID, contents map[ID][]byte) {
	p.Helper()
	named := map[uint64]bool{}
	for d, err := range s.Delta(left, right) {
		p.check(err)
		for i := range d.Length {
			named[d.Begin+i] = true
		}
	}
	for i := range uint64(thinBlocks) {
		if !named[i] && !bytes.Equal(contents[left][i*thinBlock:][:thinBlock], contents[right][i*thinBlock:][:thinBlock]) {
			p.Fatalf("block %d of %d and %d differs, and no range has it", i, left, right)
		}
	}
}
