package snapshot_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
	"github.com/layerctl/layerctl/snapshot"
)

// family makes a base, two layers on it, an active snapshot and a view on one of
// those, and an active one on nothing, of random trees.
func family(t testing.TB, v *snapshot.View, seed uint64) {
	t.Helper()
	for n, l := range []struct{ name, parent string }{{"base", ""}, {"mid", "base"}, {"side", "base"}} {
		must(t, second(v.Prepare(t.Context(), l.name+"-a", l.parent, snapshots.WithLabels(map[string]string{"of": l.name}))))
		randomly(t, v, l.name+"-a", seed+uint64(n), 60)
		must(t, v.Commit(t.Context(), l.name, l.name+"-a", snapshots.WithLabels(map[string]string{"is": l.name})))
	}
	must(t, second(v.Prepare(t.Context(), "work", "mid", snapshots.WithLabels(map[string]string{"live": "yes"}))))
	randomly(t, v, "work", seed+10, 40)
	must(t, second(v.Prepare(t.Context(), "alone", "")))
	randomly(t, v, "alone", seed+11, 20)
	must(t, second(v.View(t.Context(), "ro", "mid")))
	must(t, second(v.Prepare(t.Context(), "untouched", "side")))
}

// randomly does random operations to a snapshot, through a mount.
func randomly(t testing.TB, v *snapshot.View, key string, seed uint64, ops int) {
	t.Helper()
	ms, err := v.MountsWith(t.Context(), key, drivers.MountOptions{})
	must(t, err)
	dir, done, err := reach(t.Context(), ms)
	must(t, err)
	defer done()
	g := treegen.New(rand.New(rand.NewPCG(seed, 3)), treegen.Config{Root: true, FileSize: 20_000})
	_, err = treegen.Apply(dir, g.Ops(ops))
	must(t, err)
}

// picture is all that a view says of its snapshots, but what a migration changes.
type picture struct {
	Record  snapshot.Record
	Changes string // digest of the tar of the changes
	Tree    string // of that of the whole tree
}

func pictures(t testing.TB, v *snapshot.View) map[string]picture {
	t.Helper()
	must(t, v.Store().FinishListings(t.Context()))
	all := map[string]picture{}
	rs, err := v.Records(t.Context())
	must(t, err)
	for _, r := range rs {
		r.Driver, r.ID, r.Parents, r.Usage = "", 0, nil, drivers.Usage{}
		tar := func(from string) string {
			h := sha256.New()
			changes := v.Contents(t.Context(), r.Key)
			if from != "" {
				changes = v.Diff(t.Context(), from, r.Key)
			}
			_, err := layer.WriteTar(t.Context(), h, changes, layer.TarOptions{})
			must(t, err)
			return fmt.Sprintf("%x", h.Sum(nil))
		}
		all[r.Key] = picture{r, tar(r.Parent), tar("")}
	}
	return all
}

func samePictures(t testing.TB, got, want map[string]picture) {
	t.Helper()
	for key, w := range want {
		if g := got[key]; !reflect.DeepEqual(g, w) {
			t.Errorf("%s: got %+v\nwant %+v", key, g, w)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d snapshots, want %d", len(got), len(want))
	}
}

func migrate(t testing.TB, v *snapshot.View, to string, keys ...string) snapshot.MigrateReport {
	t.Helper()
	r, err := v.Migrate(t.Context(), keys, snapshot.MigrateOptions{To: to})
	must(t, err)
	return r
}

// onDriver fails if a layer of the store is another driver's, or another driver
// has bytes left after a GC.
func onDriver(t testing.TB, s *snapshot.Store, v *snapshot.View, driver string) {
	t.Helper()
	rs, err := v.Records(t.Context())
	must(t, err)
	for _, r := range rs {
		if r.Driver != driver {
			t.Errorf("%s is driver %s's", r.Key, r.Driver)
		}
	}
	g, err := s.GC(t.Context())
	must(t, err)
	if len(g.Left) > 0 {
		t.Errorf("gc left %v", g.Left)
	}
	names, err := os.ReadDir(filepath.Join(s.Root(), "drivers"))
	must(t, err)
	for _, n := range names {
		if n.Name() == driver || strings.Contains(n.Name(), ".") {
			continue
		}
		d, err := s.Driver(t.Context(), n.Name())
		must(t, err)
		for id, err := range d.IDs(t.Context()) {
			must(t, err)
			t.Errorf("driver %s still has layer %s", n.Name(), id)
		}
	}
}

// TestMigrateIsExact: there and back and around, by every driver that works on a
// file system, a store shows the same snapshots, to the byte and the nanosecond.
func TestMigrateIsExact(t *testing.T) {
	testenv.Root(t)
	for _, c := range []struct {
		fs  string
		way []string
	}{
		{"ext4", []string{"native", "overlay", "fuse", "overlay", "native"}},
		{"btrfs", []string{"overlay", "btrfs", "native", "btrfs", "fuse"}},
	} {
		t.Run(c.fs, func(t *testing.T) {
			root := filepath.Join(testenv.FS(t, c.fs, testenv.Size(512<<20)), "store")
			s := open(t, root)
			v := view(t, s, "v", "")
			must(t, s.SetDefaultDriver(t.Context(), c.way[0]))
			seed := testenv.Number(t, "LAYERCTL_SEED", rand.Uint64()>>1)
			family(t, v, seed)
			want := pictures(t, v)
			for _, to := range c.way[1:] {
				r := migrate(t, v, to)
				if len(r.Snapshots) != len(want) {
					t.Errorf("to %s: %d snapshots in the report, want %d", to, len(r.Snapshots), len(want))
				}
				samePictures(t, pictures(t, v), want)
				onDriver(t, s, v, to)
				clean(t, s)
				if t.Failed() {
					t.Fatalf("to %s, LAYERCTL_SEED=%d", to, seed)
				}
			}
			for _, r := range migrate(t, v, c.way[len(c.way)-1]).Snapshots {
				if r.State != snapshot.MigrateThere {
					t.Errorf("%s is %s again", r.Key, r.State)
				}
			}
			must(t, v.Commit(t.Context(), "frozen", "work"))
			clean(t, s)
		})
	}
}

// TestMigrateCopyIsCompared: a copy that came out otherwise changes no name and
// leaves nothing, and the error says what differs.
func TestMigrateCopyIsCompared(t *testing.T) {
	testenv.Root(t)
	s := open(t, testenv.Scratch(t))
	v := view(t, s, "v", "")
	must(t, s.SetDefaultDriver(t.Context(), "native"))
	layerOf(t, v, "base", "", map[string]string{"d/f": "1", "g": "2"})
	layerOf(t, v, "top", "base", map[string]string{"d/f": "3"})
	want := pictures(t, v)
	for _, spoil := range []string{"truncate -s 2", "chmod 600", "touch", "rm", "setfattr -n user.x -v y", "chown 7"} {
		ctx := faults.With(t.Context(), func(step string) error {
			if step != "store: migrate: transferred" {
				return nil
			}
			hits, err := filepath.Glob(filepath.Join(s.Root(), "drivers/overlay/*/fs/d/f"))
			if err == nil && len(hits) == 1 {
				err = exec.Command("/bin/sh", "-c", spoil+" "+hits[0]).Run()
			}
			return err
		})
		_, err := v.Migrate(ctx, nil, snapshot.MigrateOptions{To: "overlay"})
		wants(t, err, errdefs.ErrDataLoss)
		if !strings.Contains(fmt.Sprint(err), `"d`) {
			t.Errorf("after %s the error names no path: %v", spoil, err)
		}
		samePictures(t, pictures(t, v), want)
		onDriver(t, s, v, "native")
		clean(t, s)
	}
}

// TestMigrateTellsWhatGoesAlong: what lies on the same parents is named, and goes
// when asked for; nothing else goes.
func TestMigrateTellsWhatGoesAlong(t *testing.T) {
	testenv.Root(t)
	s := open(t, testenv.Scratch(t))
	v := view(t, s, "v", "")
	must(t, s.SetDefaultDriver(t.Context(), "native"))
	family(t, v, 5)
	_, err := v.Migrate(t.Context(), []string{"work"}, snapshot.MigrateOptions{To: "overlay"})
	wants(t, err, errdefs.ErrFailedPrecondition)
	if !strings.Contains(fmt.Sprint(err), `"ro", "side", "untouched"`) {
		t.Errorf("the others are not named: %v", err)
	}
	want := pictures(t, v)
	r, err := v.Migrate(t.Context(), []string{"work"}, snapshot.MigrateOptions{To: "overlay", Related: true, DryRun: true})
	must(t, err)
	if len(r.Snapshots) != 6 || r.Needed == 0 || r.Free == 0 {
		t.Errorf("dry run: %+v", r)
	}
	r, err = v.Migrate(t.Context(), []string{"work"}, snapshot.MigrateOptions{To: "overlay", Related: true})
	must(t, err)
	samePictures(t, pictures(t, v), want)
	var moved []string
	for _, m := range r.Snapshots {
		moved = append(moved, m.Key)
	}
	slices.Sort(moved)
	equal(t, "moved", moved, []string{"base", "mid", "ro", "side", "untouched", "work"})
	rec, err := v.Record(t.Context(), "alone")
	must(t, err)
	if rec.Driver != "native" {
		t.Errorf("alone is driver %s's", rec.Driver)
	}
	clean(t, s)
}

// TestMigrateLeavesOtherViews: a layer that another view names, too, stays there
// for it, with its driver.
func TestMigrateLeavesOtherViews(t *testing.T) {
	testenv.Root(t)
	s := open(t, testenv.Scratch(t))
	v, w := view(t, s, "v", ""), view(t, s, "served", "native")
	must(t, s.SetDefaultDriver(t.Context(), "native"))
	layerOf(t, v, "base", "", map[string]string{"f": "1"})
	layerOf(t, v, "top", "base", map[string]string{"f": "2"})
	must(t, w.Adopt(t.Context(), "base", v, "base", nil))
	must(t, second(w.Prepare(t.Context(), "container", "base")))
	wantV, wantW := pictures(t, v), pictures(t, w)
	migrate(t, v, "overlay")
	must(t, v.Cleanup(t.Context()))
	samePictures(t, pictures(t, v), wantV)
	samePictures(t, pictures(t, w), wantW)
	rec, err := w.Record(t.Context(), "base")
	must(t, err)
	if rec.Driver != "native" {
		t.Errorf("the other view's base is driver %s's", rec.Driver)
	}
	must(t, second(w.Prepare(t.Context(), "more", "base")))
	_, err = w.Migrate(t.Context(), nil, snapshot.MigrateOptions{To: "overlay"})
	wants(t, err, errdefs.ErrInvalidArgument)
	clean(t, s)
}

// TestMigrateRefusesWhatIsWritten: an active snapshot that is mounted, here or in
// another mount namespace, is named; a mounted view or layer is not in the way and
// shows the old bytes until it is unmounted.
func TestMigrateRefusesWhatIsWritten(t *testing.T) {
	testenv.Root(t)
	s := open(t, testenv.Scratch(t))
	v := view(t, s, "v", "")
	must(t, s.SetDefaultDriver(t.Context(), "overlay"))
	layerOf(t, v, "base", "", map[string]string{"f": "1"})
	must(t, second(v.Prepare(t.Context(), "upper", "base")))
	must(t, second(v.Prepare(t.Context(), "bare", "")))
	must(t, second(v.View(t.Context(), "ro", "base")))
	target := t.TempDir()
	refused := func(key string) {
		t.Helper()
		_, err := v.Migrate(t.Context(), nil, snapshot.MigrateOptions{To: "native"})
		wants(t, err, errdefs.ErrFailedPrecondition)
		if !strings.Contains(fmt.Sprint(err), fmt.Sprintf("%q", key)) {
			t.Errorf("%s is not named: %v", key, err)
		}
	}
	for _, key := range []string{"upper", "bare"} {
		mountAt(t, v, key, target)
		refused(key)
		must(t, mount.Unmount(target, mount.UnmountOptions{}))
	}
	ms, err := v.MountsWith(t.Context(), "bare", drivers.MountOptions{})
	must(t, err)
	elsewhere := started(t, "unshare", "-m", "sh", "-c", fmt.Sprintf("mount --bind %s %s && echo && read x", ms[0].Source, target))
	refused("bare")
	must(t, elsewhere.Process.Kill())
	_ = elsewhere.Wait()

	mountAt(t, v, "ro", target)
	migrate(t, v, "native")
	must(t, v.Cleanup(t.Context()))
	if b, err := os.ReadFile(filepath.Join(target, "f")); string(b) != "1" {
		t.Errorf("the mounted view shows %q, %v", b, err)
	}
	must(t, mount.Unmount(target, mount.UnmountOptions{}))
	onDriver(t, s, v, "native")
	clean(t, s)
}

// TestMigrateNamesSockets: what no layer carries is told.
func TestMigrateNamesSockets(t *testing.T) {
	s := open(t, testenv.Scratch(t))
	v := view(t, s, "v", "")
	must(t, s.SetDefaultDriver(t.Context(), "native"))
	must(t, second(v.Prepare(t.Context(), "a", "")))
	ms, err := v.MountsWith(t.Context(), "a", drivers.MountOptions{})
	must(t, err)
	must(t, os.MkdirAll(ms[0].Source+"/run/x", 0o755))
	must(t, syscall.Mknod(ms[0].Source+"/run/x/s", syscall.S_IFSOCK|0o600, 0))
	r := migrate(t, v, "fuse")
	equal(t, "sockets", r.Snapshots[0].Sockets, []string{"run/x/s"})
}

// TestMigrateWhileOthersWork: snapshots are made on what is being copied, and
// removed, and garbage is collected; none of them fails, and all go along.
func TestMigrateWhileOthersWork(t *testing.T) {
	testenv.Root(t)
	root := testenv.Scratch(t)
	s, other := open(t, root), open(t, root)
	v, w := view(t, s, "v", ""), view(t, other, "v", "")
	must(t, s.SetDefaultDriver(t.Context(), "native"))
	family(t, v, 9)
	want := pictures(t, v)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer func() { stop(); wg.Wait() }()
	for n := range 3 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				key := fmt.Sprintf("busy-%d-%d", n, i)
				err := w.Create(t.Context(), key, []string{"base", "mid", "side"}[n], snapshot.CreateOptions{})
				if err == nil && i%2 == 0 { // through the store: a mount would be in the way
					err = w.Apply(t.Context(), key, tarOf(t, "f"), applyOptions)
				}
				if err == nil && i%3 == 0 {
					err = errors.Join(w.Commit(t.Context(), "c"+key, key), w.Remove(t.Context(), "c"+key))
				} else if err == nil {
					err = w.Remove(t.Context(), key)
				}
				if err == nil && n == 0 {
					err = w.Cleanup(t.Context())
				}
				if err != nil {
					t.Errorf("%s: %v", key, err)
					return
				}
			}
		})
	}
	for _, to := range []string{"overlay", "native", "overlay"} {
		migrate(t, v, to)
	}
	stop()
	wg.Wait()
	migrate(t, v, "overlay") // what was made after the last
	samePictures(t, pictures(t, v), want)
	onDriver(t, s, v, "overlay")
	must(t, other.FinishListings(t.Context()))
	clean(t, s)
}

// migrateJob migrates the whole view.
func migrateJob(ctx context.Context, j job) error {
	s, err := snapshot.Open(ctx, j.Root, snapshot.Options{Registry: registry()})
	if err != nil {
		return err
	}
	v, err := s.View("v", "")
	if err != nil {
		return err
	}
	_, err = v.Migrate(ctx, nil, snapshot.MigrateOptions{To: j.Driver})
	return errors.Join(err, s.Close())
}

// TestMigrateKilledAtEveryStep: whichever step a migration is killed at, each
// snapshot is there as it was, by its old driver or all by the new one; run again,
// it copies nothing that is recorded, and is done.
func TestMigrateKilledAtEveryStep(t *testing.T) {
	testenv.Slow(t)
	testenv.Root(t)
	seed := testenv.Scratch(t)
	s := open(t, filepath.Join(seed, "store"))
	v := view(t, s, "v", "")
	must(t, s.SetDefaultDriver(t.Context(), "native"))
	layerOf(t, v, "base", "", map[string]string{"a": "1", "d/b": "2"})
	layerOf(t, v, "mid", "base", map[string]string{"a": "", "d/b": "3"})
	must(t, second(v.Prepare(t.Context(), "work", "mid")))
	write(t, v, "work", map[string]string{"d": "", "w": "live"})
	must(t, second(v.View(t.Context(), "ro", "mid")))
	want := pictures(t, v)
	must(t, s.Close())
	copyStore := func() string {
		root := filepath.Join(testenv.Scratch(t), "store")
		must(t, exec.Command("cp", "-a", filepath.Join(seed, "store"), root).Run())
		return root
	}
	var steps []string
	var mu sync.Mutex
	must(t, migrateJob(faults.With(t.Context(), func(step string) error {
		mu.Lock()
		defer mu.Unlock()
		steps = append(steps, step)
		return nil
	}), job{Root: copyStore(), Driver: "overlay"}))
	for _, step := range []string{"made", "transferred", "frozen", "listed", "recorded", "all copied", "switched"} {
		if !slices.Contains(steps, "store: migrate: "+step) {
			t.Errorf("step %q is not reached", step)
		}
	}
	every := int(testenv.Number(t, "LAYERCTL_KILL_EVERY", 5)) // of the drivers' own steps, which drivertest stops at, too
	for n, step := range steps {
		if !strings.HasPrefix(step, "store: migrate: ") && n%every != 0 {
			continue
		}
		t.Run(fmt.Sprintf("%d %s", n+1, strings.ReplaceAll(step, " ", "-")), func(t *testing.T) {
			killedMigration(t, copyStore(), n+1, steps, want)
		})
	}
}

func killedMigration(t *testing.T, root string, at int, steps []string, want map[string]picture) {
	cmd := job{Name: "migrate", Root: root, Driver: "overlay", KillAt: at}.command()
	out, err := cmd.CombinedOutput()
	if !testenv.Killed(cmd.ProcessState) {
		t.Fatalf("not killed: %v %s", err, out)
	}
	s := reopen(t, root)
	v := view(t, s, "v", "")
	samePictures(t, pictures(t, v), want)
	clean(t, s)
	must(t, v.Cleanup(t.Context())) // keeps the copies
	recorded, switched := 0, false
	for _, step := range steps[:at] {
		if step == "store: migrate: recorded" {
			recorded++
		}
		switched = switched || step == "store: migrate: switched"
	}
	r := migrate(t, v, "overlay")
	copied, there := 0, 0
	for _, m := range r.Snapshots {
		switch m.State {
		case snapshot.MigrateCopied:
			copied++
		case snapshot.MigrateThere:
			there++
		}
	}
	switch {
	case switched && there != len(want):
		t.Errorf("%d of %d are there, after the switch", there, len(want))
	case !switched && there == 0 && copied != recorded:
		t.Errorf("%d copies were taken again, of %d that were recorded", copied, recorded)
	}
	samePictures(t, pictures(t, v), want)
	onDriver(t, s, v, "overlay")
	clean(t, s)
	must(t, s.Close())
	clean(t, open(t, root))
}

// TestMigrateFailsAtEveryStep: an error leaves every snapshot as it was; called
// off, nothing of it is left.
func TestMigrateFailsAtEveryStep(t *testing.T) {
	testenv.Root(t)
	s := open(t, testenv.Scratch(t))
	v := view(t, s, "v", "")
	must(t, s.SetDefaultDriver(t.Context(), "overlay"))
	layerOf(t, v, "base", "", map[string]string{"a": "1"})
	must(t, second(v.Prepare(t.Context(), "work", "base")))
	write(t, v, "work", map[string]string{"w": "live"})
	want := pictures(t, v)
	done := false
	for n := 1; !done; n++ {
		ctx, step := failing(t.Context(), n)
		_, err := v.Migrate(ctx, nil, snapshot.MigrateOptions{To: "native"})
		if done = err == nil; done {
			break
		}
		wants(t, err, io.ErrNoProgress)
		samePictures(t, pictures(t, v), want)
		if _, err := s.CallOffMigration(t.Context()); err != nil {
			t.Error(err)
		}
		onDriver(t, s, v, "overlay")
		clean(t, s)
		if t.Failed() {
			t.Fatalf("after step %d, %s", n, *step)
		}
	}
	samePictures(t, pictures(t, v), want)
	onDriver(t, s, v, "native")
	clean(t, s)
}

// TestMigrateSeesLaterChanges: a copy of an active snapshot that a killed
// migration left is not taken once the original has changed, was committed or
// removed.
func TestMigrateSeesLaterChanges(t *testing.T) {
	testenv.Root(t)
	for _, then := range []string{"written", "committed", "removed"} {
		t.Run(then, func(t *testing.T) {
			s := open(t, testenv.Scratch(t))
			v := view(t, s, "v", "")
			must(t, s.SetDefaultDriver(t.Context(), "native"))
			layerOf(t, v, "base", "", map[string]string{"a": "1"})
			must(t, second(v.Prepare(t.Context(), "work", "base")))
			write(t, v, "work", map[string]string{"w": "live"})
			_, err := v.Migrate(failingAt(t.Context(), "store: migrate: all copied"), nil, snapshot.MigrateOptions{To: "overlay"})
			wants(t, err, io.ErrNoProgress)
			switch then {
			case "written":
				write(t, v, "work", map[string]string{"w": "more"})
			case "committed":
				must(t, v.Commit(t.Context(), "done", "work"))
			case "removed":
				must(t, v.Remove(t.Context(), "work"))
			}
			want := pictures(t, v)
			migrate(t, v, "overlay")
			samePictures(t, pictures(t, v), want)
			onDriver(t, s, v, "overlay")
			clean(t, s)
		})
	}
}

// TestMigrateSurvivesPowerCuts: what a cut leaves after each record of a migration,
// after its last transaction, and after the old bytes have gone, is the whole store.
func TestMigrateSurvivesPowerCuts(t *testing.T) {
	testenv.Root(t)
	for _, way := range [][]string{{"native", "overlay"}, {"overlay", "native"}} {
		t.Run(way[1], func(t *testing.T) {
			dir := testenv.FS(t, "ext4", testenv.Size(96<<20), testenv.MountOptions("commit=300"))
			s := open(t, filepath.Join(dir, "store"))
			v := view(t, s, "v", "")
			must(t, s.SetDefaultDriver(t.Context(), way[0]))
			family(t, v, 21)
			want := pictures(t, v)
			must(t, exec.Command("sync", "-f", dir).Run())
			cut := func(at string) {
				image := filepath.Join(testenv.Scratch(t), "cut")
				must(t, testenv.CopyImage(dir, image))
				afterCut(t, image, at, way[1], want)
			}
			recorded := 0
			ctx := faults.With(t.Context(), func(step string) error {
				if step == "store: migrate: recorded" {
					recorded++
				}
				if step == "store: migrate: recorded" && recorded%3 == 0 || step == "store: migrate: all copied" || step == "store: migrate: switched" {
					cut(step)
				}
				return nil
			})
			_, err := v.Migrate(ctx, nil, snapshot.MigrateOptions{To: way[1]})
			must(t, err)
			must(t, v.Cleanup(t.Context()))
			cut("the old bytes gone")
		})
	}
}

// afterCut opens the store on what a power cut has left.
func afterCut(t *testing.T, image, at, to string, want map[string]picture) {
	m := t.TempDir()
	if out, err := exec.Command("mount", "-o", "loop", image, m).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v %s", at, err, out)
	}
	defer func() { must(t, mount.Unmount(m, mount.UnmountOptions{Wait: time.Minute})) }()
	s, err := snapshot.Open(t.Context(), filepath.Join(m, "store"), snapshot.Options{Registry: registry()})
	must(t, err)
	defer s.Close()
	v := view(t, s, "v", "")
	samePictures(t, pictures(t, v), want)
	clean(t, s)
	migrate(t, v, to)
	samePictures(t, pictures(t, v), want)
	onDriver(t, s, v, to)
	clean(t, s)
	if t.Failed() {
		t.Fatalf("after a cut at %q", at)
	}
}
