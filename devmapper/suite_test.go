package devmapper

import (
	"context"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

// TestContainerdSuite runs containerd's own suite over a view of a store. It is here and
// not with those of the other drivers: package snapshot's tests build programs first,
// which they cannot in a guest.
func TestContainerdSuite(t *testing.T) {
	needsDM(t)
	t.Setenv("TMPDIR", testenv.Scratch(t))
	testsuite.SnapshotterSuite(t, Name, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := snapshot.Open(ctx, root, snapshot.Options{Registry: drivers.NewRegistry(Factory()), Log: func(m string) { t.Log(m) }})
		if err != nil {
			return nil, nil, err
		}
		v, err := s.View("suite", Name)
		return v, s.Close, err
	})
}
