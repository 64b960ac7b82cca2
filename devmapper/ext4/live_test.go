package ext4

import (
	"math/rand/v2"
	"os"
	"testing"

	"github.com/layerctl/layerctl/devmapper/dmtest"
	"github.com/layerctl/layerctl/devmapper/metadata"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
)

// pool is one of the kernel's, with thin devices that are disks.
type pool struct{ *dmtest.Pool }

func newPool(t *testing.T) *pool {
	t.Helper()
	return &pool{dmtest.New(t, "lt-ext4-pool", 48<<20)}
}

func (p *pool) check(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

func (p *pool) thin(id uint32) disk {
	p.Helper()
	return disk{p.TB, p.Thin(id)}
}

// snapshot is a device with what an active one, maybe mounted, has now.
func (p *pool) snapshot(id, origin uint32) disk {
	p.Helper()
	return disk{p.TB, p.Snapshot(id, origin)}
}

// delta is what the pool's metadata says of two devices.
func (p *pool) delta(left, right metadata.ID) []Range {
	p.Helper()
	p.Say("reserve_metadata_snap")
	defer p.Say("release_metadata_snap")
	f, err := os.Open(p.Metadata)
	p.check(err)
	defer f.Close()
	whole, err := metadata.Open(f)
	p.check(err)
	s, err := whole.Snapshot()
	p.check(err)
	var ranges []Range
	for r, err := range s.Delta(left, right) {
		p.check(err)
		ranges = append(ranges, Range{int64(r.Begin) * dmtest.BlockBytes, int64(r.Length) * dmtest.BlockBytes})
	}
	return ranges
}

// TestThinSnapshots: layers on thin devices, one snapshot of the other, with the
// changes that the pool's metadata tells; the last is a snapshot of one that is mounted.
func TestThinSnapshots(t *testing.T) {
	p := newPool(t)
	g := treegen.New(rand.New(rand.NewPCG(testenv.Number(t, "LAYERCTL_SEED", rand.Uint64()>>1), 7)), treegen.Config{Root: true, FileSize: 100_000})
	p.Say("create_thin 0")
	base := p.thin(0)
	base.format()
	apply := func(d disk, n int) {
		d.change(func(dir string) {
			_, err := treegen.Apply(dir, g.Ops(n))
			d.check(err)
		})
	}
	apply(base, 60)
	child := p.snapshot(1, 0)
	apply(child, 20)
	compare(t, "base to child", base, child, p.delta(0, 1))
	beside := p.snapshot(2, 0)
	apply(beside, 20)
	compare(t, "child to beside", child, beside, p.delta(1, 2))
	beside.change(func(dir string) {
		_, err := treegen.Apply(dir, g.Ops(20))
		p.check(err)
		compare(t, "base to one that is mounted", base, p.snapshot(3, 2), p.delta(0, 3))
	})
}
