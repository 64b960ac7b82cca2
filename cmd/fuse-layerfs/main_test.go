package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// envProgram makes the test binary the program.
const envProgram = "FUSE_LAYERFS_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(envProgram) != "" {
		main()
	}
	testenv.Main(m)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const patience = 60 * time.Second

// layers makes a lower with a file f in it, an upper, a workdir and a mountpoint,
// which anybody may use, and returns the directory that they are in.
func layers(t *testing.T) string {
	t.Helper()
	testenv.Leaks(t)
	dir := testenv.FS(t, "ext4")
	must(t, os.Chmod(filepath.Dir(dir), 0o711))
	for _, d := range []string{"l", "u", "w", "m"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(dir, "l", "f"), []byte("lower"), 0o644))
	return dir
}

func program(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = name
	cmd.Env = append(os.Environ(), envProgram+"=1")
	return cmd
}

// start mounts in the background and returns what it printed.
func start(t *testing.T, dir string, cmd *exec.Cmd) string {
	t.Helper()
	cmd.Dir = dir
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	kill := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	return out.String()
}

// serverOf finds the process that serves a mount below dir; 0 if there is none.
func serverOf(t *testing.T, dir string) int {
	t.Helper()
	comms, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, c := range comms {
		b, _ := os.ReadFile(c)
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(c), "environ"))
		if strings.TrimSpace(string(b)) == name && bytes.Contains(cmdline, []byte("TEST_DIR="+dir)) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(c)))
			must(t, err)
			return pid
		}
	}
	return 0
}

func mountLine(t *testing.T, target string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[1] == target {
			return line
		}
	}
	return ""
}

// In the background the program returns when the mount works, and the server
// ends when it is unmounted.
func TestBackground(t *testing.T) {
	dir := layers(t)
	cmd := program("-o", "lowerdir=l,upperdir=u,workdir=w,nosuid,fsname=some\\,thing", "m")
	cmd.Env = append(cmd.Env, "TEST_DIR="+dir)
	if out := start(t, dir, cmd); out != "" {
		t.Errorf("it said %q", out)
	}
	m := filepath.Join(dir, "m")
	if line := mountLine(t, m); !strings.HasPrefix(line, "some,thing ") || !strings.Contains(line, " fuse.fuse-layerfs rw,nosuid,nodev,") {
		t.Errorf("mounted as %q", line)
	}
	if b, err := os.ReadFile(filepath.Join(m, "f")); string(b) != "lower" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	must(t, os.WriteFile(filepath.Join(m, "f"), []byte("upper"), 0o644))
	pid := serverOf(t, dir)
	if pid == 0 {
		t.Fatal("no process is named fuse-layerfs")
	}
	if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); cwd != "/" {
		t.Errorf("the server stands in %s, %v", cwd, err)
	}
	testenv.Unmount(t, m)
	testenv.Eventually(t, "the server ends", func() bool { return serverOf(t, dir) == 0 })
	if b, err := os.ReadFile(filepath.Join(dir, "u", "f")); string(b) != "upper" || err != nil {
		t.Errorf("the upper has %q, %v", b, err)
	}
}

// A signal unmounts, in the background, too.
func TestSigterm(t *testing.T) {
	dir := layers(t)
	cmd := program("-o", "lowerdir=l,upperdir=u,workdir=w", "m")
	cmd.Env = append(cmd.Env, "TEST_DIR="+dir)
	start(t, dir, cmd)
	must(t, syscall.Kill(serverOf(t, dir), syscall.SIGTERM))
	testenv.Eventually(t, "the server ends", func() bool { return serverOf(t, dir) == 0 })
	if line := mountLine(t, filepath.Join(dir, "m")); line != "" {
		t.Errorf("still mounted: %s", line)
	}
}

// What is wrong is said by the program that was called, which fails.
func TestErrorsComeBack(t *testing.T) {
	dir := layers(t)
	for args, want := range map[string]string{
		"-o lowerdir=nope m":                      "nope",
		"-o lowerdir=l,upperdir=u m":              "workdir=",
		"-o lowerdir=l nowhere":                   "nowhere",
		"-o lowerdir=l,redirect_dir=no m":         "redirect_dir",
		"-o upperdir=u,workdir=/dev/shm,blink m2": "m2",
	} {
		cmd := program(strings.Fields(args)...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v, %q", args, err, out)
		}
	}
}

// In the foreground it stays, warns, prints counts when asked, and ends well by ^C.
func TestForeground(t *testing.T) {
	dir := layers(t)
	cmd := program("-f", "-o", "lowerdir=l,upperdir=u,workdir=w,frobnicate,log=log", "m")
	cmd.Dir = dir
	var out bytes.Buffer
	cmd.Stderr = &out
	must(t, cmd.Start())
	m := filepath.Join(dir, "m")
	testenv.Eventually(t, "mounted", func() bool { return mountLine(t, m) != "" })
	_, err := os.ReadFile(filepath.Join(m, "f"))
	must(t, err)
	must(t, cmd.Process.Signal(syscall.SIGUSR1))
	testenv.Eventually(t, "counts in the log", func() bool {
		b, _ := os.ReadFile(filepath.Join(dir, "log"))
		return bytes.Contains(b, []byte("nodes ")) && bytes.Contains(b, []byte("copy-ups 0")) && bytes.Contains(b, []byte("requests "))
	})
	must(t, cmd.Process.Signal(os.Interrupt))
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v", err)
	}
	if out.String() != "fuse-layerfs: unknown option frobnicate ignored\n" {
		t.Errorf("it said %q", &out)
	}
}

// A daemon that crashed had left nothing that says where.
func TestCrashIsInTheLog(t *testing.T) {
	dir := layers(t)
	cmd := program("-f", "-o", "lowerdir=l,upperdir=u,workdir=w,log=log", "m")
	cmd.Dir = dir
	must(t, cmd.Start())
	m := filepath.Join(dir, "m")
	testenv.Eventually(t, "mounted", func() bool { return mountLine(t, m) != "" })
	must(t, cmd.Process.Signal(syscall.SIGABRT))
	if err := cmd.Wait(); err == nil {
		t.Error("it goes on after SIGABRT")
	}
	must(t, sys.Umount(m, sys.MNT_DETACH))
	if b, err := os.ReadFile(filepath.Join(dir, "log")); err != nil || !bytes.Contains(b, []byte("goroutine ")) {
		t.Errorf("the log is %q, %v", b, err)
	}
}

// As mount(8) calls it: through mount.fuse3, which runs it by a shell.
func TestMount8(t *testing.T) {
	if _, err := os.Stat("/sbin/mount.fuse3"); err != nil {
		testenv.Skip(t, "no mount.fuse3 (Debian: fuse3)")
	}
	dir := layers(t)
	must(t, sys.Mount("tmpfs", "/usr/local/bin", "tmpfs", 0, "")) // in this namespace alone
	defer testenv.Unmount(t, "/usr/local/bin")
	self, err := os.Executable()
	must(t, err)
	script := fmt.Sprintf("#!/bin/sh\nexport %s=1 TEST_DIR=%s\nexec %s \"$@\"\n", envProgram, dir, self)
	must(t, os.WriteFile("/usr/local/bin/fuse-layerfs", []byte(script), 0o755))
	m := filepath.Join(dir, "m")
	out, err := exec.Command("mount", "-t", "fuse.fuse-layerfs", "-o",
		fmt.Sprintf("lowerdir=%[1]s/l,upperdir=%[1]s/u,workdir=%[1]s/w,noatime,lazytime,x-gvfs-hide,_netdev", dir), "overlay", m).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Fatalf("%v: %s", err, out)
	}
	if line := mountLine(t, m); !strings.HasPrefix(line, "overlay ") || strings.Contains(line, "nodev") || !strings.Contains(line, "noatime") {
		t.Errorf("mounted as %q", line)
	}
	out, err = exec.Command("umount", m).CombinedOutput()
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
	testenv.Eventually(t, "the server ends", func() bool { return serverOf(t, dir) == 0 })
}

// A privileged parent mounts and hands the descriptor on.
func TestMountedByAParent(t *testing.T) {
	dir := layers(t)
	for _, n := range []int{3, 9} {
		dev, err := sys.Open("/dev/fuse", sys.O_RDWR, 0)
		must(t, err)
		m := filepath.Join(dir, "m")
		must(t, sys.Mount("x", m, "fuse.x", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions", dev.Int())))
		cmd := program("-o", "lowerdir=l,upperdir=u,workdir=w", fmt.Sprintf("/dev/fd/%d", n))
		cmd.Env = append(cmd.Env, "TEST_DIR="+dir)
		f := dev.File()
		for len(cmd.ExtraFiles) < n-3 {
			cmd.ExtraFiles = append(cmd.ExtraFiles, nil)
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		start(t, dir, cmd)
		f.Close()
		if b, err := os.ReadFile(filepath.Join(m, "f")); string(b) != "lower" || err != nil {
			t.Errorf("descriptor %d: %q, %v", n, b, err)
		}
		testenv.Unmount(t, m)
		testenv.Eventually(t, "the server ends", func() bool { return serverOf(t, dir) == 0 })
	}
}

// openFuse gives everybody a /dev/fuse, in this namespace alone: where it is for
// root only, nobody else could test anything.
func openFuse(t *testing.T) {
	dir := testenv.FS(t, "tmpfs")
	dev := filepath.Join(dir, "fuse")
	must(t, syscall.Mknod(dev, syscall.S_IFCHR, 10<<8|229))
	must(t, os.Chmod(dev, 0o666))
	must(t, sys.Mount(dev, "/dev/fuse", "", sys.MS_BIND, ""))
	t.Cleanup(func() { must(t, sys.Umount("/dev/fuse", sys.MNT_DETACH)) })
}

// ordinary is a user who mounts by fusermount3.
const ordinary = 65534

// ordinaryLayers are layers of which the upper, work and the mountpoint are that
// user's.
func ordinaryLayers(t *testing.T) (dir string) {
	t.Helper()
	if _, err := exec.LookPath("fusermount3"); err != nil {
		testenv.Skip(t, "no fusermount3 (Debian: fuse3)")
	}
	dir = layers(t)
	openFuse(t)
	for _, d := range []string{"u", "w", "m"} {
		must(t, os.Chown(filepath.Join(dir, d), ordinary, ordinary))
	}
	return dir
}

// An ordinary user mounts by fusermount3.
func TestOrdinaryUser(t *testing.T) {
	dir := ordinaryLayers(t)
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinary, Gid: ordinary}}
	cmd := program("-o", "lowerdir=l,upperdir=u,workdir=w,userxattr", "m")
	cmd.Env = append(cmd.Env, "TEST_DIR="+dir)
	cmd.SysProcAttr = nobody
	start(t, dir, cmd)
	m := filepath.Join(dir, "m")
	if line := mountLine(t, m); !strings.Contains(line, "fuse.fuse-layerfs rw,nosuid,nodev,") || !strings.Contains(line, "user_id=65534") {
		t.Errorf("mounted as %q", line)
	}
	sh := exec.Command("/bin/sh", "-ec", "test $(cat m/f) = lower; echo new >m/new; test $(cat m/new) = new; fusermount3 -u m")
	sh.Dir, sh.SysProcAttr = dir, nobody
	if out, err := sh.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
		_ = sys.Umount(m, sys.MNT_DETACH)
	}
	testenv.Eventually(t, "the server ends", func() bool { return serverOf(t, dir) == 0 })
	if b, err := os.ReadFile(filepath.Join(dir, "u", "new")); string(b) != "new\n" || err != nil {
		t.Errorf("the upper has %q, %v", b, err)
	}
}

func TestVersionAndHelp(t *testing.T) {
	for _, arg := range []string{"--version", "-V", "--help", "-h"} {
		out, err := program(arg).CombinedOutput()
		if err != nil || !strings.Contains(string(out), name) {
			t.Errorf("%s: %v, %q", arg, err, out)
		}
	}
}

// `mount -o remount,ro` comes to the program as any other mount does. It made a
// second mount over the first.
func TestRemount(t *testing.T) {
	dir := layers(t)
	start(t, dir, program("-o", "lowerdir=l,upperdir=u,workdir=w", "m"))
	m := filepath.Join(dir, "m")
	defer testenv.Unmount(t, m)
	must(t, os.WriteFile(filepath.Join(m, "new"), nil, 0o644))
	if out := start(t, dir, program("-o", "rw,lowerdir=l,upperdir=u,workdir=w,remount,ro", "m")); out != "" {
		t.Errorf("it said %q", out)
	}
	if err := os.WriteFile(filepath.Join(m, "new"), nil, 0o644); !errors.Is(err, syscall.EROFS) {
		t.Errorf("writing: %v", err)
	}
	start(t, dir, program("source", "m", "-o", "remount,rw"))
	must(t, os.WriteFile(filepath.Join(m, "new"), nil, 0o644))
	b, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	if n := strings.Count(string(b), " "+m+" "); n != 1 {
		t.Errorf("%d mounts", n)
	}
}
