package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/userns"
)

// TestMain makes the test binary the program when it is called layerctl.
func TestMain(m *testing.M) {
	userns.Init()
	if filepath.Base(os.Args[0]) == "layerctl" {
		os.Exit(run(os.Args[1:]))
	}
	testenv.Main(m, testenv.FUSEServer)
}

// ordinaryID is a user that this machine need not know.
const ordinaryID = "61235"

// passwdLine makes the user known.
const passwdLine = "layertest:x:" + ordinaryID + ":" + ordinaryID + "::/:/bin/sh"

// asOrdinary runs a command as that user.
var asOrdinary = []string{"setpriv", "--reuid", ordinaryID, "--regid", ordinaryID, "--clear-groups"}

// TestScriptsAsRoot runs testdata/root on ext4, in a private mount namespace.
func TestScriptsAsRoot(t *testing.T) {
	testenv.Root(t)
	testenv.Program(t, "fusermount3", "fuse3")
	addLine(t, "/etc/passwd", passwdLine) // fusermount3 mounts for nobody without a name
	runScripts(t, "testdata/root", fileSystem(t, "ext4"), nil)
}

// TestScriptsOnBtrfs runs testdata/btrfs on btrfs.
func TestScriptsOnBtrfs(t *testing.T) {
	runScripts(t, "testdata/btrfs", testenv.FS(t, "btrfs", testenv.Size(512<<20)), nil)
}

// TestScriptsOnBtrfsAsUser runs testdata/btrfsuser as an ordinary user on btrfs.
func TestScriptsOnBtrfsAsUser(t *testing.T) {
	testenv.Root(t)
	runScripts(t, "testdata/btrfsuser", fileSystem(t, "btrfs", testenv.Size(512<<20)), asOrdinary)
}

// TestScriptsAsUser runs testdata/user as an ordinary user, who has no ranges of
// ids.
func TestScriptsAsUser(t *testing.T) {
	dir := ""
	var as []string
	if os.Getuid() == 0 {
		dir = fileSystem(t, "ext4")
		as = asOrdinary
	}
	runScripts(t, "testdata/user", dir, as)
}

// TestScriptsWithRanges runs testdata/ranges as an ordinary user who has a range
// in /etc/subuid and /etc/subgid.
func TestScriptsWithRanges(t *testing.T) {
	testenv.Root(t)
	testenv.Program(t, "newuidmap", "uidmap")
	addLine(t, "/etc/passwd", passwdLine)
	addLine(t, "/etc/group", "layertest:x:"+ordinaryID+":")
	addLine(t, "/etc/subuid", "layertest:700000:65536")
	addLine(t, "/etc/subgid", "layertest:800000:65536")
	runScripts(t, "testdata/ranges", fileSystem(t, "ext4"), asOrdinary)
}

// addLine mounts a file with one more line over a file of /etc, in this test's
// mount namespace. A file that is not there is not made, and the test skipped.
func addLine(t *testing.T, path, line string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		testenv.Skip(t, path+" does not exist")
	}
	if err != nil {
		t.Fatal(err)
	}
	tmp := filepath.Join(t.TempDir(), filepath.Base(path))
	if err := os.WriteFile(tmp, append(b, line+"\n"...), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount(tmp, path, "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(path, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// fileSystem makes a file system that ordinary users reach.
func fileSystem(t *testing.T, kind string, opts ...testenv.Option) string {
	t.Helper()
	dir := testenv.FS(t, kind, opts...)
	if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil { // the scratch directory is root's
		t.Fatal(err)
	}
	return dir
}

// runScripts runs the scripts of a folder below dir ("" is the usual place). The
// program runs by way of the command as.
func runScripts(t *testing.T, scripts, dir string, as []string) {
	bin := program(t, dir)
	p := testscript.Params{
		Dir: scripts, WorkdirRoot: dir, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error { return setupScript(e, bin, as) },
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"layerctl": func(ts *testscript.TestScript, neg bool, args []string) { runProgram(ts, neg, as, args) },
			"code":     func(ts *testscript.TestScript, neg bool, args []string) { runCode(ts, as, args) },
			"rot":      rot,
		},
	}
	t.Run("scripts", func(t *testing.T) { testscript.Run(t, p) })
}

// program copies the test binary under the program's name, to where every user
// may execute it.
func program(t *testing.T, dir string) string {
	t.Helper()
	if dir == "" {
		dir = t.TempDir()
	}
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(filepath.Join(bin, "layerctl"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return bin
}

func setupScript(e *testscript.Env, bin string, as []string) error {
	root := filepath.Join(e.WorkDir, "store")
	e.Setenv("PATH", bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	e.Setenv("ROOT", root)
	e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
	e.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector sleeps a second otherwise
	e.Setenv("LAYERCTL", filepath.Join(bin, "layerctl"))
	if err := os.Mkdir(filepath.Join(e.WorkDir, "home"), 0o755); err != nil {
		return err
	}
	if len(as) > 0 {
		if err := exec.Command("chown", "-R", ordinaryID+":"+ordinaryID, e.WorkDir).Run(); err != nil {
			return err
		}
	}
	if err := os.Chmod(e.WorkDir, 0o755); err != nil {
		return err
	}
	e.Defer(func() {
		for _, r := range []string{root, filepath.Join(e.WorkDir, "home/.local/share/layerctl")} {
			args := append(append([]string{}, as...), filepath.Join(bin, "layerctl"), "--root", r, "--quiet", "umount", "--all", "--lazy")
			if _, err := os.Stat(r); err != nil {
				continue
			}
			cmd := exec.Command(args[0], args[1:]...)
			cmd.Dir = "/"
			_ = cmd.Run() // a script may have spoiled its store
		}
	})
	return nil
}

// runProgram is the script command layerctl: the program with its --root.
func runProgram(ts *testscript.TestScript, neg bool, as, args []string) {
	err := execProgram(ts, as, args)
	if err != nil && !neg {
		ts.Fatalf("layerctl %s: %v", strings.Join(args, " "), err)
	}
	if err == nil && neg {
		ts.Fatalf("layerctl %s: did well", strings.Join(args, " "))
	}
}

func execProgram(ts *testscript.TestScript, as, args []string) error {
	all := append(append([]string{}, as...), ts.Getenv("LAYERCTL"), "--root", ts.Getenv("ROOT"))
	all = append(all, args...)
	return ts.Exec(all[0], all[1:]...)
}

// runCode is the script command code: it checks the program's exit status.
func runCode(ts *testscript.TestScript, as, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = execProgram(ts, as, args[1:])
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("layerctl %s: exit status %d, want %d", strings.Join(args[1:], " "), got, want)
	}
}

// rot is the script command rot FILE: it changes one byte in the middle and
// keeps size and times.
func rot(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args {
		path := ts.MkAbs(name)
		st, err := os.Stat(path)
		ts.Check(err)
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		ts.Check(err)
		b := []byte{0}
		_, err = f.ReadAt(b, st.Size()/2)
		ts.Check(err)
		b[0] ^= 1
		_, err = f.WriteAt(b, st.Size()/2)
		ts.Check(errors.Join(err, f.Close(), os.Chtimes(path, st.ModTime(), st.ModTime())))
	}
}

// BenchmarkStart is how long the program takes to do nothing.
func BenchmarkStart(b *testing.B) {
	bin := filepath.Join(b.TempDir(), "layerctl")
	build := exec.Command("go", "build", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatal(fmt.Errorf("%w\n%s", err, out))
	}
	for b.Loop() {
		if err := exec.Command(bin, "version").Run(); err != nil {
			b.Fatal(err)
		}
	}
}
