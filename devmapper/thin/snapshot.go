package thin

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
)

const (
	snapshotLock = "snapshot" // flock of who reads the metadata
	snapshotFile = "snapshot.json"
)

// Snapshot is the pool's metadata as it was at one moment, for reading. A pool has
// one at most; ours is shared by nobody. It has one owner, who releases it.
type Snapshot struct {
	// Root is the block (of 4096 bytes) of the snapshot's superblock, on Path.
	Root uint64
	Path string

	pool *Pool
	lock *sys.Lock
}

// snapshotNote says that a held root is ours: that one, or, of a process that died
// while it took it, whichever there is.
type snapshotNote struct {
	Root   uint64 `json:"root,omitempty"`
	Taking bool   `json:"taking,omitempty"`
}

// Snapshot takes a metadata snapshot. It waits for our own others as long as ctx says, and
// releases one that a process of ours died with; ErrUnavailable if another program
// has one.
func (p *Pool) Snapshot(ctx context.Context) (*Snapshot, error) {
	lock, err := waitLock(ctx, p.path(snapshotLock))
	if err != nil {
		return nil, fmt.Errorf("metadata snapshot: %w", err)
	}
	s := &Snapshot{Path: p.MetadataPath(), pool: p, lock: lock}
	if err := p.Exclusive(ctx, func(c *Change) error { return s.take(ctx, c) }); err != nil {
		lock.Close()
		return nil, fmt.Errorf("metadata snapshot: %w", err)
	}
	return s, nil
}

// waitLock is sys.WaitLock with an end. A lock that comes too late is given back.
func waitLock(ctx context.Context, path string) (*sys.Lock, error) {
	var lock *sys.Lock
	got := make(chan error, 1)
	go func() {
		var err error
		lock, err = sys.WaitLock(path, sys.O_RDWR|sys.O_CREAT, sys.LockExclusive)
		got <- err
	}()
	select {
	case err := <-got:
		return lock, err
	case <-ctx.Done():
		go func() {
			<-got
			lock.Close()
		}()
		return nil, ctx.Err()
	}
}

func (s *Snapshot) take(ctx context.Context, c *Change) error {
	st, err := s.pool.Status()
	if err != nil {
		return err
	}
	if st.HeldRoot != 0 {
		if err := s.pool.ours(st.HeldRoot); err != nil {
			return err
		}
		if err := c.message("release_metadata_snap"); err != nil {
			return err
		}
	}
	if err := s.note(snapshotNote{Taking: true}); err != nil {
		return err
	}
	if err := faults.Point(ctx, "thin: snapshot: recorded"); err != nil {
		return err
	}
	if err := c.message("reserve_metadata_snap"); err != nil {
		return err
	}
	if err := s.taken(ctx); err != nil {
		return errors.Join(err, s.give(context.WithoutCancel(ctx), c))
	}
	return nil
}

// taken writes down which one it is.
func (s *Snapshot) taken(ctx context.Context) error {
	if err := faults.Point(ctx, "thin: snapshot: reserved"); err != nil {
		return err
	}
	st, err := s.pool.Status()
	if err != nil {
		return err
	}
	s.Root = st.HeldRoot
	if err := s.note(snapshotNote{Root: s.Root}); err != nil {
		return err
	}
	return faults.Point(ctx, "thin: snapshot: taken")
}

// releaseLeft releases a metadata snapshot that a process of ours died with: until then
// nothing that it shows is freed.
func (p *Pool) releaseLeft(ctx context.Context) error {
	if st, err := p.Status(); err != nil || st.HeldRoot == 0 {
		return err
	}
	lock, err := sys.LockFile(p.path(snapshotLock), sys.LockExclusive)
	if sys.IsLocked(err) {
		return nil // its owner is at work
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	return p.Exclusive(ctx, func(c *Change) error {
		st, err := p.Status()
		if err != nil || st.HeldRoot == 0 {
			return err
		}
		if err := p.ours(st.HeldRoot); err != nil {
			return nil // another program's
		}
		return (&Snapshot{pool: p}).give(ctx, c)
	})
}

// ours refuses a held root that another program has. Of files there is none.
func (p *Pool) ours(root uint64) error {
	if p.rec.onFiles() {
		return nil
	}
	var note snapshotNote
	err := ReadJSON(p.root, snapshotFile, &note)
	if err != nil && !errors.Is(err, syscall.ENOENT) && !errdefs.IsDataLoss(err) {
		return err
	}
	if !note.Taking && note.Root != root {
		return fmt.Errorf("another program has one, at block %d: %w", root, errdefs.ErrUnavailable)
	}
	return nil
}

// note writes down whose the snapshot of a pool on devices is.
func (s *Snapshot) note(n snapshotNote) error {
	if s.pool.rec.onFiles() {
		return nil
	}
	return WriteJSON(s.pool.root, snapshotFile, n)
}

// Release gives the snapshot back.
func (s *Snapshot) Release() error { return s.release(context.Background()) }

func (s *Snapshot) release(ctx context.Context) error {
	defer s.lock.Close()
	if err := s.pool.Exclusive(ctx, func(c *Change) error { return s.give(ctx, c) }); err != nil {
		return fmt.Errorf("metadata snapshot: %w", err)
	}
	return nil
}

// give gives back what the pool has.
func (s *Snapshot) give(ctx context.Context, c *Change) error {
	if err := c.message("release_metadata_snap"); err != nil {
		return err
	}
	if err := faults.Point(ctx, "thin: snapshot: released"); err != nil {
		return err
	}
	return s.note(snapshotNote{})
}
