package treegen

import (
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"testing"
)

func gen(seed uint64, n int) []Op {
	return New(rand.New(rand.NewPCG(seed, 0)), Config{Root: os.Getuid() == 0, Sockets: true}).Ops(n)
}

func TestPrintedOpsReadBack(t *testing.T) {
	for seed := range uint64(20) {
		ops := gen(seed, 100)
		back, err := Parse("# a comment\n\n" + Format(ops))
		if err != nil {
			t.Fatal(err)
		}
		for i := range ops {
			if back[i] != ops[i] {
				t.Fatalf("%q read back as %q", ops[i], back[i])
			}
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, line := range []string{"create path", `create path="a`, "create what=1", "create mode=x"} {
		if ops, err := Parse(line); err == nil {
			t.Errorf("%q read as %v", line, ops)
		}
	}
}

// The same list gives the same results, and most of a list does something:
// otherwise tests over it prove little.
func TestOpsRepeat(t *testing.T) {
	var ok, all int
	seen := map[Verb]int{}
	for seed := range uint64(10) {
		ops := gen(seed, 200)
		if !slices.Equal(ops, gen(seed, 200)) {
			t.Fatal("a seed gives two lists")
		}
		one, err := Apply(t.TempDir(), ops)
		if err != nil {
			t.Fatal(err)
		}
		two, err := Apply(t.TempDir(), ops)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(one, two) {
			t.Fatalf("seed %d: errnos differ: %v and %v", seed, one, two)
		}
		for i, e := range one {
			all++
			if e == 0 {
				ok++
				seen[ops[i].Verb]++
			}
		}
	}
	if ok*10 < all*6 {
		t.Errorf("%d of %d operations succeeded", ok, all)
	}
	for _, w := range weights {
		if seen[w.verb] == 0 && (w.verb != Chown || os.Getuid() == 0) {
			t.Errorf("%s never succeeded", w.verb)
		}
	}
	t.Logf("%d of %d succeeded: %v", ok, all, seen)
}

func TestShrink(t *testing.T) {
	ops := gen(1, 100)
	want := []Op{ops[17], ops[71]}
	got := Shrink(ops, 1000, func(try []Op) bool {
		return slices.Contains(try, want[0]) && slices.Contains(try, want[1])
	})
	if !slices.Equal(got, want) {
		t.Errorf("shrunk to %d operations: %v", len(got), got)
	}
}
