package devmapper

import (
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/internal/testenv"
)

// needsDM skips where the kernel has no thin pools.
func needsDM(t testing.TB) {
	t.Helper()
	testenv.Root(t)
	if err := thin.Probe(); errdefs.IsNotImplemented(err) {
		testenv.NoDeviceMapper(t, err)
	} else if err != nil {
		t.Fatal(err)
	}
}

func TestDriver(t *testing.T) {
	needsDM(t)
	drivertest.Run(t, drivertest.Config{
		Factory: Factory(),
		FS:      []string{"ext4"},
		Must:    []string{"Diff", "Apply", "IDMap", "UsageBytes"}, RootOnly: true,
		Flushes: true, // the pool commits its metadata, and data before that, with every message
	})
}

// TestDriverWithXFS is the same with xfs in the layers: `make test-vm` leaves what takes
// long out.
func TestDriverWithXFS(t *testing.T) {
	needsDM(t)
	drivertest.Run(t, drivertest.Config{
		Factory: Factory(),
		Options: map[string]string{"filesystem": "xfs", "size": "1GiB"},
		FS:      []string{"ext4"},
		Must:    []string{"Diff", "Apply", "IDMap", "UsageBytes"}, RootOnly: true,
		Flushes: true,
	})
}

func BenchmarkDriver(b *testing.B) {
	needsDM(b)
	drivertest.Bench(b, drivertest.Config{Factory: Factory(), FS: []string{"ext4"}})
}
