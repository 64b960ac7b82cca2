package upper

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// Project ids of this driver: projectBase and up. /etc/projid and other
// programs count from 1, so a store begins far above them.
const (
	projectBase  = 1 << 30
	projectCount = 1 << 30
	projectTries = 64
	// projectStride, odd, leads away from the neighbours' ids when one is taken.
	projectStride = 104729
)

// candidate returns the n-th project id to try for a layer: derived from its ID,
// so that the layers of one store differ by themselves.
func candidate(id drivers.ID, n int) uint32 {
	return projectBase + uint32((uint64(id)+uint64(n)*projectStride)%projectCount)
}

// limitProject gives fs and work one project id, passed on to what is made in them, and
// then bounds what they may hold: in this order, so that a crash leaves no limit
// that nobody knows of. A project id that anything else on the file system uses
// (another store's) is passed over.
func limitProject(dir *sys.Fd, id drivers.ID, bytes int64) (uint32, error) {
	for n := range projectTries {
		p := candidate(id, n)
		taken, err := projectTaken(dir, p, 0)
		if err != nil {
			return 0, err
		}
		if taken {
			continue
		}
		own, err := setProjects(dir, p)
		if err != nil {
			return 0, err
		}
		if taken, err = projectTaken(dir, p, own); err != nil {
			return 0, err
		}
		if !taken { // by one who looked at the same time
			return p, dir.SetProjectQuota(p, sys.ProjectQuota{Bytes: bytes})
		}
	}
	return 0, fmt.Errorf("quota: %d project ids from %d on are in use: %w", projectTries, candidate(id, 0), errdefs.ErrResourceExhausted)
}

// projectTaken reports whether a project id has a limit, or files beside own.
func projectTaken(dir *sys.Fd, p uint32, own int64) (bool, error) {
	q, err := dir.ProjectQuota(p)
	if errors.Is(err, syscall.ENOENT) {
		return false, nil
	}
	return q.Bytes != 0 || q.Inodes != 0 || q.UsedInodes > own, err
}

// setProjects marks fs and, where there is one, work, and returns how many it
// marked. The same id on upper and work, or every whiteout and copy-up is EXDEV.
func setProjects(dir *sys.Fd, p uint32) (marked int64, err error) {
	for _, n := range []string{fsDir, workDir} {
		sub, err := dir.Openat(n, sys.O_RDONLY|sys.O_DIRECTORY, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue // a view has no work
		}
		if err != nil {
			return marked, err
		}
		err = sub.SetProject(p, true)
		sub.Close()
		if err != nil {
			return marked, err
		}
		marked++
	}
	return marked, nil
}

// projectOf returns the quota's project of ROOT/name, in whatever state it is; 0
// if it has none.
func (l *Layers) projectOf(name string) uint32 {
	if !l.cfg.Capabilities.Quota {
		return 0
	}
	fs, err := sys.OpenDir(l.path(name, fsDir))
	if err != nil {
		return 0
	}
	defer fs.Close()
	x, err := fs.GetFSXattr()
	if err != nil || x.Projid < projectBase {
		return 0
	}
	return x.Projid
}

// unlimit clears the limit of a project: of a removed layer, which frees its id,
// or of a committed one, to which nothing is written any more and whose files
// keep the id.
func (l *Layers) unlimit(project uint32) error {
	if project == 0 {
		return nil
	}
	root, err := sys.OpenDir(l.root)
	if err != nil {
		return err
	}
	defer root.Close()
	return root.SetProjectQuota(project, sys.ProjectQuota{})
}

// TryQuota finds out whether a project's limit is enforced: it bounds an upper and a
// work directory in a scratch as those of a layer, and has overflow write more
// than limit bytes there, through the union and as little privileged as the
// union's users are. ENOSPC or EDQUOT are what it wants to hear from it.
func TryQuota(s *Scratch, limit int64, overflow func(upper, work string) error) (err error) {
	dir, err := s.Mkdir("quota")
	if err != nil {
		return err
	}
	q, err := sys.OpenDir(dir)
	if err != nil {
		return err
	}
	defer q.Close()
	if _, err := q.ProjectQuota(projectBase); err != nil && !errors.Is(err, syscall.ENOENT) {
		return err
	}
	for _, n := range []string{fsDir, workDir} {
		if err := q.Mkdir(n, 0o755); err != nil {
			return err
		}
	}
	project, err := limitProject(q, drivers.ID(os.Getpid()), limit)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.SetProjectQuota(project, sys.ProjectQuota{})) }()
	err = overflow(dir+"/"+fsDir, dir+"/"+workDir)
	if errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.ENOSPC) {
		return nil
	}
	if err == nil {
		return fmt.Errorf("a limit is not enforced (mounted with pqnoenforce?): %w", syscall.EOPNOTSUPP)
	}
	return err
}
