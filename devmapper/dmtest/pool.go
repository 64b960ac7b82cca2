// Package dmtest gives tests what is the kernel's own, by ioctl alone: a thin pool, so that what
// reads pools is tried against it and not against package thin; a disk whose writes are
// recorded, to be had as it was at any of them; and one that loses its writes when it is told to.
package dmtest

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/testenv"
)

// BlockBytes is the pool's unit.
const BlockBytes = 64 << 10

const dataBytes = 256 << 20

// Pool is a thin pool on loop devices, which goes with the test, and its devices.
type Pool struct {
	kernel
	Metadata string // the file that the metadata device is on

	name      string
	thinBytes int64
}

// New makes a pool of that name, whose thin devices have so many bytes. It skips as
// Open does.
func New(t *testing.T, name string, thinBytes int64) *Pool {
	t.Helper()
	k := kernel{t, Open(t)}
	dir := testenv.Scratch(t)
	p := &Pool{kernel: k, Metadata: filepath.Join(dir, "metadata"), name: name, thinBytes: thinBytes}
	meta, data := p.loop(p.Metadata, 4<<20), p.loop(filepath.Join(dir, "data"), dataBytes)
	p.device(name, dm.Target{Length: dataBytes / sectorBytes, Type: "thin-pool", Params: fmt.Sprintf("%s %s %d 0 1 skip_block_zeroing", meta, data, BlockBytes/sectorBytes)}, p.destroy)
	return p
}

// loop makes a file of zeros a block device until the test's end.
func (p *Pool) loop(file string, bytes int64) (number string) {
	p.Helper()
	p.sparse(file, bytes)
	l := p.attach(file)
	p.Cleanup(func() { l.Close() })
	return l.number
}

// Say sends the pool a message.
func (p *Pool) Say(format string, args ...any) {
	p.Helper()
	_, err := p.Message(p.name, 0, fmt.Sprintf(format, args...))
	p.check(err)
}

func (p *Pool) thinName(id uint32) string { return fmt.Sprintf("%s-%d", p.name, id) }

// Thin activates a thin device and returns its node.
func (p *Pool) Thin(id uint32) (node string) {
	p.Helper()
	i, err := p.Info(p.name)
	p.check(err)
	return p.device(p.thinName(id), dm.Target{Length: uint64(p.thinBytes / sectorBytes), Type: "thin", Params: fmt.Sprintf("%s %d", i.Dev, id)}, p.destroy)
}

// Snapshot makes a snapshot of an active thin device, whose file system, if it is
// mounted, is frozen for that moment, and activates it.
func (p *Pool) Snapshot(id, origin uint32) (node string) {
	p.Helper()
	p.check(p.Suspend(p.thinName(origin), dm.SuspendOptions{}))
	p.Say("create_snap %d %d", id, origin)
	p.check(p.Resume(p.thinName(origin)))
	return p.Thin(id)
}
