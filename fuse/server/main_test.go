package server_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/fuse/server"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// envServe makes the test binary a server: a test that calls into a mount of its
// own process may stop the very threads that ought to answer it.
const envServe = "LAYERCTL_TEST_SERVE"

func TestMain(m *testing.M) {
	if what := os.Getenv(envServe); what != "" {
		if err := serveTest(what); err != nil {
			fmt.Fprintln(os.Stderr, "server:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testenv.Main(m)
}

// setup is what a test's server serves.
type setup struct {
	Dir     string // holds l (or lowers), u, w and m
	Lowers  int    // l0 is the nearest; 0: one, l
	NoUpper bool
	Options server.Options
	Config  union.Config
	Flags   uintptr
	GoFuse  bool // served by go-fuse's own loop: what ours is compared with
	// HoldAt is a step of a change at which the server stops, the first time: it
	// writes to the fifo held and goes on when it has read from the fifo on.
	HoldAt string
}

func (s *setup) config() union.Config {
	c := s.Config
	for i := range s.Lowers {
		c.Lowers = append(c.Lowers, filepath.Join(s.Dir, fmt.Sprintf("l%d", i)))
	}
	if s.Lowers == 0 {
		c.Lowers = []string{filepath.Join(s.Dir, "l")}
	}
	if !s.NoUpper {
		c.Upper, c.Work = filepath.Join(s.Dir, "u"), filepath.Join(s.Dir, "w")
	}
	return c
}

func serveTest(what string) error {
	var s setup
	if err := gob.NewDecoder(base64.NewDecoder(base64.StdEncoding, strings.NewReader(what))).Decode(&s); err != nil {
		return err
	}
	sys.Umask(0)
	log := func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
	s.Options.Log = log
	srv := server.New(s.Options)
	c := s.config()
	c.Log, c.Invalidate, c.Step = log, srv.Invalidate, s.holder()
	u, err := union.Open(context.Background(), c)
	if err != nil {
		return err
	}
	if s.GoFuse {
		return serveGoFuse(u, s.Dir)
	}
	dev, err := server.Mount(filepath.Join(s.Dir, "m"), server.MountOptions{Source: "test", Type: "layerfs-test",
		Permissions: true, AllowOther: true, Flags: s.Flags})
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(u, dev) }()
	select {
	case err := <-served:
		return err
	case <-srv.Ready():
	}
	sayReady()
	go counts(srv.Counts)
	err = <-served
	return errors.Join(err, u.Close())
}

// holder is a Config.Step that does what HoldAt says.
func (s *setup) holder() func(string) error {
	if s.HoldAt == "" {
		return nil
	}
	var held atomic.Bool
	return func(step string) error {
		if step != s.HoldAt || !held.CompareAndSwap(false, true) {
			return nil
		}
		if err := os.WriteFile(filepath.Join(s.Dir, "held"), []byte("held"), 0); err != nil {
			return err
		}
		_, err := os.ReadFile(filepath.Join(s.Dir, "on"))
		return err
	}
}

func sayReady() {
	pipe := os.NewFile(3, "ready")
	fmt.Fprintln(pipe, "up")
	pipe.Close()
}

// counts answers each byte on descriptor 4 with the server's counts.
func counts(of func() server.Counts) {
	ask, answer := os.NewFile(4, "ask"), os.NewFile(5, "answer")
	for b := make([]byte, 1); ; {
		if _, err := ask.Read(b); err != nil {
			return
		}
		_ = json.NewEncoder(answer).Encode(of())
	}
}

// mounted is a union that a child process serves.
type mounted struct {
	setup
	t          testing.TB
	cmd        *exec.Cmd
	ask        *os.File
	answers    *json.Decoder
	log        *strings.Builder
	gone       bool
	expect     string // what the server says
	mountpoint string // if that is not m
}

// dirs makes the directories of a union on a file system of the kind.
func dirs(t testing.TB, kind string) string {
	dir := testenv.FS(t, kind)
	must(t, os.Chmod(filepath.Dir(dir), 0o711)) // tests come as nobody, too
	for _, d := range []string{"l", "u", "w", "m"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	return dir
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serve mounts at s.Dir/m until the end of the test.
func serve(t testing.TB, s setup) *mounted {
	t.Helper()
	var what bytes.Buffer
	must(t, gob.NewEncoder(&what).Encode(s)) // which leaves functions out
	m := &mounted{setup: s, t: t, log: &strings.Builder{}}
	ready, readyW, err := os.Pipe()
	must(t, err)
	defer ready.Close()
	askR, ask, err := os.Pipe()
	must(t, err)
	answer, answerW, err := os.Pipe()
	must(t, err)
	m.ask, m.answers = ask, json.NewDecoder(answer)
	m.cmd = exec.Command("/proc/self/exe")
	m.cmd.Env = append(os.Environ(), envServe+"="+base64.StdEncoding.EncodeToString(what.Bytes()))
	m.cmd.Stderr = m.log
	m.cmd.ExtraFiles = []*os.File{readyW, askR, answerW}
	must(t, m.cmd.Start())
	for _, f := range m.cmd.ExtraFiles {
		f.Close()
	}
	t.Cleanup(func() {
		m.stop()
		ask.Close()
		answer.Close()
	})
	if said, _ := io.ReadAll(ready); string(said) != "up\n" {
		m.stop()
		t.Fatalf("the server did not start:\n%s", m.log)
	}
	return m
}

// stop unmounts, and fails the test if the server does not end well of it.
func (m *mounted) stop() {
	if m.gone {
		return
	}
	m.gone = true
	switch err := sys.Umount(m.at(), 0); {
	case errors.Is(err, syscall.EBUSY):
		testenv.Unmount(m.t, m.at())
	case err != nil && !errors.Is(err, syscall.EINVAL): // a test has unmounted it
		m.t.Errorf("%v", err)
	}
	kill := time.AfterFunc(patience, func() { _ = m.cmd.Process.Kill() })
	err := m.cmd.Wait()
	kill.Stop()
	if err != nil {
		m.t.Errorf("server: %v", err)
	}
	said := m.log.String()
	if m.expect != "" && !strings.Contains(said, m.expect) {
		m.t.Errorf("the server did not say %q but %q", m.expect, said)
	} else if m.expect == "" && said != "" {
		m.t.Errorf("the server said:\n%s", said)
	}
}

// wantLog makes it an error if the server does not say what, and none if it does.
func (m *mounted) wantLog(what string) { m.expect = what }

// asNobody runs a shell command without any privilege.
func asNobody(t testing.TB, script string) string {
	t.Helper()
	return asUser(t, 65534, script)
}

func asUser(t testing.TB, id uint32, script string) string {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// patience is how long anything may take that happens at once on an idle machine.
const patience = 60 * time.Second

// at is the mountpoint.
func (m *mounted) at() string {
	if m.mountpoint != "" {
		return m.mountpoint
	}
	return m.path("")
}

func (m *mounted) path(name string) string { return filepath.Join(m.Dir, "m", name) }

func (m *mounted) counts() server.Counts {
	m.t.Helper()
	_, err := m.ask.Write([]byte{1})
	must(m.t, err)
	var c server.Counts
	must(m.t, m.answers.Decode(&c))
	return c
}
