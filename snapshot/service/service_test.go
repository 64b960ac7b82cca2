package service_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
	reflectionapi "google.golang.org/grpc/reflection/grpc_reflection_v1"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot/service"
)

func keys(t testing.TB, s snapshots.Snapshotter) (all []string) {
	t.Helper()
	must(t, s.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		all = append(all, i.Name)
		return nil
	}))
	return all
}

// TestViewsAreApart: equal keys in two views, and in that of layerctl, are
// different snapshots; a client that removes every key it meets, as containerd's
// garbage collector does with those it does not know, meets none of another view.
func TestViewsAreApart(t *testing.T) {
	testenv.Root(t)
	f := serve(t, testenv.Scratch(t))
	cli, err := f.store.View("cli", "native")
	must(t, err)
	overlay, native := f.snapshotter("layerd-overlay"), f.snapshotter("layerd-native")
	for _, s := range []snapshots.Snapshotter{cli, overlay, native} {
		_, err := s.Prepare(t.Context(), "key", "")
		must(t, err)
		must(t, s.Commit(t.Context(), "base", "key"))
		_, err = s.Prepare(t.Context(), "key", "base")
		must(t, err)
	}
	for _, key := range []string{"key", "base"} {
		must(t, overlay.Remove(t.Context(), key))
	}
	must(t, overlay.(snapshots.Cleaner).Cleanup(t.Context()))
	if got := keys(t, overlay); len(got) > 0 {
		t.Errorf("the emptied view holds %v", got)
	}
	for _, s := range []snapshots.Snapshotter{cli, native} {
		if got := keys(t, s); !slices.Equal(got, []string{"base", "key"}) {
			t.Errorf("another view holds %v", got)
		}
		if _, err := s.Mounts(t.Context(), "key"); err != nil {
			t.Error(err)
		}
	}
}

// TestWhichView: a request for a view that is not served names those there are; a
// socket of one view takes any name.
func TestWhichView(t *testing.T) {
	f := serve(t, testenv.Scratch(t))
	_, err := f.snapshotter("overlayfs").Stat(t.Context(), "key")
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "layerd-overlay") {
		t.Errorf("unknown view: %v", err)
	}
	if err := f.snapshotter("overlayfs").Walk(t.Context(), nil); !strings.Contains(fmt.Sprint(err), "layerd-overlay") {
		t.Errorf("list of an unknown view: %v", err)
	}
	only := serve(t, testenv.Scratch(t), func(o *service.Options) { o.Only = "layerd-native" })
	_, err = only.snapshotter("whatever").Prepare(t.Context(), "key", "")
	must(t, err)
	if _, err := only.snapshotter("layerd-overlay").Stat(t.Context(), "key"); err != nil {
		t.Errorf("by another name: %v", err)
	}
	_, err = service.New(service.Options{Only: "missing", Views: service.Views{}})
	if !errdefs.IsNotFound(err) {
		t.Errorf("Only of a view that is not there: %v", err)
	}
}

// TestDriverThatDoesNotWork answers calls with its reason, and every other view
// works.
func TestDriverThatDoesNotWork(t *testing.T) {
	testenv.Root(t)
	f := serve(t, testenv.FS(t, "ext4"))
	_, err := f.snapshotter("layerd-btrfs").Prepare(t.Context(), "key", "")
	if err == nil || !strings.Contains(err.Error(), "not on btrfs") {
		t.Errorf("btrfs on ext4: %v", err)
	}
	if got := keys(t, f.snapshotter("layerd-btrfs")); len(got) > 0 {
		t.Errorf("its view holds %v", got)
	}
	_, err = f.snapshotter("layerd-overlay").Prepare(t.Context(), "key", "")
	must(t, err)
}

// TestLimits: too many, or too long, labels are refused, and no message is larger
// than the limit.
func TestLimits(t *testing.T) {
	f := serve(t, testenv.Scratch(t), func(o *service.Options) { o.Limits = service.Limits{Message: 1 << 16, Labels: 1000} })
	s := f.snapshotter("layerd-native")
	many := map[string]string{}
	for i := range 100 {
		many[fmt.Sprintf("containerd.io/snapshot/%d", i)] = "value"
	}
	for what, labels := range map[string]map[string]string{
		"many": many, "long": {"containerd.io/snapshot/x": strings.Repeat("x", 5000)},
	} {
		_, err := s.Prepare(t.Context(), what, "", snapshots.WithLabels(labels))
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s labels: %v", what, err)
		}
		_, err = s.Update(t.Context(), snapshots.Info{Name: "key", Labels: labels})
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s labels in an update: %v", what, err)
		}
	}
	_, err := s.Prepare(t.Context(), strings.Repeat("k", 1<<17), "")
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("a large message: %v", err)
	}
	if _, err := s.Prepare(t.Context(), "key", ""); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// TestBadRequests: what no client of containerd sends is an error of its sender.
func TestBadRequests(t *testing.T) {
	f := serve(t, testenv.Scratch(t))
	c := snapshotsapi.NewSnapshotsClient(f.conn)
	_, err := c.Update(t.Context(), &snapshotsapi.UpdateSnapshotRequest{Snapshotter: "layerd-native"})
	if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("update of nothing: %v", err)
	}
	_, err = diffapi.NewDiffClient(f.conn).Apply(inNamespace(t), &diffapi.ApplyRequest{})
	if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("apply of nothing: %v", err)
	}
	for _, key := range []string{"", strings.Repeat("k", 1<<15)} {
		_, err := c.Prepare(t.Context(), &snapshotsapi.PrepareSnapshotRequest{Snapshotter: "layerd-native", Key: key})
		if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			t.Errorf("prepare of a key of %d bytes: %v", len(key), err)
		}
	}
	_, err = c.Prepare(t.Context(), &snapshotsapi.PrepareSnapshotRequest{Snapshotter: "layerd-native", Key: "key", Parent: "../../etc"})
	if !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("parent that is a path: %v", err)
	}
}

// TestPanicIsAnError of its call: the next one works.
func TestPanicIsAnError(t *testing.T) {
	f := serve(t, testenv.Scratch(t), func(o *service.Options) { o.Views["bad"] = panicking{} })
	_, err := f.snapshotter("bad").Stat(t.Context(), "key")
	if !errdefs.IsInternal(err) {
		t.Errorf("panic: %v", err)
	}
	if err := f.snapshotter("bad").Walk(t.Context(), nil); !errdefs.IsInternal(err) {
		t.Errorf("panic in a stream: %v", err)
	}
	if _, err := f.snapshotter("layerd-native").Stat(t.Context(), "key"); !errdefs.IsNotFound(err) {
		t.Errorf("the next call: %v", err)
	}
}

type panicking struct{ snapshots.Snapshotter }

func (panicking) Stat(context.Context, string) (snapshots.Info, error) { panic("mistake") }

func (panicking) Walk(context.Context, snapshots.WalkFunc, ...string) error { panic("mistake") }

// TestOthersAreRefused, before they can call anything.
func TestOthersAreRefused(t *testing.T) {
	f := serve(t, testenv.Scratch(t), func(o *service.Options) {
		o.Allowed = service.Allowed{UIDs: []uint32{uint32(os.Getuid()) + 1}}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := snapshotsapi.NewSnapshotsClient(f.conn).Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: "layerd-native", Key: "key"})
	if !errdefs.IsUnavailable(errgrpc.ToNative(err)) {
		t.Errorf("got %v", err)
	}
	group := serve(t, testenv.Scratch(t), func(o *service.Options) {
		o.Allowed = service.Allowed{GIDs: []uint32{uint32(os.Getgid())}}
	})
	if _, err := group.snapshotter("layerd-native").Stat(ctx, "key"); !errdefs.IsNotFound(err) {
		t.Errorf("by group: %v", err)
	}
}

// TestHealthAndReflection: what probes and grpcurl ask for.
func TestHealthAndReflection(t *testing.T) {
	f := serve(t, testenv.Scratch(t))
	for _, name := range []string{"", "containerd.services.snapshots.v1.Snapshots", "containerd.services.diff.v1.Diff"} {
		r, err := healthapi.NewHealthClient(f.conn).Check(t.Context(), &healthapi.HealthCheckRequest{Service: name})
		if err != nil || r.Status != healthapi.HealthCheckResponse_SERVING {
			t.Errorf("health of %q: %v, %v", name, r, err)
		}
	}
	s, err := reflectionapi.NewServerReflectionClient(f.conn).ServerReflectionInfo(t.Context())
	must(t, err)
	must(t, s.Send(&reflectionapi.ServerReflectionRequest{MessageRequest: &reflectionapi.ServerReflectionRequest_ListServices{}}))
	r, err := s.Recv()
	must(t, err)
	must(t, s.CloseSend())
	if n := len(r.GetListServicesResponse().GetService()); n < 4 {
		t.Errorf("%d services are told of", n)
	}
}

// slow is a snapshotter whose Mounts wait.
type slow struct {
	snapshots.Snapshotter
	began chan struct{}
	goOn  chan struct{}
}

func (s slow) Mounts(ctx context.Context, _ string) ([]mount.Mount, error) {
	close(s.began)
	select {
	case <-s.goOn:
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// TestDrain: the end waits for the calls at work, and cancels them when its time is
// up.
func TestDrain(t *testing.T) {
	for _, patient := range []bool{true, false} {
		s := slow{began: make(chan struct{}), goOn: make(chan struct{})}
		f := serve(t, testenv.Scratch(t), func(o *service.Options) { o.Views["slow"] = s })
		called := make(chan error, 1)
		go func() {
			_, err := f.snapshotter("slow").Mounts(context.Background(), "key")
			called <- err
		}()
		<-s.began
		ctx, cancel := context.WithCancel(t.Context())
		drained := make(chan error, 1)
		go func() { drained <- f.server.Drain(ctx) }()
		if patient {
			close(s.goOn)
		} else {
			cancel()
		}
		cerr, derr := <-called, <-drained
		cancel()
		if patient && (cerr != nil || derr != nil) {
			t.Errorf("patient: call %v, drain %v", cerr, derr)
		}
		if !patient && (cerr == nil || !errors.Is(derr, context.Canceled)) {
			t.Errorf("impatient: call %v, drain %v", cerr, derr)
		}
	}
}
