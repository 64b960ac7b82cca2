package devmapper

import (
	"context"
	"os"
	"os/exec"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// atSuspended is a context of a call that is interrupted by do while it has a device suspended.
func (b *bench) atSuspended(do func()) context.Context {
	return faults.With(b.Context(), func(step string) error {
		if step == "devmapper: suspended" {
			do()
		}
		return nil
	})
}

func (b *bench) diffIn(ctx context.Context, from, to drivers.Ref) (changes int, err error) {
	for _, err := range b.Diff(ctx, from, to) {
		if err != nil {
			return changes, err
		}
		changes++
	}
	return changes, nil
}

// A device that is suspended for a snapshot and that somebody, seeing that nobody has it open,
// removes meanwhile needs no resuming.
func TestSuspendedDeviceThatGoes(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	base := b.create(1)
	b.commit(base)
	r := b.create(2, 1)
	b.write(r, "f", "x") // its device stays
	name, gone := b.deviceName(2, 2), false
	changes, err := b.diffIn(b.atSuspended(func() {
		b.dmsetup("remove", name)
		gone = true
	}), base, r)
	if err != nil || changes != 2 || !gone { // and the root
		t.Errorf("%d changes, %v; removed %v", changes, err, gone)
	}
	b.file(r, "f", "x") // its device is there again
	// One that comes back meanwhile may be written to: no snapshot is taken of it.
	_, err = b.diffIn(b.atSuspended(func() {
		b.dmsetup("remove", name)
		_, err := b.Mounts(t.Context(), r, drivers.MountOptions{})
		b.check(err)
	}), base, r)
	if !errdefs.IsUnavailable(err) {
		t.Errorf("a diff of a layer whose device was made again: %v", err)
	}
	b.file(r, "f", "x")
	b.remove(2, 1)
	b.nothingLoose("the diff")
}

// noCookies has udev seem to run and no semaphore be left, so that nothing can be resumed, until
// again is called.
func (b *bench) noCookies() (again func()) {
	b.Helper()
	const limits = "/proc/sys/kernel/sem"
	saved, err := os.ReadFile(limits)
	b.check(err)
	b.check(sys.Mount("tmpfs", "/run", "tmpfs", 0, ""))
	b.check(os.Mkdir("/run/udev", 0o755))
	b.check(os.WriteFile("/run/udev/control", nil, 0o600))
	b.check(os.WriteFile(limits, []byte("32000 0 500 0"), 0))
	return func() {
		b.Helper()
		b.check(os.WriteFile(limits, saved, 0))
		b.check(sys.Umount("/run", 0))
	}
}

// A snapshot whose origin cannot be resumed is dropped with the call's error, and the next call
// resumes the origin.
func TestSnapshotOfWhatCannotBeResumed(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	if dm.UdevRuns() {
		testenv.Optional(t, "udev runs here: it would miss what is done without it")
	}
	r := b.create(1)
	b.write(r, "f", "x")
	again := func() {}
	_, err := b.diffIn(b.atSuspended(func() { again = b.noCookies() }), drivers.Ref{}, r)
	again()
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("diff: %v", err)
	}
	if temps, err := b.tempIDs(); err != nil || len(temps) > 0 {
		t.Errorf("in tmp: %v, %v", temps, err)
	}
	b.file(r, "f", "x")
	b.remove(1)
	b.nothingLoose("the diff")
}

// Cleaning up that fails once a call's work is done is no failure of the call: the next sweep
// does it.
func TestCleanUpThatFails(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	base, victim := b.create(1), b.create(2)
	b.commit(base)
	r := b.create(3, 1)
	_, unmount := b.mount(r)
	const stray = 4711
	b.check(os.WriteFile(b.tempPath(stray), nil, 0o600))
	tmp := b.root + "/" + tempDir
	chattr := func(flag string) {
		t.Helper()
		if out, err := exec.Command(testenv.Program(t, "chattr", "e2fsprogs"), flag, tmp).CombinedOutput(); err != nil {
			t.Fatalf("chattr %s: %v: %s", flag, err, out)
		}
	}
	chattr("+a") // nothing in it can be removed
	t.Cleanup(func() { chattr("-a") })
	if err := os.Remove(b.tempPath(stray)); err == nil {
		t.Error("a file in it can be removed")
	}
	b.commit(r)
	b.remove(victim.ID)
	chattr("-a")
	unmount()
	b.remove(3, 1)
	b.nothingLoose("that")
	b.check(b.pool.Exclusive(t.Context(), b.sweepTemps))
	if temps, err := b.tempIDs(); err != nil || len(temps) > 0 {
		t.Errorf("in tmp: %v, %v", temps, err)
	}
}

// A layer that is mounted is committed with more in memory than the pool has free: the pool, which
// suspends all its devices to become larger, need not wait for one that waits for it.
func TestMoreInMemoryThanThePoolHas(t *testing.T) {
	b := newBench(t, 512*mib, map[string]string{"data-size": "32MiB"})
	r := b.create(1)
	dir, unmount := b.mount(r)
	content := noise(44 * mib)
	b.check(os.WriteFile(dir+"/f", []byte(content), 0o644))
	b.commit(r)
	unmount()
	b.file(r, "f", content)
	b.remove(1)
}
