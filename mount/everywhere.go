package mount

import (
	"cmp"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// Namespace is a mount namespace and what is mounted in it.
type Namespace struct {
	ID     string // as /proc/PID/ns/mnt tells it
	PID    int    // one of its processes; 0: this one's own
	Comm   string // that process's name
	Mounts []Info
}

// Namespaces returns the mounts of every mount namespace that this process may
// read, its own first. One without processes cannot be found.
func Namespaces() (all []Namespace, err error) {
	err = everyNamespace(func(p process, infos []Info) bool {
		n := Namespace{ID: ownNamespace(), Mounts: infos}
		if p.pid != 0 {
			n.ID, n.PID, n.Comm = p.namespace(), p.pid, p.comm()
		}
		all = append(all, n)
		return false
	})
	return all, err
}

// Place is a directory as mountinfo names it, whatever mount shows it.
type Place struct {
	Major, Minor uint32
	Root         string // in the file system
}

// PlaceOf returns the place of a directory.
func PlaceOf(dir string) (Place, error) {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return Place{}, withSentinel("mount: place", err)
	}
	s, err := sys.StatPath(dir)
	if err != nil {
		return Place{}, withSentinel("mount: place", err)
	}
	infos, err := List()
	if err != nil {
		return Place{}, err
	}
	at := slices.IndexFunc(infos, func(i Info) bool { return uint64(i.ID) == s.MountID })
	if at < 0 {
		return Place{}, fmt.Errorf("mount: place: %s is not in this mount namespace: %w", dir, errdefs.ErrNotFound)
	}
	i := infos[at]
	rest, ok := below(dir, i.Target)
	if !ok {
		return Place{}, fmt.Errorf("mount: place: %s is not below its mount at %s: %w", dir, i.Target, errdefs.ErrNotFound)
	}
	return Place{i.Major, i.Minor, path.Join(i.Root, rest)}, nil
}

// Below returns what of a place a mount shows: "" for all of it, else the path
// below it where the mount begins; false if it shows something else.
func (p Place) Below(i Info) (string, bool) {
	if i.Major != p.Major || i.Minor != p.Minor {
		return "", false
	}
	rest, ok := below(i.Root, p.Root)
	return strings.TrimPrefix(rest, "/"), ok
}

// Users finds the processes, but for this one, that use mounts, by mount ID: one
// Holder for each way in which one does. It asks the kernel alone, so a file system
// that does not answer is no hindrance. Processes that this one may not look into
// are left out.
func Users(mounts map[int]bool) map[int][]Holder {
	return users(func(id int) bool { return mounts[id] })
}

// Hidden finds the processes, but for this one, that use an overlay by a mount that
// none of the namespaces shows: one that was unmounted lazily, is attached nowhere,
// or is in a namespace that is not among these. Each process once.
func Hidden(shown []Namespace) (all []Holder) {
	known := map[int]bool{0: true}
	for _, n := range shown {
		for _, i := range n.Mounts {
			known[i.ID] = true
		}
	}
	for _, holders := range users(func(id int) bool { return !known[id] }) {
		all = append(all, holders...)
	}
	all = slices.DeleteFunc(all, func(h Holder) bool { return !strings.HasPrefix(h.Path, "/") || !h.onOverlay() })
	slices.SortFunc(all, func(a, b Holder) int { return cmp.Or(cmp.Compare(a.PID, b.PID), cmp.Compare(a.What, b.What)) })
	return slices.CompactFunc(all, func(a, b Holder) bool { return a.PID == b.PID })
}

// onOverlay reports whether the holder's file is on an overlay. The question goes to
// the file system, which a FUSE server may leave unanswered: then it is no overlay.
func (h Holder) onOverlay() bool {
	answer := make(chan bool, 1)
	go func() {
		fs, err := sys.StatfsPath(h.link)
		answer <- err == nil && fs.Type == sys.OVERLAYFS_SUPER_MAGIC
	}()
	select {
	case is := <-answer:
		return is
	case <-time.After(time.Second):
		return false
	}
}

func users(of func(mount int) bool) map[int][]Holder {
	all := map[int][]Holder{}
	for _, p := range processes() {
		if p.pid == os.Getpid() {
			continue
		}
		for _, what := range []string{"cwd", "root", "exe"} {
			p.use(all, of, linkMount(path.Join(p.dir, what)), what, what)
		}
		seen := map[int]bool{}
		fds, _ := os.ReadDir(path.Join(p.dir, "fdinfo"))
		for _, fd := range fds {
			id := mountID(path.Join(p.dir, "fdinfo", fd.Name()))
			if !seen[id] { // a thousand open files are one line
				seen[id] = true
				p.use(all, of, id, "fd", path.Join("fd", fd.Name()))
			}
		}
	}
	return all
}

// use notes that the process uses a mount, if it is one that is asked for.
func (p process) use(all map[int][]Holder, of func(mount int) bool, id int, what, link string) {
	if !of(id) {
		return
	}
	file, _ := os.Readlink(path.Join(p.dir, link))
	all[id] = append(all[id], Holder{PID: p.pid, Comm: p.comm(), What: what, Path: file, link: path.Join(p.dir, link)})
}

// linkMount is the mount that a magic link leads to; 0 if that cannot be known.
func linkMount(link string) int {
	f, err := sys.Open(link, sys.O_PATH, 0)
	if err != nil {
		return 0
	}
	defer f.Close()
	return mountID("/proc/thread-self/fdinfo/" + path.Base(f.ProcPath()))
}

// mountID reads the line mnt_id of a file in fdinfo; 0 if there is none.
func mountID(file string) int {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	return fdinfoNumber(string(b), "mnt_id")
}

func fdinfoNumber(text, key string) int {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(v))
			return n
		}
	}
	return 0
}

// Server is a process that has /dev/fuse open.
type Server struct {
	PID, Parent int
	Comm        string
	Args        []string
	// Connections are the minor device numbers of the file systems that it serves;
	// empty where the kernel does not tell.
	Connections []int
}

// Servers returns the processes, but for this one, that have /dev/fuse open.
func Servers() (all []Server) {
	for _, p := range processes() {
		if p.pid == os.Getpid() {
			continue
		}
		fds, _ := os.ReadDir(path.Join(p.dir, "fd"))
		s := Server{PID: p.pid, Comm: p.comm()}
		serves := false
		for _, fd := range fds {
			if file, _ := os.Readlink(path.Join(p.dir, "fd", fd.Name())); file != "/dev/fuse" {
				continue
			}
			serves = true
			b, _ := os.ReadFile(path.Join(p.dir, "fdinfo", fd.Name()))
			if n := fdinfoNumber(string(b), "fuse_connection"); n > 0 {
				s.Connections = append(s.Connections, n)
			}
		}
		if !serves {
			continue
		}
		args, _ := os.ReadFile(path.Join(p.dir, "cmdline"))
		s.Args = strings.Split(strings.TrimSuffix(string(args), "\x00"), "\x00")
		s.Parent = p.parent()
		all = append(all, s)
	}
	return all
}

// parent is the process's parent; 0 if that cannot be known.
func (p process) parent() int {
	b, err := os.ReadFile(p.dir + "/stat")
	if err != nil {
		return 0
	}
	// PID (COMM) STATE PPID: a name may hold anything
	rest := string(b[strings.LastIndexByte(string(b), ')')+1:])
	var state string
	var ppid int
	if _, err := fmt.Sscan(rest, &state, &ppid); err != nil {
		return 0
	}
	return ppid
}
