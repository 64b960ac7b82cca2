package service_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/metadata"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/testimage"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot/service"
)

// memoryLabels are the labels of a content store.
type memoryLabels struct {
	mu  sync.Mutex
	all map[string]map[string]string
}

func (m *memoryLabels) Get(d digest.Digest) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.all[d.String()], nil
}

func (m *memoryLabels) Set(d digest.Digest, l map[string]string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all[d.String()] = l
	return nil
}

func (m *memoryLabels) Update(d digest.Digest, l map[string]string) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.all[d.String()] == nil {
		m.all[d.String()] = map[string]string{}
	}
	for k, v := range l {
		m.all[d.String()][k] = v
	}
	return m.all[d.String()], nil
}

// add puts a blob into the content store.
func (f *fixture) add(b []byte, mediaType string) ocispec.Descriptor {
	f.t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	must(f.t, content.WriteBlob(f.t.Context(), f.content, d.Digest.String(), bytes.NewReader(b), d))
	return d
}

func (f *fixture) blob(d ocispec.Descriptor) []byte {
	f.t.Helper()
	b, err := content.ReadBlob(f.t.Context(), f.content, d)
	must(f.t, err)
	return b
}

// unpack is how a layer comes to its snapshot: name committed on parent.
func (f *fixture) unpack(ctx context.Context, s snapshots.Snapshotter, d ocispec.Descriptor, name, parent string) error {
	ms, err := s.Prepare(ctx, name+"-active", parent)
	if err != nil {
		return err
	}
	if _, err := f.differ().Apply(ctx, d, ms); err != nil {
		return err
	}
	return s.Commit(ctx, name, name+"-active")
}

// viewOf makes a view of a snapshot, and returns the mounts that a client has of it.
func viewOf(t testing.TB, s snapshots.Snapshotter, key string) []mount.Mount {
	t.Helper()
	ms, err := s.View(t.Context(), "view of "+key+rand.Text(), key)
	must(t, err)
	return ms
}

// entries are the names of a layer, in order.
func entries(t testing.TB, b []byte) (names []string) {
	t.Helper()
	r, _, err := layer.Decompress(bytes.NewReader(b), layer.Limits{})
	must(t, err)
	defer r.Close()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return names
		}
		must(t, err)
		names = append(names, h.Name)
	}
}

// standard adds the layers of the standard image, one of each compression.
func (f *fixture) standard() (all []ocispec.Descriptor) {
	how := []string{"gzip", "zstd", "none"}
	types := []string{ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd, ocispec.MediaTypeImageLayer}
	for i, l := range testimage.Layers(f.t) {
		all = append(all, f.add(testimage.Compress(f.t, l.Tar(f.t), how[i%3]), types[i%3]))
	}
	return all
}

// TestUnpack: layers unpacked one on the other, layers unpacked at the same time
// that get their parents at Commit, and layers of another driver are the same
// trees; the difference of any two is an empty layer, and a layer that a diff makes
// is the one that was unpacked.
func TestUnpack(t *testing.T) {
	testenv.Root(t)
	ctx := inNamespace(t)
	f := serve(t, testenv.Scratch(t))
	native, layers := f.snapshotter("layerd-native"), f.standard()
	parent := ""
	for i, d := range layers {
		name := fmt.Sprintf("layer%d", i)
		must(t, f.unpack(ctx, native, d, name, parent))
		parent = name
	}
	oracle := viewOf(t, native, parent)
	for _, name := range []string{"layerd-overlay", "layerd-fuse"} {
		t.Run(name, func(t *testing.T) {
			s, last := f.snapshotter(name), ""
			for i, d := range layers {
				key := fmt.Sprintf("sequential%d", i)
				must(t, f.unpack(ctx, s, d, key, last))
				last = key
			}
			f.equal(ctx, t, "sequential", oracle, viewOf(t, s, last))
			f.equal(ctx, t, "parallel", viewOf(t, s, last), viewOf(t, s, f.parallel(ctx, t, s, layers)))
		})
	}
}

// parallel unpacks layers as containerd does for a snapshotter with the capability
// rebase, and returns the last one's name.
func (f *fixture) parallel(ctx context.Context, t *testing.T, s snapshots.Snapshotter, layers []ocispec.Descriptor) string {
	var all errgroup.Group
	for i, d := range layers {
		all.Go(func() error {
			ms, err := s.Prepare(ctx, fmt.Sprintf("parallel%d-active", i), "")
			if err != nil {
				return err
			}
			_, err = f.differ().Apply(ctx, d, ms)
			return err
		})
	}
	must(t, all.Wait())
	parent := ""
	for i := range layers {
		name := fmt.Sprintf("parallel%d", i)
		var opts []snapshots.Opt
		if parent != "" {
			opts = append(opts, snapshots.WithParent(parent))
		}
		must(t, s.Commit(ctx, name, name+"-active", opts...))
		parent = name
	}
	return parent
}

// equal fails the test unless two snapshots are the same tree, by diffs in both
// directions.
func (f *fixture) equal(ctx context.Context, t *testing.T, what string, a, b []mount.Mount) {
	t.Helper()
	for _, ms := range [][2][]mount.Mount{{a, b}, {b, a}} {
		d, err := f.differ().Compare(ctx, ms[0], ms[1], diff.WithMediaType(ocispec.MediaTypeImageLayer))
		must(t, err)
		if names := entries(t, f.blob(d)); len(names) > 0 {
			t.Errorf("%s: differs in %q", what, names)
		}
	}
}

// TestCompare: the blob is in the content store, with its DiffID, and applied gives
// the same tree again; made twice, it gets the labels of both requests.
func TestCompare(t *testing.T) {
	testenv.Root(t)
	ctx := inNamespace(t)
	f := serve(t, testenv.Scratch(t))
	s, layers := f.snapshotter("layerd-overlay"), f.standard()
	must(t, f.unpack(ctx, s, layers[0], "base", ""))
	must(t, f.unpack(ctx, s, layers[1], "second", "base"))
	lower, upper := viewOf(t, s, "base"), viewOf(t, s, "second")
	for _, mediaType := range []string{"", ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd, ocispec.MediaTypeImageLayer} {
		d, err := f.differ().Compare(ctx, lower, upper, diff.WithMediaType(mediaType), diff.WithReference("ref"),
			diff.WithLabels(map[string]string{"label" + mediaType: "x"}))
		must(t, err)
		info, err := f.content.Info(ctx, d.Digest)
		must(t, err)
		if info.Size != d.Size || info.Labels["label"+mediaType] != "x" {
			t.Errorf("%q: %+v for %+v", mediaType, info, d)
		}
		if id := info.Labels["containerd.io/uncompressed"]; (id == "") != (mediaType == ocispec.MediaTypeImageLayer) {
			t.Errorf("%q: DiffID %q", mediaType, id)
		}
		again := "again" + strings.ReplaceAll(mediaType, "/", "-")
		must(t, f.unpack(ctx, s, d, again, "base"))
		f.equal(ctx, t, mediaType, upper, viewOf(t, s, again))
	}
	d, err := f.differ().Compare(ctx, nil, upper)
	must(t, err)
	if names := entries(t, f.blob(d)); len(names) < 20 {
		t.Errorf("from nothing: %q", names)
	}
	if left, err := f.content.ListStatuses(ctx); err != nil || len(left) > 0 {
		t.Errorf("unfinished: %v, %v", left, err)
	}
}

// TestNotOurs: what is not the store's is another differ's to do.
func TestNotOurs(t *testing.T) {
	testenv.Root(t)
	ctx := inNamespace(t)
	f := serve(t, testenv.Scratch(t))
	s := f.snapshotter("layerd-overlay")
	d := f.standard()[0]
	must(t, f.unpack(ctx, s, d, "base", ""))
	ours, err := s.Prepare(ctx, "active", "base")
	must(t, err)
	other := serve(t, testenv.Scratch(t))
	theirs, err := other.snapshotter("layerd-overlay").Prepare(ctx, "active", "")
	must(t, err)
	foreign := map[string][]mount.Mount{
		"another store's": theirs,
		"a directory":     {{Type: "bind", Source: t.TempDir(), Options: []string{"rw", "rbind"}}},
		"none":            nil,
		"two":             append(append([]mount.Mount{}, ours...), ours...),
	}
	for what, ms := range foreign {
		if _, err := f.differ().Apply(ctx, d, ms); !errdefs.IsNotImplemented(err) {
			t.Errorf("apply to %s: %v", what, err)
		}
		if _, err := f.differ().Compare(ctx, ours, ms); !errdefs.IsNotImplemented(err) && what != "none" {
			t.Errorf("diff to %s: %v", what, err)
		}
		if _, err := f.differ().Compare(ctx, ms, ours); !errdefs.IsNotImplemented(err) && what != "none" {
			t.Errorf("diff from %s: %v", what, err)
		}
	}
	encrypted := d
	encrypted.MediaType += "+encrypted"
	if _, err := f.differ().Apply(ctx, encrypted, ours); !errdefs.IsNotImplemented(err) {
		t.Errorf("encrypted layer: %v", err)
	}
	alone, err := s.Prepare(ctx, "alone", "")
	must(t, err)
	if _, err := f.differ().Apply(ctx, encrypted, alone); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("encrypted layer without a parent, which another differ would write without its whiteouts: %v", err)
	}
	if _, err := f.differ().Compare(ctx, ours, ours, diff.WithMediaType("text/plain")); !errdefs.IsNotImplemented(err) {
		t.Errorf("media type: %v", err)
	}
	if _, err := f.differ().Compare(t.Context(), ours, ours); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a namespace: %v", err)
	}
}

// TestBadContent: a blob that is not what its descriptor says is refused, and so
// are mounts that show what cannot be written.
func TestBadContent(t *testing.T) {
	testenv.Root(t)
	ctx := inNamespace(t)
	f := serve(t, testenv.Scratch(t))
	s := f.snapshotter("layerd-overlay")
	good := f.standard()[0]
	junk := f.add([]byte("no tar at all, and of no compression"), ocispec.MediaTypeImageLayer)
	short := good
	short.Size--
	missing := good
	missing.Digest = digest.FromString("missing")
	for what, d := range map[string]ocispec.Descriptor{"junk": junk, "short": short, "missing": missing} {
		ms, err := s.Prepare(ctx, what, "")
		must(t, err)
		if _, err := f.differ().Apply(ctx, d, ms); err == nil || errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	must(t, f.unpack(ctx, s, good, "base", ""))
	if _, err := f.differ().Apply(ctx, good, viewOf(t, s, "base")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("onto a view: %v", err)
	}
}

// stalling is a content store whose blobs come until they stall.
type stalling struct {
	content.Store
	began chan struct{}
}

func (s stalling) ReaderAt(ctx context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	return &stalled{ctx: ctx, size: d.Size, began: s.began}, nil
}

type stalled struct {
	ctx   context.Context
	size  int64
	began chan struct{}
	once  sync.Once
}

func (s *stalled) ReadAt([]byte, int64) (int, error) {
	s.once.Do(func() { close(s.began) })
	<-s.ctx.Done()
	return 0, s.ctx.Err()
}

func (s *stalled) Size() int64  { return s.size }
func (s *stalled) Close() error { return nil }

// TestCancel: a client that goes away ends its call, and the snapshot can be used
// again.
func TestCancel(t *testing.T) {
	testenv.Root(t)
	ctx := inNamespace(t)
	f := serve(t, testenv.Scratch(t))
	good := f.standard()[0]
	began := make(chan struct{})
	f.stop()
	f = serveContent(t, stalling{f.content, began}, f.content)
	s := f.snapshotter("layerd-overlay")
	ms, err := s.Prepare(ctx, "key", "")
	must(t, err)
	gone, cancel := context.WithCancel(ctx)
	called := make(chan error, 1)
	go func() {
		_, err := f.differ().Apply(gone, good, ms)
		called <- err
	}()
	<-began
	cancel()
	if err := <-called; !errdefs.IsCanceled(err) && !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	must(t, s.Remove(ctx, "key")) // waits for the layer's lock, if the call still has it
}

// TestSourceDateEpoch: nothing in a diff is younger than the request says.
func TestSourceDateEpoch(t *testing.T) {
	testenv.Root(t)
	ctx := inNamespace(t)
	f := serve(t, testenv.Scratch(t))
	s := f.snapshotter("layerd-overlay")
	must(t, f.unpack(ctx, s, f.standard()[0], "base", "")) // of 2025
	for _, epoch := range []time.Time{time.Unix(1_000_000_000, 5), time.Unix(4_000_000_000, 0)} {
		d, err := f.differ().Compare(ctx, nil, viewOf(t, s, "base"), diff.WithSourceDateEpoch(&epoch), diff.WithMediaType(ocispec.MediaTypeImageLayer))
		must(t, err)
		clamped := 0
		for tr := tar.NewReader(bytes.NewReader(f.blob(d))); ; {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			must(t, err)
			if h.ModTime.After(epoch) {
				t.Errorf("%s is of %v", h.Name, h.ModTime)
			}
			if h.ModTime.Equal(epoch) {
				clamped++
			}
		}
		if (clamped > 10) != (epoch.Unix() == 1_000_000_000) {
			t.Errorf("%v: %d entries have that time", epoch, clamped)
		}
	}
}

// leaseList is a containerd's leases.
type leaseList struct {
	leases.Manager
	mu      sync.Mutex
	created []leases.Lease
	deleted []string
}

func (l *leaseList) Create(ctx context.Context, opts ...leases.Opt) (leases.Lease, error) {
	var n leases.Lease
	for _, o := range opts {
		if err := o(&n); err != nil {
			return n, err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.created = append(l.created, n)
	return n, nil
}

func (l *leaseList) Delete(_ context.Context, n leases.Lease, _ ...leases.DeleteOpt) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.deleted = append(l.deleted, n.ID)
	return nil
}

// leased is a content store that notes under which lease it is written to, as it
// goes over the wire.
type leased struct {
	content.Store
	under *[]string
}

func (l leased) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	md, _ := metadata.FromOutgoingContext(ctx)
	*l.under = append(*l.under, strings.Join(md.Get(leases.GRPCHeader), ","))
	if ns := md.Get(namespaces.GRPCHeader); !slices.Contains(ns, "test") {
		return nil, fmt.Errorf("namespace %q", ns)
	}
	return l.Store.Writer(ctx, opts...)
}

// TestLease: content is written under the request's lease; without one it gets a
// lease that expires, which goes at once if nothing was written.
func TestLease(t *testing.T) {
	testenv.Root(t)
	f := serve(t, testenv.Scratch(t))
	s := f.snapshotter("layerd-native")
	ms, err := s.Prepare(t.Context(), "key", "")
	must(t, err)
	var under []string
	l := &leaseList{}
	d := service.NewDiffer(service.DifferOptions{Store: f.store, Content: leased{f.content, &under}, Leases: l, Lease: time.Hour})
	ctx := inNamespace(t)
	_, err = d.Compare(leases.WithLease(ctx, "theirs"), nil, ms) // a call in this process has its own header, too
	must(t, err)
	if len(l.created) > 0 || !slices.Equal(under, []string{"theirs,theirs"}) {
		t.Errorf("with a lease: created %v, written under %q", l.created, under)
	}
	under = nil
	_, err = d.Compare(ctx, nil, ms)
	must(t, err)
	if len(l.created) != 1 || len(l.deleted) > 0 || !slices.Equal(under, []string{l.created[0].ID}) {
		t.Fatalf("without: created %v, deleted %v, written under %q", l.created, l.deleted, under)
	}
	expires, err := time.Parse(time.RFC3339, l.created[0].Labels["containerd.io/gc.expire"])
	if err != nil || time.Until(expires) > time.Hour || time.Until(expires) < 30*time.Minute {
		t.Errorf("expires %v, %v", expires, err)
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err = d.Compare(gone, nil, ms); err == nil {
		t.Error("a cancelled diff")
	}
	if len(l.created) != len(l.deleted)+1 {
		t.Errorf("after an error: created %v, deleted %v", l.created, l.deleted)
	}
}
