package dmtest

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

const sectorBytes = 512

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

// kernel is the control device, and what a test makes with it.
type kernel struct {
	testing.TB
	*dm.Control
}

func (k kernel) check(err error) {
	k.Helper()
	if err != nil {
		k.Fatal(err)
	}
}

// sparse makes a file of zeros, or empties one.
func (k kernel) sparse(file string, bytes int64) {
	k.Helper()
	k.check(errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, bytes)))
}

// loop is a file as a block device, until its last user closes it.
type loop struct {
	*sys.Fd
	number string
}

func (k kernel) attach(file string) loop {
	k.Helper()
	l, err := sys.AttachLoop(file, sys.LoopOptions{Autoclear: true})
	k.check(err)
	s, err := sys.StatPath(l.Name())
	k.check(err)
	return loop{l, fmt.Sprintf("%d:%d", s.RdevMajor, s.RdevMinor)}
}

// device makes an active device, which remove takes away at the test's end, and returns
// its node.
func (k kernel) device(name string, target dm.Target, remove func(name string)) (node string) {
	k.Helper()
	_, err := k.Create(name, "layerctl-"+name)
	k.check(err)
	k.Cleanup(func() { remove(name) })
	k.check(k.Load(name, []dm.Target{target}, false))
	k.check(k.Resume(name))
	i, err := k.Info(name)
	k.check(err)
	node, err = dm.MakeNode(i)
	k.check(err)
	return node
}

// destroy removes a device that is there.
func (k kernel) destroy(name string) {
	k.Helper()
	k.check(errors.Join(dm.RemoveNode(name), k.Remove(name, false)))
}

// Drop removes a device that Slice or Cut made, if it is there.
func (k kernel) Drop(name string) {
	k.Helper()
	if _, err := k.Info(name); err == nil {
		k.destroy(name)
	}
}

// Slice makes a device of a part of another.
func (k kernel) Slice(name, of string, begin, bytes int64) (node string) {
	k.Helper()
	i, err := k.Info(of)
	k.check(err)
	return k.device(name, dm.Target{Length: uint64(bytes / sectorBytes), Type: "linear", Params: fmt.Sprintf("%s %d", i.Dev, begin/sectorBytes)}, k.Drop)
}
