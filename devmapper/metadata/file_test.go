package metadata

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// TestFileReadsPastTheCache: what was written to a device from below is seen, though
// the pages of the device would be cached as long as it is open.
func TestFileReadsPastTheCache(t *testing.T) {
	testenv.Root(t)
	testenv.Leaks(t)
	im := small(t)
	name := filepath.Join(testenv.Scratch(t), "metadata")
	write := func() {
		if err := os.WriteFile(name, im.b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write()
	l, err := sys.AttachLoop(name, sys.LoopOptions{Autoclear: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := OpenFile(l.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for transaction := range uint64(3) {
		le.PutUint64(im.block(0)[48:], transaction)
		im.seal(0, superblockXor)
		write()
		p, err := Open(f)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "transaction", p.Superblock().Transaction, transaction)
		if err := readAll(p); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFileReadsFiles(t *testing.T) {
	im := small(t)
	name := filepath.Join(t.TempDir(), "metadata")
	if err := os.WriteFile(name, im.b, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := OpenFile(name)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Open(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := readAll(p); err != nil {
		t.Error(err)
	}
	for range 100 {
		if p := alignedPage(); len(p) != BlockSize || reflect.ValueOf(p).Pointer()%BlockSize != 0 {
			t.Fatalf("%d bytes at %#x", len(p), reflect.ValueOf(p).Pointer())
		}
	}
	part := make([]byte, 8)
	if n, err := f.ReadAt(part, 32); n != 8 || err != nil || le.Uint64(part) != magic {
		t.Errorf("%d, %v: %x", n, err, part)
	}
	if n, err := f.ReadAt(part, int64(len(im.b))); n != 0 || err == nil {
		t.Errorf("beyond the end: %d, %v", n, err)
	}
	if err := errors.Join(f.Close(), f.Close()); err != nil {
		t.Error(err)
	}
	if _, err := OpenFile(name + "x"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("no file: %v", err)
	}
}
