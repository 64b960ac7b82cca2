package snapshot_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/native"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

// sized is a driver whose layers have a least size, and that notes the last one.
type sized struct {
	drivers.Driver
	least int64
	last  *atomic.Int64
}

func (s sized) Capabilities() drivers.Capabilities {
	c := s.Driver.Capabilities()
	c.Quota, c.LeastQuota = true, s.least
	return c
}

func (s sized) Create(ctx context.Context, r drivers.Ref, o drivers.CreateOptions) error {
	quota := o.Quota
	o.Quota = 0
	if err := s.Driver.Create(ctx, r, o); err != nil { // before it refuses: what it leaves is to be removed
		return err
	}
	if quota > 0 && quota < s.least {
		return fmt.Errorf("a quota of %d bytes is below %d: %w", quota, s.least, errdefs.ErrInvalidArgument)
	}
	s.last.Store(quota)
	return nil
}

// factory makes drivers of that name.
func (s sized) factory(name string) drivers.Factory {
	f := native.Factory()
	open := f.Open
	f.Name, f.Open = name, func(ctx context.Context, c drivers.Config) (drivers.Driver, error) {
		var err error
		s.Driver, err = open(ctx, c)
		return s, err
	}
	return f
}

func maxSize(n int) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotMaxSize: fmt.Sprint(n)})
}

// TestMaxSizeLabelIsAHint: containerd takes a snapshotter that ignores the label for no
// failure. A driver that cannot make a layer so small makes it as large as it can; an
// option of a caller is no hint.
func TestMaxSizeLabelIsAHint(t *testing.T) {
	var said logs
	driver := sized{least: 100, last: new(atomic.Int64)}
	roomy := sized{least: 1, last: new(atomic.Int64)}
	s := open(t, testenv.Scratch(t), func(o *snapshot.Options) {
		o.Registry = drivers.NewRegistry(driver.factory("sized"), roomy.factory("roomy"), native.Factory())
		o.Log = said.add
	})
	ctx, v := t.Context(), view(t, s, "v", "sized")
	must(t, second(v.Prepare(ctx, "large", "", maxSize(150))))
	if n := driver.last.Load(); n != 150 {
		t.Errorf("a size that can be had: the driver was asked for %d", n)
	}
	equal(t, "said of it", said.all(), nil)
	must(t, second(v.Prepare(ctx, "small", "", maxSize(50))))
	if n := driver.last.Load(); n != 0 {
		t.Errorf("a size that cannot be had: the driver was asked for %d in the end", n)
	}
	if lines := said.all(); len(lines) != 1 || !strings.Contains(lines[0], "below 100") {
		t.Errorf("said of it: %q", lines)
	}
	wants(t, v.Create(ctx, "strict", "", snapshot.CreateOptions{Quota: 50}), errdefs.ErrInvalidArgument)
	wants(t, second(v.Prepare(ctx, "x", "", snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotMaxSize: "x"}))), errdefs.ErrInvalidArgument)
	must(t, second(view(t, s, "n", "native").Prepare(ctx, "none", "", maxSize(50)))) // has no quotas

	must(t, second(view(t, s, "o", "roomy").Prepare(ctx, "moves", "", maxSize(50))))
	if n := roomy.last.Load(); n != 50 {
		t.Errorf("the other driver was asked for %d", n)
	}
	migrate(t, view(t, s, "o", ""), "sized", "moves")
	if lines := said.all(); len(lines) != 2 || !strings.Contains(lines[1], "below 100") {
		t.Errorf("said of the one that was moved: %q", lines)
	}
	clean(t, s)
}
