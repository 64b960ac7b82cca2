package devmapper

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/metadata"
	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

const mib = 1 << 20

// envFS has the tests use another file system than the default where they name none.
const envFS = "LAYERCTL_FILESYSTEM"

// bench is a driver on a file system of its own.
type bench struct {
	*testing.T
	*driver
	fs string
}

func newBench(t *testing.T, bytes int64, options map[string]string) *bench {
	t.Helper()
	needsDM(t)
	testenv.Leaks(t)
	b := &bench{T: t, fs: testenv.FS(t, "ext4", testenv.Size(bytes))}
	b.reopen(options)
	t.Cleanup(func() {
		b.whole()
		b.check(b.driver.Close())
	})
	return b
}

func (b *bench) check(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func (b *bench) reopen(options map[string]string) {
	b.Helper()
	options = maps.Clone(options)
	if fs := os.Getenv(envFS); fs != "" && options["filesystem"] == "" {
		if options == nil {
			options = map[string]string{}
		}
		options["filesystem"] = fs
	}
	d, err := Open(context.Background(), drivers.Config{Root: b.fs + "/r", Options: options})
	b.check(err)
	b.driver = d.(*driver)
}

// create makes a writable layer on parents.
func (b *bench) create(id drivers.ID, parents ...drivers.ID) drivers.Ref {
	b.Helper()
	r := drivers.Ref{ID: id, Parents: parents}
	b.check(b.Create(b.Context(), r, drivers.CreateOptions{}))
	return r
}

// mount mounts a layer until its unmount.
func (b *bench) mount(r drivers.Ref) (dir string, unmount func()) {
	b.Helper()
	ms, err := b.Mounts(b.Context(), r, drivers.MountOptions{})
	b.check(err)
	dir = filepath.Join(testenv.Scratch(b), "m")
	b.check(os.Mkdir(dir, 0o755))
	b.check(mount.All(b.Context(), ms, dir))
	mounted := true
	unmount = func() {
		b.Helper()
		if mounted {
			mounted = false
			b.check(mount.Unmount(dir, mount.UnmountOptions{Wait: time.Minute}))
		}
	}
	b.Cleanup(unmount)
	return dir, unmount
}

func (b *bench) edit(r drivers.Ref, f func(dir string)) {
	b.Helper()
	dir, unmount := b.mount(r)
	f(dir)
	unmount()
}

func (b *bench) commit(r drivers.Ref) {
	b.Helper()
	_, err := b.Commit(b.Context(), r, drivers.CommitOptions{})
	b.check(err)
}

func (b *bench) file(r drivers.Ref, name, want string) {
	b.Helper()
	b.edit(r, func(dir string) {
		if got, err := os.ReadFile(dir + "/" + name); err != nil || string(got) != want {
			b.Errorf("layer %s: %s: %q, %v; want %q", r.ID, name, got, err, want)
		}
	})
}

func (b *bench) write(r drivers.Ref, name, content string) {
	b.Helper()
	b.edit(r, func(dir string) { b.check(os.WriteFile(dir+"/"+name, []byte(content), 0o644)) })
}

func (b *bench) remove(ids ...drivers.ID) {
	b.Helper()
	for _, id := range ids {
		var err error
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if err = b.Remove(context.Background(), id); !errdefs.IsFailedPrecondition(err) {
				break
			}
		}
		b.check(err)
	}
}

// thins lists the pool's thin devices.
func (b *bench) thins() (ids []uint32) {
	b.Helper()
	b.check(b.withMetadata(context.Background(), func(m *metadata.Pool) error {
		for dev, err := range m.Devices() {
			if err != nil {
				return err
			}
			ids = append(ids, uint32(dev.ID))
		}
		return nil
	}))
	return ids
}

// whole checks what holds whoever died: each id of the pool stands in a record, no two
// layers have one, and each layer that is whole has its own in the pool. It returns
// the ids that are no layer's.
func (b *bench) whole() (loose []uint32) {
	b.Helper()
	in := map[uint32]bool{}
	for _, id := range b.thins() {
		in[id] = true
	}
	owners := map[uint32][]string{}
	ts, err := b.templates()
	b.check(err)
	for _, t := range ts {
		owners[t.Thin] = append(owners[t.Thin], "template of "+t.FS)
	}
	for _, name := range roots.All {
		ids, err := roots.In(context.Background(), b.root, name)
		b.check(err)
		for _, id := range ids {
			r, err := b.read(name, id)
			b.check(err)
			if r.Shared {
				continue
			}
			owners[r.Thin] = append(owners[r.Thin], name+"/"+id.String())
			if name == roots.Layers && !in[r.Thin] {
				b.Errorf("layer %s has thin device %d, which the pool has not", id, r.Thin)
			}
		}
	}
	for id := range in {
		if len(owners[id]) > 1 {
			b.Errorf("thin device %d is that of %v", id, owners[id])
		}
		if len(owners[id]) == 0 {
			loose = append(loose, id)
			if _, err := os.Stat(b.tempPath(id)); err != nil {
				b.Errorf("thin device %d stands in no record: %v", id, err)
			}
		}
	}
	return loose
}

// nothingLoose checks that the pool keeps no thin device that is no layer's. A device that
// goes with its last user does so a moment later, and its id with the next sweep.
func (b *bench) nothingLoose(after string) {
	b.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		loose := b.whole()
		if len(loose) == 0 {
			return
		}
		if time.Now().After(end) {
			b.Errorf("%s left thin devices %v", after, loose)
			return
		}
		b.check(b.pool.Exclusive(context.Background(), b.sweepTemps))
	}
}

// steps runs call with a context that stops at the n'th step; it reports whether there
// was one.
func steps(ctx context.Context, n int, stop func() error, call func(ctx context.Context) error) (reached bool, err error) {
	at := 0
	err = call(faults.With(ctx, func(string) error {
		if at++; at == n+1 {
			reached = true
			return stop()
		}
		return nil
	}))
	return reached, err
}

// A commit under a mount is stopped at each of its steps: the mount goes on, the layer
// can be committed again, and the pool keeps nothing.
func TestMountedCommitStoppedAtEachStep(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	base := b.create(1)
	b.write(base, "base", "base")
	b.commit(base)
	injected := &os.PathError{Op: "injected", Path: "step", Err: syscall.EIO}
	for n := 0; ; n++ {
		r := b.create(drivers.ID(10+n), 1)
		dir, unmount := b.mount(r)
		b.check(os.WriteFile(dir+"/f", []byte("before"), 0o644))
		reached, err := steps(t.Context(), n, func() error { return injected }, func(ctx context.Context) error {
			_, err := b.Commit(ctx, r, drivers.CommitOptions{})
			return err
		})
		if !reached {
			b.check(err)
		} else if !errors.Is(err, injected) {
			t.Fatalf("step %d: %v", n, err)
		}
		b.check(os.WriteFile(dir+"/f", []byte("after"), 0o644)) // or it is suspended still
		if reached {
			if _, err := b.Commit(t.Context(), r, drivers.CommitOptions{}); err != nil && !errdefs.IsFailedPrecondition(err) {
				t.Errorf("step %d, again: %v", n, err)
			}
		}
		unmount()
		b.edit(r, func(dir string) {
			if err := os.WriteFile(dir+"/f", nil, 0o644); !errors.Is(err, syscall.EROFS) {
				t.Errorf("step %d: a write to the layer: %v", n, err)
			}
		})
		b.remove(r.ID)
		b.nothingLoose(fmt.Sprintf("step %d", n))
		if !reached {
			if n < 4 {
				t.Errorf("only %d steps", n)
			}
			return
		}
	}
}

const envChild = "LAYERCTL_DEVMAPPER_CHILD"

// child is what another process of this test binary does.
type child struct {
	Root  string
	Step  int // at which it dies; -1: it lives
	Op    string
	ID    drivers.ID
	Base  drivers.ID
	Lives int
	FS    string // the option filesystem
	Drop  string // a capability that it does not have
}

func (b *bench) start(c child) *exec.Cmd {
	b.Helper()
	text, err := json.Marshal(c)
	b.check(err)
	self, err := os.Executable()
	b.check(err)
	cmd := exec.Command(self, "-test.run=^TestChild$")
	if c.Drop != "" {
		cmd = exec.Command(testenv.Program(b, "setpriv", "util-linux"), "--bounding-set=-"+c.Drop, self, "-test.run=^TestChild$")
	}
	cmd.Env = append(os.Environ(), envChild+"="+string(text))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	b.check(cmd.Start())
	b.Cleanup(func() {
		if b.Failed() {
			b.Logf("child %+v: %s", c, out.String())
		}
	})
	return cmd
}

// died reports whether a child was killed, and ends the test if it failed otherwise.
func (b *bench) died(cmd *exec.Cmd) bool {
	b.Helper()
	err := cmd.Wait()
	if testenv.Killed(cmd.ProcessState) {
		return true
	}
	b.check(err)
	return false
}

// TestChild is no test: it is what start starts.
func TestChild(t *testing.T) {
	text := os.Getenv(envChild)
	if text == "" {
		return
	}
	var c child
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	n := 0
	ctx := faults.With(context.Background(), func(string) error {
		if n++; c.Step >= 0 && n > c.Step {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	})
	opening := context.Background()
	if c.Op == "open" {
		opening = ctx
	}
	opened, err := Open(opening, drivers.Config{Root: c.Root, Options: map[string]string{"filesystem": c.FS}})
	if err != nil {
		t.Fatal(err)
	}
	d := opened.(*driver)
	switch c.Op {
	case "commit":
		_, err = d.Commit(ctx, drivers.Ref{ID: c.ID, Parents: []drivers.ID{c.Base}}, drivers.CommitOptions{})
	case "diff":
		for _, e := range d.Diff(ctx, drivers.Ref{ID: c.Base}, drivers.Ref{ID: c.ID, Parents: []drivers.ID{c.Base}}) {
			err = errors.Join(err, e)
		}
	case "grow":
		err = d.Create(ctx, drivers.Ref{ID: c.ID, Parents: []drivers.ID{c.Base}}, drivers.CreateOptions{Quota: 600 * mib})
	case "bounded":
		err = d.refusesQuota(ctx)
	case "lives":
		err = d.lives(ctx, c)
	case "leaves":
		err = d.leaves(ctx, c.ID)
	}
	if err == nil {
		err = d.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// lives makes, changes, commits and removes layers; every third stays.
func (d *driver) lives(ctx context.Context, c child) error {
	for i := range c.Lives {
		r := drivers.Ref{ID: c.ID + drivers.ID(i), Parents: []drivers.ID{c.Base}}
		if err := d.Create(ctx, r, drivers.CreateOptions{}); err != nil {
			return err
		}
		err := d.lookAt(ctx, r, func(s seen) error {
			if b, err := os.ReadFile(s.path + "/base"); err != nil || string(b) != "base" {
				return fmt.Errorf("%q, %w", b, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if err := d.Apply(ctx, r, bytes.NewReader(archive("own", r.ID.String())), layer.ApplyOptions{}); err != nil {
			return err
		}
		if _, err := d.Commit(ctx, r, drivers.CommitOptions{}); err != nil {
			return err
		}
		if i%3 != 0 {
			if err := d.Remove(ctx, r.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

func archive(name, content string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))})
	_, _ = w.Write([]byte(content))
	_ = w.Close()
	return b.Bytes()
}

// byMounts and byApply are what is done first with a layer after a process has died that was
// at work with it: either resumes what is suspended.
func byMounts(b *bench, r drivers.Ref) error {
	_, err := b.Mounts(b.Context(), r, drivers.MountOptions{})
	return err
}

func byApply(b *bench, r drivers.Ref) error {
	done := make(chan error, 1)
	go func() {
		done <- b.Apply(context.Background(), r, bytes.NewReader(archive("applied", "applied")), layer.ApplyOptions{})
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(time.Minute):
		resumeErr := byMounts(b, r) // so that it ends
		return errors.Join(errors.New("apply waits for a device that nobody resumes"), <-done, resumeErr)
	}
}

// A process that dies in a commit or diff of a layer that is mounted leaves the mount
// at work, and nothing that the next one does not take away.
func TestProcessDiesAtEachStepOfAMountedLayer(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	base := b.create(1)
	b.write(base, "base", "base")
	b.commit(base)
	for _, op := range []string{"commit", "diff"} {
		for n, id := 0, drivers.ID(100); b.killedAt(op, n, id, byMounts); n, id = n+1, id+1 {
		}
	}
	for op, suspended := range map[string]int{"commit": 1, "diff": 0} {
		if !b.killedAt(op, suspended, 200, byApply) {
			t.Errorf("%s has no step %d", op, suspended)
		}
	}
	b.file(base, "base", "base")
}

// killedAt has a process die at a step of a commit or diff of a mounted layer, and
// reports whether there is such a step.
func (b *bench) killedAt(op string, n int, id drivers.ID, next func(*bench, drivers.Ref) error) (dead bool) {
	b.Helper()
	what := fmt.Sprintf("%s killed at step %d", op, n)
	r := b.create(id, 1)
	dir, unmount := b.mount(r)
	b.check(os.WriteFile(dir+"/f", []byte("before"), 0o644))
	dead = b.died(b.start(child{Root: b.root, Step: n, Op: op, ID: id, Base: 1}))
	if err := next(b, r); err != nil {
		b.Errorf("%s, then: %v", what, err)
	}
	if l, err := b.layer(id); err == nil && l.Kind == writable {
		b.check(os.WriteFile(dir+"/f", []byte("after"), 0o644))
	}
	if _, err := b.Commit(b.Context(), r, drivers.CommitOptions{}); err != nil && !errdefs.IsFailedPrecondition(err) {
		b.Errorf("%s, commit: %v", what, err)
	}
	unmount()
	b.remove(id)
	b.nothingLoose(what)
	return dead
}

// Processes work on one pool at the same time, and some die at any step: no id is
// two layers', and nobody's layer is lost.
func TestProcessesShareAPoolAndDie(t *testing.T) {
	b := newBench(t, 1<<30, nil)
	base := b.create(1)
	b.write(base, "base", "base")
	b.commit(base)
	const lives = 6
	var first drivers.ID = 1000
	for round := range 2 {
		var all []*exec.Cmd
		for worker := range 4 {
			step := -1
			if worker%2 == 1 { // dies somewhere in its second, third, ... life
				step = 11 + 7*round + 5*worker
			}
			all = append(all, b.start(child{Root: b.root, Step: step, Op: "lives", ID: first, Base: 1, Lives: lives}))
			first += lives
		}
		for worker, cmd := range all {
			if dead := b.died(cmd); dead != (worker%2 == 1) {
				t.Errorf("worker %d: killed %v", worker, dead)
			}
		}
		b.whole()
	}
	for id, err := range b.IDs(t.Context()) {
		b.check(err)
		if l, err := b.layer(id); err == nil && l.Kind == committed && id != 1 {
			b.file(drivers.Ref{ID: id, Parents: []drivers.ID{1}}, "own", id.String())
		}
	}
	var ids []drivers.ID
	for id, err := range b.IDs(t.Context()) {
		b.check(err)
		ids = append(ids, id)
	}
	slices.Sort(ids)
	slices.Reverse(ids)
	b.remove(ids...)
	b.nothingLoose("all that")
	if left := b.thins(); len(left) != 1 || left[0] != b.template.Thin {
		t.Errorf("left in the pool: %v", left)
	}
}

// leave fills the file system that the pool is on, but for so many bytes.
func (b *bench) leave(bytes int64) (ballast string) {
	b.Helper()
	s, err := sys.StatfsPath(b.fs)
	b.check(err)
	ballast = b.fs + "/ballast"
	f, err := sys.Open(ballast, sys.O_RDWR|sys.O_CREAT, 0o600)
	b.check(err)
	defer f.Close()
	b.check(f.Allocate(int64(s.BlocksUser)*s.BlockSize - bytes))
	b.check(f.SyncFS())
	return ballast
}

// noise is content without zeros to be made holes of.
func noise(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>8^i*7) | 1
	}
	return string(b)
}

// A pool that fills in the middle of an Apply, by itself or because its files cannot
// have more, is an error of the Apply that says so; what was committed before is
// whole, and with room again the Apply can be done.
func TestPoolFullInApply(t *testing.T) {
	for name, c := range map[string]struct {
		options map[string]string
		free    int64
		words   string
	}{
		"pool": {map[string]string{"data-size": "32MiB", "full": "error"}, 40 * mib, "no free data block"},
		"disk": {nil, 4 * mib, "is full"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, 192*mib, c.options)
			base := b.create(1)
			b.write(base, "base", "base")
			b.commit(base)
			ballast := b.leave(c.free)
			r := b.create(2, 1)
			large := noise(40 * mib)
			err := b.Apply(t.Context(), r, bytes.NewReader(archive("large", large)), layer.ApplyOptions{})
			if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("apply: %v", err)
			}
			b.file(base, "base", "base")
			b.check(os.Remove(ballast))
			b.check(b.pool.Grow(t.Context())) // while it is full: with full=error a write may be faster than the pool's growth
			b.remove(2)
			r = b.create(3, 1)
			b.check(b.Apply(t.Context(), r, bytes.NewReader(archive("large", large)), layer.ApplyOptions{}))
			b.commit(r)
			b.file(r, "large", large)
			b.remove(3, 1)
		})
	}
}

func (b *bench) dmsetup(args ...string) {
	b.Helper()
	out, err := exec.Command(testenv.Program(b, "dmsetup", "dmsetup"), args...).CombinedOutput()
	if err != nil {
		b.Fatalf("dmsetup %v: %v\n%s", args, err, out)
	}
}

// What somebody removes with dmsetup comes back with the next call.
func TestDevicesRemovedBehindOurBack(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	base := b.create(1)
	b.write(base, "base", "base")
	name := b.deviceName(1, 1)
	b.dmsetup("remove", name)
	b.file(base, "base", "base")
	b.dmsetup("remove", name)
	b.dmsetup("remove", b.pool.Name())
	b.file(base, "base", "base")
	b.dmsetup("remove", name)
	b.dmsetup("remove", b.pool.Name())
	b.commit(base)
	b.dmsetup("remove", b.pool.Name())
	child := b.create(2, 1)
	b.file(child, "base", "base")
	b.check(os.Remove(thin.Node(b.deviceName(2, 2))))
	b.file(child, "base", "base")
	b.dmsetup("suspend", b.deviceName(2, 2))
	b.file(child, "base", "base")
	b.remove(2, 1)
}

// The metadata of a pool that is put back to an older copy of itself: layers made
// since are lost, and say so; those before are whole, and no other is taken for one.
func TestPoolOlderThanItsRecords(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	base := b.create(1)
	b.write(base, "f", "base")
	b.commit(base)
	b.check(b.Close())
	saved, err := os.ReadFile(b.root + "/metadata")
	b.check(err)
	b.reopen(nil)
	lost := b.create(2, 1)
	b.write(lost, "f", "lost")
	b.commit(lost)
	b.check(b.Close())
	b.check(os.WriteFile(b.root+"/metadata", saved, 0o600))
	b.reopen(nil)
	b.file(base, "f", "base")
	if _, err := b.Mounts(t.Context(), lost, drivers.MountOptions{}); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "transaction 2") {
		t.Errorf("mounts of a layer that the pool lost: %v", err)
	}
	if err := b.Create(t.Context(), drivers.Ref{ID: 9, Parents: []drivers.ID{2}}, drivers.CreateOptions{}); !errdefs.IsDataLoss(err) {
		t.Errorf("create on it: %v", err)
	}
	b.check(b.Remove(t.Context(), 2))
	again := b.create(3, 1)
	b.file(again, "f", "base")
	b.remove(3, 1)
}

// A layer that the pool is older than is removed without a touch at the device that its record
// names, if another layer has that.
func TestRemoveOfALostLayerKeepsAnothers(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	base := b.create(1)
	b.write(base, "f", "base")
	b.commit(base)
	b.create(2)
	b.check(b.pool.Exclusive(t.Context(), func(c *thin.Change) error { return c.Delete(2) }))
	b.rewrite(2, func(r *record) { r.Thin, r.Tx = 1, 99 })
	b.check(b.Remove(t.Context(), 2))
	b.file(base, "f", "base")
	b.remove(1)
}

// A journal that a crash left full is replayed before the layer is committed: else a
// view, which does not look at it, would miss what is there alone.
func TestJournalIsReplayedAtCommit(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	r := b.create(1)
	victim := b.create(2)
	dir, unmount := b.mount(r)
	b.check(os.WriteFile(dir+"/f", []byte("in the journal"), 0o644))
	f, err := sys.OpenDir(dir)
	b.check(err)
	b.check(f.SyncFS())
	f.Close()
	b.check(os.Rename(dir+"/f", dir+"/g"))
	g, err := os.Open(dir + "/g")
	b.check(err)
	b.check(g.Sync())
	g.Close()
	// A snapshot without the freeze that Commit's has is what a power cut leaves.
	l, err := b.layer(r.ID)
	b.check(err)
	v, err := b.layer(victim.ID)
	b.check(err)
	b.check(b.pool.Exclusive(t.Context(), func(c *thin.Change) error {
		if err := c.Delete(v.Thin); err != nil {
			return err
		}
		return c.CreateSnap(v.Thin, l.Thin)
	}))
	unmount()
	b.commit(victim)
	b.file(victim, "g", "in the journal")
	b.remove(1, 2)
}

// Devices that nobody has mounted go, in time, by the next who mounts another; those
// that a Mounts has named of late stay.
func TestIdleDevicesGo(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	old, young := b.create(1), b.create(2)
	for _, r := range []drivers.Ref{old, young} {
		_, err := b.Mounts(t.Context(), r, drivers.MountOptions{})
		b.check(err)
	}
	long := time.Now().Add(-2 * idleAfter)
	b.check(os.Chtimes(b.root+"/l/1", long, long))
	b.swept.Store(long.Unix())
	_, err := b.Mounts(t.Context(), young, drivers.MountOptions{})
	b.check(err)
	names, err := b.pool.Devices()
	b.check(err)
	if !slices.Equal(names, []string{b.deviceName(2, 2)}) {
		t.Errorf("devices %v, want that of layer 2 alone", names)
	}
	b.write(old, "f", "is made again")
	b.remove(1, 2)
}

func TestOptions(t *testing.T) {
	for _, o := range []map[string]string{{"size": "1"}, {"size": "x"}, {"size": "-1GiB"}, {"size": "99999999TiB"}, {"full": "no"}, {"block": "1KiB"}, {"data": "/dev/x"}, {"nothing": "1"}} {
		p, err := parseOptions(o)
		if err == nil {
			_, err = thin.Open(t.Context(), t.TempDir(), p.pool)
		}
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", o, err)
		}
	}
	o, err := parseOptions(map[string]string{"size": "512MiB", "data-size": "1GiB", "block": "131072", "full": "error"})
	if err != nil || o.size != 512*mib || o.pool.DataBytes != 1<<30 || o.pool.BlockBytes != 128<<10 || o.pool.Full != thin.Error {
		t.Errorf("%+v, %v", o, err)
	}
}

// Blocks larger than the layers are refused in words.
func TestSizeBelowABlock(t *testing.T) {
	needsDM(t)
	_, err := Open(t.Context(), drivers.Config{Root: testenv.FS(t, "ext4", testenv.Size(1<<30)) + "/r",
		Options: map[string]string{"size": "320MiB", "block": "512MiB", "data-size": "512MiB"}})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "size=335544320") {
		t.Errorf("%v", err)
	}
}

// A thin device that is gone from the pool is lost data, not a layer that is not there.
func TestLostThinDevice(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	base, r := b.create(1), b.create(2)
	b.write(base, "f", "x")
	b.commit(base)
	b.check(b.pool.Exclusive(t.Context(), func(c *thin.Change) error { return errors.Join(c.Delete(1), c.Delete(2)) }))
	if _, err := b.Usage(t.Context(), r); !errdefs.IsDataLoss(err) || errdefs.IsNotFound(err) {
		t.Errorf("usage: %v", err)
	}
	if _, err := b.Commit(t.Context(), r, drivers.CommitOptions{}); !errdefs.IsDataLoss(err) {
		t.Errorf("commit: %v", err)
	}
	for _, err := range b.Diff(t.Context(), drivers.Ref{}, r) {
		if !errdefs.IsDataLoss(err) || errdefs.IsNotFound(err) {
			t.Errorf("diff: %v", err)
		}
	}
	if err := b.Create(t.Context(), drivers.Ref{ID: 3, Parents: []drivers.ID{1}}, drivers.CreateOptions{}); !errdefs.IsDataLoss(err) || errdefs.IsNotFound(err) {
		t.Errorf("create on it: %v", err)
	}
	b.remove(2, 1)
}

// Another size than the layers have is refused by number.
func TestPoolOfAnotherSize(t *testing.T) {
	b := newBench(t, 512*mib, map[string]string{"size": "320MiB"})
	_, err := Open(t.Context(), drivers.Config{Root: b.root, Options: map[string]string{"size": "1GiB"}})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "335544320") {
		t.Errorf("%v", err)
	}
	b.check(b.Close())
	b.reopen(nil) // none named: that which it has
	r := b.create(1)
	b.edit(r, func(dir string) {
		s, err := sys.StatfsPath(dir)
		if err != nil || int64(s.Blocks)*s.BlockSize > 320*mib {
			t.Errorf("%+v, %v", s, err)
		}
	})
	b.remove(1)
}

// A diff asks for the names that changed blocks lead to, not for all; one of nothing
// but a view's, too, and of a layer that is mounted and being written.
func TestDiffIsByBlocks(t *testing.T) {
	b := newBench(t, 512*mib, map[string]string{"filesystem": "ext4"})
	base := b.create(1)
	b.edit(base, func(dir string) {
		for i := range 2000 {
			b.check(os.MkdirAll(fmt.Sprintf("%s/d%d", dir, i%50), 0o755))
			b.check(os.WriteFile(fmt.Sprintf("%s/d%d/f%d", dir, i%50, i), []byte("x"), 0o644))
		}
	})
	b.commit(base)
	child := b.create(2, 1)
	dir, unmount := b.mount(child)
	for i := range 10 {
		b.check(os.WriteFile(fmt.Sprintf("%s/d7/f%d", dir, 7+50*i), []byte("changed"), 0o644))
	}
	b.check(os.Remove(dir + "/d8/f8"))
	b.check(b.lookAt(t.Context(), base, func(from seen) error {
		return b.lookAt(t.Context(), child, func(to seen) error {
			c, err := b.candidates(t.Context(), from.volume, to.volume)
			if err != nil || c.Len() < 12 || c.Len() > 40 {
				t.Errorf("%d candidates, %v; want some 14 of 2050", c.Len(), err)
			}
			return nil
		})
	}))
	changes := 0
	for _, err := range b.Diff(t.Context(), base, child) {
		b.check(err)
		changes++
	}
	if changes != 12 { // and the directory d8
		t.Errorf("%d changes, want 12", changes)
	}
	unmount()
	b.remove(2, 1)
}
