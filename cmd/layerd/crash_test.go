package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/content"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	containerdns "github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
	"github.com/layerctl/layerctl/snapshot"
)

// envKill names the directory in which a layerd that a test has started looks for the step
// at which it is to die: a file "order" with a number and a step's name, which it reads
// when it starts and at SIGUSR1. The number says the how manyth time; no name is any
// step. It writes the names of the steps that it meets to the file "steps". Only the test
// binary knows of this; the program that is shipped has neither hook nor variable.
const envKill = "LAYERD_TEST_KILL"

// order is one to die.
type order struct {
	step string
	left atomic.Int64
}

// obeyOrders has this process die at the step that it is told.
func obeyOrders(dir string) {
	var now atomic.Pointer[order]
	read := func() {
		b, err := os.ReadFile(filepath.Join(dir, "order"))
		number, step, _ := strings.Cut(string(b), " ")
		n, nerr := strconv.ParseInt(number, 10, 64)
		if errors.Join(err, nerr) != nil {
			return
		}
		o := &order{step: step}
		o.left.Store(n)
		now.Store(o)
	}
	read()
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGUSR1)
	go func() {
		for range told {
			read()
		}
	}()
	steps, err := os.OpenFile(filepath.Join(dir, "steps"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		panic(err)
	}
	var met sync.Map
	faults.Everywhere(func(step string) error {
		if _, old := met.LoadOrStore(step, true); !old {
			fmt.Fprintln(steps, step)
		}
		if o := now.Load(); o != nil && (o.step == "" || o.step == step) && o.left.Add(-1) == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // until it comes
		}
		return nil
	})
}

// rig is a layerd that is killed again and again, on a file system of its own.
type rig struct {
	*world
	driver, view string
	kind, fs     string // of the file system, and where it is mounted
	rebases      bool
	r            *rand.Rand
	blobs        content.Store // in place of containerd's
	clients      []*crasher
	conns        []*grpc.ClientConn
	held         string // where a snapshot is mounted all the time
	marks        tree   // what was written there

	calls atomic.Int64  // of all clients in this round
	at    int64         // the call in which layerd is killed; 0: none
	delay time.Duration // after it has begun

	killed map[string]int // how often at each step that layerd has met
	kills  int
	last   int // kill
	cuts   int
}

// volatile, in the configuration, makes of layerd one that says that a layer is durable
// when it is not.
const volatile = "volatile = true"

// sizes are what the file systems need at least; what they write by themselves is
// put off, so that a copy of the disk is what a power cut leaves.
var sizes = map[string][]testenv.Option{
	"ext4":  {testenv.Size(128 << 20), testenv.MountOptions("commit=300")},
	"xfs":   {testenv.Size(320 << 20)},
	"btrfs": {testenv.Size(512 << 20), testenv.MountOptions("commit=300")},
}

func newRig(t *testing.T, driver, kind, more string, seed uint64) *rig {
	t.Helper()
	fs := testenv.FS(t, kind, sizes[kind]...)
	g := &rig{world: prepare(t, fs, ""), driver: driver, view: "layerd-" + driver, kind: kind, fs: fs, rebases: canRebase(driver),
		r: rand.New(rand.NewPCG(seed, 0)), marks: tree{}, killed: map[string]int{}}
	g.env = append(g.env, envKill+"="+g.dir)
	g.write(g.settings, g.layerdConfig(more+"\ngc_interval = \"150ms\""))
	g.serveContent()
	for i := range 3 {
		g.clients = append(g.clients, &crasher{rig: g, name: fmt.Sprintf("c%d", i), r: rand.New(rand.NewPCG(seed, uint64(i)+1)), now: model{}})
	}
	t.Cleanup(func() {
		for _, c := range g.conns {
			c.Close()
		}
		if g.layerd != nil {
			g.layerd.end(syscall.SIGKILL)
		}
		if g.held != "" { // the end of a test that has failed
			must(t, mount.Unmount(g.held, mount.UnmountOptions{Wait: patience}))
		}
	})
	return g
}

// memoryLabels are those of a content store.
type memoryLabels struct {
	mu  sync.Mutex
	all map[digest.Digest]map[string]string // guarded by mu
}

func (m *memoryLabels) Get(d digest.Digest) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.all[d]), nil
}

func (m *memoryLabels) Set(d digest.Digest, l map[string]string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all[d] = maps.Clone(l)
	return nil
}

func (m *memoryLabels) Update(d digest.Digest, l map[string]string) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := maps.Clone(m.all[d])
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, l)
	m.all[d] = all
	return maps.Clone(all), nil
}

// serveContent serves a content store where layerd looks for containerd's.
func (g *rig) serveContent() {
	g.t.Helper()
	var err error
	g.blobs, err = local.NewLabeledStore(testenv.Scratch(g.t), &memoryLabels{all: map[digest.Digest]map[string]string{}})
	must(g.t, err)
	l, err := net.Listen("unix", filepath.Join(g.dir, "c.sock"))
	must(g.t, err)
	s := grpc.NewServer()
	contentapi.RegisterContentServer(s, contentserver.New(g.blobs))
	go func() { _ = s.Serve(l) }() // until Stop
	g.t.Cleanup(s.Stop)
}

// ctx is that of a containerd's calls, which are under a lease of its own.
func (g *rig) ctx() context.Context {
	return containerdns.WithNamespace(leases.WithLease(g.t.Context(), "crash"), "test")
}

// began counts a call, and has layerd killed at the one that was chosen.
func (g *rig) began() {
	if g.calls.Add(1) == g.at {
		p := g.layerd.cmd.Process
		time.AfterFunc(g.delay, func() { _ = p.Kill() })
	}
}

// died tells whether layerd is dead: a client may know before its parent does.
func (g *rig) died() bool {
	select {
	case <-g.layerd.done:
		return true
	case <-time.After(patience):
		return false
	}
}

// order tells layerd when to die.
func (g *rig) order(n int, step string) {
	g.write(filepath.Join(g.dir, "order"), fmt.Sprintf("%d %s", n, step))
	_ = g.layerd.cmd.Process.Signal(syscall.SIGUSR1) // it may have died of the last
}

// arm chooses the moment of death: a step at which layerd died least often, or any
// moment in a call.
func (g *rig) arm() (step string) {
	g.calls.Store(0)
	g.at, g.delay = 0, time.Duration(g.r.IntN(4000))*time.Microsecond
	b, err := os.ReadFile(filepath.Join(g.dir, "steps"))
	must(g.t, err)
	for name := range strings.Lines(string(b)) {
		if name = strings.TrimSpace(name); g.killed[name] == 0 {
			g.killed[name] = 0
		}
	}
	if len(g.killed) == 0 || g.r.IntN(5) == 0 {
		g.at = 1 + g.r.Int64N(40)
		g.order(0, "")
		return ""
	}
	names := slices.Sorted(maps.Keys(g.killed))
	g.r.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	step = slices.MinFunc(names, func(a, b string) int { return g.killed[a] - g.killed[b] })
	g.killed[step]++ // or it would be tried for ever where it is rare
	g.order(1+g.r.IntN(2), step)
	return step
}

// kill has the clients work until layerd dies, at some moment.
func (g *rig) kill() {
	g.t.Helper()
	step := g.arm()
	var all sync.WaitGroup
	errs := make([]error, len(g.clients))
	for i, c := range g.clients {
		all.Go(func() { errs[i] = c.work(g.ctx(), 25) })
	}
	all.Wait()
	_ = g.layerd.cmd.Process.Kill() // if it has not met its moment
	if !g.died() {
		g.t.Fatal("layerd does not die")
	}
	g.dead()
	if err := errors.Join(errs...); err != nil {
		g.t.Fatalf("kill %d, at step %q: %v\n%s", g.kills, step, err, g.layerd.tail())
	}
}

// dead counts a death, which must have been ours.
func (g *rig) dead() {
	g.t.Helper()
	if !testenv.Killed(g.layerd.cmd.ProcessState) {
		g.t.Fatalf("layerd ended by itself: %v\n%s", g.layerd.cmd.ProcessState, g.layerd.tail())
	}
	g.kills++
}

// rise starts layerd, which may be killed while it recovers, until it serves and the
// clients know what there is.
func (g *rig) rise() {
	g.t.Helper()
	path := filepath.Join(g.dir, "order")
	for {
		n := 0
		if g.held != "" && g.kills < g.last { // else what comes next is no work that may be cut short
			n = max(0, g.r.IntN(32)-27) // one in eight is killed
		}
		must(g.t, os.WriteFile(path, fmt.Appendf(nil, "%d ", n), 0o600))
		g.layerd = g.start("layerd", append(confined(g.t), filepath.Join(g.dir, "bin", "layerd"), "-c", g.settings)...)
		if g.serves() && g.settled() {
			return
		}
		g.dead()
	}
}

// serves waits until layerd serves; false if it dies before.
func (g *rig) serves() (ok bool) {
	g.t.Helper()
	g.until("layerd listens", func() error {
		select {
		case <-g.layerd.done:
			return nil
		default:
		}
		c, err := net.Dial("unix", filepath.Join(g.dir, "layerd.sock"))
		if ok = err == nil; ok {
			c.Close()
		}
		return err
	})
	return ok
}

// settled has the clients find out what there is; false if layerd dies meanwhile.
func (g *rig) settled() bool {
	g.t.Helper()
	for _, c := range g.conns {
		c.Close()
	}
	g.conns = nil
	for _, c := range g.clients {
		conn := g.dial()
		g.conns = append(g.conns, conn)
		c.s = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), g.view)
		c.d = diffproxy.NewDiffApplier(diffapi.NewDiffClient(conn)).(differ)
	}
	for _, c := range g.clients {
		err := c.settle(g.ctx())
		if errors.Is(err, errKilled) {
			return false
		}
		if err != nil {
			g.t.Fatalf("after kill %d: %v\n%s", g.kills, err, g.layerd.tail())
		}
	}
	return true
}

// look compares everything with what it must be, in another process than layerd.
func (g *rig) look() {
	g.t.Helper()
	s, err := layerctl.Open(g.t.Context(), g.root, layerctl.Options{})
	must(g.t, err)
	defer s.Close()
	if r := s.Recovered(); len(r) > 0 {
		g.t.Errorf("after kill %d layerd left to recover: %v", g.kills, r)
	}
	must(g.t, s.FinishListings(g.t.Context()))
	found, err := s.Check(g.t.Context(), snapshot.CheckOptions{})
	must(g.t, err)
	for _, f := range found {
		g.t.Errorf("after kill %d check finds %v", g.kills, f)
	}
	v, err := s.View(g.view, g.driver)
	must(g.t, err)
	for _, c := range g.clients {
		for key, f := range c.now {
			if !f.unsure {
				g.same(v, key, f.tree)
			}
		}
	}
	g.useHeld()
	if g.t.Failed() {
		g.t.Fatalf("after kill %d, seed %d", g.kills, testenv.Number(g.t, "LAYERCTL_SEED", 1))
	}
}

// same fails the test unless a snapshot shows a tree.
func (g *rig) same(v *snapshot.View, key string, want tree) {
	g.t.Helper()
	got, err := contents(g.t.Context(), v, key)
	if err != nil {
		g.t.Errorf("after kill %d: %s: %v", g.kills, key, err)
	} else if d := differs(got, want); d != "" {
		g.t.Errorf("after kill %d: %s: %s", g.kills, key, d)
	}
}

// contents is what a snapshot holds.
func contents(ctx context.Context, v *snapshot.View, key string) (tree, error) {
	t := tree{}
	for ch, err := range v.Contents(ctx, key) {
		if err != nil {
			return nil, err
		}
		if ch.Entry.Type == layer.TypeDir && ch.Entry.Path == "." {
			continue
		}
		if ch.Open == nil {
			t[ch.Entry.Path] = fmt.Sprintf("type %o", ch.Entry.Type)
			continue
		}
		r, err := ch.Open()
		if err != nil {
			return nil, err
		}
		b, err := io.ReadAll(r)
		if err := errors.Join(err, r.Close()); err != nil {
			return nil, err
		}
		t[ch.Entry.Path] = string(b)
	}
	return t, nil
}

// hold mounts a snapshot for the whole test.
func (g *rig) hold() {
	g.t.Helper()
	ms, err := g.clients[0].s.Prepare(g.ctx(), "held", "")
	must(g.t, err)
	g.held = g.mkdir("held")
	must(g.t, mount.All(g.ctx(), ms, g.held))
}

// useHeld reads what was written to the mount before, and writes more.
func (g *rig) useHeld() {
	g.t.Helper()
	for name, text := range g.marks {
		if b, err := os.ReadFile(filepath.Join(g.held, name)); err != nil || string(b) != text {
			g.t.Errorf("after kill %d, in a mount: %s has %q, %v; want %q", g.kills, name, b, err, text)
		}
	}
	name := fmt.Sprintf("mark%d", len(g.marks))
	g.marks[name] = fmt.Sprintf("after kill %d", g.kills)
	g.write(filepath.Join(g.held, name), g.marks[name])
}

// end removes everything: nothing may be left, on disk or in the kernel.
func (g *rig) end() {
	g.t.Helper()
	s := g.clients[0].s
	removeAll(g.t, g.ctx(), s)
	must(g.t, s.(snapshots.Cleaner).Cleanup(g.ctx()))
	g.useHeld()
	must(g.t, mount.Unmount(g.held, mount.UnmountOptions{Wait: patience}))
	must(g.t, s.(snapshots.Cleaner).Cleanup(g.ctx()))
	g.layerd.end(syscall.SIGTERM)
	g.empty(g.root)
	infos, err := mount.List()
	must(g.t, err)
	for _, i := range infos {
		if strings.HasPrefix(i.Target, g.dir+"/") || strings.HasPrefix(i.Target, g.fs+"/") {
			g.t.Errorf("left mounted: %s", i.Target)
		}
	}
	g.noProcesses()
}

// removeAll removes every snapshot, what is above others first.
func removeAll(t *testing.T, ctx context.Context, s snapshots.Snapshotter) {
	t.Helper()
	for {
		all, above := map[string]bool{}, map[string]bool{}
		must(t, s.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			all[i.Name], above[i.Parent] = true, true
			return nil
		}))
		if len(all) == 0 {
			return
		}
		for key := range all {
			if !above[key] {
				must(t, s.Remove(ctx, key))
			}
		}
	}
}

// empty fails the test unless garbage collection leaves nothing in a store whose
// snapshots were removed.
func (g *rig) empty(root string) {
	g.t.Helper()
	s, err := layerctl.Open(g.t.Context(), root, layerctl.Options{})
	must(g.t, err)
	defer s.Close()
	r, err := s.GC(g.t.Context())
	must(g.t, err)
	found, err := s.Check(g.t.Context(), snapshot.CheckOptions{})
	must(g.t, err)
	if left := append(s.Recovered(), found...); len(left) > 0 || len(r.Left) > 0 {
		g.t.Errorf("in the end: %v, %v", left, r.Left)
	}
	d, err := s.Driver(g.t.Context(), g.driver)
	must(g.t, err)
	for id, err := range d.IDs(g.t.Context()) {
		g.t.Errorf("in the end layer %s is left, %v", id, err)
	}
}

// cut looks at what a power cut leaves now: every layer that was committed is there and
// whole.
func (g *rig) cut() {
	g.t.Helper()
	root, release := g.cutOff()
	defer release()
	g.cuts++
	if wrong := g.afterCut(root); len(wrong) > 0 {
		g.t.Errorf("after a power cut at kill %d: %s", g.kills, strings.Join(wrong, "\n"))
		return
	}
	g.empty(root)
}

// cutOff is the store as a power cut would leave it: what the file system has not written
// to its device is missing.
func (g *rig) cutOff() (root string, release func()) {
	g.t.Helper()
	image, dir := filepath.Join(testenv.Scratch(g.t), "cut"), g.t.TempDir()
	must(g.t, testenv.CopyImage(g.fs, image))
	options := "loop"
	if g.kind == "xfs" {
		options += ",nouuid" // the original is mounted, too
	}
	g.run("mount", "-t", g.kind, "-o", options, image, dir)
	return filepath.Join(dir, "store"), func() {
		must(g.t, mount.Unmount(dir, mount.UnmountOptions{Wait: patience}))
		must(g.t, os.Remove(image))
	}
}

// afterCut returns what is wrong in a store after a power cut, and removes its
// snapshots.
func (g *rig) afterCut(root string) (wrong []string) {
	g.t.Helper()
	s, err := layerctl.Open(g.t.Context(), root, layerctl.Options{})
	if err != nil {
		return []string{err.Error()}
	}
	defer s.Close()
	complain := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if err := s.FinishListings(g.t.Context()); err != nil {
		complain("%v", err)
	}
	v, err := s.View(g.view, g.driver)
	must(g.t, err)
	there := map[string]snapshots.Info{}
	must(g.t, v.Walk(g.t.Context(), func(_ context.Context, i snapshots.Info) error {
		there[i.Name] = i
		return nil
	}))
	for _, c := range g.clients {
		mine := maps.Clone(there)
		maps.DeleteFunc(mine, func(key string, _ snapshots.Info) bool { return !strings.HasPrefix(key, c.name+"-") })
		m, err := c.which(mine)
		if err != nil {
			complain("%v", err)
		}
		for key, f := range m {
			if f.kind != snapshots.KindCommitted {
				continue // what is not committed may be lost
			}
			got, err := contents(g.t.Context(), v, key)
			if err != nil {
				complain("%s: %v", key, err)
			} else if d := differs(got, f.tree); d != "" {
				complain("%s: %s", key, d)
			}
		}
	}
	found, err := s.Check(g.t.Context(), snapshot.CheckOptions{})
	must(g.t, err)
	for _, f := range found {
		key, ok := strings.CutPrefix(f.Object, g.view+"/")
		if f.Problem != snapshot.LayerMissing || !ok || there[key].Kind == snapshots.KindCommitted {
			complain("check finds %v", f)
		}
	}
	if len(wrong) == 0 {
		removeAll(g.t, g.t.Context(), v)
	}
	return wrong
}

// crashes are the drivers that a layerd with them is killed with, each first on the
// file system that it is killed on in every run.
var crashes = map[string][]string{
	"overlay": {"ext4", "xfs", "btrfs"},
	"native":  {"ext4", "xfs", "btrfs"},
	"fuse":    {"ext4", "xfs", "btrfs"},
	"btrfs":   {"btrfs"},
}

// TestCrash kills layerd under three clients, at named steps of the store and of the
// drivers and at any moment, while it starts too, and cuts the power now and then. Each
// time what was answered is there, what was not is there whole or not at all, and check
// finds nothing. LAYERCTL_CRASH is how many kills there are, over all drivers and file
// systems; LAYERCTL_SEED which.
func TestCrash(t *testing.T) {
	testenv.Slow(t)
	testenv.Root(t)
	kills, kinds := 20, 1
	if n := testenv.Number(t, "LAYERCTL_CRASH", 0); n > 0 {
		kills, kinds = int(n+9)/10, 3
	}
	seed := testenv.Number(t, "LAYERCTL_SEED", 1)
	for _, driver := range slices.Sorted(maps.Keys(crashes)) {
		for _, kind := range crashes[driver][:min(kinds, len(crashes[driver]))] {
			t.Run(driver+"/"+kind, func(t *testing.T) {
				g := newRig(t, driver, kind, "", seed)
				g.last = kills
				g.rise()
				g.hold()
				for g.kills < g.last {
					g.kill()
					if g.r.IntN(5) == 0 {
						g.cut()
					}
					g.rise()
					g.look()
				}
				g.end()
				g.summary(seed)
			})
		}
	}
}

func (g *rig) summary(seed uint64) {
	var never []string
	for _, step := range slices.Sorted(maps.Keys(g.killed)) {
		if g.killed[step] == 0 {
			never = append(never, step)
		}
	}
	g.t.Logf("LAYERCTL_SEED=%d: %d kills, %d power cuts; %d steps met, not chosen: %q", seed, g.kills, g.cuts, len(g.killed), never)
}

// TestCrashSeesALie: a service that says of layers that they are durable, when nothing of
// them is flushed, is found out.
func TestCrashSeesALie(t *testing.T) {
	testenv.Slow(t)
	testenv.Root(t)
	g := newRig(t, "overlay", "ext4", volatile, 1)
	g.rise()
	for range 20 {
		g.kill()
		root, release := g.cutOff()
		wrong := g.afterCut(root)
		release()
		if len(wrong) > 0 {
			t.Logf("found: %.400q", wrong)
			return
		}
		g.rise()
	}
	t.Error("nothing is found")
}
