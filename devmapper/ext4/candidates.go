package ext4

import (
	"path"
	"strings"
)

// Candidates are the paths at which two trees may differ.
type Candidates struct {
	below map[string]map[string]bool // directory -> names
	whole map[string]bool            // below which everything may differ
}

func newCandidates() *Candidates {
	return &Candidates{below: map[string]map[string]bool{}, whole: map[string]bool{}}
}

// Names lists the names in a directory that may differ; all says that everything
// below it may. It is a layer.DiffOptions.Candidates.
func (c *Candidates) Names(dir string) (names []string, all bool, err error) {
	if c.whole[dir] {
		return nil, true, nil
	}
	for n := range c.below[dir] {
		names = append(names, n)
	}
	return names, false, nil
}

// Len is the number of names, directories on the way to them included.
func (c *Candidates) Len() int {
	n := 0
	for _, names := range c.below {
		n += len(names)
	}
	return n
}

// add takes a path, and the directories on the way to it.
func (c *Candidates) add(p string, whole bool) {
	if whole {
		c.whole[p] = true
	}
	for p != "." {
		dir, name := path.Dir(p), path.Base(p)
		if c.below[dir][name] {
			return
		}
		if c.below[dir] == nil {
			c.below[dir] = map[string]bool{}
		}
		c.below[dir][name] = true
		p = dir
	}
}

func join(dir, name string) string {
	if dir == "." {
		return name
	}
	return strings.Join([]string{dir, name}, "/")
}
