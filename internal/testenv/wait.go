package testenv

import (
	"os"
	"syscall"
	"testing"
	"time"
)

// patience is more than anything takes that does come, on a loaded machine.
const patience = time.Minute

// Eventually waits for something that another process, or the kernel, does later, and
// ends the test if it never comes.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// Killed reports whether a process ended by SIGKILL.
func Killed(p *os.ProcessState) bool {
	if p == nil {
		return false // it did not start
	}
	s, ok := p.Sys().(syscall.WaitStatus)
	return ok && s.Signal() == syscall.SIGKILL
}
