package btrfs

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/btrfs/send"
	"github.com/layerctl/layerctl/drivers"
)

// disturbed reads a stream that does not fit a pipe, and lets something happen at each
// command, when the kernel waits for the reader.
func disturbed(t *testing.T, happens func()) {
	t.Helper()
	h := fixture(t)
	base := h.script(drivers.Ref{}, "")
	r, tree := h.create(base, drivers.CreateOptions{})
	for i := range 1000 {
		h.must(os.WriteFile(fmt.Sprintf("%s/%s%d", tree, strings.Repeat("n", 200), i), nil, 0o644))
	}
	h.commit(r)
	a, b, done := h.sendTrees(base, r)
	defer done()
	files := 0
	err := eachCommand(h.ctx, a.fd, b.fd, func() func(*send.Command) {
		files = 0
		return func(c *send.Command) {
			if happens(); c.Verb == send.MKFILE {
				files++
			}
		}
	})
	if err != nil || files != 1000 {
		t.Errorf("%d of 1000 files, %v", files, err)
	}
}

// The kernel began the stream anew, in the middle of it, when a signal met it while it
// waited for the reader, as the Go runtime's do: the diff of a few hundred changes could
// end with a damaged stream.
func TestDiffAmongSignals(t *testing.T) {
	disturbed(t, func() {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks { // one may have ended
			id, _ := strconv.Atoi(task.Name())
			_, _, _ = syscall.RawSyscall(syscall.SYS_TGKILL, uintptr(os.Getpid()), uintptr(id), uintptr(syscall.SIGURG))
		}
	})
}

// So it does when the process is stopped, which nothing can prevent.
func TestDiffOfAStoppedProcess(t *testing.T) {
	commands := 0
	disturbed(t, func() {
		if commands++; commands != 5 {
			return
		}
		stop := `kill -STOP $PPID
			n=0
			while cut -d " " -f 3 /proc/$PPID/task/*/stat | grep -qv "[Tt]" && [ $((n += 1)) -lt 3000 ]; do sleep 0.01; done
			kill -CONT $PPID`
		if out, err := exec.Command("sh", "-c", stop).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	if commands < 1000 {
		t.Error("nothing was stopped")
	}
}
