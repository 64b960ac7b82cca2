package testenv

import (
	"debug/elf"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
)

var skips struct {
	mu     sync.Mutex
	byText map[string]int // guarded by mu
}

func count(reason string) {
	skips.mu.Lock()
	defer skips.mu.Unlock()
	if skips.byText == nil {
		skips.byText = map[string]int{}
	}
	skips.byText[reason]++
}

func printSkips(w io.Writer) {
	skips.mu.Lock()
	defer skips.mu.Unlock()
	for _, reason := range slices.Sorted(maps.Keys(skips.byText)) {
		fmt.Fprintf(w, "testenv: %d skipped: %s\n", skips.byText[reason], reason)
	}
}

// Skip skips the test because this machine lacks what a complete one has. With
// LAYERCTL_EXPECT=root it fails the test: the machine was promised complete.
func Skip(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv(envExpect) == "root" {
		t.Fatalf("must not skip here (%s=root): %s", envExpect, reason)
	}
	Optional(t, reason)
}

// Optional skips the test because of something that no machine needs to have:
// a kernel built otherwise, test images that nobody made.
func Optional(t testing.TB, reason string) {
	t.Helper()
	count(reason)
	t.Skip(reason)
}

// Slow skips a test with -short, which is how CI runs tests once more under the
// race detector: it takes long, and no two goroutines of this process share
// anything in it that other tests do not cover.
func Slow(t testing.TB) {
	t.Helper()
	if testing.Short() {
		Optional(t, "slow, and one goroutine's work: not with -short")
	}
}

// Root skips the test unless it runs as root in the private mount namespace of
// Main.
func Root(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		Skip(t, "needs root")
	}
	if !inPrivateNS() {
		t.Fatal("the package has no TestMain with testenv.Main: the test would mount on the host")
	}
}

// Program returns the path of a program that Debian has in pkg, or skips.
func Program(t testing.TB, name, pkg string) string {
	t.Helper()
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
		if p, err := exec.LookPath(dir + name); err == nil {
			return p
		}
	}
	Skip(t, "no "+name+" (Debian: "+pkg+")")
	return ""
}

// Busybox returns the path of a statically linked busybox, or skips.
func Busybox(t testing.TB) string {
	t.Helper()
	p := Program(t, "busybox", "busybox-static")
	f, err := elf.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, s := range f.Progs {
		if s.Type == elf.PT_INTERP {
			Skip(t, p+" is not statically linked (Debian: busybox-static)")
		}
	}
	return p
}
