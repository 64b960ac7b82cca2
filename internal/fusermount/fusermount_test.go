package fusermount

import (
	"context"
	"os"
	"path/filepath"
	"testing"
)

// TestProgramThatSendsNothing: it says that it has mounted and sends no descriptor.
func TestProgramThatSendsNothing(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	if f, err := Mount(context.Background(), dir, nil); err == nil {
		f.Close()
		t.Error("no descriptor, no error")
	}
}
