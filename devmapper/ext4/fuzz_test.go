package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
)

// unmounted makes two small file systems of one history without mounting them.
func unmounted(t testing.TB, features string) (a, b []byte) {
	t.Helper()
	tree := filepath.Join(testenv.Scratch(t), "tree")
	x := disk{t, ""}
	for n := range 40 {
		x.file(fmt.Sprintf("%s/d%d/file%d", tree, n%4, n), bytes.Repeat([]byte{byte(n)}, n*100))
	}
	x.check(os.Symlink(strings.Repeat("long/", 30), tree+"/link"))
	x.check(os.Link(tree+"/d0/file0", tree+"/d1/other"))
	from := newDisk(t, 1<<20, "-b", "1024", "-N", "256", "-O", "^resize_inode,^has_journal,"+features, "-d", tree)
	to := from.copy()
	commands := filepath.Join(filepath.Dir(tree), "commands")
	x.check(os.WriteFile(commands, []byte(strings.Join([]string{
		"rm /d0/file4", "mkdir /d2/new", "set_inode_field /d3/file3 mode 0100600", "write " + commands + " /written", "ln /d1/file1 /d2/linked", "ea_set /d1/file5 user.a 1",
		// debugfs leaves directories' times as they are, which no kernel does.
		"sif / mtime 20200101", "sif /d0 mtime 20200101", "sif /d2 mtime 20200101",
	}, "\n")), 0o600))
	if out, err := exec.Command(testenv.Program(t, "debugfs", "e2fsprogs"), "-w", "-f", commands, to.name).CombinedOutput(); err != nil {
		t.Fatalf("debugfs: %v\n%s", err, out)
	}
	a, err := os.ReadFile(from.name)
	x.check(err)
	b, err = os.ReadFile(to.name)
	x.check(err)
	return a, b
}

func TestWithoutAMount(t *testing.T) {
	for _, features := range []string{"metadata_csum", "^metadata_csum"} {
		a, b := unmounted(t, features)
		c, err := Changed(t.Context(), bytes.NewReader(a), bytes.NewReader(b), []Range{{0, int64(len(a))}})
		if err != nil {
			t.Fatal(err)
		}
		got := c.String()
		for _, want := range []string{"d0/file4", "d2/new", "d3/file3", "written", "d2/linked", "d1/file5"} {
			if !strings.Contains(got, want) {
				t.Errorf("%s: %s is not among %s", features, want, got)
			}
		}
	}
}

// counted counts what is read.
type counted struct {
	*bytes.Reader
	n int64
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.n += int64(len(p))
	return c.Reader.ReadAt(p, off)
}

// FuzzChanged damages one of two file systems: an answer, or none with a reason,
// but no panic and no end of reading.
func FuzzChanged(f *testing.F) {
	a, b := unmounted(f, "^metadata_csum")
	f.Add([]byte{})
	f.Add([]byte{1, 0x00, 0x04, 0x20, 0x07})
	f.Add([]byte{0, 0x00, 0x10, 0x28, 0xFF, 1, 0x00, 0x18, 0x28, 0x01})
	f.Fuzz(func(t *testing.T, patches []byte) {
		x, y := bytes.Clone(a), bytes.Clone(b)
		for ; len(patches) >= 5; patches = patches[5:] {
			off := (int(patches[1])<<16 | int(patches[2])<<8 | int(patches[3])) % len(x)
			if patches[0]&1 == 0 {
				x[off] = patches[4]
			}
			if patches[0]&2 == 0 {
				y[off] = patches[4]
			}
		}
		from, to := &counted{Reader: bytes.NewReader(x)}, &counted{Reader: bytes.NewReader(y)}
		_, err := Changed(t.Context(), from, to, []Range{{0, int64(len(x))}})
		if err != nil && !errors.Is(err, ErrCannotTell) {
			t.Error(err)
		}
		if most := int64(len(x)) * 40; from.n > most || to.n > most {
			t.Errorf("%d and %d bytes were read of %d", from.n, to.n, len(x))
		}
	})
}
