package layer

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
)

// touched is what a driver would know of a list of operations: the names that
// they named, and directories that are others now.
type touched struct {
	names map[string]map[string]bool // dir -> names
	all   map[string]bool
}

func (c *touched) add(p string) {
	for p != "." {
		dir := path.Dir(p)
		if c.names[dir] == nil {
			c.names[dir] = map[string]bool{}
		}
		c.names[dir][path.Base(p)] = true
		p = dir
	}
}

func touchedBy(ops []treegen.Op, full []Change) *touched {
	c := &touched{names: map[string]map[string]bool{}, all: map[string]bool{}}
	for _, o := range ops {
		moves := o.Verb == treegen.Rename || o.Verb == treegen.Exchange || o.Verb == treegen.RmTree || o.Verb == treegen.Recreate
		paths := []string{o.Path}
		if o.Verb == treegen.Link || o.Verb == treegen.Rename || o.Verb == treegen.Exchange {
			paths = append(paths, o.To)
		}
		for _, p := range paths {
			c.add(p)
			c.all[p] = c.all[p] || moves
		}
	}
	for i := range full { // a file changed through another of its names
		if full[i].Aspects != AspectHardlink {
			c.add(full[i].Entry.Path)
		}
	}
	return c
}

func (c *touched) candidates(dir string) ([]string, bool, error) {
	if c.all[dir] {
		return nil, true, nil
	}
	return slices.Collect(maps.Keys(c.names[dir])), false, nil
}

func diffLines(t testing.TB, from, to string, o DiffOptions) (lines []string, changes []Change) {
	t.Helper()
	for c, err := range DiffTrees(t.Context(), from, to, o) {
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, fmt.Sprintf("%s hardlink=%q %d xattrs", &c, c.Entry.Hardlink, len(c.Entry.Xattrs)))
		changes = append(changes, c)
	}
	return lines, changes
}

// A pruned walk must find what a whole walk finds, members of link groups that
// no operation named among them.
func TestPrunedDiffIsTheWholeDiff(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	outside := 0
	for seed := range uint64(150) {
		gen := treegen.New(rand.New(rand.NewPCG(seed, 2)), treegen.Config{Root: true})
		base, more := gen.Ops(150), gen.Ops(1+int(seed)%12)
		a, b, _ := trees(t, dir, base, more)
		want, full := diffLines(t, a, b, DiffOptions{})
		touched := touchedBy(more, full)
		got, _ := diffLines(t, a, b, DiffOptions{Candidates: touched.candidates})
		if !slices.Equal(got, want) {
			t.Fatalf("seed %d: pruned:\n%s\nwhole:\n%s\nbase:\n%smore:\n%s", seed, strings.Join(got, "\n"),
				strings.Join(want, "\n"), treegen.Format(base), treegen.Format(more))
		}
		for _, c := range full {
			if p := c.Entry.Path; p != "." && !touched.names[path.Dir(p)][path.Base(p)] {
				outside++
			}
		}
	}
	if outside == 0 {
		t.Error("no change of a link group lay outside the candidates: the test proves little")
	}
	t.Logf("%d changes lay outside the candidates", outside)
}
