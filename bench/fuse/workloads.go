package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// workload is one thing to be measured.
type workload struct {
	name, about string
	// mib is the data moved, for the figure of CPU per MiB; 0 if it is not about data.
	mib float64
	// reads is set if it only reads what the lowers have.
	reads bool
	// union is set if it makes no sense on a plain directory.
	union bool
	// rootless workloads run as root of a user namespace.
	rootless bool
	// slow ones run only when they are named.
	slow bool
	// before prepares, untimed.
	before func(*job) error
	// timed is what is measured.
	timed func(*job) error
	// check says whether it did what it says.
	check func(*job) error
}

// job is one run of a workload.
type job struct {
	dir    string // the mount
	layers layers
	m      *mounted
	union  bool
	out    bytes.Buffer
	count  int64
	own    map[string]float64
}

func (j *job) path(name string) string { return filepath.Join(j.dir, name) }

const (
	seqMiB    = 256
	randomOps = 32768 // of 4 KiB: 128 MiB
)

var workloads = withRootless([]workload{
	{name: "write-4k", about: "write 256 MiB to a new file, 4 KiB at a time, buffered, and close it", mib: seqMiB,
		timed: func(j *job) error { return writeFile(j.path("out"), seqMiB<<20, 4096) }, check: size("out", seqMiB<<20)},
	{name: "write-4k-random", about: "write 4 KiB at 32,768 random places of a file of 256 MiB that the upper has", mib: randomOps * 4 / 1024.0,
		before: func(j *job) error { return writeFile(j.path("out"), seqMiB<<20, 1<<20) }, timed: randomWrite, check: size("out", seqMiB<<20)},
	{name: "write-1m", about: "write 512 MiB to a new file, 1 MiB at a time", mib: 512,
		timed: func(j *job) error { return writeFile(j.path("out"), 512<<20, 1<<20) }, check: size("out", 512<<20)},
	{name: "read-1m-warm", about: "read a lower file of 256 MiB four times, 1 MiB at a time, warm", mib: 4 * 256, reads: true,
		before: readBig(1), timed: readBig(4), check: counted(4 * bigSize)},
	{name: "read-4k-random-warm", about: "read 4 KiB at 262,144 random places of it, warm", mib: 1024, reads: true,
		before: readBig(1), timed: randomRead, check: counted(262144 * 4096)},
	{name: "find-cold", about: "find -printf %s over two trees of the Go toolchain, after drop_caches", reads: true,
		before: cold, timed: find, check: entries},
	{name: "find-warm", about: "the same again", reads: true,
		before: find, timed: find, check: entries},
	{name: "tar-first", about: "tar of both trees into a pipe, after drop_caches", reads: true,
		before: cold, timed: tar, check: tarred},
	{name: "tar-second", about: "the same again", reads: true,
		before: tar, timed: tar, check: tarred},
	{name: "create", about: "create 10,000 files of 100 bytes in 10 directories", timed: create, check: created},
	{name: "rm-created", about: "rm -rf of those", before: create, timed: remove("new"), check: gone("new")},
	{name: "rename", about: "rename those 10,000 in their directories", before: create, timed: renameAll, check: renamed},
	{name: "rm-lower-tree", about: "rm -rf of a lower tree, the Go toolchain's", union: true,
		before: cold, timed: remove("tree2"), check: gone("tree2")},
	{name: "rm-lower-file", about: "unlink a lower file of 256 MiB", union: true,
		timed: func(j *job) error { return os.Remove(j.path("data/big")) }, check: unlinkedLower},
	{name: "getattr", about: "200,000 statx of one file that ask the file system, not its cache", reads: true, timed: getattr, check: counted(200000)},
	{name: "memory", about: "resident memory of the server after find and tar of both trees, and after drop_caches", reads: true, timed: memory, check: counted(1)},
	{name: "copy-up", about: "append a byte to each of 1,000 lower files", union: true, before: cold, timed: appendAll, check: counted(1000)},
	{name: "extract", about: "extract a tar of the tree", slow: true, before: makeTar, timed: extract, check: func(j *job) error { return exist(j.path("tree1/VERSION")) }},
	{name: "git-status", about: "git status in a repository of the tree's files, twice", slow: true, before: gitRepo, timed: gitStatus, check: counted(2)},
	{name: "go-build", about: "go build of std's cmd/go, with the cache in the union", slow: true, timed: goBuild, check: func(j *job) error { return exist(j.path("out.bin")) }},
})

// withRootless adds the workloads that are also run as root of a user namespace.
func withRootless(all []workload) []workload {
	for _, w := range all {
		switch w.name {
		case "write-4k", "write-4k-random", "write-1m", "read-1m-warm", "read-4k-random-warm", "find-cold", "find-warm", "tar-first", "tar-second", "create", "rm-created":
			w.name, w.rootless = "rootless-"+w.name, true
			all = append(all, w)
		}
	}
	return all
}

// child runs one workload once and prints its figures.
func child(name, dir string) error {
	w, s, err := lookUp(name)
	if err != nil {
		return err
	}
	m, l, err := s.mount(dir, w)
	if err != nil {
		return err
	}
	j := &job{dir: m.dir, layers: l, m: m, union: !s.plain, own: map[string]float64{}}
	r, err := j.run(w)
	if uerr := m.unmount(); err == nil {
		err = uerr
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(r)
	}
	return err
}

func (j *job) run(w workload) (run, error) {
	if w.before != nil {
		if err := w.before(j); err != nil {
			return run{}, fmt.Errorf("before: %w", err)
		}
	}
	j.out.Reset()
	j.count = 0
	syscall.Sync() // what was prepared is not written back while the clock runs
	server, client, start := cpuOf(j.m.servers), cpuOfOurs(), time.Now()
	if err := w.timed(j); err != nil {
		return run{}, err
	}
	wall := time.Since(start)
	r := run{WallMS: ms(wall), ClientMS: ms(cpuOfOurs() - client), ServerMS: ms(cpuOf(j.m.servers) - server), Own: j.own}
	if err := w.check(j); err != nil {
		return run{}, fmt.Errorf("was not done: %w", err)
	}
	return r, nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }

func lookUp(name string) (workload, subject, error) {
	wn, sn, _ := strings.Cut(name, "/")
	for _, w := range workloads {
		for _, s := range allSubjects() {
			if w.name == wn && s.name == sn {
				return w, s, nil
			}
		}
	}
	return workload{}, subject{}, fmt.Errorf("no %q", name)
}

func writeFile(path string, size, block int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	b := bytes.Repeat([]byte("0123456789abcdef"), block/16)
	for n := 0; n < size; n += block {
		if _, err := f.Write(b); err != nil {
			f.Close()
			return err
		}
	}
	return f.Close()
}

func randomWrite(j *job) error {
	f, err := os.OpenFile(j.path("out"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	b := bytes.Repeat([]byte{7}, 4096)
	r := rand.New(rand.NewPCG(1, 2))
	for range randomOps {
		if _, err := f.WriteAt(b, int64(r.IntN(seqMiB<<20/4096))*4096); err != nil {
			f.Close()
			return err
		}
	}
	return f.Close()
}

func readBig(times int) func(*job) error {
	return func(j *job) error {
		b := make([]byte, 1<<20)
		for range times {
			f, err := os.Open(j.path("data/big"))
			if err != nil {
				return err
			}
			for {
				n, err := f.Read(b)
				j.count += int64(n)
				if err == io.EOF {
					break
				}
				if err != nil {
					f.Close()
					return err
				}
			}
			f.Close()
		}
		return nil
	}
}

func randomRead(j *job) error {
	f, err := os.Open(j.path("data/big"))
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 4096)
	r := rand.New(rand.NewPCG(1, 2))
	for range 262144 {
		n, err := f.ReadAt(b, int64(r.IntN(bigSize/4096))*4096)
		if err != nil {
			return err
		}
		j.count += int64(n)
	}
	return nil
}

func cold(*job) error { return dropCaches() }

// pipe runs a command in the mount and keeps or counts what it says.
func (j *job) pipe(w io.Writer, args ...string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = j.dir
	var errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = w, &errs
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, errs.Bytes())
	}
	return nil
}

func find(j *job) error {
	j.out.Reset()
	return j.pipe(&j.out, "find", "tree1", "tree2", "-printf", "%s\n")
}

// entries: as many as the lower has (what lower2 has, lower1 has too).
func entries(j *job) error {
	got := bytes.Count(j.out.Bytes(), []byte("\n"))
	j.own["entries"] = float64(got)
	if got < 1000 {
		return fmt.Errorf("find saw %d entries", got)
	}
	return nil
}

// counter counts bytes. It is no file, so tar reads what it archives.
type counter struct{ n *int64 }

func (c counter) Write(b []byte) (int, error) { *c.n += int64(len(b)); return len(b), nil }

func tar(j *job) error {
	j.count = 0
	return j.pipe(counter{&j.count}, "tar", "-cf", "-", "tree1", "tree2")
}

func tarred(j *job) error {
	j.own["MiB"] = float64(j.count) / (1 << 20)
	if j.count < 10<<20 {
		return fmt.Errorf("tar made %d bytes", j.count)
	}
	return nil
}

func create(j *job) error {
	content := bytes.Repeat([]byte("x"), 100)
	for d := range 10 {
		dir := j.path("new/" + strconv.Itoa(d))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		for i := range 1000 {
			if err := os.WriteFile(dir+"/file"+strconv.Itoa(i), content, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

func created(j *job) error {
	for d := range 10 {
		names, err := os.ReadDir(j.path("new/" + strconv.Itoa(d)))
		if err != nil || len(names) != 1000 {
			return fmt.Errorf("%d entries, %w", len(names), err)
		}
	}
	return nil
}

func renameAll(j *job) error {
	for d := range 10 {
		dir := j.path("new/" + strconv.Itoa(d))
		for i := range 1000 {
			if err := os.Rename(dir+"/file"+strconv.Itoa(i), dir+"/other"+strconv.Itoa(i)); err != nil {
				return err
			}
		}
	}
	return nil
}

func renamed(j *job) error {
	if exists(j.path("new/9/file999")) {
		return fmt.Errorf("the old name is there")
	}
	if err := exist(j.path("new/9/other999")); err != nil {
		return err
	}
	return created(j)
}

func remove(name string) func(*job) error {
	return func(j *job) error { return j.pipe(io.Discard, "rm", "-rf", name) }
}

func gone(name string) func(*job) error {
	return func(j *job) error {
		if exists(j.path(name)) {
			return fmt.Errorf("%s is there", name)
		}
		if j.union && name != "new" && !exists(filepath.Join(j.layers.upper, name)) && !exists(filepath.Join(j.layers.upper, ".wh."+name)) {
			return fmt.Errorf("the upper has no whiteout of %s", name)
		}
		return nil
	}
}

// unlinkedLower also notes what the upper took: a union that copies before it
// unlinks has its blocks still, or had.
func unlinkedLower(j *job) error {
	if err := gone("data/big")(j); err != nil {
		return err
	}
	if !exists(strings.Split(j.layers.lowers, ":")[1] + "/data/big") {
		return fmt.Errorf("the lower's file is gone")
	}
	return nil
}

func getattr(j *job) error {
	const (
		sysStatx  = 332
		forceSync = 0x2000
		basic     = 0x7ff
	)
	path, err := syscall.BytePtrFromString(j.path("data/big"))
	if err != nil {
		return err
	}
	var buf [256]byte
	before := cpuOf(j.m.servers)
	for range 200000 {
		if _, _, e := syscall.Syscall6(sysStatx, ^uintptr(99), uintptr(unsafe.Pointer(path)), forceSync, basic, uintptr(unsafe.Pointer(&buf)), 0); e != 0 {
			return e
		}
		j.count++
	}
	j.own["server us each"] = float64((cpuOf(j.m.servers) - before).Microseconds()) / 200000
	return nil
}

func memory(j *job) error {
	j.own["MiB at start"] = residentMiB(j.m.servers)
	if err := find(j); err != nil {
		return err
	}
	if err := tar(j); err != nil {
		return err
	}
	j.own["MiB after"] = residentMiB(j.m.servers)
	if err := dropCaches(); err != nil {
		return err
	}
	least := residentMiB(j.m.servers)
	for range 100 { // ten seconds: a server may give back later
		time.Sleep(100 * time.Millisecond)
		least = min(least, residentMiB(j.m.servers))
	}
	j.own["MiB dropped"] = least
	j.count = 1
	return nil
}

func appendAll(j *job) error {
	err := filepath.WalkDir(j.path("tree1/src"), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if j.count == 1000 {
			return filepath.SkipAll
		}
		j.count++
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		if _, err := f.Write([]byte("\n")); err != nil {
			f.Close()
			return err
		}
		return f.Close()
	})
	return err
}

func makeTar(j *job) error {
	return command("tar", "-C", filepath.Join(filepath.Dir(filepath.Dir(j.layers.work)), "lower1"), "-cf", filepath.Join(filepath.Dir(j.layers.work), "tree.tar"), "tree1")
}

func extract(j *job) error {
	if err := os.Mkdir(j.path("x"), 0o755); err != nil {
		return err
	}
	return j.pipe(io.Discard, "tar", "-C", "x", "-xf", filepath.Join(filepath.Dir(j.layers.work), "tree.tar"))
}

func gitRepo(j *job) error {
	if !j.union { // a plain subject has an empty directory
		if err := command("cp", "-a", filepath.Join(filepath.Dir(filepath.Dir(j.layers.work)), "lower1", "tree1"), j.path("tree1")); err != nil {
			return err
		}
	}
	git := []string{"git", "-C", "tree1", "-c", "user.name=n", "-c", "user.email=e", "-c", "core.fsmonitor=false", "-c", "safe.directory=*"}
	for _, c := range [][]string{{"init", "-q"}, {"add", "src"}, {"commit", "-q", "-m", "m"}} {
		if err := j.pipe(io.Discard, append(append([]string{}, git...), c...)...); err != nil {
			return err
		}
	}
	return dropCaches()
}

func gitStatus(j *job) error {
	for range 2 {
		if err := j.pipe(io.Discard, "git", "-C", "tree1", "-c", "safe.directory=*", "status", "--porcelain", "-uno"); err != nil {
			return err
		}
		j.count++
	}
	return nil
}

func goBuild(j *job) error {
	cmd := exec.Command("go", "build", "-o", j.path("out.bin"), "cmd/go")
	cmd.Dir = j.dir
	cmd.Env = append(os.Environ(), "GOROOT="+j.path("tree1"), "GOCACHE="+j.path("cache"), "GOTOOLCHAIN=local", "GOFLAGS=", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w: %s", err, out)
	}
	return nil
}

func exist(path string) error {
	_, err := os.Lstat(path)
	return err
}

func size(name string, want int64) func(*job) error {
	return func(j *job) error {
		st, err := os.Stat(filepath.Join(j.layers.upper, name))
		if err == nil && st.Size() != want {
			err = fmt.Errorf("%s has %d bytes in the upper, not %d", name, st.Size(), want)
		}
		return err
	}
}

func counted(want int64) func(*job) error {
	return func(j *job) error {
		if j.count != want {
			return fmt.Errorf("%d, not %d", j.count, want)
		}
		return nil
	}
}
