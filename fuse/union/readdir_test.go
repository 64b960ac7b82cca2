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
			if d.Ended(); d.list != nil && len(all) > keptNames {
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

// rm -r looks whether a directory is empty, and then reads it: what was listed is
// listed from memory, without the nodes that it came with; what comes next has them,
// and after a change all is new.
func TestReadingAgain(t *testing.T) {
	fs := benchUnion(t)
	for _, kind := range []string{"one", "two"} {
		dir := lookupBench(t, fs, kind)
		d, err := fs.OpenDir(dir)
		must(t, err)
		defer d.Close()
		read := func(off uint64, most int) (names map[string]uint64, nodes int, next uint64) {
			t.Helper()
			names, next = map[string]uint64{}, off
			must(t, d.ReadPlus(off, func(e DirEntry, n Entry) bool {
				if len(names) == most {
					return false
				}
				names[e.Name], next = e.Ino, e.Next
				if n.Node != nil {
					nodes++
					fs.Forget(n.Node.ID(), 1)
				}
				return true
			}))
			return names, nodes, next
		}
		if d.Again() {
			t.Error("nothing was read, and it is said to be right still")
		}
		first, nodes, _ := read(0, 100)
		if len(first) != 100 || nodes != 100 {
			t.Fatalf("%d names, %d nodes", len(first), nodes)
		}
		if !d.Again() {
			t.Fatal("nothing has changed")
		}
		all, nodes, _ := read(0, 300)
		if len(all) != 300 || nodes != 200 {
			t.Errorf("%d names, %d nodes; 200 are not known yet", len(all), nodes)
		}
		for name, ino := range first {
			if all[name] != ino {
				t.Errorf("%s: number %d, and %d before", name, all[name], ino)
			}
		}
		e, err := fs.Mkdir(Caller{}, dir, "new", 0o755)
		must(t, err)
		fs.Forget(e.Node.ID(), 1)
		if d.Again() {
			t.Error("a name has come, and the old ones are said to be right still")
		}
		if all, nodes, _ := read(0, -1); len(all) != 1001 || nodes != 1001 {
			t.Errorf("%d names, %d nodes of 1001", len(all), nodes)
		}
	}
}
