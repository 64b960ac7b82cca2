package devmapper

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/devmapper/metadata"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/testenv"
)

// thinCheckIn puts a thin_check before the real one, which does first what a shell is told, in
// a directory that it returns.
func (b *bench) thinCheckIn(first string) (dir string) {
	b.Helper()
	dir = testenv.Scratch(b)
	text := fmt.Sprintf("#!/bin/sh\ncd %s\n%s\nexec %s \"$@\"\n", dir, first, testenv.Program(b, "thin_check", "thin-provisioning-tools"))
	b.check(os.WriteFile(filepath.Join(dir, "thin_check"), []byte(text), 0o755))
	b.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return dir
}

// The pool's one metadata snapshot is free while thin_check runs: a Diff needs it.
func TestDiffWhileThinCheckRuns(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	base := b.create(1)
	b.write(base, "base", "base")
	b.commit(base)
	r := b.create(2, 1)
	b.write(r, "f", "x")
	dir := b.thinCheckIn("echo \"$@\" >began\ncat end")
	for _, pipe := range []string{"began", "end"} {
		b.check(syscall.Mkfifo(filepath.Join(dir, pipe), 0o600))
	}
	began, done := make(chan string, 1), make(chan error, 1)
	go func() {
		args, err := os.ReadFile(filepath.Join(dir, "began")) // waits for who writes
		began <- fmt.Sprint(string(args), err)
	}()
	go func() {
		found, err := b.Examine(b.Context(), drivers.ExamineOptions{})
		if err == nil && len(found) > 0 {
			err = fmt.Errorf("found %+v", found)
		}
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("ended without thin_check: %v", err)
	case args := <-began:
		if !strings.HasPrefix(args, "-m /proc/") {
			t.Errorf("thin_check %s", args)
		}
	}
	if s, err := b.pool.Status(); err != nil || s.HeldRoot != 0 {
		t.Errorf("while it runs: %+v, %v", s, err)
	}
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	if n, err := b.diffIn(ctx, base, r); err != nil || n == 0 {
		t.Errorf("diff: %d changes, %v", n, err)
	}
	b.check(os.WriteFile(filepath.Join(dir, "end"), nil, 0))
	b.check(<-done)
	b.remove(2, 1)
}

// Where there is no room for a copy of the metadata thin_check reads what the pool has.
func TestThinCheckWithoutRoomForACopy(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	dir := b.thinCheckIn("echo \"$@\" >args")
	s, err := b.pool.Status()
	b.check(err)
	ballast := b.leave(int64(s.MetadataUsed) * metadata.BlockSize * 2)
	b.finds("sound", drivers.ExamineOptions{})
	b.check(os.Remove(ballast))
	args, err := os.ReadFile(filepath.Join(dir, "args"))
	if want := "-m " + b.pool.MetadataPath() + "\n"; err != nil || string(args) != want {
		t.Errorf("thin_check %q, %v; want %q", args, err, want)
	}
}
