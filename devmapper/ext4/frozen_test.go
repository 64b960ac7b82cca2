package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
)

// frozen is a copy of the disk of a file system that is mounted, as a snapshot by
// device-mapper is: frozen, and then let go on.
func (d disk) frozen(dir string) disk {
	d.Helper()
	freeze := testenv.Program(d, "fsfreeze", "util-linux")
	if out, err := exec.Command(freeze, "--freeze", dir).CombinedOutput(); err != nil {
		d.Fatalf("fsfreeze: %v\n%s", err, out)
	}
	defer func() {
		if out, err := exec.Command(freeze, "--unfreeze", dir).CombinedOutput(); err != nil {
			d.Fatalf("fsfreeze: %v\n%s", err, out)
		}
	}()
	return d.copy()
}

// TestSnapshotsOfAFileSystemInUse: files are written through mappings and
// descriptors that stay open over several snapshots, and some have no name any more.
// What two snapshots differ by is found, and needs no walk.
func TestSnapshotsOfAFileSystemInUse(t *testing.T) {
	testenv.Leaks(t)
	rnd := rand.New(rand.NewPCG(testenv.Number(t, "LAYERCTL_SEED", rand.Uint64()>>1), 6))
	const files, size = 12, 64 << 10
	d := newDisk(t, 48<<20)
	d.change(func(dir string) {
		var maps [][]byte
		var open []*os.File
		for n := range files {
			name := fmt.Sprintf("%s/dir%d/file%d", dir, n%3, n)
			d.file(name, bytes.Repeat([]byte{byte(n)}, size))
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			d.check(err)
			m, err := syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
			d.check(err)
			maps, open = append(maps, m), append(open, f)
		}
		defer func() {
			for n := range files {
				d.check(errors.Join(syscall.Munmap(maps[n]), open[n].Close()))
			}
		}()
		last := d.frozen(dir)
		for round := range 4 {
			n := rnd.IntN(files)
			maps[n][rnd.IntN(size)]++
			n = rnd.IntN(files)
			_, err := open[n].WriteAt([]byte{byte(rnd.Uint32())}, rnd.Int64N(size))
			d.check(err)
			if n = rnd.IntN(files); round%2 == 1 {
				d.check(open[n].Truncate(size + int64(rnd.IntN(size))))
				err := os.Remove(open[n].Name())
				if err != nil && !os.IsNotExist(err) {
					t.Fatal(err)
				}
			}
			next := d.frozen(dir)
			compare(t, fmt.Sprint("round ", round), last, next, differences(last, next, 4096))
			last = next
		}
	})
}
