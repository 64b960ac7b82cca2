package uniontest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// The kernel decides what is right: every case runs on it.
func TestKernel(t *testing.T) {
	testenv.Root(t)
	Run(t, Config{Subject: Kernel(), FS: []string{"ext4", "xfs", "btrfs", "tmpfs"}})
}

// Our program, which must not differ but where it is said.
func TestProgram(t *testing.T) {
	testenv.Root(t)
	Run(t, Config{Subject: program(t), FS: []string{"ext4"}})
}

func TestKernelUser(t *testing.T) {
	testenv.Root(t)
	RunUser(t, Config{Subject: Kernel()})
}

func TestProgramUser(t *testing.T) {
	testenv.Root(t)
	RunUser(t, Config{Subject: program(t)})
}

// The kernel differs from itself in nothing: what the differential test finds is
// not of its own making.
func TestDifferentialKernel(t *testing.T) {
	testenv.Root(t)
	Differential(t, Kernel())
}

func TestDifferential(t *testing.T) {
	testenv.Root(t)
	Differential(t, program(t))
}

// program is our program as the kernel's counterpart: what it would do otherwise
// for fuse-overlayfs's or a user's sake is switched off.
func program(t *testing.T) *Subject {
	t.Helper()
	path, err := buildProgram()
	if err != nil {
		t.Fatal(err)
	}
	s := Program(path, "aufs_whiteouts=0", "dev", "suid")
	return s
}

// envProgram names the program in a process that a test starts.
const envProgram = "LAYERCTL_UNIONTEST_PROGRAM"

// buildProgram builds the program once for all tests.
var buildProgram = sync.OnceValues(func() (string, error) {
	if path := os.Getenv(envProgram); path != "" {
		return path, nil
	}
	dir, err := os.MkdirTemp(testenv.ScratchDir(), "")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "fuse-layerfs")
	cmd := exec.Command("go", "build", "-o", path, "../../cmd/fuse-layerfs")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, os.Setenv(envProgram, path)
})
