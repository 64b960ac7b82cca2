package snapshot_test

import (
	"archive/tar"
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

var applyOptions = layer.ApplyOptions{}

// tarOf is a tar of files whose content is their name. t may be nil.
func tarOf(_ testing.TB, names ...string) io.Reader {
	var b bytes.Buffer
	w := tar.NewWriter(&b) // to memory: nothing can fail
	for _, n := range names {
		_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: n, Mode: 0o644, Size: int64(len(n))})
		_, _ = io.WriteString(w, n)
	}
	_ = w.Close()
	return &b
}

// TestApplyTakesTheListing: in the same pass, unless somebody else could have
// written, too; then it is computed after Commit.
func TestApplyTakesTheListing(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *snapshot.Store, v *snapshot.View) {
		ctx := t.Context()
		listed := func(key string) []string {
			r, d, err := v.Listing(ctx, key)
			must(t, err)
			defer r.Close()
			if rec, err := v.Record(ctx, key); err != nil || rec.TreeDigest != d || d == "" {
				t.Errorf("record has digest %q, listing %q: %v", rec.TreeDigest, d, err)
			}
			var paths []string
			for rec, err := range layer.ReadListing(r) {
				must(t, err)
				if rec.Entry.Path != "." {
					paths = append(paths, rec.Entry.Path)
				}
			}
			return paths
		}
		must(t, v.Create(ctx, "one", "", snapshot.CreateOptions{}))
		must(t, v.Apply(ctx, "one", tarOf(t, "a", "b"), applyOptions))
		must(t, v.Commit(ctx, "applied", "one"))
		equal(t, "listing at Commit", listed("applied"), []string{"a", "b"})

		must(t, v.Create(ctx, "two", "applied", snapshot.CreateOptions{}))
		must(t, v.Apply(ctx, "two", tarOf(t, "c", "d"), applyOptions))
		write(t, v, "two", map[string]string{"d": "", "e": "by hand"})
		must(t, v.Commit(ctx, "changed", "two"))
		must(t, s.FinishListings(ctx))
		equal(t, "listing after a change by hand", listed("changed"), []string{"c", "e"})

		must(t, v.Create(ctx, "three", "applied", snapshot.CreateOptions{}))
		must(t, v.Apply(ctx, "three", tarOf(t, "c"), applyOptions))
		must(t, v.Apply(ctx, "three", tarOf(t, "d"), applyOptions))
		must(t, v.Commit(ctx, "twice", "three"))
		must(t, s.FinishListings(ctx))
		equal(t, "listing after two applies", listed("twice"), []string{"c", "d"})

		must(t, v.Create(ctx, "four", "applied", snapshot.CreateOptions{}))
		if err := v.Apply(ctx, "four", io.MultiReader(io.LimitReader(tarOf(t, "c", "d"), 1600), broken{}), applyOptions); err == nil {
			t.Error("a broken stream was applied")
		}
		must(t, v.Apply(ctx, "four", tarOf(t, "e"), applyOptions))
		must(t, v.Commit(ctx, "retried", "four"))
		must(t, s.FinishListings(ctx))
		if l := strings.Join(listed("retried"), " "); !strings.HasSuffix(l, "e") {
			t.Errorf("listing after a failed apply: %s", l)
		}
		_, _, err := v.Listing(ctx, "nothing")
		wants(t, err, errdefs.ErrNotFound)
	})
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }
