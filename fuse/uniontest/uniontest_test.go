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
	path, err := buildProgram()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(path)) })
	s := Program(path, "aufs_whiteouts=0", "dev", "suid")
	s.Defects = map[string]string{
		"ext4/locks/file_handles_with_nfs_export=on": "handles do not outlive the kernel's memory of a file",
	}
	Run(t, Config{Subject: s, FS: []string{"ext4"}})
}

// buildProgram builds the program once for all tests.
var buildProgram = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "uniontest")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "fuse-layerfs")
	cmd := exec.Command("go", "build", "-o", path, "../../cmd/fuse-layerfs")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})
