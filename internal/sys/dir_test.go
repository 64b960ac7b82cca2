package sys

import (
	"fmt"
	"testing"
)

// TestEachDirentsWhileNamesGo removes names as they are handed out, more than one
// buffer holds: each is seen once.
func TestEachDirentsWhileNamesGo(t *testing.T) {
	const n = 6000
	dir, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for i := range n {
		if err := dir.Mknod(fmt.Sprintf("a name that is not short %06d", i), S_IFREG|0o600, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	seen, calls := map[string]bool{}, 0
	err = dir.EachDirents(func(some []Dirent) error {
		calls++
		for _, e := range some {
			if seen[e.Name] {
				t.Errorf("%s is seen twice", e.Name)
			}
			seen[e.Name] = true
			if err := dir.Unlink(e.Name, 0); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil || len(seen) != n || calls < 2 {
		t.Errorf("%d of %d names seen in %d calls: %v", len(seen), n, calls, err)
	}
	if left, err := dir.ReadDir(); err != nil || len(left) > 0 {
		t.Errorf("%d names left: %v", len(left), err)
	}
}
