package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"path"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/internal/testimage"
)

var fuzzLimits = Limits{Document: 1 << 20, Manifests: 100, Depth: 3, Layers: 100, Entries: 100, Size: smallEntry}

// seeds adds what the readers meet in earnest.
func seeds(f *testing.F) (l *testimage.Layout, std testimage.Image) {
	l = testimage.NewLayout()
	std = l.AddImage(f, testimage.Platform, []testimage.Layer{{testimage.File("a", "a")}, {testimage.Whiteout("a")}})
	l.List("std", std.Target)
	for _, doc := range []any{l.Index, std.Doc, std.Config} {
		b, err := json.Marshal(doc)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"schemaVersion":2,"manifests":[],"layers":[]}`))
	f.Add([]byte(`null`))
	return l, std
}

// classified fails on an error that wraps no sentinel: nobody could tell bad
// input from a bad disk.
func classified(t *testing.T, err error) {
	t.Helper()
	if err != nil && !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) && !errdefs.IsResourceExhausted(err) &&
		!errdefs.IsNotFound(err) && !errdefs.IsDataLoss(err) {
		t.Errorf("an error of no kind: %v", err)
	}
}

func FuzzIndex(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		idx, err := parseIndex(b, fuzzLimits)
		classified(t, err)
		if err != nil {
			return
		}
		for _, d := range idx.Manifests {
			confined(t, blobPath(d.Digest))
		}
	})
}

func FuzzManifest(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseManifest(b, fuzzLimits)
		classified(t, err)
		if err != nil {
			return
		}
		for _, d := range append(m.Layers, m.Config) {
			confined(t, blobPath(d.Digest))
		}
		if c, err := parseConfig(b, fuzzLimits); err == nil {
			_, err = joinLayers(m.Layers, c.RootFS.DiffIDs)
			classified(t, err)
		}
	})
}

// confined checks that a path made of input stays below blobs/.
func confined(t *testing.T, p string) {
	t.Helper()
	if path.Clean(p) != p || !strings.HasPrefix(p, "blobs/") || strings.Count(p, "/") != 2 {
		t.Errorf("blob path %q", p)
	}
}

func FuzzDockerManifest(f *testing.F) {
	seeds(f)
	f.Add([]byte(`[{"Config":"c.json","RepoTags":["a:b"],"Layers":["x/layer.tar"]}]`))
	f.Add([]byte(`[{"Config":"..jsok","RepoTags":["a:b"],"Layers":["x/layer.tar"]}]`)) // dots alone lead nowhere
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := parseDockerManifest(b, fuzzLimits)
		classified(t, err)
		if err != nil {
			return
		}
		for _, img := range list {
			for _, n := range append(img.Layers, img.Config) {
				if clean, err := cleanName(n); err != nil || strings.HasPrefix(clean+"/", "../") || strings.HasPrefix(clean, "/") {
					t.Errorf("name %q", n)
				}
			}
		}
	})
}

// FuzzArchive reads any bytes as an archive and, if there are images in it,
// plans their loading.
func FuzzArchive(f *testing.F) {
	l, std := seeds(f)
	f.Add(l.Tar(f))
	f.Add(std.DockerTar(f, testimage.Docker{Tags: []string{"a:b"}, Links: true}))
	f.Add(std.DockerTar(f, testimage.Docker{Tags: []string{"a:b"}, Legacy: true}))
	f.Fuzz(func(t *testing.T, b []byte) {
		ctx := context.Background()
		a, err := spoolArchive(ctx, bytes.NewReader(b), "/nowhere", fuzzLimits) // no entry is large enough for a file
		classified(t, err)
		if err != nil {
			return
		}
		for name := range a.entries {
			if strings.HasPrefix(name, "../") || strings.HasPrefix(name, "/") || name == ".." {
				t.Errorf("entry %q", name)
			}
		}
		src, err := readArchive(ctx, a, fuzzLimits)
		classified(t, err)
		if err != nil {
			return
		}
		p := &plan{src: src, o: LoadOptions{Limits: fuzzLimits}, required: map[digest.Digest]bool{}}
		if err := p.make(ctx); !errors.Is(err, context.Canceled) {
			classified(t, err)
		}
	})
}
