package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sync/errgroup"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/testimage"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
	"github.com/layerctl/layerctl/snapshot"
)

// patience bounds every wait for another process, on a machine that has better
// things to do.
const patience = 60 * time.Second

// newest has the newest containerd, its shim and ctr built from the modules that
// tools/containerd names, which Go keeps built, and puts links to them into one
// directory. Plugins that no test needs are left out, as containerd's BUILDING.md
// has it: they are half of the time that it takes.
var newest = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(testenv.ScratchDir(), "containerd")
	if err := os.Mkdir(bin, 0o755); err != nil {
		return "", err
	}
	for _, name := range []string{"containerd", "ctr", "containerd-shim-runc-v2"} {
		cmd := exec.Command("go", "tool", "-n", name)
		cmd.Dir = "../../tools/containerd"
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-tags=no_btrfs,no_cri,no_tracing,no_devmapper,no_zfs")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("go tool -n %s: %w\n%s", name, err, &stderr)
		}
		if err := os.Symlink(strings.TrimSpace(string(out)), filepath.Join(bin, name)); err != nil {
			return "", err
		}
	}
	return bin, nil
})

// process is a program that a test has started.
type process struct {
	t    *testing.T
	name string
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed once it is reaped
}

// start starts a program, whose output goes to a file of that name.
func (e *world) start(name string, args ...string) *process {
	e.t.Helper()
	p := &process{t: e.t, name: name, cmd: exec.Command(e.look(args[0]), args[1:]...), log: filepath.Join(e.dir, name+".log"), done: make(chan struct{})}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	must(e.t, err)
	defer out.Close()
	p.cmd.Stdout, p.cmd.Stderr, p.cmd.Env = out, out, e.env
	if e.inherit != nil {
		p.cmd.ExtraFiles = []*os.File{e.inherit}
	}
	must(e.t, p.cmd.Start())
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	return p
}

// end sends a signal and waits for the end; after SIGTERM that must be a good one.
func (p *process) end(s syscall.Signal) {
	p.t.Helper()
	_ = p.cmd.Process.Signal(s)
	select {
	case <-p.done:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		<-p.done
		p.t.Errorf("%s did not end by %v:\n%s", p.name, s, p.tail())
	}
	if s == syscall.SIGTERM && !p.cmd.ProcessState.Success() {
		p.t.Errorf("%s: %v:\n%s", p.name, p.cmd.ProcessState, p.tail())
	}
}

func (p *process) tail() string {
	b, _ := os.ReadFile(p.log)
	lines := strings.Split(string(b), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}

// world is a containerd and a layerd of the test's own: directories, sockets, and
// the configuration that `layerd config containerd` prints.
type world struct {
	t          *testing.T
	dir        string // for everything but the store
	root       string // the store
	env        []string
	layerd     *process
	containerd *process
	config     string   // of containerd
	settings   string   // of layerd
	inherit    *os.File // as descriptor 3, if not nil
}

// newLayerd starts a layerd alone, on a store in fs.
func newLayerd(t *testing.T, fs string) *world {
	t.Helper()
	e := prepare(t, fs, "")
	e.write(e.settings, e.layerdConfig(""))
	e.startLayerd()
	t.Cleanup(func() { e.layerd.end(syscall.SIGTERM) })
	return e
}

func prepare(t *testing.T, fs, bin string) *world {
	t.Helper()
	testenv.Root(t)
	e := &world{t: t, dir: testenv.Scratch(t), root: filepath.Join(fs, "store")}
	e.settings = filepath.Join(e.dir, "layerd.toml")
	must(t, os.MkdirAll(filepath.Join(e.dir, "bin"), 0o755))
	for _, dir := range []string{e.dir, filepath.Dir(fs)} { // a container's root in a user namespace goes through them
		must(t, os.Chmod(dir, 0o711))
	}
	e.copyProgram()
	e.env = append(os.Environ(), "PATH="+filepath.Join(e.dir, "bin")+":"+bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin",
		"GORACE=atexit_sleep_ms=0", "XDG_RUNTIME_DIR=")
	return e
}

// newWorld starts both; bin holds containerd's programs, "" is Debian's.
func newWorld(t *testing.T, fs, bin string) *world {
	t.Helper()
	testenv.Program(t, "runc", "runc")
	testenv.Program(t, "containerd", "containerd")
	e := prepare(t, fs, bin)
	must(t, syscall.Mount("tmpfs", runtimeDir(t), "tmpfs", 0, "")) // where shims have their sockets, whatever the configuration
	t.Cleanup(func() {
		if err := syscall.Unmount("/run/containerd", syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	e.configure(fs)
	e.startLayerd()
	t.Cleanup(func() { e.layerd.end(syscall.SIGTERM) })
	e.startContainerd()
	t.Cleanup(func() {
		e.containerd.end(syscall.SIGTERM)
		e.unmount()
		e.noProcesses()
		if t.Failed() {
			t.Logf("layerd:\n%s\ncontainerd:\n%s", e.layerd.tail(), e.containerd.tail())
		}
	})
	return e
}

// runtimeDir makes /run/containerd, and removes it if it was not there.
func runtimeDir(t *testing.T) string {
	const dir = "/run/containerd"
	if err := os.Mkdir(dir, 0o711); err == nil {
		t.Cleanup(func() { os.Remove(dir) })
	}
	return dir
}

// copyProgram puts this binary under the program's name.
func (e *world) copyProgram() {
	b, err := os.ReadFile("/proc/self/exe")
	must(e.t, err)
	must(e.t, os.WriteFile(filepath.Join(e.dir, "bin", "layerd"), b, 0o755))
}

// layerdConfig is layerd's configuration, with more before its first table.
func (e *world) layerdConfig(more string) string {
	return fmt.Sprintf(`root = %q
stop_timeout = "50s"
%s
[listen]
address = "%[3]s/layerd.sock"
[log]
level = "debug"
[diff]
containerd_address = "%[3]s/c.sock"
[metrics]
address = "%[3]s/metrics.sock"
`, e.root, more, e.dir)
}

func (e *world) write(path, text string) {
	e.t.Helper()
	must(e.t, os.WriteFile(path, []byte(text), 0o644))
}

func (e *world) configure(fs string) {
	e.write(e.settings, e.layerdConfig(""))
	drop := filepath.Join(e.dir, "layerd-containerd.toml")
	must(e.t, os.WriteFile(drop, []byte(e.run("layerd", "-c", e.settings, "config", "containerd", "--parallel-unpacks", "3")), 0o644))
	e.config = filepath.Join(e.dir, "containerd.toml")
	must(e.t, os.WriteFile(e.config, fmt.Appendf(nil, `version = 2
root = "%[1]s/containerd"
state = "%[2]s/state"
imports = [%[3]q]
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.internal.v1.opt"]
[grpc]
  address = "%[2]s/c.sock"
`, fs, e.dir, drop), 0o644))
}

func (e *world) startLayerd() {
	e.t.Helper()
	args := append(confined(e.t), filepath.Join(e.dir, "bin", "layerd"), "-c", e.settings)
	e.layerd = e.start("layerd", args...)
	e.waitFor(e.layerd, filepath.Join(e.dir, "layerd.sock"))
}

func (e *world) startContainerd() {
	e.t.Helper()
	path := e.look("containerd")
	e.containerd = e.start("containerd", path, "-c", e.config)
	e.waitFor(e.containerd, filepath.Join(e.dir, "c.sock"))
	e.until("containerd answers", func() error { _, err := e.try("ctr", e.ctr("version")...); return err })
}

// look finds a program in the world's PATH.
func (e *world) look(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	for _, v := range slices.Backward(e.env) {
		if path, ok := strings.CutPrefix(v, "PATH="); ok {
			for dir := range strings.SplitSeq(path, ":") {
				if st, err := os.Stat(filepath.Join(dir, name)); dir != "" && err == nil && !st.IsDir() {
					return filepath.Join(dir, name)
				}
			}
			break
		}
	}
	e.t.Fatalf("no %s", name)
	return ""
}

// waitFor waits until somebody listens to a socket.
func (e *world) waitFor(p *process, sock string) {
	e.t.Helper()
	e.until(p.name+" listens", func() error {
		select {
		case <-p.done:
			e.t.Fatalf("%s ended: %v:\n%s", p.name, p.cmd.ProcessState, p.tail())
		default:
		}
		c, err := net.Dial("unix", sock) // the file may be a dead one's
		if err == nil {
			c.Close()
		}
		return err
	})
}

// until tries something until it works.
func (e *world) until(what string, f func() error) {
	e.t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	e.t.Fatalf("%s: %v", what, err)
}

// try runs a program and returns its standard output.
func (e *world) try(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, e.look(name), args...)
	var stderr bytes.Buffer
	cmd.Env, cmd.Stderr, cmd.Dir = e.env, &stderr, "/"
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out), err
}

func (e *world) run(name string, args ...string) string {
	e.t.Helper()
	out, err := e.try(name, args...)
	if err != nil {
		e.t.Fatal(err)
	}
	return out
}

func (e *world) ctr(args ...string) []string {
	return append([]string{"-a", filepath.Join(e.dir, "c.sock")}, args...)
}

// do runs ctr.
func (e *world) do(args ...string) string {
	e.t.Helper()
	return e.run("ctr", e.ctr(args...)...)
}

// unmount takes away what containerd mounted for itself and would have taken away
// later: its mount manager does so when it collects garbage.
func (e *world) unmount() {
	infos, err := mount.List()
	must(e.t, err)
	for _, i := range slices.Backward(infos) {
		if strings.HasPrefix(i.Target, e.dir+"/state/") {
			must(e.t, syscall.Unmount(i.Target, syscall.MNT_DETACH))
		}
	}
}

// noProcesses fails the test if a shim or a FUSE server of the test's is left.
func (e *world) noProcesses() {
	left := func() (all []string) {
		lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, l := range lines {
			b, _ := os.ReadFile(l)
			if text := strings.ReplaceAll(string(b), "\x00", " "); strings.Contains(text, e.dir) && !strings.Contains(text, "bin/layerd") || strings.Contains(text, e.root) {
				all = append(all, l+": "+text)
			}
		}
		return all
	}
	for end := time.Now().Add(patience); len(left()) > 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			e.t.Errorf("left running: %q", left())
			return
		}
	}
}

// image writes the standard image as an archive that ctr imports.
func (e *world) image() string {
	e.t.Helper()
	l := testimage.NewLayout()
	l.List("localhost/test:latest", l.AddImage(e.t, testimage.Platform, testimage.Layers(e.t), "gzip", "gzip", "none").Target)
	return testimage.TempFile(e.t, l.Tar(e.t))
}

const testImage = "localhost/test:latest"

func TestDebianContainerd(t *testing.T) {
	testenv.Slow(t)
	testContainerd(t, "", false)
}

func TestNewestContainerd(t *testing.T) {
	testenv.Slow(t)
	testenv.Root(t)
	bin, err := newest()
	must(t, err)
	testContainerd(t, bin, true)
}

// testContainerd has an unmodified containerd use each snapshotter that works on
// btrfs, which are all but devmapper.
func testContainerd(t *testing.T, bin string, differ bool) {
	testenv.Root(t)
	fs := testenv.FS(t, "btrfs", testenv.Size(1<<30))
	e := newWorld(t, fs, bin)
	archive := e.image()
	alone := []string{"image", "import", "--snapshotter", "overlayfs", archive}
	if differ { // layers unpacked at the same time get other times of implied directories in containerd's own snapshotter
		alone = slices.Insert(alone, 2, "--local")
	}
	e.do(alone...)
	e.do("image", "mount", "--snapshotter", "overlayfs", testImage, e.mkdir("theirs"))
	defer e.do("image", "unmount", "--rm", "--snapshotter", "overlayfs", filepath.Join(e.dir, "theirs"))
	for _, s := range []string{"layerd-overlay", "layerd-btrfs", "layerd-native", "layerd-fuse"} {
		t.Run(s, func(t *testing.T) {
			c := &client{world: e.in(t), s: s, archive: archive, differ: differ}
			c.unpacks()
			c.runs()
			if differ {
				c.remaps()
			}
			c.survives()
			c.diffs()
		})
	}
	if os.Getenv("LAYERCTL_STRESS") != "" {
		e.crowd()
	}
	e.collects(archive)
}

// crowd runs 50 containers of each snapshotter at once, then unpacks and deletes an
// image 20 times.
func (e *world) crowd() {
	for _, s := range []string{"layerd-overlay", "layerd-btrfs", "layerd-native", "layerd-fuse"} {
		e.t.Run("crowd/"+s, func(t *testing.T) {
			c := &client{world: e.in(t), s: s, archive: e.image()}
			var all errgroup.Group
			each := func(f func(name string) []string) {
				for i := range 50 {
					all.Go(func() error { _, err := c.try("ctr", c.ctr(f(fmt.Sprintf("crowd-%s-%d", s, i))...)...); return err })
				}
				must(t, all.Wait())
			}
			each(func(n string) []string {
				return []string{"run", "-d", "--snapshotter", s, testImage, n, "/bin/sh", "-c", "echo " + n + " > /name; while :; do sleep 1; done"}
			})
			each(func(n string) []string { return []string{"task", "exec", "--exec-id", "x", n, "/bin/cat", "/name"} })
			each(func(n string) []string { return []string{"task", "rm", "-f", n} })
			each(func(n string) []string { return []string{"container", "rm", n} })
			for range 20 {
				c.do("image", "rm", "--sync", testImage)
				c.do("image", "import", "--snapshotter", s, c.archive)
			}
		})
	}
}

// in is the world in a subtest.
func (e *world) in(t *testing.T) *world {
	sub := *e
	sub.t = t
	t.Cleanup(func() { e.layerd, e.containerd = sub.layerd, sub.containerd })
	return &sub
}

func (e *world) mkdir(name string) string {
	dir := filepath.Join(e.dir, name)
	must(e.t, os.MkdirAll(dir, 0o755))
	return dir
}

// client is a containerd with one of our snapshotters.
type client struct {
	*world
	s       string // the snapshotter
	archive string
	differ  bool // it asks ours
}

// snapshots runs ctr snapshots.
func (c *client) snapshots(args ...string) string {
	c.t.Helper()
	return c.do(append([]string{"snapshots", "--snapshotter", c.s}, args...)...)
}

// calls is how often layerd was asked for a method, since it was started.
func (c *client) calls(method string) int {
	b, err := os.ReadFile(c.layerd.log)
	must(c.t, err)
	return strings.Count(string(b), "/"+method+" ")
}

// unpacks imports the image: the tree is that of containerd's own snapshotter, file
// for file.
func (c *client) unpacks() {
	c.t.Helper()
	applied := c.calls("Apply")
	c.do("image", "import", "--snapshotter", c.s, c.archive)
	if n := c.calls("Apply") - applied; c.differ && n != 3 {
		c.t.Errorf("our differ unpacked %d layers of 3", n)
	}
	if unpacks := strings.Contains(c.dropIn(), `"rebase"`); c.differ && unpacks != (c.s == "layerd-overlay" || c.s == "layerd-fuse") {
		c.t.Errorf("drop-in:\n%s", c.dropIn())
	}
	if n := strings.Count(c.snapshots("ls"), "Committed"); n != 3 {
		c.t.Errorf("%d layers of 3:\n%s", n, c.snapshots("ls"))
	}
	ours := c.mkdir("ours-" + c.s)
	c.do("image", "mount", "--snapshotter", c.s, testImage, ours)
	c.same(filepath.Join(c.dir, "theirs"), ours)
	c.do("image", "unmount", "--rm", "--snapshotter", c.s, ours)
}

// same fails the test unless two directories are the same tree.
func (c *client) same(a, b string) {
	c.t.Helper()
	for ch, err := range layer.DiffTrees(c.t.Context(), a, b, layer.DiffOptions{}) {
		must(c.t, err)
		if c.differ && ch.Entry.Path == "." && ch.Aspects == layer.AspectTime {
			continue // layers that do not name the root change its time in containerd's own snapshotter; ours keeps the image's
		}
		c.t.Errorf("not as containerd's: %v", ch.String())
	}
}

// runs runs a container that writes and goes.
func (c *client) runs() {
	c.t.Helper()
	out := c.do("run", "--rm", "--snapshotter", c.s, testImage, "once-"+c.s, "/bin/sh", "-c",
		"cat /etc/new && echo more > /new && rm /etc/passwd && cat /new && ls /usr/share/doc")
	if out != "new\nmore\nREADME\n" {
		c.t.Errorf("the container says %q", out)
	}
}

// remaps runs a container in a user namespace: the image's owners are shown shifted,
// and no copy of it is made.
func (c *client) remaps() {
	c.t.Helper()
	if !strings.Contains(c.dropIn(), `"remap-ids"`) {
		c.t.Errorf("%s does not map ids here:\n%s", c.s, c.dropIn())
	}
	before := c.snapshots("ls")
	out := c.do("run", "--rm", "--remap-labels", "--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536", "--snapshotter", c.s,
		testImage, "mapped-"+c.s, "/bin/sh", "-c", "cat /proc/self/uid_map; ls -ln /etc/passwd /srv/owned; echo mine > /new; ls -ln /new")
	owners := regexp.MustCompile(`(?m)^-\S+ +1 (\d+ +\d+) `).FindAllStringSubmatch(out, -1)
	var got []string
	for _, o := range owners {
		got = append(got, strings.Join(strings.Fields(o[1]), ":"))
	}
	if !strings.Contains(out, "100000") || !slices.Equal(got, []string{"0:0", "1234:5678", "0:0"}) {
		c.t.Errorf("owners %q in a container that says\n%s", got, out)
	}
	if after := c.snapshots("ls"); after != before {
		c.t.Errorf("snapshots before:\n%s\nafter:\n%s", before, after)
	}
}

// dropIn is the snapshotter's part of what layerd printed.
func (c *client) dropIn() string {
	b, err := os.ReadFile(filepath.Join(c.dir, "layerd-containerd.toml"))
	must(c.t, err)
	_, part, _ := strings.Cut(string(b), "[proxy_plugins."+c.s+"]")
	part, _, _ = strings.Cut(part, "\n\n")
	return part
}

// execute runs a command in the container of survives.
func (c *client) execute(command string) string {
	c.t.Helper()
	return c.do("task", "exec", "--exec-id", "e"+fmt.Sprint(time.Now().UnixNano()), "long-"+c.s, "/bin/sh", "-c", command)
}

// survives keeps a container over the end of layerd, good and bad, and of
// containerd.
func (c *client) survives() {
	c.t.Helper()
	c.do("run", "-d", "--snapshotter", c.s, testImage, "long-"+c.s, "/bin/sleep", "1000000")
	c.execute("echo 0 > /count")
	for i, end := range []func(){
		func() { c.layerd.end(syscall.SIGTERM); c.startLayerd() },
		func() { c.layerd.end(syscall.SIGKILL); c.startLayerd() },
		func() { c.containerd.end(syscall.SIGTERM); c.startContainerd() },
	} {
		end()
		if out := c.execute(fmt.Sprintf("cat /count && echo %d > /count && cat /srv/data > /dev/null", i+1)); out != fmt.Sprintf("%d\n", i) {
			c.t.Errorf("after end %d the container says %q", i, out)
		}
	}
	c.execute("mkdir /made && echo text > /made/file && rm /bin/touch")
}

// diffs asks for usage, tree and diff of the running container, commits it, and
// removes it.
func (c *client) diffs() {
	c.t.Helper()
	long := "long-" + c.s
	compared := c.calls("Diff")
	if out := c.snapshots("usage", long); !strings.Contains(out, long) {
		c.t.Errorf("usage: %q", out)
	}
	if out := c.snapshots("tree"); !strings.Contains(out, long) {
		c.t.Errorf("tree: %q", out)
	}
	tar := c.snapshots("diff", "--media-type", "application/vnd.oci.image.layer.v1.tar", long)
	if n := c.calls("Diff") - compared; c.differ && n != 1 {
		c.t.Errorf("our differ made %d diffs of 1", n)
	}
	names := testimage.TarEntries(c.t, []byte(tar))
	for _, want := range []string{"bin/.wh.touch", "count", "made/", "made/file"} {
		if !slices.Contains(names, want) {
			c.t.Errorf("the diff lacks %s: %q", want, names)
		}
	}
	if len(names) > 20 {
		c.t.Errorf("the diff has %q", names)
	}
	c.do("task", "kill", "-s", "KILL", long)
	c.until("the task ends", func() error { _, err := c.try("ctr", c.ctr("task", "rm", long)...); return err })
	c.snapshots("commit", "committed-"+c.s, long)
	c.do("container", "rm", long)
	c.snapshots("rm", "committed-"+c.s)
}

// collects removes the image, so that containerd's garbage collector empties every
// view, and looks that nothing of another's went.
func (e *world) collects(archive string) {
	e.t.Helper()
	s, err := layerctl.Open(e.t.Context(), e.root, layerctl.Options{})
	must(e.t, err)
	defer s.Close()
	others := map[string]*snapshot.View{}
	for name, driver := range map[string]string{"cli": "overlay", "other": "btrfs"} {
		v, err := s.View(name, driver)
		must(e.t, err)
		others[name] = v
		for _, key := range []string{"mine", "default/1/" + testImage} {
			_, err := v.Prepare(e.t.Context(), key+"-active", "")
			must(e.t, err)
			must(e.t, v.Commit(e.t.Context(), key, key+"-active"))
		}
	}
	e.do("image", "unmount", "--rm", "--snapshotter", "overlayfs", filepath.Join(e.dir, "theirs"))
	e.do("image", "rm", "--sync", testImage)
	for _, name := range []string{"layerd-overlay", "layerd-btrfs", "layerd-native", "layerd-fuse"} {
		v, err := s.View(name, "")
		must(e.t, err)
		e.until("containerd's garbage collector empties "+name, func() error {
			if got := keysOf(e.t, v); len(got) > 0 {
				return fmt.Errorf("it holds %q", got)
			}
			return nil
		})
	}
	for name, v := range others {
		if got := keysOf(e.t, v); len(got) != 2 {
			e.t.Errorf("view %s holds %q after containerd's garbage collection", name, got)
		}
	}
}

func keysOf(t *testing.T, v *snapshot.View) (keys []string) {
	t.Helper()
	must(t, v.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		keys = append(keys, i.Name)
		return nil
	}))
	return keys
}
