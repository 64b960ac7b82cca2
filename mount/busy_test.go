package mount

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// shell starts a shell script that says "ready" when it is, and ends with its
// standard input.
func shell(t *testing.T, attr *syscall.SysProcAttr, script string, args ...string) (pid int, stop func()) {
	t.Helper()
	cmd := exec.Command("/bin/sh", append([]string{"-c", script + "\necho ready; read x", "sh"}, args...)...)
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%s: %q, %v", script, line, err)
	}
	stop = sync.OnceFunc(func() {
		in.Close()
		_, _ = io.Copy(io.Discard, out)
		_ = cmd.Wait()
	})
	t.Cleanup(stop)
	return cmd.Process.Pid, stop
}

func TestBusyNamesItsHolders(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	target := dirs(t, fs, "m")[0]
	mounted(t, target, Mount{Type: "tmpfs", Source: "tmpfs"})
	dirs(t, target, "dir")
	write(t, target+"/file", "x")
	for _, c := range []struct{ what, script, path string }{
		{"cwd", `cd "$1/dir"`, target + "/dir"},
		{"fd", `exec 7<"$1/file"`, target + "/file"},
	} {
		pid, stop := shell(t, nil, c.script, target)
		err := Unmount(target, UnmountOptions{})
		want := fmt.Sprintf("%d (sh) %s %s", pid, c.what, c.path)
		if !errdefs.IsFailedPrecondition(err) || !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want failed precondition, EBUSY and %q", err, want)
		}
		stop()
	}
	below := dirs(t, target, "below")[0]
	mounted(t, below, Mount{Type: "tmpfs", Source: "tmpfs"})
	if err := Unmount(target, UnmountOptions{}); err == nil || !strings.Contains(err.Error(), "mount "+below) {
		t.Errorf("%v does not name the mount below", err)
	}
}

func TestBusyNamesARunningProgram(t *testing.T) {
	testenv.Leaks(t)
	busybox := testenv.Busybox(t)
	fs := testenv.FS(t, "tmpfs")
	target := dirs(t, fs, "m")[0]
	mounted(t, target, Mount{Type: "tmpfs", Source: "tmpfs"})
	b, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(target+"/busybox", b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(target+"/busybox", "sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	holders, err := Holders(target)
	got := fmt.Sprint(holders)
	for _, what := range []string{"exe", "map"} {
		if want := fmt.Sprintf("%d (busybox) %s %s/busybox", cmd.Process.Pid, what, target); !strings.Contains(got, want) {
			t.Errorf("%s, %v lacks %s", got, err, want)
		}
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

func TestBusyNamesOtherNamespaces(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "ext4")
	target := dirs(t, fs, "m")[0]
	mounted(t, target, stack(t, fs, 2))
	pid, stop := shell(t, &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}, "")
	defer stop()
	holders, err := Holders(target)
	if want := fmt.Sprintf("%d (sh) namespace %s", pid, target); err != nil || !strings.Contains(fmt.Sprint(holders), want) {
		t.Errorf("%v, %v lacks %s", holders, err, want)
	}
}

func TestUnmountIsIdempotent(t *testing.T) {
	fs := testenv.FS(t, "tmpfs")
	target := dirs(t, fs, "m")[0]
	if err := All(t.Context(), []Mount{{Type: "tmpfs", Source: "tmpfs"}}, target); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := Unmount(target, UnmountOptions{}); err != nil {
			t.Error(err)
		}
	}
	if err := Unmount(target+"/missing", UnmountOptions{}); err != nil {
		t.Error(err)
	}
	write(t, fs+"/file", "")
	if err := Unmount(fs+"/file", UnmountOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := Holders(target); !errdefs.IsNotFound(err) {
		t.Errorf("holders of a plain directory: %v", err)
	}
}

func TestUnmountWaitsForAHolderThatEnds(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	target := dirs(t, fs, "m")[0]
	if err := All(t.Context(), []Mount{{Type: "tmpfs", Source: "tmpfs"}}, target); err != nil {
		t.Fatal(err)
	}
	_, stop := shell(t, nil, `cd "$1"`, target)
	go func() {
		time.Sleep(20 * time.Millisecond)
		stop()
	}()
	if err := Unmount(target, UnmountOptions{Wait: time.Minute}); err != nil {
		t.Error(err)
	}
}

// refused checks that m cannot be mounted and that the error says why.
func refused(t *testing.T, m Mount, target, says string) {
	t.Helper()
	err := All(t.Context(), []Mount{m}, target)
	if err == nil {
		_ = Unmount(target, UnmountOptions{})
	}
	if !errdefs.IsFailedPrecondition(err) || !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), says) {
		t.Errorf("%v; want failed precondition, EBUSY and %q", err, says)
	}
}

func TestSecondMountOfAnUpperIsRefused(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			testenv.Leaks(t)
			fs := testenv.FS(t, kind)
			d := dirs(t, fs, "m1", "m2", "w2", "u2")
			m := stack(t, fs, 2)
			mounted(t, d[0], m)
			refused(t, m, d[1], "mounted at "+d[0])
			otherWork, otherUpper := m, m
			otherWork.Options = append(m.Options[:3:3], "workdir="+d[2])
			otherUpper.Options = append(m.Options[:2:2], "upperdir="+d[3], m.Options[3])
			refused(t, otherWork, d[1], "mounted at "+d[0])
			refused(t, otherUpper, d[1], "mounted at "+d[0])
			readOnly := Mount{Type: "overlay", Source: "overlay", Options: m.Options[:2]}
			mounted(t, d[1], readOnly) // lowers may be shared
		})
	}
}

func TestUpperMountedInAnotherNamespaceIsRefused(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "ext4")
	d := dirs(t, fs, "m1", "m2")
	m := stack(t, fs, 2)
	pid, stop := shell(t, &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS},
		`mount -t overlay overlay -o "$1" "$2"`, strings.Join(m.Options, ","), d[0])
	refused(t, m, d[1], fmt.Sprintf("%s in the mount namespace of process %d (sh)", d[0], pid))
	stop()
	mounted(t, d[1], m) // the namespace has ended with its process
}

func TestUpperOfALazilyUnmountedMountIsRefused(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "ext4")
	d := dirs(t, fs, "m1", "m2")
	m := stack(t, fs, 2)
	if err := All(t.Context(), []Mount{m}, d[0]); err != nil {
		t.Fatal(err)
	}
	pid, stop := shell(t, nil, `cd "$1"`, d[0])
	if err := Unmount(d[0], UnmountOptions{Lazy: true}); err != nil {
		t.Fatal(err)
	}
	refused(t, m, d[1], "no mount namespace shows")
	refused(t, m, d[1], "perhaps held by ")
	refused(t, m, d[1], fmt.Sprintf(" %d (sh) cwd", pid)) // others on the machine may come first
	stop()
	mounted(t, d[1], m)
}

func TestProbeWritesNothing(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			testenv.Leaks(t)
			fs := testenv.FS(t, kind)
			d := dirs(t, fs, "u", "w", "u/dir")
			write(t, d[0]+"/f", "x")
			before := state(t, d[:2])
			if a, where, err := UpperInUse(d[0], d[1]); a != kprobe.No || where != "" || err != nil {
				t.Errorf("%v %q, %v", a, where, err)
			}
			if after := state(t, d[:2]); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}

// state tells everything of the trees but atimes, change times and xattrs
// included.
func state(t *testing.T, roots []string) (all string) {
	t.Helper()
	for _, r := range roots {
		out, err := exec.Command("find", r, "-printf", "%p %y %m %T@ %C@ %n\n").Output()
		if err != nil {
			t.Fatal(err)
		}
		d, err := sys.OpenDir(r)
		if err != nil {
			t.Fatal(err)
		}
		xattrs, err := d.Listxattr("")
		d.Close()
		all += fmt.Sprintf("%s%q %v\n", out, xattrs, err)
	}
	return all
}

// TestClaimKeepsOthersOut: a server's claim refuses mounts, and other claims, until
// it is released; UpperInUse tells who has it.
func TestClaimKeepsOthersOut(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "ext4")
	m := stack(t, fs, 1)
	l, err := OverlayLayers(m)
	if err != nil {
		t.Fatal(err)
	}
	release, err := Claim(t.Context(), l.Upper, l.Work)
	if err != nil {
		t.Fatal(err)
	}
	a, who, err := UpperInUse(l.Upper, l.Work)
	if a != kprobe.Yes || !strings.Contains(who, "process "+strconv.Itoa(os.Getpid())) || err != nil {
		t.Errorf("%v %q, %v", a, who, err)
	}
	soon, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	target := dirs(t, fs, "m")[0]
	if err := All(soon, []Mount{m}, target); err == nil {
		t.Error("mounted")
		_ = Unmount(target, UnmountOptions{})
	}
	if again, err := Claim(soon, l.Upper, l.Work); err == nil {
		t.Error("claimed twice")
		again()
	}
	release()
	if a, who, err := UpperInUse(l.Upper, l.Work); a != kprobe.No {
		t.Errorf("after release: %v %q, %v", a, who, err)
	}
	mounted(t, target, m)
	if _, err := Claim(t.Context(), l.Upper, l.Work); !errdefs.IsFailedPrecondition(err) || !errors.Is(err, syscall.EBUSY) {
		t.Errorf("claim of a mounted upper: %v", err)
	}
}

func TestUpperInUseOfMissingDirectories(t *testing.T) {
	testenv.Root(t)
	a, _, err := UpperInUse("/nosuch/u", "/nosuch/w")
	if a != kprobe.Unknown || !errdefs.IsNotFound(err) {
		t.Errorf("%v, %v", a, err)
	}
}

func TestOneOfManyMountersWins(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	m := stack(t, fs, 2)
	const n = 8
	targets := make([]string, n)
	for i := range n {
		targets[i] = dirs(t, fs, "m"+strconv.Itoa(i))[0]
	}
	errs := make(chan error, n)
	for i := range n {
		go func() { errs <- All(t.Context(), []Mount{m}, targets[i]) }()
	}
	won := 0
	for range n {
		err := <-errs
		if err == nil {
			won++
		} else if !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
	}
	if won != 1 {
		t.Errorf("%d of %d mounted the upper", won, n)
	}
	for _, target := range targets {
		if err := Unmount(target, UnmountOptions{}); err != nil {
			t.Error(err)
		}
	}
}

func TestALockedWorkdirEndsWithTheContext(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	m := stack(t, fs, 2)
	work, err := sys.OpenDir(fs + "/w")
	if err != nil {
		t.Fatal(err)
	}
	defer work.Close()
	lock, err := work.TryLock(sys.LockExclusive)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if err := All(ctx, []Mount{m}, dirs(t, fs, "m")[0]); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want deadline exceeded", err)
	}
}

// In a user namespace overlayfs may not use file handles, so the kernel does not
// tell; the mounts that this user can see do.
func TestUnprivilegedOverlay(t *testing.T) {
	if !testenv.InUserNS(t) {
		return
	}
	testenv.Leaks(t)
	dir := testenv.Scratch(t)
	d := dirs(t, dir, "m1", "m2", "src", "b")
	m := stack(t, dir, 3)
	m.Options = append(m.Options, "userxattr")
	mounted(t, d[0], m)
	write(t, d[0]+"/new", "x")
	if err := os.Remove(d[0] + "/f1"); err != nil {
		t.Error(err)
	}
	refused(t, m, d[1], "mounted at "+d[0])
	mounted(t, d[3], Mount{Type: "bind", Source: d[2], Options: []string{"rbind", "ro"}})
	if err := os.WriteFile(d[3]+"/f", nil, 0o600); !errors.Is(err, syscall.EROFS) {
		t.Errorf("write through the bind: %v", err)
	}
	tree, err := Detached(t.Context(), []Mount{m})
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("detached: %v", err)
	}
	tree.Close()
}

func TestMountingOnTheHostNeedsPrivileges(t *testing.T) {
	if os.Getuid() == 0 {
		if !testenv.InUserNS(t) {
			return
		}
	}
	target := testenv.Scratch(t)
	err := All(t.Context(), []Mount{{Type: "ext4", Source: "/dev/null"}}, target)
	if !errdefs.IsPermissionDenied(err) {
		t.Errorf("%v, want permission denied", err)
	}
}

// TestOneUpperWithTwoWorkdirsAtTheSameTime: one of the mounts is made, whatever
// the workdirs are.
func TestOneUpperWithTwoWorkdirsAtTheSameTime(t *testing.T) {
	testenv.Root(t)
	base := testenv.FS(t, "tmpfs")
	d := dirs(t, base, "lower", "upper", "w1", "w2")
	for round := range 2 { // the loser waits for an unattached mount to go
		var wg sync.WaitGroup
		var made [2]*Tree
		for i := range made {
			wg.Go(func() {
				m := Mount{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + d[0], "upperdir=" + d[1], "workdir=" + d[2+i], "index=off"}}
				tree, err := Detached(t.Context(), []Mount{m})
				if err == nil {
					made[i] = tree
				} else if !errors.Is(err, errdefs.ErrFailedPrecondition) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if (made[0] == nil) == (made[1] == nil) {
			t.Errorf("round %d: mounts %v", round, made)
		}
		for _, m := range made {
			m.Close()
		}
	}
}
