package service_test

import (
	"context"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/layerctl/layerctl/internal/testenv"
)

// TestContainerdSuite runs containerd's own suite against the service, over its
// socket, with each driver. By its name the suite knows which snapshotter cannot
// rename a directory of its parent.
func TestContainerdSuite(t *testing.T) {
	testenv.Root(t)
	testenv.Slow(t)
	for _, c := range []struct{ name, view string }{
		{"overlayfs", "layerd-overlay"}, {"native", "layerd-native"}, {"overlayfs", "layerd-fuse"}, {"btrfs", "layerd-btrfs"},
	} {
		t.Run(c.view, func(t *testing.T) {
			tmp := testenv.Scratch(t)
			if c.view == "layerd-btrfs" {
				tmp = testenv.FS(t, "btrfs")
			}
			t.Setenv("TMPDIR", tmp)
			testsuite.SnapshotterSuite(t, c.name, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				f := serve(t, root)
				return f.snapshotter(c.view), func() error { f.stop(); return nil }, nil
			})
		})
	}
}
