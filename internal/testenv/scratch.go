package testenv

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
)

// scratch is the directory for loop files and mountpoints; immutable once the
// tests run.
var scratch string

const (
	scratchPrefix = "lt"
	ownerFile     = ".owner" // in each scratch directory, locked for its owner's life
)

// makeScratch makes a directory with a short name, in memory if there is such
// a place: overlay tests put many paths into one page. cleanup removes it.
func makeScratch() (dir string, cleanup func(), err error) {
	for _, base := range []string{"/dev/shm", os.TempDir()} {
		sweep(base)
		if dir, cleanup, err = makeScratchIn(base); err == nil {
			return dir, cleanup, nil
		}
	}
	return "", nil, err
}

func makeScratchIn(base string) (dir string, cleanup func(), err error) {
	if dir, err = os.MkdirTemp(base, scratchPrefix); err != nil {
		return "", nil, err
	}
	lock, err := sys.LockFile(filepath.Join(dir, ownerFile), sys.LockExclusive)
	if err != nil {
		os.RemoveAll(dir)
		return "", nil, err
	}
	cleanup = func() {
		os.RemoveAll(dir)
		lock.Close()
	}
	return dir, cleanup, os.Chmod(dir, 0o711) // InUserNS gives somebody else a directory inside
}

// sweep removes what processes left that were killed: directories whose owner
// file exists and is not locked any more.
func sweep(base string) {
	owners, _ := filepath.Glob(filepath.Join(base, scratchPrefix+"*", ownerFile))
	for _, o := range owners {
		f, err := sys.Open(o, sys.O_RDONLY|sys.O_NOFOLLOW, 0)
		if err != nil {
			continue // another user's, or just gone
		}
		lock, err := f.TryLock(sys.LockExclusive)
		f.Close()
		if err == nil {
			os.RemoveAll(filepath.Dir(o))
			lock.Close()
		}
	}
}

func openScratch() (cleanup func(), err error) {
	if scratch = os.Getenv(envScratch); scratch != "" && inPrivateNS() {
		return func() {}, nil // the first process removes it
	}
	scratch, cleanup, err = makeScratch()
	return cleanup, err
}

// ScratchDir is a directory that is removed after the last test of the package:
// for what several tests share.
func ScratchDir() string { return scratch }

// Scratch returns a new directory with a short path (some 20 bytes), in memory
// where possible, removed at the end of the test.
func Scratch(t testing.TB) string {
	t.Helper()
	d, err := os.MkdirTemp(scratch, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(d); err != nil {
			t.Errorf("scratch directory: %v", err)
		}
	})
	return d
}
