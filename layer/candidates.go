package layer

import (
	"path"
	"slices"
	"strings"
)

// Candidates are the paths at which two trees may differ, collected for
// DiffOptions.Candidates.
type Candidates struct {
	below map[string]map[string]bool // directory -> names
	whole map[string]bool            // below which everything may differ
}

// NewCandidates returns an empty set.
func NewCandidates() *Candidates {
	return &Candidates{below: map[string]map[string]bool{}, whole: map[string]bool{}}
}

// Add takes a path, slash-separated and "." for the root, and the directories on the
// way to it.
func (c *Candidates) Add(p string) {
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

// AddWhole takes a path below which everything may differ.
func (c *Candidates) AddWhole(p string) {
	c.whole[p] = true
	c.Add(p)
}

// Names is DiffOptions.Candidates.
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

// String lists the names, those below which everything may differ with a "/" behind.
func (c *Candidates) String() string {
	var all []string
	for dir, names := range c.below {
		for n := range names {
			p := path.Join(dir, n)
			if c.whole[p] {
				p += "/"
			}
			all = append(all, p)
		}
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}
