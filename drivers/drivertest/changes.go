package drivertest

import (
	"bytes"
	"context"
	"iter"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/layer"
)

// changeset is a diff taken apart: its tar and a line for each change, with the
// aspects that the tar does not show.
type changeset struct {
	tar   []byte
	lines []string
}

// lastError drains a diff and returns the error that ended it.
func lastError(changes iter.Seq2[layer.Change, error]) error {
	for _, err := range changes {
		if err != nil {
			return err
		}
	}
	return nil
}

// collect writes a diff as a tar.
func collect(ctx context.Context, changes iter.Seq2[layer.Change, error]) (changeset, error) {
	var c changeset
	var b bytes.Buffer
	noted := func(yield func(layer.Change, error) bool) {
		for ch, err := range changes {
			if err == nil {
				c.lines = append(c.lines, ch.String())
			}
			if !yield(ch, err) {
				return
			}
		}
	}
	_, err := layer.WriteTar(ctx, &b, noted, layer.TarOptions{})
	c.tar = b.Bytes()
	return c, err
}

// walkDiff is the exact walk over the two mounted trees.
func (k *kit) walkDiff(from, to drivers.Ref) changeset {
	k.Helper()
	var below string
	if from.ID != 0 {
		below = k.mount(from, drivers.MountOptions{ReadOnly: true})
		defer k.umount(below)
	}
	above := k.mount(to, drivers.MountOptions{ReadOnly: true})
	defer k.umount(above)
	c, err := collect(k.ctx, layer.DiffTrees(k.ctx, below, above, layer.DiffOptions{OverrideStat: !k.fs.privileged}))
	k.check(err)
	return c
}

// driverDiff is what the driver says.
func (k *kit) driverDiff(from, to drivers.Ref) changeset {
	k.Helper()
	c, err := collect(k.ctx, k.driver.(drivers.Differ).Diff(k.ctx, from, to))
	k.check(err)
	return c
}

// diffIsExact compares the driver's diff with the walk's, and returns it. A
// driver without a diff is served by the walk.
func (k *kit) diffIsExact(from, to drivers.Ref) changeset {
	k.Helper()
	want := k.walkDiff(from, to)
	if !k.caps.Diff {
		return want
	}
	got := k.driverDiff(from, to)
	k.same("the driver's changes", got.lines, want.lines)
	if !bytes.Equal(got.tar, want.tar) {
		k.Fatalf("the same changes, other tars: %d and %d bytes; they differ from byte %d",
			len(got.tar), len(want.tar), firstDifference(got.tar, want.tar))
	}
	return got
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// applied makes a new committed layer on parent and applies a tar to it.
func (k *kit) applied(parent drivers.Ref, tar []byte) drivers.Ref {
	k.Helper()
	r := k.create(parent, drivers.CreateOptions{})
	if a, ok := k.driver.(drivers.Applier); ok {
		k.check(a.Apply(k.ctx, r, bytes.NewReader(tar), layer.ApplyOptions{}))
	} else {
		k.edit(r, func(dir string) {
			k.check(layer.Apply(k.ctx, dir, bytes.NewReader(tar), layer.ApplyOptions{OverrideStat: !k.fs.privileged}))
		})
	}
	k.commit(r)
	return r
}
