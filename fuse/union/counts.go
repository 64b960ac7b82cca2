package union

import "fmt"

// Counts is what an FS holds, and what it did.
type Counts struct {
	Nodes   int    // in memory
	Dirs    int    // directory descriptors kept open
	CopyUps uint64 // since Open
}

// Counts counts.
func (fs *FS) Counts() Counts {
	c := Counts{CopyUps: fs.copyUps.Load()}
	fs.table.mu.Lock()
	c.Nodes = len(fs.table.byID)
	fs.table.mu.Unlock()
	fs.dirs.mu.Lock()
	c.Dirs = len(fs.dirs.all)
	fs.dirs.mu.Unlock()
	return c
}

// String is one line for people.
func (c Counts) String() string {
	return fmt.Sprintf("nodes %d, directory descriptors %d, copy-ups %d", c.Nodes, c.Dirs, c.CopyUps)
}
