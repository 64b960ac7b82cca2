package dm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/devmapper/dmtest"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

const sectors = 64 << 20 / 512 // of a data disk

// bench is the control device, and what a test makes with it.
type bench struct {
	*testing.T
	*dm.Control
}

func newBench(t *testing.T) *bench {
	t.Helper()
	return &bench{t, dmtest.Open(t)}
}

func (b *bench) check(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// loop makes a disk and returns its number and its node.
func (b *bench) loop(bytes int64) (number, node string) {
	b.Helper()
	f := filepath.Join(testenv.Scratch(b), "disk")
	b.check(os.WriteFile(f, nil, 0o600))
	b.check(os.Truncate(f, bytes))
	l, err := sys.AttachLoop(f, sys.LoopOptions{Autoclear: true})
	b.check(err)
	b.Cleanup(func() { l.Close() })
	s, err := sys.StatPath(l.Name())
	b.check(err)
	return fmt.Sprintf("%d:%d", s.RdevMajor, s.RdevMinor), l.Name()
}

// device makes a device with a node, which the test's end removes.
func (b *bench) device(name string, table ...dm.Target) (node string) {
	b.Helper()
	_, err := b.Create(name, "layerctl-"+name)
	b.check(err)
	b.Cleanup(func() {
		b.check(dm.RemoveNode(name))
		if err := b.Remove(name, false); err != nil && !errdefs.IsNotFound(err) {
			b.Error(err)
		}
	})
	b.check(b.Load(name, table, false))
	b.check(b.Resume(name))
	i, err := b.Info(name)
	b.check(err)
	node, err = dm.MakeNode(i)
	b.check(err)
	return node
}

// dmsetup is the oracle.
func (b *bench) dmsetup(args ...string) string {
	b.Helper()
	out, err := exec.Command(testenv.Program(b, "dmsetup", "dmsetup"), args...).CombinedOutput()
	if err != nil {
		b.Fatalf("dmsetup %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(strings.ReplaceAll(string(out), " \n", "\n")) // a target that says nothing
}

func (b *bench) same(what, got, want string) {
	b.Helper()
	if got != want {
		b.Errorf("%s: %q, dmsetup says %q", what, got, want)
	}
}

func lines(table []dm.Target, err error) string {
	if err != nil {
		return err.Error()
	}
	var s []string
	for _, t := range table {
		s = append(s, t.String())
	}
	return strings.Join(s, "\n")
}

func TestLinearLivesItsWholeLife(t *testing.T) {
	b := newBench(t)
	disk, node := b.loop(64 << 20)
	table := []dm.Target{{0, 8, "linear", disk + " 16"}, {8, 24, "linear", disk + " 64"}}
	dev := b.device("lt-linear", table...)
	b.same("table", lines(b.Table("lt-linear", false)), b.dmsetup("table", "lt-linear"))
	b.same("status", lines(b.Status("lt-linear", false)), b.dmsetup("status", "lt-linear"))
	b.info("lt-linear")
	if got, err := b.Table("lt-linear", false); err != nil || !slices.Equal(got, table) {
		t.Errorf("%v, %v", got, err)
	}
	b.check(os.WriteFile(dev, []byte(strings.Repeat("x", 4096)), 0))
	b.dmsetup("suspend", "lt-linear") // flushes
	if i, err := b.Info("lt-linear"); err != nil || !i.Suspended {
		t.Errorf("%+v, %v", i, err)
	}
	b.check(b.Resume("lt-linear"))
	f, err := os.Open(node)
	b.check(err)
	defer f.Close()
	got := make([]byte, 1)
	if _, err := f.ReadAt(got, 16*512); err != nil || got[0] != 'x' {
		t.Errorf("on the disk: %q, %v", got, err)
	}
	deps, err := b.Deps("lt-linear")
	if err != nil || len(deps) != 1 || deps[0].String() != disk {
		t.Errorf("deps %v, %v; want %s", deps, err, disk)
	}
	b.reload(disk)
}

// reload exercises the inactive table and the ways to suspend.
func (b *bench) reload(disk string) {
	b.Helper()
	const name = "lt-linear"
	next := []dm.Target{{0, 64, "linear", disk + " 0"}}
	b.check(b.Load(name, next, true))
	if got, err := b.Table(name, true); err != nil || !slices.Equal(got, next) {
		b.Errorf("inactive: %v, %v", got, err)
	}
	b.check(b.Clear(name))
	if i, err := b.Info(name); err != nil || i.InactiveTable || !i.ActiveTable {
		b.Errorf("cleared: %+v, %v", i, err)
	}
	b.check(b.Load(name, next, true))
	b.check(b.Suspend(name, dm.SuspendOptions{NoFlush: true, SkipLockFS: true}))
	b.check(b.Resume(name))
	if i, err := b.Info(name); err != nil || !i.ReadOnly || i.Targets != 1 || i.Suspended {
		b.Errorf("reloaded read-only: %+v, %v", i, err)
	}
	if err := b.Load(name, []dm.Target{{0, 8, "linear", "nothing"}}, false); !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENODEV) {
		b.Errorf("bad table: %v", err)
	}
}

// info compares all that dmsetup tells of a device.
func (b *bench) info(name string) {
	b.Helper()
	i, err := b.Info(name)
	b.check(err)
	got := fmt.Sprintf("%s:%s:%d:%d:%d:%d:%d", i.Name, i.UUID, i.Dev.Major, i.Dev.Minor, i.Open, i.Targets, i.Event)
	b.same("info", got, b.dmsetup("info", "-c", "--noheadings", "-o", "name,uuid,major,minor,open,segments,events", name))
}

func TestNamesListsAndRemoval(t *testing.T) {
	b := newBench(t)
	disk, _ := b.loop(1 << 20)
	node := b.device("lt-a", dm.Target{Length: 8, Type: "linear", Params: disk + " 0"})
	b.device("lt-b", dm.Target{Length: 8, Type: "linear", Params: disk + " 8"})
	if _, err := b.Create("lt-a", ""); !errdefs.IsAlreadyExists(err) || !errors.Is(err, syscall.EBUSY) {
		t.Errorf("twice: %v", err)
	}
	if err := b.Rename("lt-a", "lt-b"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("onto another: %v", err)
	}
	b.check(b.Rename("lt-b", "lt-c"))
	b.check(b.Rename("lt-c", "lt-b"))
	names, err := b.List()
	b.check(err)
	var list []string
	for _, n := range names {
		list = append(list, fmt.Sprintf("%s\t(%s)", n.Name, n.Dev))
	}
	slices.Sort(list)
	want := strings.Split(b.dmsetup("ls"), "\n")
	slices.Sort(want)
	b.same("list", strings.Join(list, "|"), strings.Join(want, "|"))
	f, err := os.Open(node)
	b.check(err)
	if err := b.Remove("lt-a", false); !errdefs.IsFailedPrecondition(err) || !errors.Is(err, syscall.EBUSY) {
		t.Errorf("removal of an open device: %v", err)
	}
	b.check(b.Remove("lt-a", true))
	if i, err := b.Info("lt-a"); err != nil || !i.DeferredRemove || i.Open != 1 {
		t.Errorf("deferred: %+v, %v", i, err)
	}
	f.Close()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		_, err := b.Info("lt-a")
		if errdefs.IsNotFound(err) && errors.Is(err, syscall.ENXIO) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("a deferred removal never comes: %v", err)
		}
	}
	targets, err := b.Targets()
	b.check(err)
	for line := range strings.Lines(b.dmsetup("targets") + "\n") {
		f := strings.Fields(line)
		b.same("version of "+f[0], "v"+targets[f[0]].String(), f[1])
	}
}

// pool makes a thin pool; lowWater is in blocks of 64 KiB.
func (b *bench) pool(lowWater int) {
	b.Helper()
	meta, _ := b.loop(4 << 20)
	data, _ := b.loop(64 << 20)
	b.device("lt-pool", dm.Target{Length: sectors, Type: "thin-pool", Params: fmt.Sprintf("%s %s 128 %d", meta, data, lowWater)})
}

func (b *bench) thin(name string, id int) (node string) {
	b.Helper()
	i, err := b.Info("lt-pool")
	b.check(err)
	return b.device(name, dm.Target{Length: 2048, Type: "thin", Params: fmt.Sprintf("%s %d", i.Dev, id)})
}

func (b *bench) say(message string) {
	b.Helper()
	_, err := b.Message("lt-pool", 0, message)
	b.check(err)
}

func TestThinPoolAndSnapshot(t *testing.T) {
	b := newBench(t)
	b.pool(0)
	b.say("create_thin 0")
	b.say("set_transaction_id 0 7")
	origin := b.thin("lt-t0", 0)
	b.check(os.WriteFile(origin, []byte(strings.Repeat("a", 512)), 0))
	b.check(b.Suspend("lt-t0", dm.SuspendOptions{}))
	b.say("create_snap 1 0")
	b.check(b.Resume("lt-t0"))
	b.check(os.WriteFile(origin, []byte(strings.Repeat("b", 512)), 0))
	snap, err := os.ReadFile(b.thin("lt-t1", 1))
	if err != nil || snap[0] != 'a' {
		t.Errorf("the snapshot has %q, %v; want what was there when it was made", snap[:1], err)
	}
	status, err := b.Status("lt-pool", false)
	b.check(err)
	if len(status) != 1 || status[0].Type != "thin-pool" || !strings.HasPrefix(status[0].Params, "7 ") {
		t.Errorf("%v; want transaction 7", status)
	}
	for _, d := range []string{"lt-pool", "lt-t0", "lt-t1"} {
		b.same("table", lines(b.Table(d, false)), b.dmsetup("table", d))
		b.same("status", lines(b.Status(d, false)), b.dmsetup("status", d))
	}
	if _, err := b.Message("lt-pool", 0, "create_thin 0"); !errors.Is(err, syscall.EEXIST) || !strings.Contains(err.Error(), `message "create_thin 0"`) {
		t.Errorf("%v", err)
	}
}

func TestMessageWithAnAnswer(t *testing.T) {
	b := newBench(t)
	disk, _ := b.loop(1 << 20)
	b.device("lt-stats", dm.Target{Length: 8, Type: "linear", Params: disk + " 0"})
	reply, err := b.Message("lt-stats", 0, "@stats_create - 8")
	if err != nil || reply != "0" {
		t.Errorf("%q, %v; want the region's number", reply, err)
	}
	list, err := b.Message("lt-stats", 0, "@stats_list")
	b.same("answer", strings.TrimSpace(list), b.dmsetup("message", "lt-stats", "0", "@stats_list"))
	b.check(err)
}

func TestPoolBelowLowWaterIsAnEvent(t *testing.T) {
	b := newBench(t)
	b.pool(sectors / 128) // low from the first block on
	b.say("create_thin 0")
	node := b.thin("lt-t0", 0)
	before, err := b.Info("lt-pool")
	b.check(err)
	e, err := dm.Watch()
	b.check(err)
	defer e.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want cancelled", err)
	}
	b.check(os.WriteFile(node, make([]byte, 4096), 0))
	ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		i, err := b.Info("lt-pool")
		b.check(err)
		if i.Event > before.Event {
			return
		}
		b.check(e.Wait(ctx))
	}
}

func TestFlakeyAnswersWithErrors(t *testing.T) {
	b := newBench(t)
	disk, _ := b.loop(1 << 20)
	node := b.device("lt-flakey", dm.Target{Length: 8, Type: "flakey", Params: disk + " 0 0 60"})
	b.same("table", lines(b.Table("lt-flakey", false)), b.dmsetup("table", "lt-flakey"))
	f, err := os.Open(node)
	b.check(err)
	defer f.Close()
	if _, err := f.Read(make([]byte, 512)); !errors.Is(err, syscall.EIO) {
		t.Errorf("%v, want EIO", err)
	}
}

// A list that does not fit the first buffer comes whole.
func TestManyDevicesAreListed(t *testing.T) {
	b := newBench(t)
	const many = 150
	for i := range many {
		name := fmt.Sprintf("lt-%s-%d", strings.Repeat("n", 110), i)
		_, err := b.Create(name, "")
		b.check(err)
		t.Cleanup(func() { b.check(b.Remove(name, false)) })
	}
	names, err := b.List()
	if err != nil || len(names) < many {
		t.Errorf("%d devices, %v; want %d", len(names), err, many)
	}
}

func TestNodeOfAnotherDeviceIsReplaced(t *testing.T) {
	b := newBench(t)
	disk, _ := b.loop(1 << 20)
	node := b.device("lt-n", dm.Target{Length: 8, Type: "linear", Params: disk + " 0"})
	b.check(os.Remove(node))
	b.check(os.WriteFile(node, nil, 0o600))
	i, err := b.Info("lt-n")
	b.check(err)
	for range 2 {
		p, err := dm.MakeNode(i)
		b.check(err)
		if s, err := sys.StatPath(p); err != nil || s.RdevMinor != i.Dev.Minor || s.Type() != sys.S_IFBLK {
			t.Errorf("%+v, %v", s, err)
		}
	}
	if _, err := os.Stat(i.Path()); err != nil {
		t.Error(err)
	}
}
