package server_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/fuse/server"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"golang.org/x/sys/unix"
)

func open(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0o644)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func content(t testing.TB, f *os.File) string {
	t.Helper()
	var b [4096]byte
	n, err := f.ReadAt(b[:], 0)
	if n == 0 && err != nil && err.Error() != "EOF" {
		t.Fatal(err)
	}
	return string(b[:n])
}

func wantContent(t testing.TB, f *os.File, want string) {
	t.Helper()
	if got := content(t, f); got != want {
		t.Errorf("%s reads %.40q, not %.40q", f.Name(), got, want)
	}
}

func writeAt(t testing.TB, f *os.File, s string) {
	t.Helper()
	_, err := f.WriteAt([]byte(s), 0)
	must(t, err)
}

// union returns a mount whose lower has the files.
func serveFiles(t testing.TB, o server.Options, lower ...string) *mounted {
	t.Helper()
	dir := dirs(t, "ext4")
	for _, name := range lower {
		must(t, os.WriteFile(filepath.Join(dir, "l", name), []byte("lower"), 0o644))
	}
	return serve(t, setup{Dir: dir, Options: o})
}

var policyA = server.Options{Passthrough: server.PassthroughUppers}

func TestUpperFilesAreReadAndWrittenWithoutTheServer(t *testing.T) {
	m := serveFiles(t, policyA)
	f := open(t, m.path("f"), os.O_RDWR|os.O_CREATE)
	g := open(t, m.path("f"), os.O_RDONLY)
	if c := m.counts(); c.Passthrough != 1 || c.ThroughOpens != 2 || c.CachedOpens != 0 {
		t.Errorf("one file open twice: %v", c)
	}
	before := m.counts().Requests
	for i := range 100 {
		_, err := f.WriteAt(bytes.Repeat([]byte{'x'}, 4096), int64(i)*4096)
		must(t, err)
		_, err = g.ReadAt(make([]byte, 4096), int64(i)*4096)
		must(t, err)
	}
	if n := m.counts().Requests - before; n > 5 {
		t.Errorf("%d requests for a hundred reads and writes", n)
	}
	f.Close()
	g.Close()
	testenv.Eventually(t, "the file below is given back", func() bool { return m.counts().Passthrough == 0 })
	if st, err := os.Stat(m.path("f")); err != nil || st.Size() != 100*4096 {
		t.Errorf("size %d, %v", st.Size(), err)
	}
}

// UNION.md's trap: a file that is read in the lower and then opened for writing.
func TestLowerOpenForReadingSeesWhatIsWritten(t *testing.T) {
	for name, o := range map[string]server.Options{"passthrough": policyA, "writeback": {Writeback: true}, "cached": {}} {
		t.Run(name, func(t *testing.T) {
			m := serveFiles(t, o, "f")
			r := open(t, m.path("f"), os.O_RDONLY)
			wantContent(t, r, "lower")
			mapped, err := unix.Mmap(int(r.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
			must(t, err)
			defer unix.Munmap(mapped)
			if string(mapped[:5]) != "lower" {
				t.Errorf("mapped: %q", mapped[:5])
			}
			w := open(t, m.path("f"), os.O_RDWR)
			writeAt(t, w, "upper")
			wantContent(t, r, "upper")
			wantContent(t, w, "upper")
			if string(mapped[:5]) != "upper" {
				t.Errorf("mapped, after the write: %q", mapped[:5])
			}
			r2 := open(t, m.path("f"), os.O_RDONLY)
			wantContent(t, r2, "upper")
			if c := m.counts(); c.Passthrough != 0 {
				t.Errorf("in passthrough while it is in the page cache: %v", c)
			}
			if b, err := os.ReadFile(filepath.Join(m.Dir, "l", "f")); string(b) != "lower" || err != nil {
				t.Errorf("the lower has %q, %v", b, err)
			}
		})
	}
}

// After the last open that used the page cache, passthrough begins; pages from
// before must not show again.
func TestPagesFromBeforePassthroughAreGone(t *testing.T) {
	m := serveFiles(t, policyA, "f")
	r := open(t, m.path("f"), os.O_RDONLY)
	wantContent(t, r, "lower")
	w := open(t, m.path("f"), os.O_WRONLY)
	writeAt(t, w, "cache")
	w.Close()
	r.Close()
	testenv.Eventually(t, "all closed", func() bool { return m.counts().Files == 0 })
	w = open(t, m.path("f"), os.O_WRONLY)
	if c := m.counts(); c.Passthrough != 1 {
		t.Fatalf("not in passthrough: %v", c)
	}
	writeAt(t, w, "below")
	w.Close()
	testenv.Eventually(t, "closed", func() bool { return m.counts().Files == 0 })
	must(t, unix.Chmod(m.path("f"), 0o4755)) // never in passthrough
	before := m.counts().CachedOpens
	r = open(t, m.path("f"), os.O_RDONLY)
	wantContent(t, r, "below")
	if m.counts().CachedOpens != before+1 {
		t.Error("a setuid file was opened in passthrough")
	}
}

// A setuid file loses the bit when somebody without privilege writes it.
func TestSetuidIsDroppedByAWrite(t *testing.T) {
	for name, o := range map[string]server.Options{"passthrough": policyA, "writeback": {Writeback: true}, "cached": {}} {
		for _, layer := range []string{"l", "u"} {
			t.Run(name+"/"+layer, func(t *testing.T) {
				dir := dirs(t, "ext4")
				path := filepath.Join(dir, layer, "f")
				must(t, os.WriteFile(path, []byte("x"), 0o666))
				must(t, unix.Chmod(path, 0o6777))
				m := serve(t, setup{Dir: dir, Options: o})
				r := open(t, m.path("f"), os.O_RDONLY)
				asNobody(t, "printf y >>"+m.path("f"))
				wantContent(t, r, "xy")
				var st unix.Stat_t
				must(t, unix.Stat(m.path("f"), &st))
				if st.Mode&0o7777 != 0o777 {
					t.Errorf("mode %o", st.Mode)
				}
			})
		}
	}
}

// mtime after a write through a mapping is there at once, not in a day.
func TestMappedWritesShowInTheTimes(t *testing.T) {
	m := serveFiles(t, policyA)
	must(t, os.WriteFile(m.path("f"), make([]byte, 4096), 0o644))
	past := []unix.Timespec{{Sec: 1000}, {Sec: 1000}}
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, m.path("f"), past, 0))
	var st unix.Stat_t
	must(t, unix.Stat(m.path("f"), &st)) // the kernel knows it now
	f := open(t, m.path("f"), os.O_RDWR)
	if c := m.counts(); c.Passthrough != 1 {
		t.Fatalf("not in passthrough: %v", c)
	}
	mapped, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	mapped[0] = 1
	must(t, unix.Msync(mapped, unix.MS_SYNC))
	must(t, unix.Stat(m.path("f"), &st))
	if st.Mtim.Sec == 1000 {
		t.Error("open: the old time")
	}
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, m.path("f"), past, 0))
	mapped[1] = 1
	must(t, unix.Msync(mapped, unix.MS_SYNC))
	f.Close()
	must(t, unix.Munmap(mapped))
	must(t, unix.Stat(m.path("f"), &st))
	if st.Mtim.Sec == 1000 {
		t.Error("closed: the old time")
	}
}

// Every way to open a file that is in passthrough already.
func TestFurtherOpensOfAFileInPassthrough(t *testing.T) {
	m := serveFiles(t, policyA)
	must(t, os.WriteFile(m.path("f"), bytes.Repeat([]byte("0123456789abcdef"), 512), 0o644))
	r := open(t, m.path("f"), os.O_RDONLY)
	for _, flags := range []int{os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDWR | unix.O_DIRECT, os.O_RDWR | os.O_SYNC} {
		open(t, m.path("f"), flags)
	}
	must(t, os.Link(m.path("f"), m.path("g")))
	open(t, m.path("g"), os.O_RDWR)
	must(t, os.Remove(m.path("f")))
	must(t, unix.Chmod(m.path("g"), 0o4644)) // must stay in passthrough now
	open(t, m.path("g"), os.O_RDONLY)
	must(t, os.Truncate(m.path("g"), 16))
	wantContent(t, r, "0123456789abcdef")
	w := open(t, m.path("g"), os.O_WRONLY|os.O_TRUNC)
	writeAt(t, w, "new")
	wantContent(t, r, "new")
	must(t, unix.Fallocate(int(w.Fd()), 0, 0, 100))
	if st, err := r.Stat(); err != nil || st.Size() != 100 {
		t.Errorf("size %d, %v", st.Size(), err)
	}
}

// Many open, read, write and close a few files at once: no open may fail, and
// no write may end up where nobody reads it.
func TestOpensAtOnce(t *testing.T) {
	for name, o := range map[string]server.Options{"uppers": policyA, "all": {Passthrough: server.PassthroughAll}} {
		t.Run(name, func(t *testing.T) {
			files := []string{"a", "b", "c", "d"}
			m := serveFiles(t, o, files...)
			var wg sync.WaitGroup
			for worker := range 8 {
				wg.Add(1)
				go func() {
					defer wg.Done()
					rnd := rand.New(rand.NewPCG(1, uint64(worker)))
					for range 150 {
						if err := openOnce(m.path(files[rnd.IntN(len(files))]), rnd); err != nil {
							t.Error(err)
							return
						}
					}
				}()
			}
			wg.Wait()
			for _, f := range files {
				b, err := os.ReadFile(filepath.Join(m.Dir, "l", f))
				if string(b) != "lower" {
					t.Errorf("the lower %s has %q, %v", f, b, err)
				}
			}
			testenv.Eventually(t, "all closed", func() bool { c := m.counts(); return c.Files == 0 && c.Passthrough == 0 })
		})
	}
}

// openOnce reads a file, or writes it and reads that back.
func openOnce(path string, rnd *rand.Rand) error {
	flags := []int{os.O_RDONLY, os.O_RDONLY, os.O_RDWR, os.O_WRONLY}[rnd.IntN(4)]
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if flags != os.O_RDONLY {
		if _, err := f.WriteAt([]byte(fmt.Sprintf("%05d", rnd.IntN(1e5))), 0); err != nil {
			return err
		}
	}
	if flags != os.O_WRONLY {
		b := make([]byte, 5)
		if _, err := f.ReadAt(b, 0); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// Policy B: who has a lower file open goes on reading it; everybody else gets
// what was written.
func TestPassthroughAllSwitchesAtACopyUp(t *testing.T) {
	m := serveFiles(t, server.Options{Passthrough: server.PassthroughAll}, "f")
	old := open(t, m.path("f"), os.O_RDONLY)
	if c := m.counts(); c.Passthrough != 1 {
		t.Fatalf("a lower is not in passthrough: %v", c)
	}
	var before, after unix.Stat_t
	must(t, unix.Stat(m.path("f"), &before))
	w := open(t, m.path("f"), os.O_RDWR)
	writeAt(t, w, "upper")
	wantContent(t, w, "upper")
	wantContent(t, old, "lower")
	wantContent(t, open(t, m.path("f"), os.O_RDONLY), "upper")
	must(t, unix.Stat(m.path("f"), &after))
	if before.Ino != after.Ino {
		t.Errorf("inode %d became %d", before.Ino, after.Ino)
	}
	if c := m.counts(); c.CachedOpens != 0 {
		t.Errorf("%v", c)
	}
	if b, err := os.ReadFile(filepath.Join(m.Dir, "l", "f")); string(b) != "lower" || err != nil {
		t.Errorf("the lower has %q, %v", b, err)
	}
}

func TestReadOnlyMountInPassthrough(t *testing.T) {
	dir := dirs(t, "ext4")
	must(t, os.WriteFile(filepath.Join(dir, "l", "f"), []byte("lower"), 0o644))
	m := serve(t, setup{Dir: dir, NoUpper: true, Flags: sys.MS_RDONLY,
		Options: server.Options{Passthrough: server.PassthroughReadOnly, ReadOnly: true}})
	f := open(t, m.path("f"), os.O_RDONLY)
	wantContent(t, f, "lower")
	if c := m.counts(); c.Passthrough != 1 || c.CachedOpens != 0 {
		t.Errorf("%v", c)
	}
	if _, err := os.OpenFile(m.path("f"), os.O_WRONLY, 0); !errors.Is(err, syscall.EROFS) {
		t.Errorf("open for writing: %v", err)
	}
}

// Above a file system that is stacked itself the kernel takes files only where
// it was told so at INIT; else the page cache does.
func TestRefusedPassthroughUsesThePageCache(t *testing.T) {
	dir := testenv.FS(t, "ext4")
	for _, d := range []string{"ol", "ou", "ow", "o"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	over := filepath.Join(dir, "o")
	must(t, sys.Mount("overlay", over, "overlay", 0, fmt.Sprintf("lowerdir=%[1]s/ol,upperdir=%[1]s/ou,workdir=%[1]s/ow", dir)))
	t.Cleanup(func() { testenv.Unmount(t, over) })
	for _, d := range []string{"l", "u", "w", "m"} {
		must(t, os.Mkdir(filepath.Join(over, d), 0o755))
	}
	for depth, through := range map[int]uint64{1: 0, 2: 1} {
		m := serve(t, setup{Dir: over, Options: server.Options{Passthrough: server.PassthroughUppers, StackDepth: depth}})
		must(t, os.WriteFile(m.path("f"), []byte("x"), 0o644))
		if c := m.counts(); c.ThroughOpens != through {
			t.Errorf("depth %d: %v", depth, c)
		}
		if b, err := os.ReadFile(m.path("f")); string(b) != "x" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		if through == 0 {
			m.wantLog("no passthrough")
		}
		m.stop()
	}
}

// Who had a file open before it became setuid cannot write into a setuid file.
func TestSetuidAfterTheOpen(t *testing.T) {
	m := serveFiles(t, policyA)
	must(t, os.WriteFile(m.path("f"), []byte("x"), 0o666))
	must(t, unix.Chmod(m.path("f"), 0o777))
	cmd := exec.Command("/bin/sh", "-c", "exec 3>>"+m.path("f")+"; echo open; read x; echo evil >&3")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	if _, err := out.Read(make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	if c := m.counts(); c.Passthrough != 1 {
		t.Errorf("not in passthrough: %v", c)
	}
	must(t, unix.Chmod(m.path("f"), 0o4777))
	var st unix.Stat_t
	must(t, unix.Stat(m.path("f"), &st))
	if st.Mode&0o7777 != 0o4777 {
		t.Errorf("mode %o before the write", st.Mode&0o7777)
	}
	fmt.Fprintln(in)
	must(t, cmd.Wait())
	must(t, unix.Stat(m.path("f"), &st))
	if st.Mode&0o7777 != 0o777 {
		t.Errorf("mode %o after the write", st.Mode&0o7777)
	}
}

// fallocate and copy_file_range are changes, too.
func TestSetuidIsDroppedByFallocate(t *testing.T) {
	if _, err := exec.LookPath("fallocate"); err != nil {
		testenv.Skip(t, "no fallocate (Debian: util-linux)")
	}
	m := serveFiles(t, policyA, "f")
	var st unix.Stat_t
	mode := func() uint32 {
		must(t, unix.Stat(m.path("f"), &st))
		return st.Mode & 0o7777
	}
	must(t, unix.Chmod(m.path("f"), 0o6777))
	if out, err := exec.Command("fallocate", "-l", "100", m.path("f")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got := mode(); got != 0o6777 {
		t.Errorf("root's fallocate left %o", got)
	}
	asNobody(t, "fallocate -l 200 "+m.path("f"))
	if got := mode(); got != 0o777 || st.Size != 200 {
		t.Errorf("nobody's fallocate left %o, size %d", got, st.Size)
	}
}
