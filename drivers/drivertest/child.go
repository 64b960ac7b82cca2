package drivertest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
)

func newReader(b []byte) io.Reader { return bytes.NewReader(b) }

func syncDir(path string) error {
	d, err := sys.OpenDir(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.SyncFS()
}

// envChild makes the test binary do a job in a process of its own, instead of
// running the suite: the same Run, in the same driver's test.
const envChild = "LAYERCTL_DRIVERTEST_CHILD"

// job is what a child does.
type job struct {
	// Crash: call Op on a driver at Root, and die at the Step'th step.
	Crash bool
	Op    string
	Root  string
	Step  int
	Ref   drivers.Ref
	Tar   string // a file, for apply

	// Unprivileged: run the suite in Dir, on a file system of Kind.
	Unprivileged bool
	Kind, Dir    string
}

// runChild does the job of a child and reports whether there was one.
func runChild(t *testing.T, c Config) bool {
	text := os.Getenv(envChild)
	if text == "" {
		return false
	}
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		t.Fatal(err)
	}
	if j.Crash {
		j.crash(t, c)
		return true
	}
	os.Unsetenv(envChild)
	t.Run(j.Kind, func(t *testing.T) { (&fsys{cfg: c, kind: j.Kind, dir: j.Dir}).run(t) })
	return true
}

// command runs this test binary for a job; run selects the test.
func (j job) command(t *testing.T, run string) *exec.Cmd {
	t.Helper()
	text, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run="+run, "-test.timeout=10m")
	cmd.Env = append(os.Environ(), envChild+"="+string(text))
	return cmd
}

// topTest is the pattern of the driver's own test function.
func topTest(t *testing.T) string {
	name, _, _ := strings.Cut(t.Name(), "/")
	return "^" + regexp.QuoteMeta(name) + "$"
}

// crash is a child's death at a step: no deferred function runs.
func (j job) crash(t *testing.T, c Config) {
	d, err := c.Factory.Open(t.Context(), drivers.Config{Root: j.Root, Options: c.Options})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	ctx := faults.With(t.Context(), func(string) error {
		if n++; n > j.Step {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	})
	var tar []byte
	if j.Tar != "" {
		if tar, err = os.ReadFile(j.Tar); err != nil {
			t.Fatal(err)
		}
	}
	if err := stepOps[j.Op].call(ctx, d, j.Ref, tar); err != nil {
		t.Fatal(err)
	}
}

// crashed runs a job that has to die at its step.
func (k *kit) crashed(j job) {
	k.Helper()
	cmd := j.command(k.T, topTest(k.T))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		k.Fatalf("the process that had to die at step %d of %s: %v\n%s", j.Step, j.Op, err, out)
	}
}

// nobody is the user of the unprivileged run, with ids of its own as
// /etc/subuid would give them.
const nobody, nobodySub = 65534, 200000

// unprivileged runs the suite once more as root of a user namespace.
func (f *fsys) unprivileged(t *testing.T) {
	dir := filepath.Join(f.dir, "unprivileged")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, nobody, nobody)); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	j := job{Unprivileged: true, Kind: f.kind, Dir: dir}
	cmd := j.command(t, topTest(t)+below(t))
	if testing.Verbose() {
		cmd.Args = append(cmd.Args, "-test.v")
	}
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: nobody, Size: 1}, {ContainerID: 1, HostID: nobodySub, Size: 65535}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
		UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{Uid: 0, Gid: 0},
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	os.Stdout.Write(out.Bytes())
	if err != nil {
		t.Errorf("unprivileged: %v", err)
	}
}

// below is the part of -test.run that selects cases, for the child's own levels.
func below(t *testing.T) string {
	var pattern string
	for _, a := range os.Args {
		if v, ok := strings.CutPrefix(a, "-test.run="); ok {
			pattern = v
		}
	}
	parts := strings.SplitN(pattern, "/", 4) // test, file system, "unprivileged", the case
	if len(parts) < 4 {
		return ""
	}
	return "/.*/" + parts[3]
}
