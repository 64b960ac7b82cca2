package snapshot_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/mount"
	"github.com/layerctl/layerctl/snapshot"
)

func diagnose(t testing.TB, s *snapshot.Store) snapshot.Diagnosis {
	t.Helper()
	d, err := s.Diagnose(t.Context())
	must(t, err)
	return d
}

func leftOf(d snapshot.Diagnosis) (all []string) {
	for _, l := range d.Left {
		all = append(all, string(l.Problem))
	}
	slices.Sort(all)
	return all
}

// started is a process that says when it is ready, and ends when told.
func started(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(name, args...)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("%s %q: %q, %v", name, args, line, err)
	}
	return cmd
}

// TestDoctorSaysWhoHoldsAMount: by every driver, a mount here and one that only
// another mount namespace has, with the processes that are in them.
func TestDoctorSaysWhoHoldsAMount(t *testing.T) {
	testenv.Root(t)
	for _, driver := range []string{"native", "overlay", "fuse", "btrfs"} {
		t.Run(driver, func(t *testing.T) {
			dir := testenv.Scratch(t)
			if driver == "btrfs" {
				dir = testenv.FS(t, "btrfs")
			}
			s := open(t, filepath.Join(dir, "store"))
			v := view(t, s, "v", driver)
			layerOf(t, v, "base", "", map[string]string{"d/f": "1"})
			must(t, second(v.Prepare(t.Context(), "work", "base")))
			target := t.TempDir()
			mountAt(t, v, "work", target)
			t.Cleanup(func() { _ = mount.Unmount(target, mount.UnmountOptions{Lazy: true}) })
			// A shell in it here; one with a copy of the mount, of which ours is gone there.
			here := started(t, "sh", "-c", "cd "+target+" && echo && read x")
			there := started(t, "unshare", "-m", "sh", "-c", fmt.Sprintf("mkdir %[1]s/m && mount --bind %[2]s/d %[1]s/m && umount %[2]s && exec 3<%[1]s/m/f && echo && read x", t.TempDir(), target))
			d := diagnose(t, s)
			if len(d.Left) > 0 {
				t.Errorf("left: %+v", d.Left)
			}
			if len(d.Uses) != 2 {
				t.Fatalf("%d uses: %+v", len(d.Uses), d.Uses)
			}
			for n, want := range []struct{ pid, holder int }{{0, here.Process.Pid}, {there.Process.Pid, there.Process.Pid}} {
				u := d.Uses[n]
				if u.Key != "work" || u.Driver != driver || u.ReadOnly || u.PID != want.pid {
					t.Errorf("use %d: %+v", n, u)
				}
				if !slices.ContainsFunc(u.Holders, func(h mount.Holder) bool { return h.PID == want.holder }) {
					t.Errorf("use %d has holders %v, and not process %d", n, u.Holders, want.holder)
				}
				if driver == "fuse" && u.Server == 0 && kernelTellsServers(t) {
					t.Errorf("use %d has no server", n)
				}
			}
		})
	}
}

// kernelTellsServers: fdinfo of /dev/fuse names the connection since Linux 6.15.
func kernelTellsServers(t *testing.T) bool {
	for _, s := range mount.Servers() {
		if len(s.Connections) > 0 {
			return true
		}
	}
	t.Log("this kernel does not say whom a FUSE server serves")
	return false
}

// TestDoctorFindsWhatIsLeft: each kind of leftover is found, with its bytes and what
// removes it, and once that is done nothing is.
func TestDoctorFindsWhatIsLeft(t *testing.T) {
	testenv.Root(t)
	s := open(t, filepath.Join(testenv.FS(t, "ext4"), "store"))
	v := view(t, s, "v", "")
	must(t, s.SetDefaultDriver(t.Context(), "overlay"))
	layerOf(t, v, "base", "", map[string]string{"f": strings.Repeat("x", 1<<20)})
	must(t, s.FinishListings(t.Context()))
	if d := diagnose(t, s); len(d.Left)+len(d.Uses)+len(d.Working) > 0 {
		t.Fatalf("in a store at rest: %+v", d)
	}
	finds := func(what string, want ...string) snapshot.Diagnosis {
		t.Helper()
		d := diagnose(t, s)
		equal(t, what, leftOf(d), want)
		for _, l := range d.Left {
			if l.Suggestion == "" || l.Detail == "" || l.Object == "" {
				t.Errorf("%s: %+v", what, l)
			}
		}
		return d
	}

	target := t.TempDir()
	must(t, second(v.View(t.Context(), "ro", "base")))
	mountAt(t, v, "ro", target)
	must(t, v.Remove(t.Context(), "ro"))
	must(t, v.Cleanup(t.Context()))
	finds("a mount of a removed snapshot", "debt-open", "mount-orphan")
	must(t, mount.Unmount(target, mount.UnmountOptions{}))
	must(t, v.Cleanup(t.Context()))
	finds("unmounted and collected")

	must(t, second(v.Prepare(t.Context(), "work", "base")))
	mountAt(t, v, "work", target)
	inside := started(t, "sh", "-c", "cd "+target+" && echo && read x")
	must(t, mount.Unmount(target, mount.UnmountOptions{Lazy: true}))
	must(t, v.Remove(t.Context(), "work"))
	hidden := finds("unmounted lazily", "debt-open", "mount-hidden").Left
	if !slices.ContainsFunc(hidden, func(l snapshot.Leftover) bool {
		return slices.ContainsFunc(l.Holders, func(h mount.Holder) bool { return h.PID == inside.Process.Pid })
	}) {
		t.Errorf("process %d is not among %+v", inside.Process.Pid, hidden)
	}
	must(t, inside.Process.Kill())
	_ = inside.Wait()
	collected(t, v)
	finds("its process ended, and collected")

	_, err := v.Migrate(failingAt(t.Context(), "store: migrate: all copied"), nil, snapshot.MigrateOptions{To: "native"})
	wants(t, err, io.ErrNoProgress)
	if d := finds("a migration that was not ended", "move-open"); d.Left[0].Bytes < 1<<20 {
		t.Errorf("it costs %d bytes", d.Left[0].Bytes)
	}
	_, err = s.CallOffMigration(t.Context())
	must(t, err)
	if d := finds("called off", "debt-open"); d.Left[0].Bytes < 1<<20 {
		t.Errorf("it costs %d bytes", d.Left[0].Bytes)
	}
	must(t, v.Cleanup(t.Context()))

	image := filepath.Join(s.Root(), "images", "disk")
	must(t, os.MkdirAll(filepath.Dir(image), 0o755))
	must(t, os.WriteFile(image, make([]byte, 1<<20), 0o644))
	out, err := exec.Command("losetup", "-f", "--show", image).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	d := finds("a loop device", "loop-orphan")
	must(t, exec.Command("losetup", "-d", dev).Run())
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat("/sys/block/" + filepath.Base(dev) + "/loop/backing_file"); err != nil {
			break // somebody, like udev, may have had it open
		}
	}
	if d.Left[0].Object != dev {
		t.Errorf("it is %s, not %s", dev, d.Left[0].Object)
	}

	driver, err := s.Driver(t.Context(), "overlay")
	must(t, err)
	must(t, driver.Create(t.Context(), drivers.Ref{ID: 9999}, drivers.CreateOptions{}))
	finds("a layer that no record names", "orphan-layer")
	must(t, driver.Remove(t.Context(), 9999))
	finds("at the end")
}

// collected runs GC until nothing is left: the kernel takes down the mounts of a
// process that has ended after it has been waited for.
func collected(t testing.TB, v *snapshot.View) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		r, err := v.Store().GC(t.Context())
		must(t, err)
		if len(r.Left) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("gc leaves %v", r.Left)
		}
	}
}

// TestDoctorFindsADeadServer: a FUSE mount whose server was killed.
func TestDoctorFindsADeadServer(t *testing.T) {
	testenv.Root(t)
	s := open(t, testenv.Scratch(t))
	v := view(t, s, "v", "fuse")
	layerOf(t, v, "base", "", map[string]string{"f": "1"})
	must(t, second(v.Prepare(t.Context(), "work", "base")))
	target := t.TempDir()
	mountAt(t, v, "work", target)
	defer func() { _ = mount.Unmount(target, mount.UnmountOptions{Lazy: true}) }()
	if left := diagnose(t, s).Left; len(left) > 0 {
		t.Errorf("of a server that works: %+v", left)
	}
	for _, p := range mount.Servers() {
		if slices.ContainsFunc(p.Args, func(a string) bool { return strings.Contains(a, s.Root()) }) {
			must(t, syscall.Kill(p.PID, syscall.SIGKILL))
		}
	}
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(target); err != nil {
			break
		}
	}
	equal(t, "left", leftOf(diagnose(t, s)), []string{"mount-dead"})
	must(t, mount.Unmount(target, mount.UnmountOptions{Lazy: true}))
	equal(t, "left", leftOf(diagnose(t, s)), nil)
}
