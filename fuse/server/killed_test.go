package server_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/fuse/union"
	"golang.org/x/sys/unix"
)

// openDuringCopyUp opens a large file of the lower for writing, in a process of its
// own that gets a signal when a part of the data is copied, and returns how the
// process ended. script may say what comes before the open.
func openDuringCopyUp(t *testing.T, m *mounted, script string, sig syscall.Signal) syscall.WaitStatus {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", script+": >>"+m.path("big"))
	var out bytes.Buffer
	cmd.Stderr = &out
	held, err := os.OpenFile(filepath.Join(m.Dir, "held"), os.O_RDWR, 0) // which waits for nobody
	must(t, err)
	defer held.Close()
	must(t, held.SetReadDeadline(time.Now().Add(patience)))
	must(t, cmd.Start())
	_, err = held.Read(make([]byte, 4))
	must(t, err)
	must(t, cmd.Process.Signal(sig))
	must(t, os.WriteFile(filepath.Join(m.Dir, "on"), []byte("on"), 0))
	_ = cmd.Wait()
	if out.Len() > 0 {
		t.Errorf("%v: %s", sig, out.String())
	}
	return cmd.ProcessState.Sys().(syscall.WaitStatus)
}

// serveBig is a mount of a lower with a large file, whose copy-up is held.
func serveBig(t *testing.T, c union.Config) (*mounted, []byte) {
	t.Helper()
	dir := dirs(t, "ext4")
	big := bytes.Repeat([]byte("0123456789abcdef"), 20<<20/16)
	must(t, os.WriteFile(filepath.Join(dir, "l", "big"), big, 0o644))
	must(t, unix.Mkfifo(filepath.Join(dir, "held"), 0o600))
	must(t, unix.Mkfifo(filepath.Join(dir, "on"), 0o600))
	return serve(t, setup{Dir: dir, Options: policyA, Config: c, HoldAt: "copy-up: part of the data"}), big
}

// wantBig says that the mount shows the file as it was, that work is empty, and
// that the file can be written.
func wantBig(t *testing.T, m *mounted, big []byte) {
	t.Helper()
	if got, err := os.ReadFile(m.path("big")); err != nil || !bytes.Equal(got, big) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if left, err := os.ReadDir(filepath.Join(m.Dir, "w", "work")); err != nil || len(left) > 0 {
		t.Errorf("left in work: %v %v", left, err)
	}
	f := open(t, m.path("big"), os.O_RDWR)
	writeAt(t, f, "X")
	must(t, f.Close())
	big[0] = 'X'
	if got, err := os.ReadFile(m.path("big")); err != nil || !bytes.Equal(got, big) {
		t.Errorf("after a write: %d bytes, %v", len(got), err)
	}
}

// A copy-up that nobody waits for any more ends, and leaves nothing; the kernel's
// overlayfs does the same.
func TestCopyUpEndsWhenItsCallerIsKilled(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			m, big := serveBig(t, union.Config{})
			if ended := openDuringCopyUp(t, m, "", sig); ended.Signal() != sig {
				t.Errorf("ended by %v, %d", ended.Signal(), ended)
			}
			if _, err := os.Lstat(filepath.Join(m.Dir, "u", "big")); !os.IsNotExist(err) {
				t.Errorf("it is in the upper: %v", err)
			}
			wantBig(t, m, big)
		})
	}
}

// The same for a file whose metadata is in the upper already.
func TestFillingInEndsWhenItsCallerIsKilled(t *testing.T) {
	m, big := serveBig(t, union.Config{Metacopy: true, Redirect: union.RedirectOn})
	must(t, os.Chmod(m.path("big"), 0o600))
	if ended := openDuringCopyUp(t, m, "", syscall.SIGKILL); ended.Signal() != syscall.SIGKILL {
		t.Errorf("ended by %v, %d", ended.Signal(), ended)
	}
	if _, err := unix.Lgetxattr(filepath.Join(m.Dir, "u", "big"), "trusted.overlay.metacopy", nil); err != nil {
		t.Errorf("metacopy: %v", err)
	}
	wantBig(t, m, big)
}

// A signal that its caller survives is no reason: open(2) does not say EINTR.
func TestCopyUpGoesOnAfterASignalThatIsHandled(t *testing.T) {
	m, big := serveBig(t, union.Config{})
	if ended := openDuringCopyUp(t, m, "trap : USR1; ", syscall.SIGUSR1); ended.ExitStatus() != 0 {
		t.Errorf("exit status %d", ended.ExitStatus())
	}
	if st, err := os.Lstat(filepath.Join(m.Dir, "u", "big")); err != nil || st.Size() != int64(len(big)) {
		t.Errorf("not in the upper: %v", err)
	}
	wantBig(t, m, big)
}

// Who makes, renames or removes something waits for no data of another file in the same
// directory to be copied up; who wants the same file does, and finds it whole.
func TestNobodyWaitsForACopyUpBeside(t *testing.T) {
	m, big := serveBig(t, union.Config{})
	held, err := os.OpenFile(filepath.Join(m.Dir, "held"), os.O_RDWR, 0)
	must(t, err)
	defer held.Close()
	must(t, held.SetReadDeadline(time.Now().Add(patience)))
	run := func(script string) *exec.Cmd {
		cmd := exec.Command("/bin/sh", "-e", "-c", script)
		cmd.Dir = m.path("")
		must(t, cmd.Start())
		return cmd
	}
	first := run(": >>big")
	_, err = held.Read(make([]byte, 4))
	must(t, err)
	second := run("chmod 600 big")
	beside := run("echo x >new; mv new other; mkdir d; mv other d; rm d/other; ls -l big >d/list; head -c 16 big >>d/list")
	ended := make(chan error, 1)
	go func() { ended <- beside.Wait() }()
	select {
	case err = <-ended:
	case <-time.After(patience):
		t.Error("what is done beside waits for the copy-up")
		defer func() { <-ended }()
	}
	must(t, err)
	if _, err := os.Lstat(filepath.Join(m.Dir, "u", "big")); !os.IsNotExist(err) {
		t.Errorf("it is in the upper already: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(m.Dir, "on"), []byte("on"), 0))
	must(t, first.Wait())
	must(t, second.Wait())
	if st, err := os.Lstat(filepath.Join(m.Dir, "u", "big")); err != nil || st.Size() != int64(len(big)) || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	wantBig(t, m, big)
}
