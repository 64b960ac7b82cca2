package union

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// TestRacingSymlinks: somebody who can change the layers themselves puts symlinks into
// the place of their files and directories while the union works. It may answer what
// it likes, but nothing outside of the layers is read or changed.
func TestRacingSymlinks(t *testing.T) {
	testenv.Root(t)
	base := testenv.FS(t, "tmpfs")
	outside := filepath.Join(base, "outside")
	for _, f := range []string{"f", "g", "sub/f"} {
		put(t, outside, f, "secret")
	}
	c := layersFor(t, base, 2, Config{Redirect: RedirectOn, MaxDirs: 2}, func(l []string) {
		for i := range l {
			for _, f := range []string{"d/f", "d/g", "d/sub/f", "e/f"} {
				put(t, l[i], f, "layer")
			}
		}
	})
	before := outsideListing(t, outside)
	u := openUnion(t, c)
	u.shared = true
	must(t, u.chmod("d/f", 0o600)) // d is in the upper
	must(t, u.chmod("d/sub/f", 0o600))
	var stop atomic.Bool
	var swapping, working sync.WaitGroup
	for _, layer := range []string{c.Upper, c.Lowers[0], c.Lowers[1]} {
		swapping.Go(func() {
			for i := 0; !stop.Load(); i++ {
				for _, p := range []string{"d", "d/f", "d/sub", "d/g"} {
					swap(layer, p, outside, i)
				}
			}
		})
	}
	for g := range 3 {
		working.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(g)))
			for range 150 {
				workOn(t, u, []string{"d/f", "d/g", "d/sub/f", "e/f", "d/sub", "d"}[r.IntN(6)], r.IntN(10))
			}
		})
	}
	working.Wait()
	stop.Store(true)
	swapping.Wait()
	if d := diffLines(before, outsideListing(t, outside)); d != "" {
		t.Errorf("outside of the layers:\n%s", d)
	}
	_ = u.fs.Close()
}

// swap puts a symlink to the same name outside in the place of what a layer has at p,
// and takes it away again.
func swap(layer, p, outside string, i int) {
	at, aside := filepath.Join(layer, p), filepath.Join(filepath.Dir(layer), filepath.Base(layer)+"-aside")
	if os.Rename(at, aside) != nil {
		return
	}
	to := outside
	if p != "d" {
		to = filepath.Join(outside, p[len("d/"):])
	}
	_ = os.Symlink(to, at)
	for range i % 50 {
		_, _ = os.Lstat(at)
	}
	if st, err := os.Lstat(at); err == nil && st.Mode()&os.ModeSymlink != 0 {
		_ = os.Remove(at)
	}
	_ = os.Rename(aside, at)
}

// workOn does one thing with a name; nobody knows what comes of it.
func workOn(t *testing.T, u *unionSide, p string, what int) {
	switch what {
	case 0:
		_ = u.chmod(p, 0o777)
	case 1:
		_ = u.chown(p, 7, 7)
	case 2:
		_ = u.write(p, 0, "OVERWRITTEN")
	case 3:
		_ = u.setxattr(p, "user.mark", "x")
	case 4:
		_ = u.create(p+"-new", "made")
	case 5:
		_ = u.rename(p, p+"-moved", 0)
		_ = u.rename(p+"-moved", p, 0)
	case 6:
		_ = u.unlink(p)
		_ = u.create(p, "again")
	case 7:
		_ = u.mkdir(p+"-dir", 0o755)
		_ = u.rmdir(p + "-dir")
	case 8:
		_ = u.utimes(p, sys.Time{Sec: 1}, sys.Time{Sec: 1})
		_ = u.truncate(p, 1)
	}
	if b, err := u.read(p); err == nil && b == "secret" {
		t.Errorf("%s reads what is outside", p)
	}
	_ = u.walk(p, func(n *Node) error {
		if !n.isDir() {
			return syscall.ENOTDIR
		}
		d, err := u.fs.OpenDir(n)
		if err != nil {
			return err
		}
		defer d.Close()
		return d.Read(0, func(DirEntry) bool { return true })
	})
}

// outsideListing is everything below a directory that nobody may change.
func outsideListing(t *testing.T, dir string) (lines []string) {
	return append(upperListing(t, Config{Upper: dir}), contents(t, dir)...)
}

func contents(t *testing.T, dir string) (lines []string) {
	t.Helper()
	must(t, filepath.Walk(dir, func(p string, i os.FileInfo, err error) error {
		if err != nil || i.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		st := i.Sys().(*syscall.Stat_t)
		lines = append(lines, p+" "+string(b)+" "+i.ModTime().String()+" "+string(rune('0'+st.Uid%10)))
		return err
	}))
	return lines
}
