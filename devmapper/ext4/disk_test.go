package ext4

import (
	"bytes"
	"errors"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
)

// disk is a file with an ext4 on it, which is not mounted.
type disk struct {
	testing.TB
	name string
}

func newDisk(t testing.TB, size int64, mkfs ...string) disk {
	t.Helper()
	d := disk{t, filepath.Join(testenv.Scratch(t), "a")}
	d.check(errors.Join(os.WriteFile(d.name, nil, 0o600), os.Truncate(d.name, size)))
	d.format(mkfs...)
	return d
}

func (d disk) format(mkfs ...string) {
	d.Helper()
	args := append([]string{"-q", "-F", "-t", "ext4"}, append(mkfs, d.name)...)
	if out, err := exec.Command(testenv.Program(d, "mke2fs", "e2fsprogs"), args...).CombinedOutput(); err != nil {
		d.Fatalf("mke2fs %v: %v\n%s", args, err, out)
	}
}

func (d disk) check(err error) {
	d.Helper()
	if err != nil {
		d.Fatal(err)
	}
}

// open opens the disk for reading.
func (d disk) open() *os.File {
	d.Helper()
	f, err := os.Open(d.name)
	d.check(err)
	return f
}

// copy is what a snapshot would be.
func (d disk) copy() disk {
	d.Helper()
	c := disk{d.TB, filepath.Join(testenv.Scratch(d), "c")}
	from := d.open()
	defer from.Close()
	st, err := from.Stat()
	d.check(err)
	to, err := os.Create(c.name)
	d.check(err)
	defer to.Close()
	d.check(to.Truncate(st.Size()))
	buf, zeros := make([]byte, 1<<16), make([]byte, 1<<16)
	for off := nextData(0, len(buf), from); off < st.Size(); off = nextData(off+int64(len(buf)), len(buf), from) {
		n, err := from.ReadAt(buf, off)
		if err != nil && err != io.EOF {
			d.Fatal(err)
		}
		if !bytes.Equal(buf[:n], zeros[:n]) {
			_, err := to.WriteAt(buf[:n], off)
			d.check(err)
		}
	}
	return c
}

// nextData is the first block at or after off that is not a hole in all of the files.
func nextData(off int64, block int, files ...*os.File) int64 {
	const seekData = 3
	next := int64(math.MaxInt64)
	for _, f := range files {
		at, err := f.Seek(off, seekData)
		switch {
		case err == nil:
			next = min(next, at/int64(block)*int64(block))
		case !errors.Is(err, syscall.ENXIO): // a device
			next = off
		}
	}
	return max(next, off)
}

// mount shows a disk until the returned function is called.
func (d disk) mount(readOnly bool) (dir string, unmount func()) {
	d.Helper()
	testenv.Root(d)
	device, err := sys.StatPath(d.name)
	d.check(err)
	source := d.name
	if device.IsReg() {
		loop, err := sys.AttachLoop(d.name, sys.LoopOptions{Autoclear: true})
		d.check(err)
		defer loop.Close()
		source = loop.Name()
	}
	dir, err = os.MkdirTemp(testenv.Scratch(d), "m")
	d.check(err)
	flags, data := uintptr(0), ""
	if readOnly {
		flags, data = sys.MS_RDONLY, "noload"
	}
	err = sys.Mount(source, dir, "ext4", flags, data)
	if errors.Is(err, syscall.EINVAL) && strings.HasSuffix(d.Name(), "/quota") {
		testenv.Optional(d, "the kernel is built without quota: make test-vm")
	}
	d.check(err)
	return dir, func() {
		d.Helper()
		testenv.Unmount(d, dir)
	}
}

// change mounts the disk for a while.
func (d disk) change(do func(dir string)) {
	d.Helper()
	dir, unmount := d.mount(false)
	defer unmount()
	do(dir)
}

// fsck fails if the tests' disk is not sound.
func (d disk) fsck() {
	d.Helper()
	if out, err := exec.Command(testenv.Program(d, "e2fsck", "e2fsprogs"), "-f", "-n", d.name).CombinedOutput(); err != nil {
		d.Fatalf("e2fsck: %v\n%s", err, out)
	}
}

// grow makes the disk and its file system larger: by the kernel where it lets us, or by
// resize2fs.
func (d disk) grow(size int64, offline bool) {
	d.Helper()
	d.check(os.Truncate(d.name, size))
	if !offline {
		d.change(func(dir string) {
			root, err := sys.OpenDir(dir)
			d.check(err)
			defer root.Close()
			s, err := root.Statfs()
			d.check(err)
			err = root.GrowExt4(uint64(size / s.BlockSize))
			offline = errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EOPNOTSUPP) // root in a container; sparse_super2
			if !offline {
				d.check(err)
			}
		})
	}
	if offline {
		if out, err := exec.Command(testenv.Program(d, "resize2fs", "e2fsprogs"), "-f", d.name).CombinedOutput(); err != nil {
			d.Fatalf("resize2fs: %v\n%s", err, out)
		}
	}
}

// differences are the blocks of a size at which two disks differ; what only one has differs
// where it is not zero.
func differences(a, b disk, block int) []Range {
	a.Helper()
	var out []Range
	x, y := make([]byte, block), make([]byte, block)
	f, g := a.open(), b.open()
	defer f.Close()
	defer g.Close()
	for off := nextData(0, block, f, g); ; off = nextData(off+int64(block), block, f, g) {
		if off == math.MaxInt64 {
			return out
		}
		clear(x)
		clear(y)
		n, err := f.ReadAt(x, off)
		if err != nil && err != io.EOF {
			a.Fatal(err)
		}
		m, err := g.ReadAt(y, off)
		if err != nil && err != io.EOF {
			a.Fatal(err)
		}
		if n+m == 0 {
			return out
		}
		if bytes.Equal(x, y) {
			continue
		}
		if l := len(out); l > 0 && out[l-1].Offset+out[l-1].Length == off {
			out[l-1].Length += int64(block)
		} else {
			out = append(out, Range{off, int64(block)})
		}
	}
}

// changed asks for the candidates of two disks.
func changed(a, b disk, ranges []Range) (*layer.Candidates, error) {
	a.Helper()
	f, g := a.open(), b.open()
	defer f.Close()
	defer g.Close()
	return Changed(a.Context(), f, g, ranges)
}
