package union

import (
	"fmt"
	"testing"
)

// What is behind the end is told without reading the directory again, which one
// request in two was for; but a name that came since, wherever it stands, is shown
// to who asks on.
func TestReadingOnBehindTheEnd(t *testing.T) {
	for _, kind := range []string{"empty", "one", "two"} {
		t.Run(kind, func(t *testing.T) {
			fs := benchUnion(t)
			e, err := fs.Mkdir(Caller{}, fs.Root(), "empty", 0o755)
			must(t, err)
			fs.Forget(e.Node.ID(), 1)
			dir := lookupBench(t, fs, kind)
			d, err := fs.OpenDir(dir)
			must(t, err)
			defer d.Close()
			read := func(off uint64) (names []string, next uint64) {
				t.Helper()
				next = off
				must(t, d.Read(off, func(e DirEntry) bool {
					names, next = append(names, e.Name), e.Next
					return true
				}))
				return names, next
			}
			all, end := read(0)
			if !d.Ended() {
				t.Fatal("the end was not reached")
			}
			if more, _ := read(end); len(more) > 0 && end != 0 {
				t.Errorf("behind the end: %q", more)
			}
			if again, _ := read(0); len(again) != len(all) {
				t.Errorf("%q, and from the start again %q", all, again)
			}
			if d.Ended(); d.list != nil {
				t.Error("the names are kept")
			}
			// Of so many some stand, most likely, behind what was the last one.
			made, behind := 5*len(all)+10, 0
			for i := range made {
				name := fmt.Sprintf("new%d", i)
				e, err := fs.Mkdir(Caller{}, dir, name, 0o755)
				must(t, err)
				fs.Forget(e.Node.ID(), 1)
				if fs.cookie([]byte(name)) >= end {
					behind++
				}
			}
			if more, _ := read(end); len(more) != behind {
				t.Errorf("%d names came behind the end, %d are seen", behind, len(more))
			}
			if again, _ := read(0); len(again) != len(all)+made {
				t.Errorf("%d names of %d", len(again), len(all)+made)
			}
		})
	}
}
