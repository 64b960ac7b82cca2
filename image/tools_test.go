package image_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/testimage"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

// realImages is a folder with images of a real distribution (see
// scripts/make-images.sh); without it these tests use the standard image only.
const realImages = "LAYERCTL_IMAGES"

// inspect asks skopeo what it sees at a reference.
func inspect(t *testing.T, ref string) (config struct {
	RootFS struct{ DiffIDs []digest.Digest }
}, dg digest.Digest) {
	t.Helper()
	skopeo := testenv.Program(t, "skopeo", "skopeo")
	var c struct {
		RootFS struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal([]byte(run(t, "", skopeo, "inspect", "--config", ref)), &c); err != nil {
		t.Fatal(err)
	}
	config.RootFS.DiffIDs = c.RootFS.DiffIDs
	return config, digest.FromString(run(t, "", skopeo, "inspect", "--raw", ref))
}

// TestSkopeoReads: skopeo reads and copies what Save writes, in every form, and
// the store's own folder in place.
func TestSkopeoReads(t *testing.T) {
	skopeo := testenv.Program(t, "skopeo", "skopeo")
	s := newStore(t)
	img, std := loadStd(t, s)
	dir := t.TempDir()
	if err := s.Tag(t.Context(), "std", "localhost/std:v1"); err != nil {
		t.Fatal(err)
	}
	refs := map[string]string{"store": "oci:" + s.Dir() + ":std", "store, long name": "oci:" + s.Dir() + ":localhost/std:v1"}
	for form, kind := range map[string]image.Kind{"oci:": image.KindLayout, "oci-archive:": image.KindLayoutArchive, "docker-archive:": image.KindDockerArchive} {
		path := filepath.Join(dir, string(kind))
		if _, err := s.Save(t.Context(), img, image.Destination{Kind: kind, Path: path}, image.SaveOptions{}); err != nil {
			t.Fatal(err)
		}
		refs[string(kind)] = form + path
		if kind != image.KindDockerArchive {
			refs[string(kind)] += ":std"
		}
	}
	for name, ref := range refs {
		c, dg := inspect(t, ref)
		if layer.ChainID(c.RootFS.DiffIDs) != layer.ChainID(std.Config.RootFS.DiffIDs) {
			t.Errorf("%s: DiffIDs %v", name, c.RootFS.DiffIDs)
		}
		if !strings.HasPrefix(ref, "docker") && dg != std.Target.Digest {
			t.Errorf("%s: digest %s", name, dg)
		}
		run(t, "", skopeo, "--insecure-policy", "copy", "-q", ref, "dir:"+filepath.Join(t.TempDir(), "copy")) // reads and verifies every layer
	}
}

// TestSkopeoWrites: what skopeo writes from it loads again.
func TestSkopeoWrites(t *testing.T) {
	skopeo := testenv.Program(t, "skopeo", "skopeo")
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
	l.List("std", std.Target)
	from := "oci:" + l.Dir(t) + ":std"
	for form, kind := range map[string]image.Kind{"oci:": image.KindLayout, "oci-archive:": image.KindLayoutArchive, "docker-archive:": image.KindDockerArchive} {
		path := filepath.Join(t.TempDir(), "out")
		run(t, "", skopeo, "--insecure-policy", "copy", "-q", from, form+path+":localhost/std:v1")
		s := newStore(t)
		r, err := s.Load(t.Context(), path, image.LoadOptions{})
		if err != nil || r.Kind != kind || len(r.Images) != 1 || r.Images[0].Name != "localhost/std:v1" {
			t.Errorf("%s: %+v %v", form, r, err)
			continue
		}
		if m, err := s.Manifest(t.Context(), r.Images[0], ""); err != nil || m.ChainID() != layer.ChainID(std.Config.RootFS.DiffIDs) {
			t.Errorf("%s: %v", form, err)
		}
	}
}

// TestUmociUnpacksTheSame: umoci's unpacking of what Save wrote is our mount,
// file by file: type, mode, owner, time, link, content, hard links, xattrs.
func TestUmociUnpacksTheSame(t *testing.T) {
	testenv.Slow(t)
	testenv.Root(t)
	umoci := testenv.Program(t, "umoci", "umoci")
	eachDriver(t, func(t *testing.T, v *snapshot.View) {
		s := newStore(t)
		img, _ := loadStd(t, s, "gzip", "none")
		top := unpack(t, s, v, img).ChainID.String()
		change(t, v, top, "changed", func(dir string) {
			os.WriteFile(dir+"/etc/more", []byte("more"), 0o600)
			os.RemoveAll(dir + "/usr/share")
			os.Link(dir+"/srv/owned", dir+"/srv/again")
			os.Lchown(dir+"/srv/dangling", 7, 8)
			os.Chmod(dir+"/bin/busybox", 0o4711)
		})
		dest := filepath.Join(t.TempDir(), "out")
		for _, key := range []string{top, "changed"} {
			if _, err := s.SaveSnapshot(t.Context(), v, key, image.Destination{Path: dest}, image.SaveOptions{Name: "tag"}); err != nil {
				t.Fatal(err)
			}
			bundle := filepath.Join(testenv.Scratch(t), "b")
			run(t, "", umoci, "unpack", "--image", dest+":tag", bundle)
			if d := diffLines(listTree(t, bundle+"/rootfs"), listSnapshot(t, v, key)); d != "" {
				t.Errorf("%s: umoci (-) and our mount (+) differ:\n%s", key, d)
			}
		}
	})
}

// TestPodmanLoads: podman loads what Save writes and runs it.
func TestPodmanLoads(t *testing.T) {
	testenv.Root(t)
	podman := testenv.Program(t, "podman", "podman")
	s := newStore(t)
	img, _ := loadStd(t, s)
	root := testenv.Scratch(t)
	store := []string{"--root", root + "/root", "--runroot", root + "/run", "--storage-driver", "vfs", "--events-backend", "none"}
	for _, kind := range []image.Kind{image.KindLayoutArchive, image.KindDockerArchive} {
		path := filepath.Join(t.TempDir(), "out.tar")
		if _, err := s.Save(t.Context(), img, image.Destination{Kind: kind, Path: path}, image.SaveOptions{Name: "localhost/std:" + string(kind)}); err != nil {
			t.Fatal(err)
		}
		out := run(t, "", podman, append(store, "load", "-i", path)...)
		if !strings.Contains(out, "localhost/std:"+string(kind)) {
			t.Errorf("%s: podman load said %q", kind, out)
		}
		out = run(t, "", podman, append(store, "image", "inspect", "--format", "{{.Config.Cmd}} {{len .RootFS.Layers}}", "localhost/std:"+string(kind))...)
		if strings.TrimSpace(out) != "[/bin/sh] 3" {
			t.Errorf("%s: %s", kind, out)
		}
	}
}

// TestRealImage: a distribution's image of six layers, in each form it has,
// against umoci, and out and in again with the same digests.
func TestRealImage(t *testing.T) {
	dir := os.Getenv(realImages)
	if dir == "" {
		testenv.Optional(t, realImages+" names no folder of images (scripts/make-images.sh makes one)")
	}
	testenv.Root(t)
	umoci := testenv.Program(t, "umoci", "umoci")
	v := newView(t, "overlay")
	bundle := filepath.Join(testenv.Scratch(t), "b")
	run(t, "", umoci, "unpack", "--image", dir+"/oci:full", bundle)
	want := listTree(t, bundle+"/rootfs")
	for _, name := range []string{"oci", "full.oci.tar", "full.docker.tar"} {
		s := newStore(t)
		o := image.LoadOptions{}
		if name == "oci" {
			o.Select = "full"
		}
		r, err := s.Load(t.Context(), filepath.Join(dir, name), o)
		if err != nil {
			t.Fatal(err)
		}
		u := unpack(t, s, v, r.Images[0])
		if d := diffLines(want, listSnapshot(t, v, u.ChainID.String())); d != "" {
			t.Errorf("%s: umoci (-) and our mount (+) differ:\n%.4000s", name, d)
		}
		out := filepath.Join(t.TempDir(), "out")
		desc, err := s.SaveSnapshot(t.Context(), v, u.ChainID.String(), image.Destination{Path: out}, image.SaveOptions{Name: "full"})
		if err != nil || desc.Digest != r.Images[0].Target.Digest {
			t.Errorf("%s: came as %s, went as %s: %v", name, r.Images[0].Target.Digest, desc.Digest, err)
		}
	}
}
