package dmtest

import (
	"fmt"
	"os"
	"testing"

	"github.com/layerctl/layerctl/devmapper/dm"
)

// FlakyDisk is a block device that can be told to lose every write from then on, and to say
// that all is well (dm-flakey's drop_writes): a power cut with what runs going on.
type FlakyDisk struct {
	kernel
	name  string
	base  loop
	bytes int64
}

// NewFlakyDisk makes one of a file that is there; it keeps all yet. It skips as Open does.
func NewFlakyDisk(t *testing.T, name, file string) *FlakyDisk {
	t.Helper()
	d := &FlakyDisk{kernel: kernel{t, Open(t)}, name: name}
	st, err := os.Stat(file)
	d.check(err)
	d.bytes, d.base = st.Size(), d.attach(file)
	t.Cleanup(func() { d.base.Close() })
	d.up("linear", d.base.number+" 0")
	return d
}

func (d *FlakyDisk) up(kind, params string) {
	d.Helper()
	d.device(d.name, dm.Target{Length: uint64(d.bytes / sectorBytes), Type: kind, Params: params}, d.Drop)
}

// DropWrites has it lose what is written from now on. What is under way is not waited for.
func (d *FlakyDisk) DropWrites() {
	d.Helper()
	lost := dm.Target{Length: uint64(d.bytes / sectorBytes), Type: "flakey", Params: fmt.Sprintf("%s 0 0 1 1 drop_writes", d.base.number)}
	d.check(d.Load(d.name, []dm.Target{lost}, false))
	d.check(d.Suspend(d.name, dm.SuspendOptions{NoFlush: true, SkipLockFS: true}))
	d.check(d.Resume(d.name))
}

// Keep makes it anew, with what was not lost. Nobody has it open.
func (d *FlakyDisk) Keep() {
	d.Helper()
	d.Drop(d.name)
	d.up("linear", d.base.number+" 0")
}
