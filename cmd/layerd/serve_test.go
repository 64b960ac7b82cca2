package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

// snapshotter is a client's of layerd.
func (e *world) snapshotter(name string) snapshots.Snapshotter {
	e.t.Helper()
	conn := e.dial()
	e.t.Cleanup(func() { conn.Close() })
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), name)
}

// dial returns a connection to layerd.
func (e *world) dial() *grpc.ClientConn {
	e.t.Helper()
	path := filepath.Join(e.dir, "layerd.sock")
	conn, err := grpc.NewClient("passthrough:///"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}))
	must(e.t, err)
	return conn
}

// logged waits until the log has a text.
func (e *world) logged(text string) {
	e.t.Helper()
	e.until(fmt.Sprintf("the log says %q", text), func() error {
		if b, _ := os.ReadFile(e.layerd.log); !strings.Contains(string(b), text) {
			return fmt.Errorf("it says\n%s", b)
		}
		return nil
	})
}

// TestReload: SIGHUP takes a new level of the log; a wrong file changes nothing, and
// what needs a restart is told.
func TestReload(t *testing.T) {
	e := newLayerd(t, testenv.Scratch(t))
	s := e.snapshotter("layerd-native")
	stat := func(key string) {
		t.Helper()
		if _, err := s.Stat(t.Context(), key); !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
	}
	hup := func() { must(t, e.layerd.cmd.Process.Signal(syscall.SIGHUP)) }
	stat("first")
	e.logged("Snapshots/Stat")
	e.write(e.settings, "no such thing")
	hup()
	e.logged("configuration not reloaded")
	stat("still served")
	e.write(e.settings, strings.ReplaceAll(e.layerdConfig(`gc_interval = "50ms"`), `"debug"`, `"info"`))
	hup()
	e.logged("needs_restart=false")
	before, err := os.ReadFile(e.layerd.log)
	must(t, err)
	stat("not logged")
	_, err = s.Prepare(t.Context(), "garbage", "")
	must(t, err)
	must(t, s.Remove(t.Context(), "garbage"))
	e.logged("msg=garbage layers=1")
	after, err := os.ReadFile(e.layerd.log)
	must(t, err)
	if strings.Contains(string(after[len(before):]), "msg=call") {
		t.Errorf("calls are logged at level info: %s", after[len(before):])
	}
	e.write(e.settings, e.layerdConfig("volatile = true"))
	hup()
	e.logged("needs_restart=true")
}

// TestSecondIsRefused: a socket that is served is left to who serves it.
func TestSecondIsRefused(t *testing.T) {
	e := newLayerd(t, testenv.Scratch(t))
	_, err := e.try("layerd", "-c", e.settings)
	if err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("the second: %v", err)
	}
	if _, err := e.snapshotter("layerd-native").Stat(t.Context(), "key"); !errdefs.IsNotFound(err) {
		t.Errorf("the first: %v", err)
	}
}

// TestUsage: a wrong command line has its own exit code, a wrong configuration says
// where it is wrong.
func TestUsage(t *testing.T) {
	e := prepare(t, testenv.Scratch(t), "")
	e.write(e.settings, e.layerdConfig("no_such_option = 1"))
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--no-such-flag"}, exitUsage, "no-such-flag"},
		{[]string{"config", "default", "more"}, exitUsage, "layerd config default --help"},
		{[]string{"--log-level", "loud"}, exitUsage, "loud"},
		{[]string{"-c", e.settings}, exitError, "line 3: no option no_such_option"},
		{[]string{"--root", "/proc/no/such/place", "--address", e.dir + "/s"}, exitError, "/proc/no/such/place"},
		{[]string{"version"}, exitOK, ""},
		{[]string{"man", e.dir + "/man"}, exitOK, ""},
		{[]string{"completion", "bash"}, exitOK, ""},
	} {
		_, err := e.try("layerd", c.args...)
		code := 0
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			code = exit.ExitCode()
		}
		if code != c.code || !strings.Contains(fmt.Sprint(err), c.says) {
			t.Errorf("%q: exit code %d, want %d and %q: %v", c.args, code, c.code, c.says, err)
		}
	}
	if pages, err := os.ReadDir(e.dir + "/man"); err != nil || len(pages) < 4 {
		t.Errorf("man pages: %v, %v", pages, err)
	}
}

// TestEndUnderLoad: whatever ends layerd in the middle of calls of many clients, what
// a call said is done is there when it serves again, and nothing else is.
func TestEndUnderLoad(t *testing.T) {
	testenv.Slow(t)
	e := newLayerd(t, testenv.Scratch(t))
	var all []*worker
	for _, driver := range []string{"overlay", "native"} {
		for i := range 4 {
			all = append(all, &worker{view: "layerd-" + driver, name: fmt.Sprintf("w%d", i), have: map[string]bool{}})
		}
	}
	for round, end := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL} {
		var work sync.WaitGroup
		busy := make(chan struct{}, len(all))
		for _, w := range all {
			w.s = e.snapshotter(w.view)
			work.Go(func() { w.run(t, round, busy) })
		}
		for range all {
			<-busy
		}
		e.layerd.end(end)
		work.Wait()
		e.startLayerd()
		for _, w := range all {
			w.check(t, e.snapshotter(w.view))
		}
	}
	e.layerd.end(syscall.SIGTERM)
	s, err := layerctl.Open(t.Context(), e.root, layerctl.Options{})
	must(t, err)
	defer s.Close()
	must(t, s.FinishListings(t.Context()))
	found, err := s.Check(t.Context(), snapshot.CheckOptions{})
	must(t, err)
	for _, f := range found {
		t.Errorf("check: %v", f)
	}
	e.startLayerd()
}

// worker makes and removes snapshots, and remembers what it was told.
type worker struct {
	view  string
	s     snapshots.Snapshotter // of this round: a client whose service ended waits before it tries again
	name  string
	have  map[string]bool // keys that are there
	maybe []string        // whose last call failed: they may be there, or not
}

// run works until a call fails; it tells when it has done a few.
func (w *worker) run(t *testing.T, round int, busy chan<- struct{}) {
	ctx := context.Background()
	for i := 0; ; i++ {
		if i == 3 {
			busy <- struct{}{}
		}
		active, name := fmt.Sprintf("%s-%d-%d-active", w.name, round, i), fmt.Sprintf("%s-%d-%d", w.name, round, i)
		_, err := w.s.Prepare(ctx, active, "")
		if err == nil {
			if err = w.s.Commit(ctx, name, active); err == nil {
				w.have[name] = true
			}
		}
		if err == nil && i%2 == 1 {
			if err = w.s.Remove(ctx, name); err == nil {
				delete(w.have, name)
			}
		}
		if err != nil {
			w.maybe = append(w.maybe, active, name)
			if !errdefs.IsUnavailable(err) && !errdefs.IsCanceled(err) {
				t.Errorf("a call under the end of the service: %v", err)
			}
			if i <= 3 {
				busy <- struct{}{}
			}
			return
		}
	}
}

func (w *worker) check(t *testing.T, s snapshots.Snapshotter) {
	t.Helper()
	there := map[string]bool{}
	must(t, s.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		if strings.HasPrefix(i.Name, w.name+"-") {
			there[i.Name] = true
		}
		return nil
	}))
	for name := range w.have {
		if !there[name] && !slices.Contains(w.maybe, name) {
			t.Errorf("%s was committed and is not there", name)
		}
	}
	for name := range there {
		if !w.have[name] && !slices.Contains(w.maybe, name) {
			t.Errorf("%s is there, which was removed or never made", name)
		}
	}
}

// TestActivation: layerd takes the socket that systemd hands over, tells systemd
// when it serves, and leaves the socket to the next.
func TestActivation(t *testing.T) {
	e := prepare(t, testenv.Scratch(t), "")
	e.write(e.settings, e.layerdConfig(""))
	l, err := net.Listen("unix", filepath.Join(e.dir, "layerd.sock"))
	must(t, err)
	defer l.Close()
	f, err := l.(*net.UnixListener).File()
	must(t, err)
	defer f.Close()
	states, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(e.dir, "notify"), Net: "unixgram"})
	must(t, err)
	defer states.Close()
	e.env = append(e.env, "LISTEN_FDS=1", "LISTEN_FDNAMES=layerd", "NOTIFY_SOCKET="+filepath.Join(e.dir, "notify"))
	for range 2 {
		e.inherit = f
		e.layerd = e.start("layerd", "sh", "-c", `LISTEN_PID=$$ exec layerd -c "$0"`, e.settings)
		b := make([]byte, 64)
		for _, want := range []string{"READY=1", "STOPPING=1"} {
			must(t, states.SetReadDeadline(time.Now().Add(patience)))
			n, err := states.Read(b)
			must(t, err)
			if string(b[:n]) != want {
				t.Errorf("state %q, want %q", b[:n], want)
			}
			if want == "READY=1" {
				if _, err := e.snapshotter("layerd-native").Stat(t.Context(), "key"); !errdefs.IsNotFound(err) {
					t.Errorf("by the socket that was handed over: %v", err)
				}
				must(t, e.layerd.cmd.Process.Signal(syscall.SIGTERM))
			}
		}
		e.layerd.end(syscall.SIGTERM)
	}
	if _, err := os.Stat(filepath.Join(e.dir, "layerd.sock")); err != nil {
		t.Errorf("systemd's socket: %v", err)
	}
}

// TestMetrics: calls, and what is in the store.
func TestMetrics(t *testing.T) {
	e := newLayerd(t, testenv.Scratch(t))
	s := e.snapshotter("layerd-native")
	_, err := s.Prepare(t.Context(), "key", "")
	must(t, err)
	if _, err := e.snapshotter("no-such-view").Stat(t.Context(), "key"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	c := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(e.dir, "metrics.sock"))
	}}}
	defer c.CloseIdleConnections()
	r, err := c.Get("http://layerd/metrics")
	must(t, err)
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	must(t, err)
	for _, want := range []string{
		`layerd_calls_total{code="OK",method="/containerd.services.snapshots.v1.Snapshots/Prepare",view="layerd-native"} 1`,
		`layerd_calls_total{code="NotFound",method="/containerd.services.snapshots.v1.Snapshots/Stat",view=""} 1`,
		`layerd_snapshots{view="layerd-native"} 1`, `layerd_store_up 1`, "layerd_store_free_bytes ",
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("lacks %s:\n%s", want, b)
		}
	}
}
