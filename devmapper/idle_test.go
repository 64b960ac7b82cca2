package devmapper

import (
	"bytes"
	"context"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

// age has it that no Mounts has named layers for long.
func (b *bench) age(ids ...drivers.ID) {
	b.Helper()
	long := time.Now().Add(-2 * idleAfter)
	for _, id := range ids {
		b.check(os.Chtimes(b.root+"/l/"+id.String(), long, long))
	}
}

func (b *bench) devicesAre(what string, want ...drivers.ID) {
	b.Helper()
	names, err := b.pool.Devices()
	b.check(err)
	var wanted []string
	for _, id := range want {
		wanted = append(wanted, b.deviceName(id, uint32(id)))
	}
	slices.Sort(names)
	if !slices.Equal(names, wanted) {
		b.Errorf("%s: devices %v, want %v", what, names, wanted)
	}
}

// Devices go that nobody has open and no Mounts has named of late; those that are in use, at
// work, or young stay, and one that is gone comes back.
func TestDropIdle(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	idle, mounted, young := b.create(1), b.create(2), b.create(3)
	for _, r := range []drivers.Ref{idle, young} {
		_, err := b.Mounts(t.Context(), r, drivers.MountOptions{})
		b.check(err)
	}
	dir, unmount := b.mount(mounted)
	suspended := b.create(4)
	b.write(suspended, "f", "x")
	b.age(1, 2, 4)
	_, err := b.diffIn(b.atSuspended(func() {
		b.check(b.DropIdle(t.Context()))
		b.devicesAre("while one is suspended", 2, 3, 4)
	}), drivers.Ref{}, suspended)
	b.check(err)
	b.check(os.WriteFile(dir+"/f", []byte("x"), 0o600))
	b.check(b.DropIdle(t.Context()))
	b.devicesAre("then", 2, 3)
	b.write(idle, "f", "is made again")
	b.check(b.DropIdle(t.Context()))
	b.devicesAre("after a Mounts", 1, 2, 3)
	unmount()
	b.age(1, 2, 3)
	b.check(b.DropIdle(t.Context()))
	b.devicesAre("all idle")
	b.remove(4, 3, 2, 1)
}

// What is done to a layer that was idle for long begins with its device, which must not be
// taken for idle then.
func TestNobodyTakesWhatIsUsedForIdle(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	applied, committed := b.create(1), b.create(2)
	b.age(1, 2)
	b.check(b.Apply(t.Context(), applied, bytes.NewReader(archive("f", "x")), layer.ApplyOptions{}))
	b.check(b.DropIdle(t.Context()))
	b.devicesAre("after an Apply", 1)
	looked := false
	ctx := faults.With(t.Context(), func(step string) error {
		if step != "devmapper: commit: flushed" {
			return nil
		}
		looked = true
		st, err := os.Stat(b.root + "/l/2")
		if err == nil && time.Since(st.ModTime()) > idleAfter {
			t.Errorf("the record of a layer at whose device a Commit is at work: %v", st.ModTime())
		}
		return err
	})
	_, err := b.Commit(ctx, committed, drivers.CommitOptions{})
	b.check(err)
	if !looked {
		t.Error("no such step")
	}
	b.remove(2, 1)
}

// A store's GC drops what is idle.
func TestGCDropsIdleDevices(t *testing.T) {
	needsDM(t)
	testenv.Leaks(t)
	s, err := snapshot.Open(t.Context(), testenv.FS(t, "ext4", testenv.Size(512*mib)), snapshot.Options{Registry: drivers.NewRegistry(Factory())})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t}
	v, err := s.View("v", Name)
	b.check(err)
	for _, drop := range []func(context.Context) error{v.Cleanup, s.DropIdle} {
		ms, err := v.Prepare(t.Context(), "work", "")
		b.check(err)
		root := s.Root() + "/drivers/" + Name + "/l/"
		records, err := os.ReadDir(root)
		b.check(err)
		if len(records) != 1 {
			t.Fatalf("%d layers", len(records))
		}
		b.check(drop(t.Context()))
		if _, err := os.Stat(ms[0].Source); err != nil {
			t.Errorf("a device that was asked for just now: %v", err)
		}
		long := time.Now().Add(-2 * idleAfter)
		b.check(os.Chtimes(root+records[0].Name(), long, long))
		b.check(drop(t.Context()))
		if _, err := os.Stat(ms[0].Source); !os.IsNotExist(err) {
			t.Errorf("an idle device: %v", err)
		}
		b.check(v.Remove(t.Context(), "work"))
		b.check(v.Cleanup(t.Context()))
	}
	b.check(s.Close())
}
