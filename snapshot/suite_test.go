package snapshot_test

import (
	"context"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

// TestContainerdSuite runs containerd's own suite over a view, with each driver.
// By its name the suite knows which snapshotter cannot rename a lower directory.
func TestContainerdSuite(t *testing.T) {
	testenv.Root(t)
	for _, c := range []struct {
		name, driver string
		options      map[string]string
	}{
		{"native", "native", nil},
		{"overlayfs", "overlay", nil},
		{"overlay-redirect", "overlay", map[string]string{"redirect_dir": "on"}},
		{"fuse-redirect", "fuse", map[string]string{"redirect_dir": "on"}}, // the suite renames a directory
		{"btrfs", "btrfs", nil},
	} {
		if testing.Short() && c.name != "overlayfs" {
			continue // its goroutines are the same
		}
		t.Run(c.name, func(t *testing.T) {
			tmp := testenv.Scratch(t)
			if c.driver == "btrfs" {
				tmp = testenv.FS(t, "btrfs")
			}
			t.Setenv("TMPDIR", tmp)
			testsuite.SnapshotterSuite(t, c.name, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				s, err := snapshot.Open(ctx, root, snapshot.Options{
					Registry:      registry(),
					DriverOptions: map[string]map[string]string{c.driver: c.options},
					Log:           func(m string) { t.Log(m) },
				})
				if err != nil {
					return nil, nil, err
				}
				v, err := s.View("suite", c.driver)
				return v, s.Close, err
			})
		})
	}
}
