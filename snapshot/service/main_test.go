package service_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	snapshotsproxy "github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/log"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/internal/socket"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
	"github.com/layerctl/layerctl/snapshot/service"
)

func TestMain(m *testing.M) {
	_ = log.SetLevel("error")
	testenv.Main(m, testenv.FUSEServer)
}

// fixture is a store that is served, with a content store in place of
// containerd's.
type fixture struct {
	t       testing.TB
	store   *snapshot.Store
	content content.Store
	server  *service.Server
	conn    *grpc.ClientConn
	address string
	stop    func()
}

// views are the snapshotters that tests serve.
func views(t testing.TB, s *snapshot.Store) service.Views {
	t.Helper()
	all := service.Views{}
	for _, driver := range []string{"overlay", "native", "fuse", "btrfs", "devmapper"} {
		v, err := s.View("layerd-"+driver, driver)
		if err != nil {
			t.Fatal(err)
		}
		all["layerd-"+driver] = v
	}
	return all
}

// serve opens a store at root and serves it as changes would have it.
func serve(t testing.TB, root string, changes ...func(*service.Options)) *fixture {
	t.Helper()
	f := &fixture{t: t}
	var err error
	if f.store, err = layerctl.Open(context.Background(), root, layerctl.Options{Log: func(m string) { t.Log(m) }}); err != nil {
		t.Fatal(err)
	}
	labels := &memoryLabels{all: map[string]map[string]string{}}
	if f.content, err = local.NewLabeledStore(testenv.Scratch(t), labels); err != nil {
		t.Fatal(err)
	}
	o := service.Options{
		Views:   views(t, f.store),
		Differ:  service.NewDiffer(service.DifferOptions{Store: f.store, Content: f.content, Rebase: true}),
		Allowed: service.Allowed{UIDs: []uint32{uint32(os.Getuid())}},
	}
	for _, c := range changes {
		c(&o)
	}
	f.listen(o)
	return f
}

func (f *fixture) listen(o service.Options) {
	f.t.Helper()
	var err error
	if f.server, err = service.New(o); err != nil {
		f.t.Fatal(err)
	}
	f.address = filepath.Join(testenv.Scratch(f.t), "s")
	l, err := socket.Listen(f.address, socket.Options{})
	if err != nil {
		f.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- f.server.Serve(l) }()
	f.conn = dial(f.t, f.address)
	f.stop = sync.OnceFunc(func() {
		f.conn.Close()
		if err := f.server.Drain(context.Background()); err != nil {
			f.t.Errorf("drain: %v", err)
		}
		if err := <-ended; err != nil {
			f.t.Errorf("serve: %v", err)
		}
		l.Close()
		if err := f.store.Close(); err != nil {
			f.t.Errorf("close: %v", err)
		}
	})
	f.t.Cleanup(f.stop)
}

func dial(t testing.TB, address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", a)
		}))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// snapshotter is a client's, as containerd makes it.
func (f *fixture) snapshotter(name string) snapshots.Snapshotter {
	return snapshotsproxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(f.conn), name)
}

// differ is a client's.
func (f *fixture) differ() interface {
	diff.Comparer
	diff.Applier
} {
	return diffproxy.NewDiffApplier(diffapi.NewDiffClient(f.conn)).(interface {
		diff.Comparer
		diff.Applier
	})
}

func inNamespace(t testing.TB) context.Context {
	return namespaces.WithNamespace(t.Context(), "test")
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serveContent serves a new store over a content store.
func serveContent(t testing.TB, c, blobs content.Store) *fixture {
	t.Helper()
	f := serve(t, testenv.Scratch(t))
	o := service.Options{
		Views:   views(t, f.store),
		Differ:  service.NewDiffer(service.DifferOptions{Store: f.store, Content: c}),
		Allowed: service.Allowed{UIDs: []uint32{uint32(os.Getuid())}},
	}
	g := &fixture{t: t, store: f.store, content: blobs}
	g.listen(o)
	return g
}
