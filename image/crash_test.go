package image_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/native"
	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/testimage"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/overlay"
	"github.com/layerctl/layerctl/snapshot"
)

// envJob makes the test binary do one thing and kill itself in the middle:
// WHAT|IMAGES|SOURCE|SNAPSHOTS|N, N being the progress event at which it dies.
const envJob = "IMAGE_TEST_JOB"

func runJob(job string) int {
	f := strings.Split(job, "|")
	n, _ := strconv.Atoi(f[4])
	die := func(image.Event) {
		if n--; n < 0 {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
	}
	if err := doJob(f[0], f[1], f[2], f[3], die); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func doJob(what, images, source, snapshots string, die image.Progress) error {
	ctx := context.Background()
	s, err := image.Open(images)
	if err != nil {
		return err
	}
	switch what {
	case "load":
		_, err = s.Load(ctx, source, image.LoadOptions{Progress: die})
		return err
	case "stream":
		f, err := os.Open(source)
		if err != nil {
			return err
		}
		_, err = s.LoadFrom(ctx, f, image.LoadOptions{Progress: die})
		return err
	}
	st, err := snapshot.Open(ctx, snapshots, snapshot.Options{Registry: drivers.NewRegistry(overlay.Factory(), native.Factory())})
	if err != nil {
		return err
	}
	v, err := st.View("cli", "native")
	if err != nil {
		return err
	}
	img, err := s.Resolve(ctx, "std")
	if err != nil {
		return err
	}
	if what == "save" {
		_, err = s.Save(ctx, img, image.Destination{Path: source}, image.SaveOptions{Progress: die})
		return err
	}
	_, err = s.Unpack(ctx, v, img, image.UnpackOptions{Progress: die})
	return err
}

// killed runs a job that dies at event n and reports whether it came so far.
func killed(t *testing.T, what, images, source, snapshots string, n int) bool {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envJob+"="+strings.Join([]string{what, images, source, snapshots, strconv.Itoa(n)}, "|"))
	out, err := cmd.CombinedOutput()
	if err == nil {
		return false
	}
	if !testenv.Killed(cmd.ProcessState) {
		t.Fatalf("%s: %v\n%s", what, err, out)
	}
	return true
}

// bulky is an image whose layers take several progress events each.
func bulky(t *testing.T) (*testimage.Layout, testimage.Image) {
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, bulkyLayers(), "none")
	l.List("std", std.Target)
	return l, std
}

func bulkyLayers() []testimage.Layer {
	random := rand.NewChaCha8([32]byte{1})
	var layers []testimage.Layer
	for i := range 3 {
		b := make([]byte, 5<<20)
		random.Read(b)
		layers = append(layers, testimage.Layer{testimage.Dir("."), testimage.File("f"+strconv.Itoa(i), string(b))})
	}
	return layers
}

// TestKilledLoad: a load killed at any step lists nothing, the store is sound,
// and GC removes what is left.
func TestKilledLoad(t *testing.T) {
	testenv.Slow(t)
	l, _ := bulky(t)
	for what, source := range map[string]string{"load": l.Dir(t), "stream": testimage.TempFile(t, l.Tar(t))} {
		deaths := 0
		for n := 0; n < 40; n += 3 {
			s := newStore(t)
			if !killed(t, what, s.Dir(), source, "", n) {
				break
			}
			deaths++
			if list, err := s.List(t.Context()); err != nil || len(list) > 0 {
				t.Errorf("%s killed at %d: listed %v %v", what, n, list, err)
			}
			if found, err := s.Check(t.Context(), image.CheckOptions{}); err != nil || len(found) > 0 {
				t.Errorf("%s killed at %d: %v %v", what, n, found, err)
			}
			if _, err := s.GC(t.Context()); err != nil {
				t.Error(err)
			}
			noLeftovers(t, s.Dir())
			if c := blobCount(t, s.Dir()); c != 0 {
				t.Errorf("%s killed at %d: %d blobs after gc", what, n, c)
			}
		}
		if deaths < 2 {
			t.Errorf("%s was killed %d times only", what, deaths)
		}
	}
}

// TestKilledUnpack: an unpack killed at any step leaves whole layers; the next
// one removes the half-made one and finishes.
func TestKilledUnpack(t *testing.T) {
	testenv.Slow(t)
	l, std := bulky(t)
	s := newStore(t)
	r, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	root := testenv.Scratch(t)
	deaths := 0
	for n := 3; n < 4000; n += 40 {
		if !killed(t, "unpack", s.Dir(), "", root, n) {
			break
		}
		deaths++
	}
	if deaths < 2 {
		t.Errorf("killed %d times only", deaths)
	}
	v := openView(t, root, "native")
	if u := unpack(t, s, v, r.Images[0]); u.ChainID != layer.ChainID(std.Config.RootFS.DiffIDs) {
		t.Errorf("%+v", u)
	}
	if k := keys(t, v); len(k) != 3 {
		t.Errorf("snapshots %v", k)
	}
}

// TestKilledSave: a save to a new layout that is killed leaves no destination.
func TestKilledSave(t *testing.T) {
	l, _ := bulky(t)
	s := newStore(t)
	if _, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	dest := filepath.Join(testenv.Scratch(t), "out")
	if !killed(t, "save", s.Dir(), dest, testenv.Scratch(t), 5) {
		t.Fatal("not killed")
	}
	if _, err := os.Stat(dest); err == nil {
		t.Error("half a layout under its final name")
	}
	if killed(t, "save", s.Dir(), dest, testenv.Scratch(t), 1<<20) {
		t.Error("killed")
	}
	if _, err := newStore(t).Load(t.Context(), dest, image.LoadOptions{}); err != nil {
		t.Error(err)
	}
}
