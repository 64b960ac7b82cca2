package snapshot

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// The reserve is space that db.reserve takes on the file system and that is given
// up when a removal finds the disk full: the records of a removal are writes, too,
// and a file system that copies on write needs new blocks for each of them. Only
// who has db.bolt open touches it. It is made again when there is room.
const (
	reserveFile = "db.reserve"
	// reserveSize is far more than the pages that one removal writes, which are
	// tried one by one then, and nothing beside the smallest file systems.
	reserveSize = 4 << 20
)

// keepReserve makes the reserve if it is not there whole; without room, or on a
// file system that cannot allocate, there is none. The database is open.
func (d *database) keepReserve() {
	d.reserveMu.Lock()
	defer d.reserveMu.Unlock()
	path := d.path(reserveFile)
	if st, err := sys.LstatPath(path); err == nil && st.Blocks*512 >= reserveSize {
		return
	}
	f, err := sys.Open(path, sys.O_WRONLY|sys.O_CREAT|sys.O_NOFOLLOW, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	if f.Allocate(reserveSize) != nil && f.Truncate(0) != nil {
		_ = os.Remove(path) // a truncation may need what a removal does not
	}
}

// spendReserve gives the reserve up and reports whether there was one. It is
// removed and not truncated, which may itself need space, and flushed: until then
// a file system may not hand the blocks out. The database is open.
func (d *database) spendReserve() bool {
	d.reserveMu.Lock()
	defer d.reserveMu.Unlock()
	path := d.path(reserveFile)
	if st, err := sys.LstatPath(path); err != nil || st.Blocks == 0 {
		return false
	}
	if err := os.Remove(path); err != nil {
		return false
	}
	dir, err := sys.OpenDir(d.dir)
	if err != nil {
		return false
	}
	defer dir.Close()
	return dir.SyncFS() == nil
}

// MakeRoom gives up the little space that the store keeps for removals on a full
// disk, and reports whether there was any. Removals and GC of the store do so by
// themselves; it is for others that make room on the same file system. GC takes
// the space back.
func (s *Store) MakeRoom(ctx context.Context) (bool, error) {
	if s.o.ReadOnly {
		return false, fmt.Errorf("snapshot: make room: %w", errReadOnly)
	}
	if _, err := s.db.enter(ctx); err != nil {
		return false, fmt.Errorf("snapshot: make room: %w", err)
	}
	defer s.db.leave()
	return s.db.spendReserve(), nil
}

// refill makes the reserve again after room was made.
func (d *database) refill(ctx context.Context) {
	if _, err := d.enter(ctx); err != nil {
		return
	}
	defer d.leave()
	d.keepReserve()
}

// free is update for a transaction by which space becomes free: on a full disk
// it is run again with the reserve given up.
func (d *database) free(ctx context.Context, fn func(*txn) error) error {
	return d.submit(ctx, &call{fn: fn, frees: true, done: make(chan struct{})})
}

// again runs those calls of a batch that free space, each by itself, after the
// batch failed with full.
func (g *committer) again(batch []*call, full error) {
	db, err := g.db.enter(context.Background())
	if err != nil {
		return // full stands
	}
	defer g.db.leave()
	// Spent or not: what another removal has freed is there after a flush.
	g.db.spendReserve()
	for _, c := range batch {
		if !c.frees || c.err != full {
			continue
		}
		err := g.flushAndTry(db, c)
		switch {
		case err != nil:
			c.err = err
			g.db.spoil()
			return
		case errdefs.IsNotFound(c.err):
			// The first attempt took place, though its flush failed.
			c.err = dbError("sync", db.Sync())
		}
	}
}

// flushes bounds how often a removal is tried on a disk that stays full.
const flushes = 8

// flushAndTry commits one call. What was freed is there only after a flush on file
// systems that copy on write (btrfs pins it until its transaction ends), so one that
// finds no room is tried again after it.
func (g *committer) flushAndTry(db *bolt.DB, c *call) error {
	for n := 0; ; n++ {
		err := commitBatch(db, []*call{c})
		if !drivers.IsFull(err) || n == flushes {
			return err
		}
		dir, e := sys.OpenDir(g.db.dir)
		if e != nil {
			return err
		}
		_ = dir.SyncFS()
		dir.Close()
	}
}
