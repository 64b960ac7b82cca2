package service_test

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/layerctl/layerctl/internal/testenv"
)

// raw sends the bytes that it is given as the message, and looks at no answer.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error) { return v.([]byte), nil }
func (raw) Unmarshal([]byte, any) error   { return nil }
func (raw) Name() string                  { return "proto" }

const servicePrefix = "/containerd.services."

// request is a method with a message that it takes.
type request struct {
	name    string
	message proto.Message
}

// requests are all that change or read one snapshot, and the differ's.
func requests() []request {
	const view = "layerd-native"
	mounts := []*types.Mount{{Type: "bind", Source: "/", Options: []string{"ro", "rbind"}}}
	return []request{
		{"snapshots.v1.Snapshots/Prepare", &snapshotsapi.PrepareSnapshotRequest{Snapshotter: view, Key: "a", Labels: map[string]string{"containerd.io/snapshot/max-size": "x"}}},
		{"snapshots.v1.Snapshots/View", &snapshotsapi.ViewSnapshotRequest{Snapshotter: view, Key: "b", Parent: "c"}},
		{"snapshots.v1.Snapshots/Mounts", &snapshotsapi.MountsRequest{Snapshotter: view, Key: "a"}},
		{"snapshots.v1.Snapshots/Commit", &snapshotsapi.CommitSnapshotRequest{Snapshotter: view, Key: "a", Name: "c"}},
		{"snapshots.v1.Snapshots/Remove", &snapshotsapi.RemoveSnapshotRequest{Snapshotter: view, Key: "a"}},
		{"snapshots.v1.Snapshots/Stat", &snapshotsapi.StatSnapshotRequest{Snapshotter: view, Key: "a"}},
		{"snapshots.v1.Snapshots/Update", &snapshotsapi.UpdateSnapshotRequest{Snapshotter: view, Info: &snapshotsapi.Info{Name: "a", Labels: map[string]string{"b": "c"}},
			UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels.b"}}}},
		{"snapshots.v1.Snapshots/Usage", &snapshotsapi.UsageRequest{Snapshotter: view, Key: "a"}},
		{"snapshots.v1.Snapshots/Cleanup", &snapshotsapi.CleanupRequest{Snapshotter: view}},
		{"diff.v1.Diff/Apply", &diffapi.ApplyRequest{Diff: &types.Descriptor{Digest: "sha256:x"}, Mounts: mounts}},
		{"diff.v1.Diff/Diff", &diffapi.DiffRequest{Left: mounts, Right: mounts, MediaType: "x"}},
	}
}

// TestRandomRequests sends damaged messages to every method: the answer is never a
// mistake of the service's own, and it goes on answering. LAYERCTL_REQUESTS says how
// many, LAYERCTL_SEED which.
func TestRandomRequests(t *testing.T) {
	methods := requests()
	seed := testenv.Number(t, "LAYERCTL_SEED", 1)
	r := rand.New(rand.NewPCG(seed, seed))
	f := serve(t, testenv.Scratch(t))
	for i := range testenv.Number(t, "LAYERCTL_REQUESTS", 500) {
		m := methods[r.IntN(len(methods))]
		b, err := proto.Marshal(m.message)
		must(t, err)
		b = damage(r, b)
		err = f.conn.Invoke(inNamespace(t), servicePrefix+m.name, b, &emptypb.Empty{}, grpc.ForceCodec(raw{}))
		if c := status.Code(err); c == codes.Unavailable || strings.Contains(status.Convert(err).Message(), "made a mistake") {
			t.Fatalf("seed %d, request %d: %s %x: %v", seed, i, m.name, b, err)
		}
	}
	if _, err := f.snapshotter("layerd-native").Prepare(t.Context(), "in the end", ""); err != nil {
		t.Error(err)
	}
}

// damage changes a few bytes of a message, leaves some out or repeats some.
func damage(r *rand.Rand, b []byte) []byte {
	for range r.IntN(4) {
		if len(b) == 0 {
			return []byte{byte(r.UintN(256))}
		}
		i, n := r.IntN(len(b)), 1+r.IntN(8)
		switch r.IntN(4) {
		case 0:
			b[i] ^= 1 << r.UintN(8)
		case 1:
			b[i] = byte(r.UintN(256))
		case 2:
			b = slices.Delete(b, i, min(i+n, len(b)))
		case 3:
			b = slices.Insert(b, i, b[i:min(i+n, len(b))]...)
		}
	}
	return b
}
