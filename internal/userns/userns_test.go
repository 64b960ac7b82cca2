package userns

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/internal/testenv"
)

// envAct makes the test binary act as the program: the act is the value.
const envAct = "LAYERCTL_USERNS_TEST_ACT"

func TestMain(m *testing.M) {
	Init()
	if act := os.Getenv(envAct); act != "" {
		os.Exit(actAs(act, os.Args[1:]))
	}
	testenv.Main(m)
}

// actAs is what an ordinary user's program does in the tests below.
func actAs(act string, args []string) int {
	if act == "inside" || Inside() {
		return inside(args)
	}
	c := Command{Root: args[0], Args: args, Keep: act == "keep"}
	if act == "stop" {
		c.Mounts = func(*Namespaces, int) (int, error) { return strconv.Atoi(args[1]) }
	}
	code, err := Run(c)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 99
	}
	return code
}

// inside reports who and where it is and becomes a shell command.
func inside(args []string) int {
	ns, _ := os.Readlink("/proc/self/ns/mnt")
	fmt.Println("uid", os.Getuid(), "gid", os.Getgid(), "ns", ns, "inside", Inside())
	if len(args) < 3 {
		return 0
	}
	err := syscall.Exec("/bin/sh", []string{"/bin/sh", "-c", args[2]}, os.Environ())
	fmt.Fprintln(os.Stderr, err)
	return 98
}

const ordinaryID = 61234

// asUser runs the test binary as an ordinary user and returns its output.
func asUser(t *testing.T, act string, args ...string) (string, int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Dir = "/"
	// the race detector sleeps a second in each exit otherwise
	cmd.Env = append(os.Environ(), envAct+"="+act, "HOME="+args[0], "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinaryID, Gid: ordinaryID}}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// userRoot makes a store root that belongs to the ordinary user.
func userRoot(t *testing.T) string {
	t.Helper()
	testenv.Root(t)
	dir, err := os.MkdirTemp("/dev/shm", "userns")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, ordinaryID, ordinaryID); err != nil {
		t.Fatal(err)
	}
	return dir
}

// overlayFile bind-mounts a file with more lines over a file of /etc, in the
// test binary's private mount namespace.
func overlayFile(t *testing.T, path, more string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if os.IsNotExist(err) {
		testenv.Skip(t, path+" does not exist")
	}
	tmp := filepath.Join(t.TempDir(), filepath.Base(path))
	if err := os.WriteFile(tmp, append(b, more...), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount(tmp, path, "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(path, syscall.MNT_DETACH) })
}

func TestOrdinaryUserBecomesRootInside(t *testing.T) {
	root := userRoot(t)
	out, code := asUser(t, "once", root, "", "mount -t tmpfs none /mnt && echo mounted; exit 7")
	if code != 7 {
		t.Errorf("exit status %d, want the command's 7", code)
	}
	for _, want := range []string{"uid 0 gid 0", "inside true", "mounted"} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	if _, err := os.Stat(filepath.Join(root, "keeper")); err == nil {
		t.Error("a verb that needs no keeper left a keeper directory")
	}
}

// subordinateIDs gives the ordinary user ranges of ids.
func subordinateIDs(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("newuidmap"); err != nil {
		testenv.Skip(t, "newuidmap is not installed")
	}
	overlayFile(t, "/etc/passwd", fmt.Sprintf("layertest:x:%d:%d::/:/bin/sh\n", ordinaryID, ordinaryID))
	overlayFile(t, "/etc/group", fmt.Sprintf("layertest:x:%d:\n", ordinaryID))
	overlayFile(t, "/etc/subuid", "layertest:700000:65536\n")
	overlayFile(t, "/etc/subgid", "layertest:800000:65536\n")
}

func TestSubordinateIDsAreMapped(t *testing.T) {
	root := userRoot(t)
	subordinateIDs(t)
	out, code := asUser(t, "once", root, "", "cd "+root+" && touch f && chown 33:44 f && stat -c %u:%g f")
	if code != 0 || !strings.Contains(out, "33:44") {
		t.Fatalf("status %d:\n%s", code, out)
	}
	st := &syscall.Stat_t{}
	if err := syscall.Lstat(filepath.Join(root, "f"), st); err != nil || st.Uid != 700032 || st.Gid != 800043 {
		t.Errorf("outside the file belongs to %d:%d (%v), want 700032:800043", st.Uid, st.Gid, err)
	}
}

func TestKeeperHoldsMountsUntilStopped(t *testing.T) {
	root := userRoot(t)
	run := func(act, mounts, sh string) string {
		t.Helper()
		out, code := asUser(t, act, root, mounts, sh)
		if code != 0 {
			t.Fatalf("%s %q: status %d:\n%s", act, sh, code, out)
		}
		return out
	}
	first := run("keep", "", "mount -t tmpfs none /mnt && echo there >/mnt/f")
	keeper := keeperPID(filepath.Join(root, "keeper"))
	if keeper < 0 {
		t.Fatal("no keeper")
	}
	again := run("once", "", "cat /mnt/f")
	if !strings.Contains(again, "there") {
		t.Errorf("a later command does not see the mount:\n%s", again)
	}
	if ns := func(s string) string { return strings.SplitN(s, "\n", 2)[0] }; ns(first) != ns(again) {
		t.Errorf("namespaces differ: %s, %s", ns(first), ns(again))
	}
	run("stop", "1", "true")
	if keeperPID(filepath.Join(root, "keeper")) != keeper {
		t.Error("the keeper went though a mount is left")
	}
	run("stop", "0", "umount /mnt")
	if pid := keeperPID(filepath.Join(root, "keeper")); pid >= 0 {
		t.Errorf("keeper %d stays without a mount", pid)
	}
	waitGone(t, keeper)
}

// waitGone waits until a process of ours has been reaped or is a zombie of init.
func waitGone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || bytes.Contains(b, []byte(") Z ")) {
			return
		}
	}
	t.Errorf("process %d is still there", pid)
}

func TestManyFirstMountsShareOneKeeper(t *testing.T) {
	root := userRoot(t)
	const n = 6
	outs := make(chan string, n)
	for range n {
		go func() {
			out, _ := asUser(t, "keep", root, "", "true")
			outs <- strings.SplitN(out, "\n", 2)[0]
		}()
	}
	first := <-outs
	for range n - 1 {
		if o := <-outs; o != first {
			t.Errorf("two namespaces: %q, %q", first, o)
		}
	}
	keeper := keeperPID(filepath.Join(root, "keeper"))
	if out, code := asUser(t, "stop", root, "0", "true"); code != 0 {
		t.Error(out)
	}
	waitGone(t, keeper)
}

func TestSignalsReachTheCommand(t *testing.T) {
	root := userRoot(t)
	cmd := exec.Command("/proc/self/exe", root, "", "trap 'echo got; exit 5' TERM; echo ready; while :; do sleep 0.05; done")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), envAct+"=once")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: &syscall.Credential{Uid: ordinaryID, Gid: ordinaryID}}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	// The group: a command that the signal missed would stay.
	defer func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }()
	if err := r.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	out := bufio.NewReader(r)
	for line := ""; line != "ready\n"; {
		if line, err = out.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(out)
	if err != nil || string(rest) != "got\n" {
		t.Errorf("after the signal the command said %q (%v), want got and its end", rest, err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 5 {
		t.Errorf("exit status %d, want the command's 5", code)
	}
}

func TestASignalWhileTheCommandStartsReachesIt(t *testing.T) {
	root := userRoot(t)
	subordinateIDs(t)
	mapper, err := exec.LookPath("newuidmap")
	if err != nil {
		t.Fatal(err)
	}
	// Who maps the ids runs between the command's clone and its program.
	bin := userRoot(t)
	script := "#!/bin/sh\nkill -TERM $PPID\nexec " + mapper + " \"$@\"\n"
	if err := os.WriteFile(filepath.Join(bin, "newuidmap"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	out, code := asUser(t, "once", root, "", "exec sleep 60")
	if want := 128 + int(syscall.SIGTERM); code != want {
		t.Errorf("exit status %d, want %d, the command's end:\n%s", code, want, out)
	}
}

func TestParseSubID(t *testing.T) {
	for _, c := range []struct {
		line string
		ok   bool
	}{
		{"anna:100000:65536", true},
		{"1000:100000:65536", true},
		{"bob:100000:65536", false},
		{"anna:x:65536", false},
		{"anna:100000:0", false},
		{"anna:-1:5", false},
		{"anna:100000", false},
		{"", false},
	} {
		r, ok := parseSubID(c.line, "anna", 1000)
		if ok != c.ok || ok && r != (idRange{0, 100000, 65536}) {
			t.Errorf("%q: %v %v", c.line, r, ok)
		}
	}
	if _, ok := parseSubID(":100000:65536", "", 1000); ok {
		t.Error("a line without a name belongs to a user without a name")
	}
}

func TestRangesAreStacked(t *testing.T) {
	got := stack([]idRange{{0, 1000, 1}}, []idRange{{0, 100000, 10}, {0, 300000, 5}})
	want := []idRange{{0, 1000, 1}, {1, 100000, 10}, {11, 300000, 5}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
