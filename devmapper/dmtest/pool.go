// Package dmtest gives tests a thin pool of the kernel's own, by ioctl alone: what
// reads pools is tried against it, and not against package thin.
package dmtest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// BlockBytes is the pool's unit.
const BlockBytes = 64 << 10

const dataBytes = 256 << 20

// Pool is a thin pool on loop devices, which goes with the test, and its devices.
type Pool struct {
	testing.TB
	*dm.Control
	Metadata string // the file that the metadata device is on

	name      string
	thinBytes int64
}

// Open opens the control device until the test's end, which checks that nothing is
// left. It skips where the kernel has no device-mapper, see testenv.NoDeviceMapper.
func Open(t *testing.T) *dm.Control {
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
	return c
}

// New makes a pool of that name, whose thin devices have so many bytes. It skips as
// Open does.
func New(t *testing.T, name string, thinBytes int64) *Pool {
	t.Helper()
	c := Open(t)
	dir := testenv.Scratch(t)
	p := &Pool{TB: t, Control: c, Metadata: filepath.Join(dir, "metadata"), name: name, thinBytes: thinBytes}
	meta, data := p.loop(p.Metadata, 4<<20), p.loop(filepath.Join(dir, "data"), dataBytes)
	p.device(name, dm.Target{Length: dataBytes / 512, Type: "thin-pool", Params: fmt.Sprintf("%s %s %d 0 1 skip_block_zeroing", meta, data, BlockBytes/512)})
	return p
}

func (p *Pool) check(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

func (p *Pool) loop(file string, bytes int64) (number string) {
	p.Helper()
	p.check(errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, bytes)))
	l, err := sys.AttachLoop(file, sys.LoopOptions{Autoclear: true})
	p.check(err)
	p.Cleanup(func() { l.Close() })
	s, err := sys.StatPath(l.Name())
	p.check(err)
	return fmt.Sprintf("%d:%d", s.RdevMajor, s.RdevMinor)
}

// device makes an active device, which the test's end removes.
func (p *Pool) device(name string, target dm.Target) (node string) {
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
	return p.device(p.thinName(id), dm.Target{Length: uint64(p.thinBytes / 512), Type: "thin", Params: fmt.Sprintf("%s %d", i.Dev, id)})
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
