package layer

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
	"pgregory.net/rapid"
)

type draws struct{ t *rapid.T }

func (d draws) IntN(n int) int { return rapid.IntRange(0, n-1).Draw(d.t, "n") }

// trees makes the tree a from base, b from base and more, and c equal to a.
func trees(t testing.TB, parent string, base, more []treegen.Op) (a, b, c string) {
	t.Helper()
	dir, err := os.MkdirTemp(parent, "t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for name, ops := range map[string][]treegen.Op{"a": base, "b": append(slices.Clip(base), more...), "c": base} {
		if err := os.Mkdir(dir+"/"+name, 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := treegen.Apply(dir+"/"+name, ops); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"a", "b", "c"} { // their roots were made now
		if err := sysUtimes(dir+"/"+name, epoch); err != nil {
			t.Fatal(err)
		}
	}
	return dir + "/a", dir + "/b", dir + "/c"
}

// unpackers are the ways to unpack a layer that must agree.
var unpackers = map[string]func(context.Context, string, io.Reader) error{
	"Apply": func(ctx context.Context, dir string, r io.Reader) error {
		return Apply(ctx, dir, r, ApplyOptions{Volatile: true})
	},
	"plain": func(_ context.Context, dir string, r io.Reader) error { return plainApply(dir, r) },
}

// checkRoundTrip is the property that matters most: Apply(Diff(a, b)) on a is b.
func checkRoundTrip(t testing.TB, parent string, base, more []treegen.Op) error {
	a, b, _ := trees(t, parent, base, more)
	want := treeState(t, b)
	var layer bytes.Buffer
	changes := DiffTrees(t.Context(), a, b, DiffOptions{})
	if _, err := WriteTar(t.Context(), &layer, changes, TarOptions{}); err != nil {
		return err
	}
	for name, unpack := range unpackers {
		_, _, c := trees(t, parent, base, nil)
		if err := unpack(t.Context(), c, bytes.NewReader(layer.Bytes())); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if d := stateDiff(treeState(t, c), want); d != "" {
			return fmt.Errorf("%s: unpacked tree differs:\n%s", name, d)
		}
	}
	return checkExact(t, a, b)
}

// checkExact checks each change against the independent description: in the
// changeset are exactly the paths whose description differs.
func checkExact(t testing.TB, a, b string) error {
	was, is := treeState(t, a), treeState(t, b)
	want := map[string]string{}
	for p := range was {
		if _, ok := is[p]; !ok && is[parentOf(p)] != "" && strings.HasPrefix(is[parentOf(p)], "4") {
			want[p] = "D"
		}
	}
	for p, s := range is {
		if old, ok := was[p]; !ok {
			want[p] = "A"
		} else if old != s {
			want[p] = "C"
		}
	}
	got := map[string]string{}
	last := ""
	for c, err := range DiffTrees(t.Context(), a, b, DiffOptions{}) {
		if err != nil {
			return err
		}
		if last != "" && ComparePaths(last, c.Entry.Path) >= 0 {
			return fmt.Errorf("%q comes after %q", c.Entry.Path, last)
		}
		if (c.Kind == Modified) != (c.Aspects != 0) {
			return fmt.Errorf("%s has aspects %q", &c, c.Aspects)
		}
		last = c.Entry.Path
		got[last] = c.Kind.String()
	}
	if !maps.Equal(got, want) {
		return fmt.Errorf("changes differ:\n%s", stateDiff(got, want))
	}
	return nil
}

func parentOf(p string) string {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i]
	}
	return "."
}

// failure shrinks a failing pair of lists and prints it so that it replays.
func failure(t testing.TB, parent string, base, more []treegen.Op, err error) string {
	more = treegen.Shrink(more, 300, func(ops []treegen.Op) bool { return checkRoundTrip(t, parent, base, ops) != nil })
	base = treegen.Shrink(base, 300, func(ops []treegen.Op) bool { return checkRoundTrip(t, parent, ops, more) != nil })
	return fmt.Sprintf("%v\n--- shortest: %v\n--- base:\n%s--- more:\n%s", err, checkRoundTrip(t, parent, base, more), treegen.Format(base), treegen.Format(more))
}

func TestRoundTripRandomTrees(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	rapid.Check(t, func(rt *rapid.T) {
		gen := treegen.New(draws{rt}, treegen.Config{Root: true, Sockets: true})
		base := gen.Ops(rapid.IntRange(0, 60).Draw(rt, "base"))
		more := gen.Ops(rapid.IntRange(0, 40).Draw(rt, "more"))
		if err := checkRoundTrip(t, dir, base, more); err != nil {
			rt.Fatal(failure(t, dir, base, more, err))
		}
	})
}
