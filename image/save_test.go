package image_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/testimage"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
	"github.com/layerctl/layerctl/snapshot"
)

// TestSaveUnchanged: what was loaded goes out with the same digests, in every
// form that can hold them, and comes back.
func TestSaveUnchanged(t *testing.T) {
	testenv.Leaks(t)
	s := newStore(t)
	img, std := loadStd(t, s, "gzip", "zstd", "none")
	for _, kind := range []image.Kind{image.KindLayout, image.KindLayoutArchive, image.KindDockerArchive} {
		t.Run(string(kind), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "out")
			desc, err := s.Save(t.Context(), img, image.Destination{Kind: kind, Path: path}, image.SaveOptions{})
			if err != nil || desc.Digest != std.Target.Digest {
				t.Fatal(desc, err)
			}
			back := newStore(t)
			r, err := back.Load(t.Context(), path, image.LoadOptions{})
			if err != nil || r.Kind != kind {
				t.Fatal(r, err)
			}
			checkBack(t, back, r.Images[0], std, kind)
		})
	}
}

func checkBack(t *testing.T, s *image.Store, img image.Image, std testimage.Image, kind image.Kind) {
	t.Helper()
	m, err := s.Manifest(t.Context(), img, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	if layer.ChainID(std.Config.RootFS.DiffIDs) != m.ChainID() {
		t.Errorf("ChainID %s", m.ChainID())
	}
	if kind == image.KindDockerArchive {
		if img.Name != "std:latest" {
			t.Errorf("name %q", img.Name)
		}
		return
	}
	if img.Name != "std" || img.Target.Digest != std.Target.Digest {
		t.Errorf("%s %s, was %s", img.Name, img.Target.Digest, std.Target.Digest)
	}
}

// TestSaveIndex: an image of several platforms goes out whole.
func TestSaveIndex(t *testing.T) {
	l := testimage.NewLayout()
	_, _, top := platformsIndex(t, l)
	l.List("multi", top)
	s := newStore(t)
	if _, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{Platform: "linux/amd64"}); err != nil {
		t.Fatal(err)
	}
	img, _ := s.Resolve(t.Context(), "multi")
	for _, kind := range []image.Kind{image.KindLayout, image.KindLayoutArchive} {
		path := filepath.Join(t.TempDir(), "out")
		if _, err := s.Save(t.Context(), img, image.Destination{Kind: kind, Path: path}, image.SaveOptions{Platform: "linux/amd64"}); err != nil {
			t.Fatal(err)
		}
		back := newStore(t)
		r, err := back.Load(t.Context(), path, image.LoadOptions{Platform: "linux/arm64"})
		if err != nil || r.Images[0].Target.Digest != top.Digest || blobCount(t, back.Dir()) != len(l.Blobs) {
			t.Errorf("%s: %+v %v", kind, r, err)
		}
	}
}

// TestSaveStream: an archive written to a pipe is the one written to a file.
func TestSaveStream(t *testing.T) {
	s := newStore(t)
	img, _ := loadStd(t, s)
	for _, kind := range []image.Kind{image.KindLayoutArchive, image.KindDockerArchive} {
		path := filepath.Join(t.TempDir(), "out.tar")
		if _, err := s.Save(t.Context(), img, image.Destination{Kind: kind, Path: path}, image.SaveOptions{}); err != nil {
			t.Fatal(err)
		}
		file, _ := os.ReadFile(path)
		var stream bytes.Buffer
		if _, err := s.Save(t.Context(), img, image.Destination{Kind: kind, Writer: &stream}, image.SaveOptions{}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(file, stream.Bytes()) || len(file) == 0 {
			t.Errorf("%s: %d bytes in the file, %d in the stream", kind, len(file), stream.Len())
		}
		if _, err := newStore(t).LoadFrom(t.Context(), &stream, image.LoadOptions{}); err != nil {
			t.Error(err)
		}
	}
}

// TestSaveIntoLayout: a layout gets one image more and keeps those it has;
// something else is refused and stays as it was.
func TestSaveIntoLayout(t *testing.T) {
	s := newStore(t)
	img, std := loadStd(t, s)
	l := testimage.NewLayout()
	other := l.AddImage(t, testimage.Platform, testimage.Layers(t)[:1], "zstd")
	l.List("other", other.Target)
	l.List("new", other.Target)
	dir := l.Dir(t)
	if _, err := s.Save(t.Context(), img, image.Destination{Path: dir}, image.SaveOptions{Name: "new"}); err != nil {
		t.Fatal(err)
	}
	noLeftovers(t, dir)
	if _, err := os.Stat(dir + "/ingest"); err == nil {
		t.Error("ingest is left in a layout that is not ours")
	}
	back, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	list, err := back.List(t.Context())
	if err != nil || len(list) != 2 || list[0].Target.Digest != std.Target.Digest || list[1].Target.Digest != other.Target.Digest {
		t.Errorf("%+v %v", list, err)
	}
	full := t.TempDir()
	os.WriteFile(full+"/file", nil, 0o644)
	if _, err := s.Save(t.Context(), img, image.Destination{Path: full}, image.SaveOptions{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a folder of something else: %v", err)
	}
	if names, _ := os.ReadDir(full); len(names) != 1 {
		t.Errorf("changed: %v", names)
	}
	if _, err := s.Save(t.Context(), img, image.Destination{Path: t.TempDir()}, image.SaveOptions{}); err != nil {
		t.Errorf("an empty folder: %v", err)
	}
}

// TestSaveRotten: a blob that rotted in the store is refused by name, and
// nothing is at the destination, in its place or beside it.
func TestSaveRotten(t *testing.T) {
	for _, kind := range []image.Kind{image.KindLayout, image.KindLayoutArchive, image.KindDockerArchive} {
		s := newStore(t)
		img, std := loadStd(t, s)
		rotten := std.Doc.Layers[1].Digest
		flip(t, blobFile(s, rotten))
		dir := t.TempDir()
		_, err := s.Save(t.Context(), img, image.Destination{Kind: kind, Path: dir + "/out"}, image.SaveOptions{})
		if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), rotten.String()) {
			t.Errorf("%s: %v", kind, err)
		}
		if names, _ := os.ReadDir(dir); len(names) > 0 {
			t.Errorf("%s: left behind: %v", kind, names)
		}
		noLeftovers(t, s.Dir())
	}
}

// TestSaveFullDisk: no room at the destination is an error with its errno, and
// leaves nothing.
func TestSaveFullDisk(t *testing.T) {
	testenv.Root(t)
	s := newStore(t)
	img, _ := loadStd(t, s, "none")
	small := testenv.FS(t, "tmpfs", testenv.Size(200<<10))
	for _, kind := range []image.Kind{image.KindLayout, image.KindLayoutArchive} {
		_, err := s.Save(t.Context(), img, image.Destination{Kind: kind, Path: small + "/out"}, image.SaveOptions{})
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%s: %v", kind, err)
		}
		if names, _ := os.ReadDir(small); len(names) > 0 {
			t.Errorf("%s: left behind: %v", kind, names)
		}
	}
}

// change prepares a snapshot on parent, changes it and commits it as name.
func change(t testing.TB, v *snapshot.View, parent, name string, f func(dir string)) {
	t.Helper()
	ms, err := v.Prepare(t.Context(), name+"-key", parent)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := mount.Detached(t.Context(), ms)
	if err != nil {
		t.Fatal(err)
	}
	f(tree.Path())
	if err := tree.Close(); err != nil {
		t.Fatal(err)
	}
	if err := v.Commit(t.Context(), name, name+"-key"); err != nil {
		t.Fatal(err)
	}
}

// TestSaveSnapshot: an unpacked image is itself again; a change on top becomes
// one more layer, and all of it unpacks to the same tree.
func TestSaveSnapshot(t *testing.T) {
	eachDriver(t, func(t *testing.T, v *snapshot.View) {
		testenv.Root(t)
		s := newStore(t)
		img, std := loadStd(t, s, "gzip", "zstd", "none")
		top := unpack(t, s, v, img).ChainID.String()
		dest := filepath.Join(t.TempDir(), "out")
		if desc, err := s.SaveSnapshot(t.Context(), v, top, image.Destination{Path: dest}, image.SaveOptions{Name: "same"}); err != nil || desc.Digest != std.Target.Digest {
			t.Fatalf("unchanged: %s %v, was %s", desc.Digest, err, std.Target.Digest)
		}
		change(t, v, top, "base2", func(dir string) {
			os.WriteFile(dir+"/etc/more", []byte("more"), 0o600)
			os.Remove(dir + "/etc/new")
			os.Mkdir(dir+"/usr/added", 0o755)
		})
		o := image.SaveOptions{Name: "base2", CreatedBy: "a test", Compression: layer.Zstd, Created: time.Unix(1e9, 0)}
		if _, err := s.SaveSnapshot(t.Context(), v, "base2", image.Destination{Path: dest}, o); err != nil {
			t.Fatal(err)
		}
		noLeftovers(t, s.Dir())
		checkGrown(t, v, dest, std)
	})
}

// checkGrown reads back an image of the standard one's layers and one more.
func checkGrown(t *testing.T, v *snapshot.View, dest string, std testimage.Image) {
	t.Helper()
	s2, v2 := newStore(t), newView(t, "native")
	r, err := s2.Load(t.Context(), dest, image.LoadOptions{Select: "base2"})
	if err != nil {
		t.Fatal(err)
	}
	m, err := s2.Manifest(t.Context(), r.Images[0], "")
	if err != nil || len(m.Layers) != 4 || len(m.Config.History) != 4 {
		t.Fatalf("%+v %v", m, err)
	}
	for i, l := range std.Doc.Layers {
		if m.Layers[i].Blob.Digest != l.Digest {
			t.Errorf("layer %d was not handed out as it came", i+1)
		}
	}
	if h := m.Config.History[3]; h.CreatedBy != "a test" || h.Created.Unix() != 1e9 || m.Config.Created.Unix() != 1e9 || m.Config.Config.Cmd[0] != "/bin/sh" {
		t.Errorf("config %+v", m.Config)
	}
	if m.Layers[3].Blob.MediaType != ocispec.MediaTypeImageLayerZstd {
		t.Errorf("made as %s", m.Layers[3].Blob.MediaType)
	}
	u := unpack(t, s2, v2, r.Images[0])
	if d := diffLines(listSnapshot(t, v, "base2"), listSnapshot(t, v2, u.ChainID.String())); d != "" {
		t.Errorf("the tree changed on its way:\n%s", d)
	}
}

// TestSaveSnapshotWithoutImage: a snapshot of no image becomes one, with the
// same bytes each time, whichever driver keeps it.
func TestSaveSnapshotWithoutImage(t *testing.T) {
	var first []byte
	eachDriver(t, func(t *testing.T, v *snapshot.View) {
		testenv.Root(t)
		for i, name := range []string{"one", "two"} {
			change(t, v, []string{"", "one"}[i], name, func(dir string) {
				for _, f := range []string{name, "both"} {
					os.WriteFile(dir+"/"+f, []byte(name), 0o644)
					os.Chtimes(dir+"/"+f, testimage.Epoch, testimage.Epoch)
				}
				os.Chtimes(dir, testimage.Epoch, testimage.Epoch)
			})
		}
		for range 2 {
			s := newStore(t)
			var out bytes.Buffer
			o := image.SaveOptions{Name: "two", Platform: "linux/arm64", Created: time.Unix(1e9, 0)}
			if _, err := s.SaveSnapshot(t.Context(), v, "two", image.Destination{Kind: image.KindLayoutArchive, Writer: &out}, o); err != nil {
				t.Fatal(err)
			}
			noLeftovers(t, s.Dir())
			if first == nil {
				first = out.Bytes()
			}
			if !bytes.Equal(first, out.Bytes()) {
				t.Error("other bytes")
			}
		}
		s := newStore(t)
		r, err := s.LoadFrom(t.Context(), bytes.NewReader(first), image.LoadOptions{Platform: "linux/arm64"})
		if err != nil {
			t.Fatal(err)
		}
		if m, err := s.Manifest(t.Context(), r.Images[0], ""); err != nil || len(m.Layers) != 2 || m.Config.Architecture != "arm64" {
			t.Errorf("%+v %v", m, err)
		}
	})
}

// TestSaveKeepsUnknownConfig: fields of a configuration that this program does
// not know survive a change.
func TestSaveKeepsUnknownConfig(t *testing.T) {
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t)[:1])
	var doc map[string]any
	json.Unmarshal(l.Blobs[std.Doc.Config.Digest], &doc)
	doc["config"].(map[string]any)["Healthcheck"] = map[string]any{"Test": []string{"CMD", "true"}}
	doc["docker_version"] = "1.2.3"
	std.Doc.Config = l.AddJSON(std.Doc.Config.MediaType, doc)
	l.List("std", l.AddJSON(std.Target.MediaType, std.Doc))
	s, v := newStore(t), newView(t, "native")
	r, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	testenv.Root(t)
	change(t, v, unpack(t, s, v, r.Images[0]).ChainID.String(), "top", func(dir string) { os.WriteFile(dir+"/x", nil, 0o644) })
	var out bytes.Buffer
	if _, err := s.SaveSnapshot(t.Context(), v, "top", image.Destination{Kind: image.KindLayoutArchive, Writer: &out}, image.SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"Healthcheck":{"Test":["CMD","true"]}`, `"docker_version":"1.2.3"`} {
		if !bytes.Contains(out.Bytes(), []byte(want)) {
			t.Errorf("lost %s", want)
		}
	}
}

// TestSaveCancelled: an interrupted save leaves nothing, here or there.
func TestSaveCancelled(t *testing.T) {
	s := newStore(t)
	img, _ := loadStd(t, s)
	for _, kind := range []image.Kind{image.KindLayout, image.KindLayoutArchive, image.KindDockerArchive} {
		ctx, cancel := context.WithCancel(t.Context())
		dir := t.TempDir()
		_, err := s.Save(ctx, img, image.Destination{Kind: kind, Path: dir + "/out"}, image.SaveOptions{Progress: func(image.Event) { cancel() }})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", kind, err)
		}
		if names, _ := os.ReadDir(dir); len(names) > 0 {
			t.Errorf("%s: left behind: %v", kind, names)
		}
		noLeftovers(t, s.Dir())
	}
}

// TestLocksHoldOffGC: GC waits for a load that is under way, and gives up with
// its context.
func TestLocksHoldOffGC(t *testing.T) {
	s := newStore(t)
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
	l.List("std", std.Target)
	b := l.Tar(t)
	half := make(chan error)
	r := io.MultiReader(bytes.NewReader(b[:len(b)/2]), readerFunc(func([]byte) (int, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := s.GC(ctx)
		half <- err
		return 0, io.EOF
	}), bytes.NewReader(b[len(b)/2:]))
	done := make(chan error)
	go func() {
		_, err := s.LoadFrom(t.Context(), r, image.LoadOptions{})
		done <- err
	}()
	if err := <-half; !errors.Is(err, context.DeadlineExceeded) || !sys.IsLocked(err) {
		t.Errorf("gc in the middle of a load: %v", err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if r, err := s.GC(t.Context()); err != nil || r.Blobs != 0 {
		t.Errorf("%+v %v", r, err)
	}
}

// TestImageWithoutLayers goes in, through and out.
func TestImageWithoutLayers(t *testing.T) {
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, nil)
	l.List("none", std.Target)
	s, v := newStore(t), newView(t, "native")
	r, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if u := unpack(t, s, v, r.Images[0]); u.ChainID != "" || u.Layers != 0 {
		t.Errorf("%+v", u)
	}
	if _, err := s.DropLayers(t.Context(), "none"); err != nil {
		t.Error(err)
	}
	img, _ := s.Resolve(t.Context(), "none")
	for _, kind := range []image.Kind{image.KindLayout, image.KindLayoutArchive, image.KindDockerArchive} {
		to := image.Destination{Kind: kind, Path: filepath.Join(t.TempDir(), "out")}
		if desc, err := s.Save(t.Context(), img, to, image.SaveOptions{Snapshots: v}); err != nil || desc.Digest != std.Target.Digest {
			t.Errorf("%s: %v %v", kind, desc, err)
		}
	}
	if _, err := s.SaveSnapshot(t.Context(), v, "", image.Destination{Path: t.TempDir()}, image.SaveOptions{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no snapshot: %v", err)
	}
}
