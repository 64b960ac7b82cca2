package thin

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// bench is a test on a kernel with thin pools.
type bench struct{ *testing.T }

func newBench(t *testing.T) *bench {
	t.Helper()
	testenv.Root(t)
	if err := Probe(); errdefs.IsNotImplemented(err) {
		testenv.NoDeviceMapper(t, err)
	} else if err != nil {
		t.Fatal(err)
	}
	testenv.Leaks(t)
	return &bench{t}
}

func (b *bench) check(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// open opens the pool in dir until the end of the test.
func (b *bench) open(dir string, o Options) *Pool {
	b.Helper()
	p, err := Open(b.Context(), dir, o)
	b.check(err)
	b.Cleanup(func() {
		if err := p.Close(); err != nil {
			b.Error(err)
		}
	})
	return p
}

func (b *bench) change(p *Pool, f func(c *Change) error) {
	b.Helper()
	b.check(p.Exclusive(b.Context(), f))
}

const mib = 1 << 20

// volume makes thin device id and shows it, 64 MiB large.
func (b *bench) volume(p *Pool, id uint32) Volume {
	b.Helper()
	v := Volume{Name: p.Prefix() + "v" + string(rune('a'+id)), ID: id, Sectors: 64 * mib / 512}
	b.change(p, func(c *Change) error {
		if err := c.CreateThin(id); err != nil {
			return err
		}
		return c.Activate(v)
	})
	return v
}

// write writes n bytes of c at off, through to the pool.
func (b *bench) write(v Volume, off int64, c byte, n int) error {
	b.Helper()
	f, err := os.OpenFile(Node(v.Name), os.O_WRONLY|os.O_SYNC, 0)
	b.check(err)
	_, err = f.WriteAt([]byte(strings.Repeat(string(c), n)), off)
	return errors.Join(err, f.Close())
}

func (b *bench) wantByte(v Volume, off int64, want byte) {
	b.Helper()
	f, err := os.Open(Node(v.Name))
	b.check(err)
	defer f.Close()
	got := make([]byte, 1)
	if _, err := f.ReadAt(got, off); err != nil || got[0] != want {
		b.Errorf("%s at %d: %q, %v; want %q", v.Name, off, got, err, want)
	}
}

func (b *bench) status(p *Pool) Status {
	b.Helper()
	s, err := p.Status()
	b.check(err)
	return s
}

// fileSystem makes a file system on a loop file for the pool's directory.
func (b *bench) fileSystem(bytes int64) string {
	return testenv.FS(b, "ext4", testenv.Size(bytes))
}

func TestPoolOnFilesLivesItsWholeLife(t *testing.T) {
	b := newBench(t)
	dir := b.fileSystem(512 * mib)
	p := b.open(dir, Options{})
	s := b.status(p)
	if s.Mode != ReadWrite || s.Policy != Queue || s.Transaction != 0 || int64(s.DataTotal)*p.BlockBytes() < 300*mib {
		t.Errorf("%+v", s)
	}
	a := b.volume(p, 0)
	b.check(b.write(a, 0, 'a', 4096))
	snap := Volume{Name: p.Prefix() + "snap", ID: 1, Sectors: a.Sectors, ReadOnly: true}
	b.change(p, func(c *Change) error {
		b.check(p.Suspend(a.Name))
		b.check(c.CreateSnap(1, 0))
		b.check(p.Resume(a.Name))
		b.check(c.SetTransaction(0, 5))
		return c.Activate(snap)
	})
	b.check(b.write(a, 0, 'b', 4096))
	b.wantByte(snap, 0, 'a')
	if err := os.WriteFile(Node(snap.Name), []byte("x"), 0); err == nil {
		t.Error("a read-only volume was written to")
	}
	table, err := p.ctl.Status(snap.Name, false)
	if err != nil || len(table) != 1 || !strings.HasPrefix(table[0].Params, "128 ") { // sectors: one block
		t.Errorf("%+v, %v; want one block", table, err)
	}
	b.change(p, func(c *Change) error {
		if err := c.CreateThin(0); !errdefs.IsAlreadyExists(err) || !errors.Is(err, syscall.EEXIST) {
			t.Errorf("twice: %v", err)
		}
		if err := c.CreateSnap(7, 6); !errdefs.IsNotFound(err) {
			t.Errorf("of nothing: %v", err)
		}
		if err := c.SetTransaction(4, 6); !errdefs.IsAborted(err) {
			t.Errorf("from another transaction: %v", err)
		}
		if err := c.Delete(0); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("of an active one: %v", err)
		}
		b.check(c.Delete(7))
		b.check(c.Deactivate(snap.Name))
		b.check(c.Deactivate(snap.Name))
		return c.Delete(1)
	})
	b.check(p.Close())
	b.check(p.Close())
	b.gone(p)
	// As after a reboot: no device is there.
	p = b.open(dir, Options{})
	if s := b.status(p); s.Transaction != 5 {
		t.Errorf("opened again: %+v", s)
	}
	b.check(p.Activate(t.Context(), a))
	b.wantByte(a, 0, 'b')
	b.change(p, func(c *Change) error {
		b.check(c.Deactivate(a.Name))
		return c.Delete(0)
	})
}

// gone checks that the pool has no device left.
func (b *bench) gone(p *Pool) {
	b.Helper()
	out, err := exec.Command(testenv.Program(b, "dmsetup", "dmsetup"), "ls").Output()
	b.check(err)
	if strings.Contains(string(out), p.Prefix()) {
		b.Errorf("left:\n%s", out)
	}
}

func TestPoolOnDevices(t *testing.T) {
	b := newBench(t)
	dir := b.fileSystem(64 * mib)
	data, metadata := b.loop(64*mib), b.loop(4*mib)
	o := Options{Data: data, Metadata: metadata, BlockBytes: 128 << 10}
	p := b.open(dir, o)
	if s := b.status(p); s.DataTotal != 512 || s.Policy != Error {
		t.Errorf("%+v", s)
	}
	b.change(p, func(c *Change) error { return c.SetTransaction(0, 1) })
	// Others' pool, and what is not empty, are refused by name.
	other := b.fileSystem(64 * mib)
	_, err := Open(t.Context(), other, o)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), metadata) {
		t.Errorf("the pool of another: %v", err)
	}
	used := b.loop(64 * mib)
	if out, err := exec.Command(testenv.Program(b, "mkfs.ext4", "e2fsprogs"), "-q", used).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, err = Open(t.Context(), other, Options{Data: used, Metadata: b.loop(4 * mib)})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "wipefs -a "+used) {
		t.Errorf("a device with a file system: %v", err)
	}
	for _, o := range []Options{{BlockBytes: 64 << 10}, {Data: used, Metadata: metadata}, {Full: Queue}} {
		if _, err := Open(t.Context(), dir, o); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("opened with %+v: %v", o, err)
		}
	}
	b.check(p.Close())
	if _, err := os.Stat(filepath.Join(dir, dataFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a data file beside devices: %v", err)
	}
	// The metadata of another pool in the place of ours.
	swapped := b.loop(4 * mib)
	b.check(os.WriteFile(filepath.Join(dir, recordFile), []byte(`{"format":1,"data":"`+data+`","metadata":"`+swapped+`","block":131072,"full":"error"}`), 0o600))
	if _, err := Open(t.Context(), dir, Options{}); !errdefs.IsDataLoss(err) {
		t.Errorf("empty metadata: %v", err)
	}
}

// loop makes a block device for the test.
func (b *bench) loop(bytes int64) string {
	b.Helper()
	f := filepath.Join(testenv.Scratch(b), "disk")
	b.check(os.WriteFile(f, nil, 0o600))
	b.check(os.Truncate(f, bytes))
	l, err := sys.AttachLoop(f, sys.LoopOptions{Autoclear: true})
	b.check(err)
	b.Cleanup(func() { l.Close() })
	return l.Name()
}

func TestPoolGrowsWhenItRunsLow(t *testing.T) {
	b := newBench(t)
	p := b.open(b.fileSystem(512*mib), Options{DataBytes: 16 * mib})
	before := b.status(p)
	v := b.volume(p, 0)
	for off := int64(0); off < 48*mib; off += mib { // three times what the pool had
		b.check(b.write(v, off, 'x', mib))
	}
	if s := b.status(p); s.DataTotal <= before.DataTotal || s.Mode != ReadWrite {
		t.Errorf("%+v, before %+v", s, before)
	}
	b.wantByte(v, 47*mib, 'x')
	b.drop(p, v)
}

// Who has a layer mounted when the last process leaves its pool can write what the file system
// below has room for, also more than the pool had, and its metadata could map.
func TestPoolIsLargeWhenNobodyIsLeft(t *testing.T) {
	b := newBench(t)
	dir := b.fileSystem(512 * mib)
	p := b.open(dir, Options{DataBytes: 16 * mib, MetadataBytes: 2 * mib})
	v := b.volume(p, 0)
	f, err := os.OpenFile(Node(v.Name), os.O_WRONLY|os.O_SYNC, 0)
	b.check(err)
	defer f.Close()
	b.check(p.Close())
	ctl, err := dm.Open()
	b.check(err)
	defer ctl.Close()
	p.ctl = ctl
	s := b.status(p)
	if have := int64(s.DataTotal) * p.BlockBytes(); have < 300*mib || have > 512*mib {
		t.Errorf("the pool has %d MiB", have/mib)
	}
	if blocks := s.DataTotal - s.DataUsed; blocks*mappingBytes/2 > (s.MetadataTotal-s.MetadataUsed)*4096 {
		t.Errorf("metadata for less than the data: %+v", s)
	}
	if p.suspended() {
		t.Error("suspended")
	}
	for off := int64(0); off < 48*mib; off += 16 * mib { // more than it had
		_, err := f.WriteAt(bytes.Repeat([]byte{'x'}, 16*mib), off)
		b.check(err)
	}
	b.check(f.Close())
	q := b.open(dir, Options{})
	b.wantByte(v, 47*mib, 'x')
	b.drop(q, v)
}

// Metadata for which there is no room leaves its file as it was: the next Open takes that as large
// as it is, and what is not allocated there would stop the pool.
func TestMetadataThatCannotGrowStays(t *testing.T) {
	b := newBench(t)
	p := b.open(b.fileSystem(80*mib), Options{DataBytes: 16 * mib, MetadataBytes: 2 * mib})
	data, loop, err := p.devices()
	b.check(err)
	defer data.Close()
	defer loop.Close()
	before, err := freeBytes(p.root)
	b.check(err)
	f, err := p.openFile(metadataFile)
	b.check(err)
	defer f.Close()
	short, err := p.enlarge(t.Context(), f.Fd, 1<<30, loop)
	if err != nil || !errors.Is(short, syscall.ENOSPC) {
		t.Errorf("%v, %v", short, err)
	}
	now, err := p.openFile(metadataFile)
	b.check(err)
	defer now.Close()
	free, err := freeBytes(p.root)
	if err != nil || now.size != 2*mib || now.holes != 0 || free < before-mib {
		t.Errorf("%d bytes, %d of them not allocated; %d bytes are free, before %d; %v", now.size, now.holes, free, before, err)
	}
}

// A pool whose watch fails is watched again, and made larger if it ran low meanwhile.
func TestPoolGrowsAfterItsWatchFailed(t *testing.T) {
	b := newBench(t)
	p := b.open(b.fileSystem(512*mib), Options{DataBytes: 16 * mib})
	p.stop()
	p.watching.Wait()
	before := b.status(p)
	v := b.volume(p, 0)
	b.check(b.write(v, 0, 'x', 14*mib))
	broken, err := dm.Watch()
	b.check(err)
	b.check(broken.Close())
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	p.watching.Go(func() { p.follow(ctx, broken) })
	testenv.Eventually(t, "grown", func() bool { return b.status(p).DataTotal != before.DataTotal })
	b.drop(p, v)
}

func (b *bench) drop(p *Pool, v Volume) {
	b.Helper()
	b.check(p.Release(b.Context(), v.Name, time.Minute))
	b.change(p, func(c *Change) error { return c.Delete(v.ID) })
}

// With nowhere to grow to, a write fails at once, is told why, and goes on when
// there is room again.
func TestFullPoolSaysSo(t *testing.T) {
	b := newBench(t)
	for _, full := range []Policy{Error, Queue} {
		dir := b.fileSystem(80 * mib)
		p := b.open(dir, Options{DataBytes: 16 * mib, Full: full})
		v := b.volume(p, 0)
		b.check(os.WriteFile(dir+"/ballast", []byte(strings.Repeat("b", 28*mib)), 0o600))
		var err error
		for off := int64(0); off < 48*mib && err == nil; off += mib {
			err = b.write(v, off, 'x', mib)
		}
		if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EIO) {
			t.Errorf("%s: %v, want ENOSPC or EIO", full, err)
		}
		if err := p.Explain(); !errdefs.IsResourceExhausted(err) {
			t.Errorf("%s: %v", full, err)
		}
		b.wantByte(v, 0, 'x')
		b.check(os.Remove(dir + "/ballast"))
		b.check(p.Grow(t.Context()))
		if err := p.ExplainWrite(); err == nil || p.Explain() != nil || !strings.Contains(err.Error(), "a moment ago") {
			t.Errorf("%s, just grown: %v", full, err)
		}
		if s := b.status(p); s.Mode != ReadWrite || s.Policy != full {
			t.Errorf("%s, with room again: %+v", full, s)
		}
		b.check(b.write(v, 40*mib, 'y', mib))
		b.drop(p, v)
		b.check(p.Close())
	}
}

// Full metadata is told by name: the kernel has the pool read-only then.
func TestFullMetadataSaysSo(t *testing.T) {
	b := newBench(t)
	p := b.open(b.fileSystem(64*mib), Options{Data: b.loop(512 * mib), Metadata: b.loop(2 * mib)})
	var err error
	id := uint32(0)
	for ; err == nil && id < 1<<16; id++ {
		err = p.Exclusive(t.Context(), func(c *Change) error { return c.CreateThin(id) })
	}
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "metadata") {
		t.Errorf("after %d devices: %v", id, err)
	}
}

func TestMetadataSnapshot(t *testing.T) {
	b := newBench(t)
	for _, o := range []Options{{}, {Data: b.loop(64 * mib), Metadata: b.loop(4 * mib)}} {
		b.snapshots(b.open(b.fileSystem(128*mib), o))
	}
}

func (b *bench) snapshots(p *Pool) {
	t := b.T
	s, err := p.Snapshot(t.Context())
	b.check(err)
	if s.Root == 0 || b.status(p).HeldRoot != s.Root {
		t.Errorf("root %d, %+v", s.Root, b.status(p))
	}
	b.check(s.Release())
	if b.status(p).HeldRoot != 0 {
		t.Error("released, and held")
	}
	// One that a process of ours died with is released; another program's is not.
	s, err = p.Snapshot(t.Context())
	b.check(err)
	s.lock.Close()
	again, err := p.Snapshot(t.Context())
	b.check(err)
	b.check(again.Release())
	dmsetup := testenv.Program(t, "dmsetup", "dmsetup")
	message := func(m string) {
		if out, err := exec.Command(dmsetup, "message", p.Name(), "0", m).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	message("reserve_metadata_snap")
	if p.OnFiles() { // nobody else has to do with those
		s, err := p.Snapshot(t.Context())
		b.check(err)
		b.check(s.Release())
		return
	}
	if _, err := p.Snapshot(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("another program's: %v", err)
	}
	message("release_metadata_snap")
}

// Who waits for the metadata snapshot waits as long as its context says, and takes nothing with
// it.
func TestWaitForTheMetadataSnapshotEnds(t *testing.T) {
	b := newBench(t)
	p := b.open(b.fileSystem(128*mib), Options{})
	s, err := p.Snapshot(t.Context())
	b.check(err)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	waited := make(chan error, 1)
	go func() {
		late, err := p.Snapshot(ctx)
		if err == nil {
			err = errors.Join(errors.New("taken"), late.Release())
		}
		waited <- err
	}()
	select {
	case err := <-waited:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("waited: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("waits on")
	}
	b.check(s.Release())
	again, err := p.Snapshot(t.Context())
	b.check(err)
	b.check(again.Release())
}

// Two Pools of one directory, as two processes have them: the last one that
// closes takes the pool away, what is open stays.
func TestTwoOpenOnePool(t *testing.T) {
	b := newBench(t)
	dir := b.fileSystem(128 * mib)
	one, two := b.open(dir, Options{}), b.open(dir, Options{})
	v := b.volume(one, 0)
	errs := make(chan error)
	for i, p := range []*Pool{one, two} {
		go func() {
			var err error
			for id := uint32(10 + 20*i); id < uint32(30+20*i) && err == nil; id++ {
				err = p.Exclusive(context.Background(), func(c *Change) error { return c.CreateThin(id) })
			}
			errs <- err
		}()
	}
	b.check(errors.Join(<-errs, <-errs))
	b.check(one.Close())
	b.check(b.write(v, 0, 'a', 4096))
	f, err := os.Open(Node(v.Name))
	b.check(err)
	b.check(two.Close())
	if err := two.healthySince(); err != nil {
		t.Errorf("the pool of an open device: %v", err)
	}
	f.Close()
	three := b.open(dir, Options{})
	b.wantByte(v, 0, 'a')
	b.check(three.Close())
	b.gone(three)
}

// healthySince looks at a closed pool's device.
func (p *Pool) healthySince() error {
	out, err := exec.Command("dmsetup", "status", p.name).Output()
	if err == nil && !strings.Contains(string(out), "thin-pool") {
		err = errors.New(string(out))
	}
	return err
}

// Devices that were removed, half made or suspended by somebody else, or by a
// process that died, are made again and go on.
func TestDevicesChangedBehindOurBack(t *testing.T) {
	b := newBench(t)
	dir := b.fileSystem(128 * mib)
	p := b.open(dir, Options{})
	v := b.volume(p, 0)
	b.check(b.write(v, 0, 'a', 4096))
	dmsetup := testenv.Program(t, "dmsetup", "dmsetup")
	do := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(dmsetup, args...).CombinedOutput(); err != nil {
			t.Fatalf("dmsetup %v: %v\n%s", args, err, out)
		}
	}
	do("remove", "--noudevsync", v.Name)
	b.check(p.Activate(t.Context(), v))
	b.wantByte(v, 0, 'a')
	do("suspend", v.Name)
	b.check(p.Activate(t.Context(), v))
	b.check(p.Resume(v.Name))
	b.wantByte(v, 0, 'a')
	do("remove", "--noudevsync", v.Name)
	do("create", "--notable", "--noudevsync", v.Name)
	b.check(p.Activate(t.Context(), v))
	b.wantByte(v, 0, 'a')
	b.check(os.Remove(Node(v.Name)))
	b.check(p.Activate(t.Context(), v))
	b.wantByte(v, 0, 'a')
	// The pool itself.
	do("remove", "--noudevsync", v.Name)
	do("remove", "--noudevsync", p.Name())
	q := b.open(dir, Options{})
	b.check(q.Activate(t.Context(), v))
	b.wantByte(v, 0, 'a')
	do("suspend", p.Name())
	r := b.open(dir, Options{})
	b.check(b.write(v, 0, 'b', 4096))
	b.drop(r, v)
}

// A pool that a process left suspended that died goes on as soon as anybody has to do with it, and
// by itself where somebody has it open.
func TestSuspendedPoolGoesOn(t *testing.T) {
	b := newBench(t)
	dir := b.fileSystem(128 * mib)
	p := b.open(dir, Options{})
	v := b.volume(p, 0)
	p.stop()
	p.watching.Wait() // or it might be quicker
	suspend := func() {
		t.Helper()
		b.check(p.ctl.Suspend(p.Name(), dm.SuspendOptions{NoFlush: true, SkipLockFS: true}))
	}
	for name, next := range map[string]func() error{
		"grow":      func() error { return p.Grow(t.Context()) },
		"message":   func() error { return (&Change{pool: p}).CreateThin(7) },
		"exclusive": func() error { return p.Exclusive(t.Context(), func(*Change) error { return nil }) },
		"open": func() error {
			q, err := Open(t.Context(), dir, Options{})
			if err != nil {
				return err
			}
			q.stop()
			q.watching.Wait()
			return q.Close()
		},
	} {
		suspend()
		if err := next(); err != nil || p.suspended() {
			t.Errorf("%s: %v; suspended: %v", name, err, p.suspended())
		}
	}
	b.open(dir, Options{}) // and looks after it
	suspend()
	testenv.Eventually(t, "resumed, with a process that has it open", func() bool { return !p.suspended() })
	b.check(b.write(v, 0, 'a', 4096))
	b.drop(p, v)
}

// A pool that is being activated is in its middle one that is suspended and has a table: who
// looks after it, woken by an event, must not resume it before its time, which ends with EINVAL for one of the two.
func TestActivationIsNotTakenForAPoolThatWasLeft(t *testing.T) {
	b := newBench(t)
	dir := b.fileSystem(128 * mib)
	p := b.open(dir, Options{})
	for n := range 24 {
		b.check(p.ctl.Remove(p.Name(), false)) // an event, of which p hears
		q, err := Open(t.Context(), dir, Options{})
		if err != nil {
			t.Fatalf("%d: %v", n, err)
		}
		b.check(q.Close())
	}
}

// Where udev runs, a pool grows although no semaphore is left for a cookie.
func TestPoolGrowsWithoutACookie(t *testing.T) {
	b := newBench(t)
	if dm.UdevRuns() {
		testenv.Optional(t, "udev runs here: it would miss what is done without it")
	}
	p := b.open(b.fileSystem(128*mib), Options{})
	v := b.volume(p, 0)
	p.stop()
	p.watching.Wait() // or it might give the pool its own policy again
	err := func() error {
		defer b.noCookies()()
		return b.otherPolicy(p, Error)
	}()
	if s := b.status(p); err != nil || p.suspended() || s.Policy != Error {
		t.Errorf("%v; suspended: %v; %+v", err, p.suspended(), s)
	}
	b.check(b.write(v, 0, 'a', 4096))
	b.drop(p, v)
}

// otherPolicy gives the pool another table.
func (b *bench) otherPolicy(p *Pool, full Policy) error {
	b.Helper()
	lock, err := p.growing()
	b.check(err)
	defer lock.Close()
	data, metadata, err := p.devices()
	b.check(err)
	defer data.Close()
	defer metadata.Close()
	return p.reload(b.Context(), b.status(p), data, metadata, full)
}

// noCookies has udev seem to run and no semaphore be left for a cookie, until again is called.
func (b *bench) noCookies() (again func()) {
	b.Helper()
	const limits = "/proc/sys/kernel/sem"
	saved, err := os.ReadFile(limits)
	b.check(err)
	stop := b.pretendUdev()
	b.check(os.WriteFile(limits, []byte("32000 0 500 0"), 0))
	return func() {
		b.Helper()
		b.check(os.WriteFile(limits, saved, 0))
		stop()
	}
}

// An Open that died at any of its steps is begun again.
func TestOpenAfterAnOpenThatDied(t *testing.T) {
	b := newBench(t)
	dir := b.fileSystem(128 * mib)
	root, err := sys.OpenDir(dir)
	b.check(err)
	defer root.Close()
	b.check(WriteJSON(root, recordFile, Options{}.record())) // no file yet
	p := b.open(dir, Options{})
	b.change(p, func(c *Change) error { return c.CreateThin(0) })
	b.check(p.Close())
	// The files made and used, the record not: it says that they are nobody's.
	b.check(WriteJSON(root, recordFile, Options{}.record()))
	p = b.open(dir, Options{})
	b.change(p, func(c *Change) error { return c.CreateThin(0) })
	b.check(p.Close())
	b.check(os.WriteFile(filepath.Join(dir, recordFile), []byte("{"), 0o600))
	if _, err := Open(t.Context(), dir, Options{}); !errdefs.IsDataLoss(err) {
		t.Errorf("half a record: %v", err)
	}
}
