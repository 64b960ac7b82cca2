package image_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/internal/testenv"
)

func TestMain(m *testing.M) {
	if job := os.Getenv(envJob); job != "" {
		os.Exit(runJob(job))
	}
	testenv.Main(m)
}

// newStore makes a store of the test.
func newStore(t testing.TB) *image.Store {
	t.Helper()
	s, err := image.Open(filepath.Join(testenv.Scratch(t), "images"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// noLeftovers checks that nothing half-made is in a store: no ingest, no
// temporary file.
func noLeftovers(t testing.TB, dir string) {
	t.Helper()
	for _, pattern := range []string{"ingest/*", ".*"} {
		if left, _ := filepath.Glob(filepath.Join(dir, pattern)); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

func blobCount(t testing.TB, dir string) int {
	t.Helper()
	names, err := os.ReadDir(filepath.Join(dir, "blobs/sha256"))
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}
