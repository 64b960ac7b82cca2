package layer

import (
	"path"
	"slices"
)

// impliedDirs are the directories that an archive passes through without naming
// them, as far as they are left. A nil one keeps nothing.
type impliedDirs struct {
	made map[string]uint64 // when it was made, by count
	gone map[string]uint64 // when something else last took the place of a directory
	now  uint64
}

func newImpliedDirs() *impliedDirs {
	return &impliedDirs{made: map[string]uint64{}, gone: map[string]uint64{}}
}

// add notes a directory that was made up.
func (d *impliedDirs) add(path string) {
	if d != nil {
		d.now++
		d.made[path] = d.now
	}
}

// named notes that the archive has an entry for path.
func (d *impliedDirs) named(path string) {
	if d != nil {
		delete(d.made, path)
	}
}

// remove notes that the directory path is removed with all below it. What was made
// there is told from what is made there later by its count: looking for it now
// would cost every removal as much as there are directories.
func (d *impliedDirs) remove(path string) {
	if d != nil && len(d.made) > 0 {
		d.now++
		d.gone[path] = d.now
	}
}

// left returns the directories that are there still, in path order.
func (d *impliedDirs) left() []string {
	if d == nil {
		return nil
	}
	paths := make([]string, 0, len(d.made))
	for p, when := range d.made {
		if !d.goneSince(p, when) {
			paths = append(paths, p)
		}
	}
	slices.SortFunc(paths, ComparePaths)
	return paths
}

// goneSince reports whether p, or a directory above it, was removed after when.
func (d *impliedDirs) goneSince(p string, when uint64) bool {
	for len(d.gone) > 0 && p != "." {
		if d.gone[p] > when {
			return true
		}
		p = path.Dir(p)
	}
	return false
}
