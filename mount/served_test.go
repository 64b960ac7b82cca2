package mount

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestEndedFusermountIsUndone: it is ended when it has mounted and not said so.
func TestEndedFusermountIsUndone(t *testing.T) {
	dir := t.TempDir()
	script := "#!/bin/sh\necho \"$*\" >>\"$CALLS\"\ncase $1 in -o) exec sleep 1000;; esac\n"
	t.Setenv("CALLS", filepath.Join(dir, "calls"))
	if err := os.WriteFile(filepath.Join(dir, "fusermount3"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("TMPDIR", dir)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer cancel()
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if b, _ := os.ReadFile(filepath.Join(dir, "calls")); len(b) > 0 {
				return
			}
		}
	}()
	p := &plan{fstype: "fuse-layerfs", source: "/layer"}
	if root, dev, err := p.byFusermount(ctx); err == nil {
		root.Close()
		dev.Close()
		t.Fatal("no error")
	}
	calls, err := os.ReadFile(filepath.Join(dir, "calls"))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(calls)), "\n")
	if len(lines) != 2 || !strings.HasPrefix(lines[1], "-u -z -- "+dir+"/fuse-") {
		t.Errorf("calls: %q", lines)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "fuse-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
