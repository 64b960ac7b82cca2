package union

import (
	"errors"
	"os"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// TestMountpointInALayerShowsNothing: a server whose mountpoint lies in one of its
// layers asked itself when it looked at that name, and hung, not to be killed. Here
// the mount in the layer is a tmpfs, whose file would show.
func TestMountpointInALayerShowsNothing(t *testing.T) {
	testenv.Root(t)
	t.Run("with an upper", func(t *testing.T) { covered(t, true) })
	t.Run("lowers alone", func(t *testing.T) { covered(t, false) })
}

func covered(t *testing.T, upper bool) {
	dir := testenv.FS(t, "ext4")
	for _, d := range []string{"l", "l/in", "u", "u/up", "w"} {
		if err := os.Mkdir(dir+"/"+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c := Config{Lowers: []string{dir + "/l", dir + "/u"}}
	if upper {
		c = Config{Lowers: []string{dir + "/l"}, Upper: dir + "/u", Work: dir + "/w"}
	}
	fs, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer fs.Close()
	for name, at := range map[string]string{"in": dir + "/l/in", "up": dir + "/u/up"} {
		if err := sys.Mount("over", at, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		defer testenv.Unmount(t, at)
		if err := os.WriteFile(at+"/hidden", nil, 0o644); err != nil {
			t.Fatal(err)
		}
		e, err := fs.Lookup(fs.Root(), name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fs.Lookup(e.Node, "hidden"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s shows what is mounted there: %v", name, err)
		}
		if !upper {
			continue
		}
		if _, err := fs.Mkdir(Caller{}, e.Node, "made", 0o755); err != nil {
			t.Errorf("mkdir in %s: %v", name, err)
		}
	}
}
