package uniontest

import (
	"os/exec"
	"strings"
)

// executes runs a program of the mount and compares what it prints.
func (k *Kit) executes(p, want string) {
	k.Helper()
	out, err := exec.Command(k.p(p)).CombinedOutput()
	k.ok(err)
	equal(k, "output", strings.TrimSpace(string(out)), want)
}

func startSleep(path string) *exec.Cmd { return exec.Command(path, "600") }
