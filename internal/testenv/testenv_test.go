package testenv

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
)

func TestMain(m *testing.M) { Main(m) }

func TestFileSystemsAreUsableAndGone(t *testing.T) {
	Root(t)
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		var dir string
		t.Run(kind, func(t *testing.T) {
			Leaks(t)
			dir = FS(t, kind)
			if err := os.WriteFile(dir+"/f", []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
			if b, _ := os.ReadFile("/proc/self/mountinfo"); !strings.Contains(string(b), " "+dir+" ") {
				t.Errorf("%s is not mounted", dir)
			}
		})
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}

func TestMountsStayInThePrivateNamespace(t *testing.T) {
	Root(t)
	dir := FS(t, "tmpfs")
	parent, err := os.ReadFile("/proc/1/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(parent), dir) {
		t.Errorf("%s is visible outside", dir)
	}
}

func TestReadOnlyOption(t *testing.T) {
	dir := FS(t, "ext4", Size(64<<20), MountOptions("ro"))
	if err := os.Mkdir(dir+"/d", 0o700); !errors.Is(err, syscall.EROFS) {
		t.Errorf("mkdir: %v, want EROFS", err)
	}
}

func TestInventoryFindsEveryKindOfLeak(t *testing.T) {
	Root(t)
	before := takeInventory()
	dir := Scratch(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	file, err := os.Create(dir + "/open")
	must(err)
	must(file.Truncate(1 << 20))
	must(os.Mkdir(dir+"/m", 0o700))
	must(sys.Mount("tmpfs", dir+"/m", "tmpfs", 0, ""))
	child := exec.Command("sleep", "60")
	must(child.Start())
	loop, err := sys.AttachLoop(dir+"/open", sys.LoopOptions{Autoclear: true})
	must(err)

	now := takeInventory()
	for _, want := range []string{"descriptor", "mount", "child process", "loop device"} {
		found := slices.ContainsFunc(keys(now), func(s string) bool { return !before[s] && strings.HasPrefix(s, want) })
		if !found {
			t.Errorf("no %s among what is left: %q", want, keys(now))
		}
	}

	must(loop.Close())
	must(child.Process.Kill())
	_ = child.Wait()
	must(sys.Umount(dir+"/m", 0))
	must(file.Close())
	if left := before.leaked(); len(left) > 0 {
		t.Errorf("still there after release: %q", left)
	}
}

func keys(v inventory) (all []string) {
	for k := range v {
		all = append(all, k)
	}
	return all
}

func TestScratchIsShort(t *testing.T) {
	if d := Scratch(t); filepath.Dir(d) != scratch || len(d) > 40 {
		t.Errorf("%s is not a short path", d)
	}
}

func TestInUserNSHasNoPrivilegesOutside(t *testing.T) {
	if !InUserNS(t) {
		return
	}
	if os.Getuid() != 0 {
		t.Errorf("uid %d inside", os.Getuid())
	}
	dir := Scratch(t)
	if err := sys.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Errorf("mount inside: %v", err)
	}
	if err := sys.Umount(dir, 0); err != nil {
		t.Error(err)
	}
	if f, err := os.Open("/etc/shadow"); err == nil {
		f.Close()
		t.Error("can read /etc/shadow")
	}
}

func TestSweepRemovesOnlyWhatNobodyOwns(t *testing.T) {
	base := Scratch(t)
	owned, cleanup, err := makeScratchIn(base)
	if err != nil {
		t.Fatal(err)
	}
	defer cleanup()
	orphan, other := filepath.Join(base, "lt1"), filepath.Join(base, "lt2")
	for _, d := range []string{orphan, other} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(orphan, ownerFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	sweep(base)
	for dir, want := range map[string]bool{owned: true, other: true, orphan: false} {
		if _, err := os.Stat(dir); (err == nil) != want {
			t.Errorf("%s: %v, want it there: %v", dir, err, want)
		}
	}
}
