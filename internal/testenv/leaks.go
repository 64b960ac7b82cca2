package testenv

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// inventory is what a process can leave behind.
type inventory map[string]bool

// settle bounds how long leaked waits for the kernel to finish what it does
// later by itself: clearing a loop device, ending a killed child.
const settle = 10 * time.Second

// takeInventory lists this process's mounts, descriptors and children, and the
// loop devices on files of the scratch directory, each in words.
func takeInventory() inventory {
	v := inventory{}
	v.mounts()
	v.descriptors()
	v.children()
	v.loops()
	return v
}

func (v inventory) mounts() {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 {
			v[fmt.Sprintf("mount %s at %s", f[0], f[4])] = true
		}
	}
}

// runtimeFiles are descriptors that the Go runtime opens at some time and keeps.
var runtimeFiles = []string{"anon_inode:[eventpoll]", "anon_inode:[eventfd]", "/dev/null", "/sys/fs/cgroup/"}

func (v inventory) descriptors() {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, n := range names {
		to, err := os.Readlink("/proc/self/fd/" + n.Name())
		if err != nil || strings.HasPrefix(to, fmt.Sprintf("/proc/%d/fd", os.Getpid())) {
			continue // closed meanwhile: the descriptor of this very listing
		}
		if !slices.ContainsFunc(runtimeFiles, func(s string) bool { return strings.HasPrefix(to, s) }) {
			v[fmt.Sprintf("descriptor %s of %s", n.Name(), to)] = true
		}
	}
}

func (v inventory) children() {
	lists, _ := filepath.Glob("/proc/self/task/*/children")
	for _, l := range lists {
		b, _ := os.ReadFile(l)
		for pid := range strings.FieldsSeq(string(b)) {
			comm, _ := os.ReadFile("/proc/" + pid + "/comm")
			v[fmt.Sprintf("child process %s (%s)", pid, strings.TrimSpace(string(comm)))] = true
		}
	}
}

func (v inventory) loops() {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if file := strings.TrimSpace(string(b)); err == nil && scratch != "" && strings.HasPrefix(file, scratch+"/") {
			v[fmt.Sprintf("loop device %s on %s", strings.Split(f, "/")[3], file)] = true
		}
	}
}

// leaked returns what is there now and was not then, sorted.
func (v inventory) leaked() []string {
	for end := time.Now().Add(settle); ; time.Sleep(10 * time.Millisecond) {
		now := takeInventory()
		maps.DeleteFunc(now, func(what string, _ bool) bool { return v[what] })
		if len(now) == 0 || time.Now().After(end) {
			return slices.Sorted(maps.Keys(now))
		}
	}
}

// Leaks fails the test if at its end the process has a mount, a descriptor, a
// child or a loop device that it does not have now. Call it before anything
// that registers a cleanup.
func Leaks(t testing.TB) {
	t.Helper()
	before := takeInventory()
	t.Cleanup(func() {
		for _, what := range before.leaked() {
			t.Errorf("left behind: %s", what)
		}
	})
}
