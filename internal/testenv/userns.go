package testenv

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

const (
	envUserNS = "LAYERCTL_TESTENV_USERNS" // the test that runs in a user namespace
	nobody    = 65534
)

// InUserNS runs the test as somebody without privileges who is root in a user
// and mount namespace of his own. It returns true in there. In the first process
// it waits for that run, fails if it fails, and returns false: the caller
// returns then.
//
//	func TestX(t *testing.T) {
//		if !testenv.InUserNS(t) {
//			return
//		}
//		...
func InUserNS(t *testing.T) bool {
	t.Helper()
	if os.Getenv(envUserNS) == t.Name() {
		return true
	}
	dir := Scratch(t)
	uid, gid := os.Getuid(), os.Getgid()
	if uid == 0 {
		uid, gid = nobody, nobody
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$", "-test.v")
	cmd.Env = append(os.Environ(), envUserNS+"="+t.Name(), envHostNS+"="+mountNS(), envScratch+"="+dir, "TMPDIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}},
		Credential:  &syscall.Credential{Uid: 0, Gid: 0, NoSetGroups: true},
		Pdeathsig:   syscall.SIGKILL,
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	switch {
	case errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EINVAL):
		Skip(t, "no user namespaces here: "+err.Error())
	case err != nil:
		t.Errorf("in the user namespace: %v\n%s", err, out.Bytes())
	case bytes.Contains(out.Bytes(), []byte("--- SKIP")):
		Skip(t, "in the user namespace: "+skipReason(out.String()))
	case !bytes.Contains(out.Bytes(), []byte("--- PASS: "+t.Name())):
		t.Errorf("the test did not run in the user namespace:\n%s", out.Bytes())
	default:
		t.Logf("in the user namespace:\n%s", out.Bytes())
	}
	return false
}

// skipReason finds the line that Main printed.
func skipReason(out string) string {
	for line := range strings.Lines(out) {
		if _, why, ok := strings.Cut(line, " skipped: "); ok {
			return strings.TrimSpace(why)
		}
	}
	return "unknown reason"
}
