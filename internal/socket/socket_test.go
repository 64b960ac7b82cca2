package socket_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/socket"
	"github.com/layerctl/layerctl/internal/testenv"
)

func TestMain(m *testing.M) {
	if os.Getenv("SOCKET_TEST_CHILD") != "" {
		os.Exit(child())
	}
	testenv.Main(m)
}

func path(t *testing.T) string { return filepath.Join(testenv.Scratch(t), "run", "s.sock") }

func dials(t *testing.T, p string) bool {
	t.Helper()
	c, err := net.Dial("unix", p)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// TestListen: the mode is right, Close removes the socket, and a second Close does
// nothing to the next service's.
func TestListen(t *testing.T) {
	testenv.Leaks(t)
	p := path(t)
	l, err := socket.Listen(p, socket.Options{})
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(p)
	if err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	if l.Addr().String() != p {
		t.Errorf("address %s", l.Addr())
	}
	if !dials(t, p) {
		t.Error("nobody listens")
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(p); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	next, err := socket.Listen(p, socket.Options{Mode: 0o660})
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	l.Close()
	if fi, err := os.Lstat(p); err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("the next socket: %v, %v", fi, err)
	}
	entries, err := os.ReadDir(filepath.Dir(p))
	if err != nil || len(entries) != 2 { // the socket and its lock
		t.Errorf("directory holds %v, %v", entries, err)
	}
}

// TestLivingSocketIsRefused, whether its owner locks or not.
func TestLivingSocketIsRefused(t *testing.T) {
	for _, how := range []string{"ours", "another program's"} {
		p := path(t)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		var l net.Listener
		var err error
		if how == "ours" {
			l, err = socket.Listen(p, socket.Options{})
		} else {
			l, err = net.Listen("unix", p)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if _, err := socket.Listen(p, socket.Options{}); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), p) {
			t.Errorf("%s: %v", how, err)
		}
		if !dials(t, p) {
			t.Errorf("%s: does not listen any more", how)
		}
	}
}

// TestStaleSocketIsReplaced: what a killed service leaves.
func TestStaleSocketIsReplaced(t *testing.T) {
	p := path(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "SOCKET_TEST_CHILD=die", "SOCKET_TEST_PATH="+p)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("%v\n%s", err, out)
	}
	if _, err := os.Lstat(p); err != nil {
		t.Fatalf("the child left no socket: %v", err)
	}
	l, err := socket.Listen(p, socket.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if !dials(t, p) {
		t.Error("nobody listens")
	}
}

// TestOtherFilesStay: only a socket is ever removed.
func TestOtherFilesStay(t *testing.T) {
	p := path(t)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := socket.Listen(p, socket.Options{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("over a file: %v", err)
	}
	if b, err := os.ReadFile(p); err != nil || string(b) != "x" {
		t.Errorf("the file: %q, %v", b, err)
	}
	if _, err := socket.Listen("/"+strings.Repeat("x", 200), socket.Options{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a long path: %v", err)
	}
}

// TestActivated: sockets are taken by their names, and only by the process that
// they are for.
func TestActivated(t *testing.T) {
	p := path(t)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", p)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, c := range []struct{ pid, want string }{{"own", "layerd=1 child=none"}, {"1", "none"}} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "SOCKET_TEST_CHILD=activated", "LISTEN_FDS=1", "LISTEN_FDNAMES=layerd", "LISTEN_PID="+c.pid)
		cmd.ExtraFiles = []*os.File{f}
		out, err := cmd.CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != c.want {
			t.Errorf("for pid %s: %q, %v, want %q", c.pid, out, err, c.want)
		}
	}
	if !dials(t, p) {
		t.Error("the children ended systemd's socket")
	}
}

// child is what the tests run in another process.
func child() int {
	if os.Getenv("SOCKET_TEST_CHILD") == "die" {
		if _, err := socket.Listen(os.Getenv("SOCKET_TEST_PATH"), socket.Options{}); err != nil {
			println(err.Error())
			return 1
		}
		p, _ := os.FindProcess(os.Getpid())
		_ = p.Kill()
		select {}
	}
	if os.Getenv("LISTEN_PID") == "own" { // only this process knows its id
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	}
	all, err := socket.Activated()
	if err != nil {
		println(err.Error())
		return 1
	}
	if len(all) == 0 {
		os.Stdout.WriteString("none")
		return 0
	}
	for name, ls := range all {
		os.Stdout.WriteString(name + "=" + strconv.Itoa(len(ls)))
		for _, l := range ls {
			l.Close()
		}
	}
	rest := "none"
	if os.Getenv("LISTEN_FDS") != "" {
		rest = "some"
	}
	os.Stdout.WriteString(" child=" + rest)
	return 0
}
