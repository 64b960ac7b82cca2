package service_test

import (
	"os"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/plugins/content/local"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot/service"
)

// FuzzRequest sends any bytes as the message of any method: the answer is never a mistake
// of the service's own, and the service goes on.
func FuzzRequest(f *testing.F) {
	store, err := layerctl.Open(f.Context(), testenv.Scratch(f), layerctl.Options{Volatile: true})
	must(f, err)
	blobs, err := local.NewLabeledStore(testenv.Scratch(f), &memoryLabels{all: map[string]map[string]string{}})
	must(f, err)
	g := &fixture{t: f, store: store, content: blobs}
	native := views(f, store)["layerd-native"]
	g.listen(service.Options{Views: service.Views{"layerd-native": native}, Differ: service.NewDiffer(service.DifferOptions{Store: store, Content: blobs}),
		Allowed: service.Allowed{UIDs: []uint32{uint32(os.Getuid())}}})
	all := requests()
	for i, m := range all {
		b, err := proto.Marshal(m.message)
		must(f, err)
		f.Add(uint8(i), b)
	}
	done := 0
	f.Fuzz(func(t *testing.T, method uint8, b []byte) {
		m := all[int(method)%len(all)]
		err := g.conn.Invoke(inNamespace(t), servicePrefix+m.name, b, &emptypb.Empty{}, grpc.ForceCodec(raw{}))
		if c := status.Code(err); c == codes.Unavailable || strings.Contains(status.Convert(err).Message(), "made a mistake") {
			t.Fatalf("%s %x: %v", m.name, b, err)
		}
		if done++; done%500 == 0 { // or the store grows
			for _, key := range keys(t, native) {
				_ = native.Remove(t.Context(), key) // parents have their turn later
			}
		}
	})
}
