package overlay

import (
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// TestDeviceThatVanishesAbove: in a layer on nothing, a bind, a 0/0 character
// device can be made, and every layer above would lose it without a word. Commit
// refuses it by name, and takes the layer when it is gone.
func TestDeviceThatVanishesAbove(t *testing.T) {
	b := newBench(t, "ext4", nil)
	r := b.create(drivers.Ref{}, drivers.CreateOptions{})
	b.edit(r, func(dir string) {
		b.file(dir+"/d/file", "x")
		d, err := sys.OpenDir(dir + "/d")
		b.check(err)
		defer d.Close()
		b.check(d.Mknod("null-null", sys.S_IFCHR|0o600, 0, 0))
	})
	_, err := b.Commit(b.ctx, r, drivers.CommitOptions{})
	b.wants("commit", err, errdefs.ErrFailedPrecondition, "d/null-null")
	b.edit(r, func(dir string) {
		d, err := sys.OpenDir(dir + "/d")
		b.check(err)
		defer d.Close()
		b.check(d.Unlink("null-null", 0))
	})
	b.commit(r)
}
