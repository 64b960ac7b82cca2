package layerctl_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"testing"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/userns"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
	"github.com/layerctl/layerctl/snapshot"
)

// TestMain takes an ordinary user's run into a user namespace: examples mount.
func TestMain(m *testing.M) {
	userns.Init()
	if userns.Needed() {
		if code, err := userns.Run(userns.Command{Args: os.Args[1:], Root: "/nonexistent"}); err == nil {
			os.Exit(code)
		}
	}
	testenv.Main(m)
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// A tree becomes a committed snapshot; a writable one on top of it is mounted and
// changed; the difference is shown and committed.
func Example() {
	ctx := context.Background()
	dir := makeTree()
	defer os.RemoveAll(dir)

	store, err := layerctl.Open(ctx, filepath.Join(dir, "store"), layerctl.Options{})
	must(err)
	defer store.Close()
	view, err := store.View("example", "") // a containerd snapshots.Snapshotter
	must(err)

	// Import: the tree as the layer that makes it from nothing.
	r, w := io.Pipe()
	go func() {
		_, err := layer.WriteTar(ctx, w, layer.DiffTrees(ctx, "", filepath.Join(dir, "tree"), layer.DiffOptions{}), layer.TarOptions{})
		w.CloseWithError(err)
	}()
	must(view.Create(ctx, "importing", "", snapshot.CreateOptions{}))
	must(view.Apply(ctx, "importing", r, layer.ApplyOptions{}))
	must(view.Commit(ctx, "base", "importing"))

	// Prepare and mount; who has containerd's mount.All may use that.
	mounts, err := view.Prepare(ctx, "work", "base")
	must(err)
	m := filepath.Join(dir, "mnt")
	must(mount.All(ctx, mounts, m))

	// Change, and unmount.
	must(os.WriteFile(filepath.Join(m, "etc/new"), []byte("new\n"), 0o644))
	must(os.Remove(filepath.Join(m, "etc/old")))
	must(mount.Unmount(m, mount.UnmountOptions{}))

	// What changed, exactly; then freeze it.
	for change, err := range view.Diff(ctx, "", "work") {
		must(err)
		fmt.Println(&change)
	}
	must(view.Commit(ctx, "base2", "work"))
	info, err := view.Stat(ctx, "base2")
	must(err)
	fmt.Println(info.Kind, info.Name, "on", info.Parent)

	// Output:
	// C etc (time)
	// A etc/new
	// D etc/old
	// Committed base2 on base
}

// makeTree makes a directory with a small tree and a mountpoint.
func makeTree() string {
	dir, err := os.MkdirTemp("", "layerctl-example-")
	must(err)
	must(os.MkdirAll(filepath.Join(dir, "tree/etc"), 0o755))
	must(os.Mkdir(filepath.Join(dir, "mnt"), 0o755))
	must(os.WriteFile(filepath.Join(dir, "tree/etc/old"), []byte("old\n"), 0o644))
	must(os.WriteFile(filepath.Join(dir, "tree/etc/same"), []byte("same\n"), 0o644))
	return dir
}

// The drivers, best first.
func ExampleDrivers() {
	for _, f := range layerctl.Drivers().Factories() {
		fmt.Println(f.Name)
	}
	// Output:
	// overlay
	// btrfs
	// fuse
	// native
	// devmapper
}
