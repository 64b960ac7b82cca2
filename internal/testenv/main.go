// Package testenv gives tests that need a kernel what they need: a private
// mount namespace, file systems on loop files, skips that are counted, and
// checks that nothing is left behind.
//
// # Life cycle
//
// A package whose tests mount has
//
//	func TestMain(m *testing.M) { testenv.Main(m) }
//
// As root, Main runs the test binary a second time in a mount namespace of its
// own in which nothing propagates to the host; the first process only waits,
// passes signals on and at last removes the scratch directory, so that a test
// that dies leaves neither a mount nor a loop device nor a file. Not root, it
// runs the tests where it is. After the tests it checks that no mount, loop
// device, descriptor or child process is left.
//
// # Skips
//
// Skip is for what a complete machine has (root, loop devices, FUSE): with
// LAYERCTL_EXPECT=root in the environment it fails the test instead. Optional is
// for what no machine needs to have. Main prints how many tests skipped, by
// reason.
//
// # Traps
//
// Leaks compares what the whole process holds: a test that runs in parallel
// with others must not use it. Call it first, so that it looks last.
package testenv

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
)

const (
	// envHostNS is the mount namespace that the first process ran in: whoever
	// finds itself in another one is in the private one.
	envHostNS  = "LAYERCTL_TESTENV_HOST"
	envScratch = "LAYERCTL_TESTENV_SCRATCH"
	envExpect  = "LAYERCTL_EXPECT"
)

// The main thread belongs to the main goroutine in every test: one that changes
// its thread's working directory or namespace and leaves the thread to the
// runtime to end it (containerd's mount.All does) must not meet the thread that
// cannot be ended.
func init() { runtime.LockOSThread() }

// Setup prepares something for all tests of a package and for the processes that
// they start, in dir, which is removed in the end; it may change the environment.
type Setup func(dir string) error

// Main is the body of TestMain: it runs the setups once, then the tests. It does
// not return.
func Main(m *testing.M, setups ...Setup) {
	if os.Getuid() == 0 && !inPrivateNS() {
		os.Exit(rerun(setups))
	}
	os.Exit(run(m, setups))
}

func setUp(setups []Setup, dir string) error {
	for _, s := range setups {
		if err := s(dir); err != nil {
			return err
		}
	}
	return nil
}

func mountNS() string {
	ns, _ := os.Readlink("/proc/self/ns/mnt")
	return ns
}

func inPrivateNS() bool {
	host := os.Getenv(envHostNS)
	return host != "" && host != mountNS()
}

// rerun runs this test binary in a private mount namespace and returns its exit
// code. A whole new process, because a mount namespace belongs to a thread and a
// Go program does not choose its threads.
func rerun(setups []Setup) int {
	runtime.LockOSThread() // Pdeathsig is about the thread, not the process
	scratch, cleanup, err := makeScratch()
	if err != nil {
		fmt.Fprintln(os.Stderr, "testenv:", err)
		return 2
	}
	defer cleanup()
	if err := setUp(setups, scratch); err != nil {
		fmt.Fprintln(os.Stderr, "testenv:", err)
		return 2
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), envHostNS+"="+mountNS(), envScratch+"="+scratch)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "testenv: private mount namespace:", err)
		return 2
	}
	stop := passSignals(cmd.Process)
	defer stop()
	_ = cmd.Wait() // the state below says it
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		return code
	}
	fmt.Fprintln(os.Stderr, "testenv: test process:", cmd.ProcessState)
	return 2
}

func passSignals(p *os.Process) (stop func()) {
	c := make(chan os.Signal, 8)
	signal.Notify(c, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	go func() {
		for s := range c {
			_ = p.Signal(s)
		}
	}()
	return func() { signal.Stop(c); close(c) }
}

// run runs the tests here and returns the exit code.
func run(m *testing.M, setups []Setup) int {
	if inPrivateNS() && os.Getuid() == 0 {
		if err := sys.Mount("", "/", "", sys.MS_REC|sys.MS_PRIVATE, ""); err != nil {
			fmt.Fprintln(os.Stderr, "testenv:", err)
			return 2
		}
	}
	cleanup, err := openScratch()
	if err != nil {
		fmt.Fprintln(os.Stderr, "testenv:", err)
		return 2
	}
	defer cleanup()
	if !inPrivateNS() {
		if err := setUp(setups, scratch); err != nil {
			fmt.Fprintln(os.Stderr, "testenv:", err)
			return 2
		}
	}
	if inPrivateNS() && os.Getuid() == 0 {
		if err := openFUSE(); err != nil {
			fmt.Fprintln(os.Stderr, "testenv: /dev/fuse for everybody:", err)
			return 2
		}
	}
	before := takeInventory()
	code := m.Run()
	printSkips(os.Stdout)
	if code != 0 {
		return code
	}
	if left := before.leaked(); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "testenv: the tests left behind:\n\t%s\n", strings.Join(left, "\n\t"))
		return 1
	}
	return 0
}
