package mount

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// Holder is something that keeps a mount, or its file system, in use.
type Holder struct {
	PID  int    // 0 for a mount on top
	Comm string // the process's name
	// What is "cwd", "root", "exe", "fd", "map", "mount" (another mount below the
	// target), or "namespace": the process is in another mount namespace that
	// shows the same file system, which does not keep ours from being unmounted
	// but keeps what is mounted in use.
	What string
	Path string // the file, or where it is mounted

	link string // in /proc, where Users found it
}

// String reads: 123 (bash) cwd /mnt/x.
func (h Holder) String() string {
	if h.What == "mount" {
		return "mount " + h.Path
	}
	return fmt.Sprintf("%d (%s) %s %s", h.PID, h.Comm, h.What, h.Path)
}

// Holders finds what keeps the mount at target in use: processes with a file of
// it, mounts below it, and one process of each other mount namespace that shows
// the same file system. Processes that this one may not look into are left out.
// ErrNotFound if target is not a mountpoint.
func Holders(target string) ([]Holder, error) {
	s, err := sys.StatPath(target)
	if err != nil {
		return nil, withSentinel("mount: holders", err)
	}
	if !s.IsMountRoot() {
		return nil, fmt.Errorf("mount: holders: %s is not a mountpoint: %w", target, errdefs.ErrNotFound)
	}
	infos, err := List()
	if err != nil {
		return nil, err
	}
	at := slices.IndexFunc(infos, func(i Info) bool { return uint64(i.ID) == s.MountID })
	if at < 0 {
		return nil, fmt.Errorf("mount: holders: %s is not in this mount namespace: %w", target, errdefs.ErrNotFound)
	}
	all := mountsOn(infos, infos[at])
	seen := map[string]bool{ownNamespace(): true}
	for _, pid := range processes() {
		all = append(all, pid.holds(s.MountID)...)
		if ns := pid.namespace(); ns != "" && !seen[ns] {
			seen[ns] = true
			all = append(all, pid.shows(infos[at])...)
		}
	}
	return all, nil
}

func mountsOn(infos []Info, i Info) (all []Holder) {
	for _, m := range infos {
		if m.Parent == i.ID && m.ID != i.ID {
			all = append(all, Holder{What: "mount", Path: m.Target})
		}
	}
	return all
}

// Shown finds the mounts, in every mount namespace that this process may read, that
// show a directory or something below it: binds of it, wherever it lies. The mount
// that dir itself lies on is none of them. A namespace without processes cannot be
// found.
func Shown(dir string) (where []Holder, err error) {
	place, err := PlaceOf(dir)
	if err != nil {
		return nil, err
	}
	err = everyNamespace(func(p process, infos []Info) bool {
		for _, i := range infos {
			if _, ok := place.Below(i); !ok {
				continue
			}
			h := Holder{What: "mount", Path: i.Target}
			if p.pid != 0 {
				h = Holder{PID: p.pid, Comm: p.comm(), What: "namespace", Path: i.Target}
			}
			where = append(where, h)
		}
		return false
	})
	return where, err
}

// process is a directory of /proc.
type process struct {
	pid int
	dir string
}

func processes() (all []process) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			all = append(all, process{pid, "/proc/" + e.Name()})
		}
	}
	return all
}

func ownNamespace() string {
	ns, _ := os.Readlink("/proc/thread-self/ns/mnt")
	return ns
}

// namespace names the process's mount namespace; "" if it may not be known.
func (p process) namespace() string {
	ns, _ := os.Readlink(p.dir + "/ns/mnt")
	return ns
}

func (p process) comm() string {
	b, _ := os.ReadFile(p.dir + "/comm")
	return strings.TrimSuffix(string(b), "\n")
}

// holds lists the ways in which the process uses mount id.
func (p process) holds(id uint64) []Holder {
	return p.uses(func(_ string, s sys.Stat) bool { return s.MountID == id })
}

// uses lists the open files and directories of the process that match. One of
// each kind is enough: a thousand open files are one line.
func (p process) uses(match func(link string, s sys.Stat) bool) (all []Holder) {
	add := func(what, link string) bool {
		s, err := sys.StatPath(link)
		if err != nil || !match(link, s) {
			return false
		}
		file, _ := os.Readlink(link)
		all = append(all, Holder{PID: p.pid, Comm: p.comm(), What: what, Path: file})
		return true
	}
	for _, what := range []string{"cwd", "root", "exe"} {
		add(what, path.Join(p.dir, what))
	}
	for _, kind := range [][2]string{{"fd", "fd"}, {"map_files", "map"}} {
		entries, _ := os.ReadDir(path.Join(p.dir, kind[0]))
		for _, e := range entries {
			if add(kind[1], path.Join(p.dir, kind[0], e.Name())) {
				break
			}
		}
	}
	return all
}

// shows tells where the process's mount namespace has the same directory of the
// same file system mounted.
func (p process) shows(i Info) []Holder {
	infos, err := listFile(p.dir + "/mountinfo")
	if err != nil {
		return nil
	}
	for _, m := range infos {
		if m.Major == i.Major && m.Minor == i.Minor && m.Root == i.Root {
			return []Holder{{PID: p.pid, Comm: p.comm(), What: "namespace", Path: m.Target}}
		}
	}
	return nil
}

// everyNamespace calls f with the mounts of each mount namespace that this
// process may read, its own first (with pid 0), until f says stop. A namespace
// without processes cannot be found.
func everyNamespace(f func(p process, infos []Info) (stop bool)) error {
	own, err := List()
	if err != nil {
		return err
	}
	if f(process{0, "/proc/self"}, own) {
		return nil
	}
	seen := map[string]bool{ownNamespace(): true}
	for _, p := range processes() {
		ns := p.namespace()
		if ns == "" || seen[ns] {
			continue
		}
		infos, err := listFile(p.dir + "/mountinfo")
		if err != nil {
			continue // the process has ended, or may not be looked into
		}
		seen[ns] = true
		if f(p, infos) {
			return nil
		}
	}
	return nil
}
