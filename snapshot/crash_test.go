package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/mount"
	"github.com/layerctl/layerctl/snapshot"
)

// job is what a child process does: this test binary, started again with
// SNAPSHOT_TEST_JOB.
type job struct {
	Name, Root, Driver string
	Seed               int
	KillAt             int    // ends the process at that step, counted from 1
	Step               string // ends the process at the step of that name
}

func (j job) command() *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("SNAPSHOT_TEST_JOB=%s %s %s %d %d %s", j.Name, j.Root, j.Driver, j.Seed, j.KillAt, strings.ReplaceAll(j.Step, " ", "")+"."))
	return cmd
}

func runJob(text string) int {
	var j job
	if _, err := fmt.Sscanf(text, "%s %s %s %d %d %s", &j.Name, &j.Root, &j.Driver, &j.Seed, &j.KillAt, &j.Step); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	work := map[string]func(context.Context, job) error{"life": liveJob, "churn": churnJob, "hold": holdJob, "put": putJob, "dieat": dieAtJob, "migrate": migrateJob}[j.Name]
	var mu sync.Mutex
	steps := 0
	ctx := faults.With(context.Background(), func(step string) error {
		mu.Lock()
		defer mu.Unlock()
		if steps++; steps == j.KillAt || strings.ReplaceAll(step, " ", "")+"." == j.Step {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // until it comes
		}
		return nil
	})
	if err := work(ctx, j); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func liveJob(ctx context.Context, j job) error {
	s, err := snapshot.Open(ctx, j.Root, snapshot.Options{Registry: registry()})
	if err != nil {
		return err
	}
	v, err := s.View("v", j.Driver)
	if err != nil {
		return err
	}
	return errors.Join(live(ctx, s, v), s.Close())
}

// live takes a store through every change there is.
func live(ctx context.Context, s *snapshot.Store, v *snapshot.View) error {
	do := func(steps ...func() error) error {
		for _, step := range steps {
			if err := step(); err != nil {
				return err
			}
		}
		return nil
	}
	return do(
		func() error { _, err := v.Prepare(ctx, "act", "base"); return err },
		func() error { return put(ctx, v, "act", "f", "by hand") },
		func() error { return v.Commit(ctx, "hand", "act") },
		func() error { return v.Create(ctx, "unpack", "hand", snapshot.CreateOptions{}) },
		func() error { return v.Apply(ctx, "unpack", tarOf(nil, "g"), applyOptions) },
		func() error { return v.Commit(ctx, "unpacked", "unpack") },
		func() error { _, err := v.View(ctx, "ro", "unpacked"); return err },
		func() error { return v.Remove(ctx, "ro") },
		func() error { return v.Remove(ctx, "unpacked") },
		func() error { _, err := s.GC(ctx); return err },
		func() error { _, err := v.Prepare(ctx, "last", "hand"); return err },
	)
}

func put(ctx context.Context, v *snapshot.View, key, name, content string) error {
	ms, err := v.MountsWith(ctx, key, drivers.MountOptions{})
	if err != nil {
		return err
	}
	dir, done, err := reach(ctx, ms)
	if err != nil {
		return err
	}
	defer done()
	return os.WriteFile(dir+"/"+name, []byte(content), 0o644)
}

// TestCrashAtEveryStep kills a process at each step of everything it does, the
// driver's steps among them, and wants what is then opened to be whole.
func TestCrashAtEveryStep(t *testing.T) {
	testenv.Slow(t)
	testenv.Root(t)
	for _, driver := range []string{"native", "overlay"} {
		t.Run(driver, func(t *testing.T) {
			steps := stepsOf(t, driver)
			for _, want := range []string{"store: create: made", "store: create: recorded", "store: commit: intended", "store: commit: frozen", "store: commit: recorded", "store: apply: begun", "store: apply: listed", "store: list: written", "store: gc: bytes removed"} {
				if !slices.Contains(steps, want) {
					t.Errorf("step %q is not reached", want)
				}
			}
			for n, step := range steps {
				t.Run(fmt.Sprintf("%d %s", n+1, strings.ReplaceAll(step, " ", "-")), func(t *testing.T) { crash(t, driver, n+1) })
			}
		})
	}
}

// stepsOf lists the steps of live.
func stepsOf(t *testing.T, driver string) (steps []string) {
	root := seedStore(t, driver)
	var mu sync.Mutex
	ctx := faults.With(t.Context(), func(step string) error {
		mu.Lock()
		defer mu.Unlock()
		steps = append(steps, step)
		return nil
	})
	must(t, liveJob(ctx, job{Root: root, Driver: driver}))
	return steps
}

func seedStore(t *testing.T, driver string) string {
	root := testenv.Scratch(t)
	s, err := snapshot.Open(t.Context(), root, snapshot.Options{Registry: registry()})
	must(t, err)
	v := view(t, s, "v", driver)
	layerOf(t, v, "base", "", map[string]string{"a": "1", "d/b": "2"})
	must(t, s.Close())
	return root
}

func crash(t *testing.T, driver string, step int) {
	root := seedStore(t, driver)
	cmd := job{Name: "life", Root: root, Driver: driver, KillAt: step}.command()
	out, err := cmd.CombinedOutput()
	if !testenv.Killed(cmd.ProcessState) {
		// The background listing runs beside: a later run may have fewer steps.
		t.Logf("not killed: %v %s", err, out)
	}
	s := reopen(t, root)
	t.Logf("recovered: %v", s.Recovered())
	v := view(t, s, "v", driver)
	wholeSnapshots(t, v)
	clean(t, s)
	if err := finish(t.Context(), v); err != nil {
		t.Errorf("going on: %v", err)
	}
	must(t, v.Cleanup(t.Context()))
	clean(t, s)
	must(t, s.Close())
	again := open(t, root)
	clean(t, again)
}

// wholeSnapshots: whatever is committed has its content.
func wholeSnapshots(t *testing.T, v *snapshot.View) {
	must(t, v.Walk(t.Context(), func(ctx context.Context, i snapshots.Info) error {
		if i.Kind != snapshots.KindCommitted || i.Name == "base" {
			return nil
		}
		want := map[string]string{"hand": "A f", "unpacked": "A g"}[i.Name]
		if d := diff(t, v, "", i.Name); !slices.Equal(d, []string{want}) && !slices.Equal(d, []string{"C .", want}) {
			t.Errorf("%s: changes %v, want %s", i.Name, d, want) // the root's time may differ
		}
		return nil
	}))
}

// finish commits and removes whatever a crash left active.
func finish(ctx context.Context, v *snapshot.View) error {
	var active []string
	err := v.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		active = append(active, i.Name)
		return nil
	}, "kind==active")
	for _, key := range active {
		if _, merr := v.Mounts(ctx, key); merr != nil {
			return merr
		}
		err = errors.Join(err, v.Commit(ctx, key+"-finished", key), v.Remove(ctx, key+"-finished"))
	}
	return err
}

// TestFailureAtEveryStep fails each step in turn instead: the store must stay
// whole and open.
func TestFailureAtEveryStep(t *testing.T) {
	testenv.Root(t)
	for _, driver := range []string{"native", "overlay"} {
		t.Run(driver, func(t *testing.T) {
			for n := range stepsOf(t, driver) {
				root := seedStore(t, driver)
				s := open(t, root)
				v := view(t, s, "v", driver)
				ctx, step := failing(t.Context(), n+1)
				err := live(ctx, s, v)
				if err != nil && !errors.Is(err, io.ErrNoProgress) {
					t.Errorf("step %d, %s: %v", n+1, *step, err)
				}
				wholeSnapshots(t, v)
				clean(t, s)
				if err := finish(t.Context(), v); err != nil {
					t.Errorf("after step %d, %s: %v", n+1, *step, err)
				}
				must(t, v.Cleanup(t.Context()))
				clean(t, s)
				must(t, s.Close())
			}
		})
	}
}

func failing(ctx context.Context, at int) (context.Context, *string) {
	var mu sync.Mutex
	n, name := 0, ""
	return faults.With(ctx, func(step string) error {
		mu.Lock()
		defer mu.Unlock()
		if n++; n == at {
			name = step
			return io.ErrNoProgress
		}
		return nil
	}), &name
}

// failingAt is a context in which every step of that name fails.
func failingAt(ctx context.Context, at string) context.Context {
	return faults.With(ctx, func(step string) error {
		if step == at {
			return io.ErrNoProgress
		}
		return nil
	})
}

// churnJob prepares, commits and removes until it is killed or its time is up.
func churnJob(ctx context.Context, j job) error {
	s, err := snapshot.Open(ctx, j.Root, snapshot.Options{Registry: registry(), Log: func(m string) { fmt.Fprintln(os.Stderr, m) }})
	if err != nil {
		return err
	}
	v, err := s.View("v", j.Driver)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make([]error, 2)
	end := time.Now().Add(time.Duration(j.KillAt) * -time.Millisecond)
	for w := range errs {
		wg.Go(func() {
			for i := 0; time.Now().Before(end) && errs[w] == nil; i++ {
				errs[w] = churnOnce(ctx, v, fmt.Sprintf("%d-%d-%d", j.Seed, w, i))
			}
		})
	}
	wg.Wait()
	return errors.Join(append(errs, s.Close())...)
}

func churnOnce(ctx context.Context, v *snapshot.View, key string) error {
	if _, err := v.Prepare(ctx, key, "base"); err != nil {
		return err
	}
	if err := put(ctx, v, key, "f", key); err != nil {
		return err
	}
	if err := v.Commit(ctx, "c"+key, key); err != nil {
		return err
	}
	if _, err := v.Prepare(ctx, "top"+key, "c"+key); err != nil {
		return err
	}
	if err := v.Remove(ctx, "top"+key); err != nil {
		return err
	}
	if len(key)%3 == 0 {
		return nil
	}
	if err := v.Remove(ctx, "c"+key); err != nil {
		return err
	}
	return v.Cleanup(ctx)
}

// TestStress: eight processes prepare, commit and remove in one store while two
// are killed each second. LAYERCTL_STRESS=1m makes it longer.
func TestStress(t *testing.T) {
	testenv.Root(t)
	length := 8 * time.Second
	if d, err := time.ParseDuration(os.Getenv("LAYERCTL_STRESS")); err == nil {
		length = d
	} else if testing.Short() {
		length = 2 * time.Second
	}
	for _, driver := range []string{"overlay", "native"} {
		t.Run(driver, func(t *testing.T) { stress(t, driver, length/2) })
	}
}

func stress(t *testing.T, driver string, length time.Duration) {
	root := seedStore(t, driver)
	end := time.Now().Add(length)
	var wg sync.WaitGroup
	stress := &stressed{t: t, root: root, driver: driver, end: end, running: map[int]*os.Process{}}
	for w := range 8 {
		wg.Go(func() { stress.worker(w) })
	}
	for tick := time.NewTicker(500 * time.Millisecond); time.Now().Before(end); {
		<-tick.C
		stress.killOne()
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(60 * time.Second):
		t.Fatal("the processes hang")
	}
	s := reopen(t, root)
	v := view(t, s, "v", driver)
	must(t, second(v.Prepare(t.Context(), "last", "base")))
	last, err := v.Record(t.Context(), "last")
	must(t, err)
	t.Logf("%d processes ran, %d killed; IDs up to %d; the last open recovered %d things", stress.runs, stress.killed, last.ID, len(s.Recovered()))
	if int(last.ID) < stress.runs { // how many more is a matter of the machine
		t.Errorf("%d processes made only %d layers: they hinder each other", stress.runs, last.ID)
	}
	if stress.killed == 0 {
		t.Error("none was killed")
	}
	must(t, v.Cleanup(t.Context()))
	clean(t, s)
}

type stressed struct {
	t            *testing.T
	root, driver string
	end          time.Time
	mu           sync.Mutex
	running      map[int]*os.Process
	runs, killed int
}

// worker runs one process after the other.
func (s *stressed) worker(w int) {
	for time.Now().Before(s.end) {
		s.mu.Lock()
		s.runs++
		seed := s.runs
		j := job{Name: "churn", Root: s.root, Driver: s.driver, Seed: seed, KillAt: -int(min(time.Until(s.end), 3*time.Second).Milliseconds())}
		cmd := j.command()
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		err := cmd.Start()
		if err == nil {
			s.running[w] = cmd.Process
		}
		s.mu.Unlock()
		if err == nil {
			err = cmd.Wait()
		}
		s.mu.Lock()
		delete(s.running, w)
		s.mu.Unlock()
		if err != nil && !strings.Contains(err.Error(), "signal: killed") {
			s.t.Errorf("process %s: %v\n%s", strconv.Itoa(seed), err, out.String())
		}
	}
}

func (s *stressed) killOne() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w, p := range s.running {
		if p.Kill() == nil {
			s.killed++
		}
		delete(s.running, w)
		return
	}
}

// holdJob opens the store's database and stops, with the database held.
func holdJob(ctx context.Context, j job) error {
	s, err := snapshot.Open(ctx, j.Root, snapshot.Options{Registry: registry()})
	if err != nil {
		return err
	}
	if _, err := s.Views(ctx); err != nil {
		return err
	}
	for range 2 { // so that the database is never idle and let go before the stop
		go func() {
			for {
				_, _ = s.Views(ctx)
			}
		}()
	}
	fmt.Println("holding")
	return syscall.Kill(os.Getpid(), syscall.SIGSTOP)
}

// putJob is a short program: one snapshot.
func putJob(ctx context.Context, j job) error {
	s, err := snapshot.Open(ctx, j.Root, snapshot.Options{Registry: registry()})
	if err != nil {
		return err
	}
	v, err := s.View("v", j.Driver)
	if err != nil {
		return err
	}
	_, err = v.Prepare(ctx, fmt.Sprintf("put-%d", j.Seed), "base")
	return errors.Join(err, s.Close())
}

// TestCrashInRecovery kills the recovery itself at each of its steps.
func TestCrashInRecovery(t *testing.T) {
	testenv.Slow(t)
	testenv.Root(t)
	for _, driver := range []string{"native", "overlay"} {
		t.Run(driver, func(t *testing.T) {
			steps := stepsOf(t, driver)
			made := slices.Index(steps, "store: create: made") + 1
			frozen := slices.Index(steps, "store: commit: frozen") + 1
			if made == 0 || frozen == 0 {
				t.Fatalf("steps %v", steps)
			}
			for _, first := range []int{made, frozen} {
				for then := 1; then <= 4; then++ {
					root := seedStore(t, driver)
					_ = job{Name: "life", Root: root, Driver: driver, KillAt: first}.command().Run()
					_ = job{Name: "put", Root: root, Driver: driver, Seed: 1, KillAt: then}.command().Run()
					s := reopen(t, root)
					wholeSnapshots(t, view(t, s, "v", driver))
					clean(t, s)
					must(t, s.Close())
					clean(t, open(t, root))
				}
			}
		})
	}
}

// TestRemovedStaysRemovedAfterAPowerCut: what GC and recovery removed, and the file system
// had not, came back without a record that named it.
func TestRemovedStaysRemovedAfterAPowerCut(t *testing.T) {
	testenv.Root(t)
	for _, driver := range []string{"native", "overlay"} {
		t.Run(driver, func(t *testing.T) {
			dir := testenv.FS(t, "ext4", testenv.Size(96<<20), testenv.MountOptions("commit=300"))
			s := open(t, filepath.Join(dir, "store"))
			v := view(t, s, "v", driver)
			files := map[string]string{"a": "1", "d/b": "2"}
			for i, name := range []string{"base", "one", "two", "three"} {
				layerOf(t, v, name, []string{"", "base", "one", "two"}[i], files)
			}
			must(t, s.FinishListings(t.Context()))
			for _, key := range []string{"three", "two", "one"} {
				must(t, v.Remove(t.Context(), key))
			}
			r, err := s.GC(t.Context())
			must(t, err)
			if r.Layers != 3 {
				t.Errorf("gc removed %d layers of 3", r.Layers)
			}
			afterPowerCut(t, dir, func(root string) { clean(t, open(t, root)) })
			must(t, s.Close())

			// A process dies in Prepare; the next one ends its lease.
			out, err := job{Name: "dieat", Root: filepath.Join(dir, "store"), Driver: driver, Step: "store: create: made"}.command().CombinedOutput()
			if err == nil || err.Error() != "signal: killed" {
				t.Fatalf("%v %s", err, out)
			}
			must(t, exec.Command("sync", "-f", dir).Run())
			s = reopen(t, filepath.Join(dir, "store"))
			if len(s.Recovered()) != 1 {
				t.Errorf("recovered: %v", s.Recovered())
			}
			afterPowerCut(t, dir, func(root string) { clean(t, open(t, root)) })
			must(t, s.Close())
		})
	}
}

// afterPowerCut has f look at the store of dir, a file system on a loop device, as a power
// cut at this moment would leave it.
func afterPowerCut(t *testing.T, dir string, f func(root string)) {
	t.Helper()
	image := filepath.Join(testenv.Scratch(t), "cut")
	must(t, testenv.CopyImage(dir, image))
	m := t.TempDir()
	if out, err := exec.Command("mount", "-o", "loop", image, m).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	t.Cleanup(func() { must(t, mount.Unmount(m, mount.UnmountOptions{Wait: time.Minute})) })
	f(filepath.Join(m, "store"))
}
