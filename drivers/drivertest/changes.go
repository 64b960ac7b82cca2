package drivertest

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/layer"
)

// Changeset is a diff taken apart: its tar and a line for each change, with the
// aspects that the tar does not show.
type Changeset struct {
	Tar   []byte
	Lines []string
}

// Differs says in what c is another than what the exact walk gives; "" for in
// nothing.
func (c Changeset) Differs(walk Changeset) string {
	if bytes.Equal(c.Tar, walk.Tar) && slices.Equal(c.Lines, walk.Lines) {
		return ""
	}
	return fmt.Sprintf("the walk says\n%s\nand the diff\n%s", strings.Join(walk.Lines, "\n"), strings.Join(c.Lines, "\n"))
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

// Collect writes a diff as a tar.
func Collect(ctx context.Context, changes iter.Seq2[layer.Change, error]) (Changeset, error) {
	var c Changeset
	var b bytes.Buffer
	noted := func(yield func(layer.Change, error) bool) {
		for ch, err := range changes {
			if err == nil {
				c.Lines = append(c.Lines, ch.String())
			}
			if !yield(ch, err) {
				return
			}
		}
	}
	_, err := layer.WriteTar(ctx, &b, noted, layer.TarOptions{})
	c.Tar = b.Bytes()
	return c, err
}

// walkDiff is the exact walk over the two mounted trees.
func (k *kit) walkDiff(from, to drivers.Ref) Changeset {
	k.Helper()
	var below string
	if from.ID != 0 {
		below = k.mount(from, drivers.MountOptions{ReadOnly: true})
		defer k.umount(below)
	}
	above := k.mount(to, drivers.MountOptions{ReadOnly: true})
	defer k.umount(above)
	c, err := Collect(k.ctx, layer.DiffTrees(k.ctx, below, above, layer.DiffOptions{OverrideStat: !k.fs.privileged}))
	k.check(err)
	return c
}

// driverDiff is what the driver says.
func (k *kit) driverDiff(from, to drivers.Ref) Changeset {
	k.Helper()
	c, err := Collect(k.ctx, k.driver.(drivers.Differ).Diff(k.ctx, from, to))
	k.check(err)
	return c
}

// diffIsExact compares the driver's diff with the walk's, and returns it. A
// driver without a diff is served by the walk.
func (k *kit) diffIsExact(from, to drivers.Ref) Changeset {
	k.Helper()
	want := k.walkDiff(from, to)
	if !k.caps.Diff {
		return want
	}
	got := k.driverDiff(from, to)
	k.same("the driver's changes", got.Lines, want.Lines)
	if !bytes.Equal(got.Tar, want.Tar) {
		k.Fatalf("the same changes, other tars: %d and %d bytes; they differ from byte %d",
			len(got.Tar), len(want.Tar), firstDifference(got.Tar, want.Tar))
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
