package vm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/internal/testenv"
)

// envTests names the kernel that these tests run in guests; `make test-vm` sets
// it. envRunner makes this binary a runner, for the test that kills one.
const (
	envTests  = "LAYERCTL_VM"
	envRunner = "LAYERCTL_VM_RUNNER"
)

func TestMain(m *testing.M) {
	Init()
	if disk := os.Getenv(envRunner); disk != "" {
		kernel, err := Install(CacheDir(), os.Getenv(envTests))
		if err != nil {
			panic(err)
		}
		exe, _ := os.Executable()
		_, err = Run(context.Background(), Config{Kernel: kernel, Init: exe, Argv: []string{"/bin/sh", "-c", "echo ready; sleep 1000"},
			Env: os.Environ(), Dir: "/", Disks: []string{disk}, Stdout: os.Stdout, Stderr: os.Stderr})
		panic(err)
	}
	testenv.Main(m)
}

// guest returns a Config that runs a shell script.
func guest(t *testing.T, script string) (c Config, stdout, stderr *bytes.Buffer) {
	t.Helper()
	name := os.Getenv(envTests)
	if name == "" {
		testenv.Optional(t, "starts a virtual machine: make test-vm")
	}
	kernel, err := Install(CacheDir(), name)
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	stdout, stderr = &bytes.Buffer{}, &bytes.Buffer{}
	return Config{Kernel: kernel, Init: exe, Argv: []string{"/bin/sh", "-c", script}, Env: os.Environ(), Dir: "/",
		Memory: 512 << 20, Stdout: stdout, Stderr: stderr}, stdout, stderr
}

// disk makes an empty disk of 64 MiB; its path is in the kernel's arguments.
func disk(t *testing.T) string {
	t.Helper()
	f := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(f, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(f, 64<<20); err != nil {
		t.Fatal(err)
	}
	return f
}

// processes returns those that have text in their command line, but for the
// test itself and its shells.
func processes(text string) (pids []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		b, _ := os.ReadFile(f)
		if bytes.Contains(b, []byte(text)) {
			pids = append(pids, strings.Split(f, "/")[2])
		}
	}
	return pids
}

func noneLeft(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		left := processes(text)
		if len(left) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("processes of the guest are left: %v", left)
		}
	}
}

func TestStatusAndOutputsComeBackApart(t *testing.T) {
	c, stdout, stderr := guest(t, `printf 'out\r\n\001\377'; echo "err $X $(pwd)" >&2; (sleep 1000 &) ; exit 7`)
	c.Env, c.Dir = append(c.Env, "X=a b"), "/usr"
	status, err := Run(t.Context(), c)
	if status != 7 || err != nil {
		t.Errorf("status %d, %v; want 7", status, err)
	}
	if got := stdout.String(); got != "out\r\n\001\377" {
		t.Errorf("stdout %q", got)
	}
	if got := stderr.String(); got != "err a b /usr\n" {
		t.Errorf("stderr %q", got)
	}
}

// A pipe holds 64 KiB, a serial line less: all of it must come before the end.
func TestMuchOutputIsWhole(t *testing.T) {
	c, stdout, _ := guest(t, `seq 200000`)
	if status, err := Run(t.Context(), c); status != 0 || err != nil {
		t.Fatalf("status %d, %v", status, err)
	}
	lines := bytes.Count(stdout.Bytes(), []byte("\n"))
	if lines != 200000 || !bytes.HasSuffix(stdout.Bytes(), []byte("\n200000\n")) {
		t.Errorf("%d lines of 200000", lines)
	}
}

func TestSignalAndMissingProgram(t *testing.T) {
	c, _, _ := guest(t, `kill -9 $$`)
	if status, err := Run(t.Context(), c); status != 137 || err != nil {
		t.Errorf("killed: status %d, %v; want 137", status, err)
	}
	c, _, stderr := guest(t, "")
	c.Argv = []string{"/no/such"}
	if status, err := Run(t.Context(), c); status != 127 || err != nil || !strings.Contains(stderr.String(), "/no/such") {
		t.Errorf("missing: status %d, %v, %q; want 127 and the name", status, err, stderr)
	}
}

// What the guest is there for.
func TestGuestHasTheKernelAndWhatItIsFor(t *testing.T) {
	c, stdout, stderr := guest(t, `uname -r; dmsetup targets; cat /proc/filesystems; ls /dev/mapper/control /dev/fuse /dev/loop-control`)
	if status, err := Run(t.Context(), c); status != 0 || err != nil {
		t.Fatalf("status %d, %v, %s", status, err, stderr)
	}
	words := strings.Fields(stdout.String())
	for _, w := range []string{c.Kernel.Release, "thin-pool", "thin", "flakey", "log-writes", "linear", "overlay", "btrfs", "xfs", "ext4", "fuse"} {
		if !slices.Contains(words, w) {
			t.Errorf("the guest lacks %s", w)
		}
	}
}

func TestHostIsReadOnlyButWhatIsShared(t *testing.T) {
	shared, other := t.TempDir(), t.TempDir()
	c, _, stderr := guest(t, `echo x > `+shared+`/f || exit 1; echo x > /usr/f && exit 2; mkdir -p `+other+`; echo x > `+other+`/f; exit 0`)
	c.Share = []string{shared}
	c.Dir = filepath.Join(t.TempDir(), "below", "it") // seen, though /tmp is the guest's
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if status, err := Run(t.Context(), c); status != 0 || err != nil {
		t.Fatalf("status %d, %v, %s", status, err, stderr)
	}
	if b, err := os.ReadFile(shared + "/f"); string(b) != "x\n" {
		t.Errorf("the shared directory has %q, %v", b, err)
	}
	if _, err := os.Stat(other + "/f"); err == nil {
		t.Error("a directory that is not shared was written to")
	}
}

func TestTimeoutKillsTheGuest(t *testing.T) {
	c, _, _ := guest(t, `sleep 1000`)
	c.Disks = []string{disk(t)}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if status, err := Run(ctx, c); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("status %d, %v; want the deadline", status, err)
	}
	noneLeft(t, c.Disks[0])
}

func TestGuestThatDiesSaysSo(t *testing.T) {
	c, stdout, _ := guest(t, `echo before; echo c > /proc/sysrq-trigger; sleep 1000`)
	status, err := Run(t.Context(), c)
	if !errors.Is(err, ErrDied) || !strings.Contains(err.Error(), "panic") {
		t.Errorf("status %d, %v; want ErrDied and the kernel's words", status, err)
	}
	if stdout.String() != "before\n" {
		t.Errorf("stdout %q", stdout)
	}
}

// cutAt runs the guest until it says "ready", and cuts it off.
func cutAt(t *testing.T, c Config) {
	t.Helper()
	ctx, cut := context.WithCancel(t.Context())
	defer cut()
	r, w := io.Pipe()
	c.Stdout = w
	seen := make(chan bool)
	go func() {
		b := make([]byte, 64)
		var all []byte
		for {
			n, err := r.Read(b)
			all = append(all, b[:n]...)
			if bytes.Contains(all, []byte("ready")) {
				cut()
			}
			if err != nil {
				seen <- bytes.Contains(all, []byte("ready"))
				return
			}
		}
	}()
	status, err := Run(ctx, c)
	w.Close()
	if !<-seen || !errors.Is(err, context.Canceled) {
		t.Fatalf("status %d, %v before it was cut off", status, err)
	}
}

func TestDiskSurvivesAPowerCut(t *testing.T) {
	c, stdout, stderr := guest(t, `mount /dev/ubda /mnt && echo a >/mnt/synced && sync && echo b >/mnt/not && echo ready; sleep 1000`)
	c.Disks = []string{disk(t)}
	mkfs := testenv.Program(t, "mkfs.ext4", "e2fsprogs")
	if out, err := exec.Command(mkfs, "-q", c.Disks[0]).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cutAt(t, c)
	noneLeft(t, c.Disks[0])
	c.Argv = []string{"/bin/sh", "-c", `mount /dev/ubda /mnt; cat /mnt/synced; dmesg | grep -c 'recovery complete'`}
	if status, err := Run(t.Context(), c); status != 0 || err != nil || stdout.String() != "a\n1\n" {
		t.Errorf("after the cut: status %d, %v, %q %q; want what was synced, and a journal to recover", status, err, stdout, stderr)
	}
}

func TestKilledRunnerLeavesNoGuest(t *testing.T) {
	guest(t, "") // skips where there are none
	d := disk(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), envRunner+"="+d)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("ready"))); err != nil {
		t.Errorf("the guest did not come up: %v", err)
	}
	if len(processes(d)) == 0 {
		t.Error("the kernel's process is not found: the test sees nothing")
	}
	_ = cmd.Process.Signal(syscall.SIGKILL)
	_ = cmd.Wait()
	noneLeft(t, d)
}
