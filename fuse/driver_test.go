package fuse_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/fuse"
)

var config = drivertest.Config{
	Factory:          fuse.Factory(),
	Must:             []string{"Diff", "Apply", "Rebase", "IDMap", "UsageBytes", "UsageInodes", "Reflink:btrfs,xfs"},
	MustUnprivileged: []string{"Diff", "Apply", "Rebase", "IDMap", "UsageBytes", "UsageInodes"},
}

// TestMain builds the server once for all processes that the tests start.
func TestMain(m *testing.M) {
	const built = "LAYERCTL_FUSE_PROGRAM"
	if os.Getenv(built) == "" {
		dir, err := buildServer()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		os.Setenv(built, dir)
		os.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	}
	drivertest.Main(m)
}

// buildServer puts fuse-layerfs where a test's processes find it, whoever they are:
// in a directory by the cache of Go, which stays.
func buildServer() (string, error) {
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("layerctl-test-%d", os.Getuid()))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", dir+"/fuse-layerfs", "github.com/layerctl/layerctl/cmd/fuse-layerfs")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return dir, nil
}

func TestDriver(t *testing.T)      { drivertest.Run(t, config) }
func BenchmarkDriver(b *testing.B) { drivertest.Bench(b, config) }
