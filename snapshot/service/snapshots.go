package service

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Views are what the snapshots API serves: snapshotters by the names that clients
// have for them.
type Views map[string]snapshots.Snapshotter

// dispatcher hands each request to the view that it names. Immutable.
type dispatcher struct {
	snapshotsapi.UnimplementedSnapshotsServer
	views map[string]snapshotsapi.SnapshotsServer
	only  string // the one view, whatever requests name; "" for all
}

// newDispatcher returns the snapshots API of views, or of one of them.
func newDispatcher(views Views, only string) (*dispatcher, error) {
	d := &dispatcher{views: map[string]snapshotsapi.SnapshotsServer{}, only: only}
	for name, v := range views {
		d.views[name] = snapshotservice.FromSnapshotter(v)
	}
	if only != "" && d.views[only] == nil {
		return nil, d.unknown(only)
	}
	return d, nil
}

func (d *dispatcher) unknown(name string) error {
	return fmt.Errorf("snapshotter %q: %w (served: %s)", name, errdefs.ErrNotFound, strings.Join(slices.Sorted(maps.Keys(d.views)), ", "))
}

// name is the name of the view that serves a request; "" if none does.
func (d *dispatcher) name(req any) string {
	r, ok := req.(interface{ GetSnapshotter() string })
	if !ok {
		return ""
	}
	if d.only != "" {
		return d.only
	}
	if d.views[r.GetSnapshotter()] == nil {
		return ""
	}
	return r.GetSnapshotter()
}

// view returns the service of the view that a request names.
func (d *dispatcher) view(name string) (snapshotsapi.SnapshotsServer, error) {
	if d.only != "" {
		name = d.only
	}
	if v := d.views[name]; v != nil {
		return v, nil
	}
	return nil, errgrpc.ToGRPC(d.unknown(name))
}

// dispatch calls a method of the view that a request names.
func dispatch[Req interface{ GetSnapshotter() string }, Resp any](ctx context.Context, d *dispatcher, r Req,
	method func(snapshotsapi.SnapshotsServer, context.Context, Req) (Resp, error)) (Resp, error) {
	v, err := d.view(r.GetSnapshotter())
	if err != nil {
		var none Resp
		return none, err
	}
	return method(v, ctx, r)
}

func (d *dispatcher) Prepare(ctx context.Context, r *snapshotsapi.PrepareSnapshotRequest) (*snapshotsapi.PrepareSnapshotResponse, error) {
	return dispatch(ctx, d, r, snapshotsapi.SnapshotsServer.Prepare)
}

func (d *dispatcher) View(ctx context.Context, r *snapshotsapi.ViewSnapshotRequest) (*snapshotsapi.ViewSnapshotResponse, error) {
	return dispatch(ctx, d, r, snapshotsapi.SnapshotsServer.View)
}

func (d *dispatcher) Mounts(ctx context.Context, r *snapshotsapi.MountsRequest) (*snapshotsapi.MountsResponse, error) {
	return dispatch(ctx, d, r, snapshotsapi.SnapshotsServer.Mounts)
}

func (d *dispatcher) Commit(ctx context.Context, r *snapshotsapi.CommitSnapshotRequest) (*emptypb.Empty, error) {
	return dispatch(ctx, d, r, snapshotsapi.SnapshotsServer.Commit)
}

func (d *dispatcher) Remove(ctx context.Context, r *snapshotsapi.RemoveSnapshotRequest) (*emptypb.Empty, error) {
	return dispatch(ctx, d, r, snapshotsapi.SnapshotsServer.Remove)
}

func (d *dispatcher) Stat(ctx context.Context, r *snapshotsapi.StatSnapshotRequest) (*snapshotsapi.StatSnapshotResponse, error) {
	return dispatch(ctx, d, r, snapshotsapi.SnapshotsServer.Stat)
}

func (d *dispatcher) Update(ctx context.Context, r *snapshotsapi.UpdateSnapshotRequest) (*snapshotsapi.UpdateSnapshotResponse, error) {
	return dispatch(ctx, d, r, snapshotsapi.SnapshotsServer.Update)
}

func (d *dispatcher) List(r *snapshotsapi.ListSnapshotsRequest, s snapshotsapi.Snapshots_ListServer) error {
	v, err := d.view(r.GetSnapshotter())
	if err != nil {
		return err
	}
	return v.List(r, s)
}

func (d *dispatcher) Usage(ctx context.Context, r *snapshotsapi.UsageRequest) (*snapshotsapi.UsageResponse, error) {
	return dispatch(ctx, d, r, snapshotsapi.SnapshotsServer.Usage)
}

func (d *dispatcher) Cleanup(ctx context.Context, r *snapshotsapi.CleanupRequest) (*emptypb.Empty, error) {
	return dispatch(ctx, d, r, snapshotsapi.SnapshotsServer.Cleanup)
}
