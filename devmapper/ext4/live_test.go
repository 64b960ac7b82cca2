package ext4

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/devmapper/metadata"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
)

const thinBlock = 64 << 10

// pool is one of the kernel's, with thin devices that are disks.
type pool struct {
	disk
	*dm.Control
	meta string
}

func newPool(t *testing.T) *pool {
	t.Helper()
	testenv.Root(t)
	c, err := dm.Open()
	if errdefs.IsNotImplemented(err) {
		testenv.NoDeviceMapper(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	testenv.Leaks(t)
	t.Cleanup(func() { c.Close() })
	dir := testenv.Scratch(t)
	p := &pool{disk{t, ""}, c, filepath.Join(dir, "metadata")}
	meta, data := p.loop(p.meta, 4<<20), p.loop(filepath.Join(dir, "data"), 256<<20)
	p.activate("lt-ext4-pool", dm.Target{Length: 256 << 20 / 512, Type: "thin-pool", Params: fmt.Sprintf("%s %s %d 0 1 skip_block_zeroing", meta, data, thinBlock/512)})
	return p
}

func (p *pool) loop(file string, bytes int64) string {
	p.Helper()
	p.check(errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, bytes)))
	l, err := sys.AttachLoop(file, sys.LoopOptions{Autoclear: true})
	p.check(err)
	p.Cleanup(func() { l.Close() })
	s, err := sys.StatPath(l.Name())
	p.check(err)
	return fmt.Sprintf("%d:%d", s.RdevMajor, s.RdevMinor)
}

// activate makes a device, which the test's end removes.
func (p *pool) activate(name string, target dm.Target) (node string) {
	p.Helper()
	_, err := p.Create(name, "layerctl-"+name)
	p.check(err)
	p.Cleanup(func() { p.check(errors.Join(dm.RemoveNode(name), p.Remove(name, false))) })
	p.check(p.Load(name, []dm.Target{target}, false))
	p.check(p.Resume(name))
	i, err := p.Info(name)
	p.check(err)
	node, err = dm.MakeNode(i)
	p.check(err)
	return node
}

func (p *pool) say(format string, args ...any) {
	p.Helper()
	_, err := p.Message("lt-ext4-pool", 0, fmt.Sprintf(format, args...))
	p.check(err)
}

func deviceName(id int) string { return fmt.Sprint("lt-ext4-", id) }

func (p *pool) thin(id int) disk {
	p.Helper()
	i, err := p.Info("lt-ext4-pool")
	p.check(err)
	return disk{p.TB, p.activate(deviceName(id), dm.Target{Length: 48 << 20 / 512, Type: "thin", Params: fmt.Sprintf("%s %d", i.Dev, id)})}
}

// snapshot is a device with what an active one, maybe mounted, has now: suspending it
// freezes the file system.
func (p *pool) snapshot(id, origin int) disk {
	p.Helper()
	p.check(p.Suspend(deviceName(origin), dm.SuspendOptions{}))
	p.say("create_snap %d %d", id, origin)
	p.check(p.Resume(deviceName(origin)))
	return p.thin(id)
}

// delta is what the pool's metadata says of two devices.
func (p *pool) delta(left, right metadata.ID) []Range {
	p.Helper()
	p.say("reserve_metadata_snap")
	defer p.say("release_metadata_snap")
	f, err := os.Open(p.meta)
	p.check(err)
	defer f.Close()
	whole, err := metadata.Open(f)
	p.check(err)
	s, err := whole.Snapshot()
	p.check(err)
	var ranges []Range
	for r, err := range s.Delta(left, right) {
		p.check(err)
		ranges = append(ranges, Range{int64(r.Begin) * thinBlock, int64(r.Length) * thinBlock})
	}
	return ranges
}

// TestThinSnapshots: layers on thin devices, one snapshot of the other, with the
// changes that the pool's metadata tells; the last is a snapshot of one that is mounted.
func TestThinSnapshots(t *testing.T) {
	p := newPool(t)
	g := treegen.New(rand.New(rand.NewPCG(firstSeed(t), 7)), treegen.Config{Root: true, FileSize: 100_000})
	p.say("create_thin 0")
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
