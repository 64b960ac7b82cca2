package uniontest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/treegen"
)

// upperSays runs f on a file of the upper's file system and returns its errno:
// what a union should answer, too.
func (k *Kit) upperSays(content string, f func(*os.File) error) error {
	k.Helper()
	p := k.dir + "/probe"
	k.ok(os.WriteFile(p, []byte(content), 0o644))
	defer os.Remove(p)
	o, err := os.OpenFile(p, os.O_RDWR, 0)
	k.ok(err)
	defer o.Close()
	return f(o)
}

// alike runs f on a file in the mount that starts in the lower, on a new one, and
// on one of the file system below, and compares errno and content.
func (k *Kit) alike(content string, f func(*os.File) error) {
	k.Helper()
	var after string
	want := k.upperSays(content, func(o *os.File) error {
		err := f(o)
		b, rerr := io.ReadAll(io.NewSectionReader(o, 0, 1<<40))
		k.ok(rerr)
		after = string(b)
		return err
	})
	k.union(file("low", content))
	k.write("new", content)
	for _, p := range []string{"low", "new"} {
		o := k.open(p, unix.O_RDWR)
		got := f(o)
		if !sameErrno(got, want) {
			k.Errorf("%s: %v, the file system below says %v", p, got, want)
		}
		k.readsFile(o, after)
		k.ok(o.Close())
		k.reads(p, after)
	}
}

// shifts is alike for what a subject may refuse.
func (k *Kit) shifts(content string, f func(*os.File) error) {
	k.Helper()
	if k.reader.differs(NoShift) != "" || k.differs(NoShift) {
		k.unlike = "one of the two cannot"
	}
	if !k.differs(NoShift) {
		k.alike(content, f)
		return
	}
	k.union(file("low", content))
	o := k.open("low", unix.O_RDWR)
	k.is(unix.EOPNOTSUPP, f(o))
	k.readsFile(o, content)
}

func sameErrno(a, b error) bool {
	var x, y syscall.Errno
	errors.As(a, &x)
	errors.As(b, &y)
	return x == y && (a == nil) == (b == nil)
}

const eight = 8 * 4096

var ioCases = map[string]func(*Kit){
	"fallocate": func(k *Kit) {
		k.alike("abc", func(f *os.File) error { return unix.Fallocate(fd(f), 0, 0, 10_000) })
	},
	"fallocate KEEP_SIZE": func(k *Kit) {
		k.alike("abc", func(f *os.File) error { return unix.Fallocate(fd(f), unix.FALLOC_FL_KEEP_SIZE, 0, 10_000) })
	},
	"fallocate PUNCH_HOLE": func(k *Kit) {
		k.alike(string(treegen.Content(1, eight)), func(f *os.File) error {
			return unix.Fallocate(fd(f), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4096, 8192)
		})
	},
	"fallocate ZERO_RANGE": func(k *Kit) {
		k.alike(string(treegen.Content(2, eight)), func(f *os.File) error {
			return unix.Fallocate(fd(f), unix.FALLOC_FL_ZERO_RANGE, 100, 20_000)
		})
	},
	"fallocate COLLAPSE_RANGE": func(k *Kit) {
		k.shifts(string(treegen.Content(3, eight)), func(f *os.File) error {
			return unix.Fallocate(fd(f), unix.FALLOC_FL_COLLAPSE_RANGE, 4096, 8192)
		})
	},
	"fallocate INSERT_RANGE": func(k *Kit) {
		k.shifts(string(treegen.Content(4, eight)), func(f *os.File) error {
			return unix.Fallocate(fd(f), unix.FALLOC_FL_INSERT_RANGE, 4096, 8192)
		})
	},
	"fallocate that is refused": func(k *Kit) {
		k.alike("abc", func(f *os.File) error { return unix.Fallocate(fd(f), 0, -1, 10) })
	},
	"O_APPEND with two writers": func(k *Kit) {
		k.union(file("f", ""))
		a, b := k.open("f", unix.O_WRONLY|unix.O_APPEND), k.open("f", unix.O_WRONLY|unix.O_APPEND)
		for i := range 100 {
			_, err := fmt.Fprintf(a, "a%03d\n", i)
			k.ok(err)
			_, err = fmt.Fprintf(b, "b%03d\n", i)
			k.ok(err)
		}
		k.size("f", 1000)
		content, err := os.ReadFile(k.p("f"))
		k.ok(err)
		equal(k, "lines", strings.Count(string(content), "\n"), 200)
	},
	"O_APPEND with writers at once": func(k *Kit) {
		k.union(file("f", "start\n"))
		var wg sync.WaitGroup
		errs := make([]error, 8)
		for n := range errs {
			wg.Go(func() { errs[n] = appendLines(k.p("f"), n, 50) })
		}
		wg.Wait()
		k.ok(errors.Join(errs...))
		content, err := os.ReadFile(k.p("f"))
		k.ok(err)
		equal(k, "lines", strings.Count(string(content), "\n"), 401)
		k.unlike = "the order of lines is chance"
		k.size("f", int64(6+400*8))
	},
	"O_APPEND writes at the end wherever it is told to": func(k *Kit) {
		k.union(file("f", "abc"))
		f := k.open("f", unix.O_RDWR|unix.O_APPEND)
		_, err := unix.Pwrite(fd(f), []byte("d"), 0)
		k.ok(err)
		k.reads("f", "abcd")
	},
	"O_SYNC, O_DSYNC and fsync": func(k *Kit) {
		k.union(file("f", "x"), dir("d"))
		for _, flag := range []int{unix.O_SYNC, unix.O_DSYNC} {
			f := k.open("f", unix.O_WRONLY|flag)
			_, err := f.WriteString("synced")
			k.ok(err)
			k.ok(f.Close())
		}
		f := k.open("f", unix.O_RDWR)
		k.ok(unix.Fsync(fd(f)))
		k.ok(unix.Fdatasync(fd(f)))
		k.ok(unix.SyncFileRange(fd(f), 0, 0, unix.SYNC_FILE_RANGE_WRITE))
		for _, p := range []string{".", "d"} {
			d := k.open(p, unix.O_RDONLY|unix.O_DIRECTORY)
			k.ok(unix.Fsync(fd(d)))
		}
		r := k.open("f", unix.O_RDONLY)
		k.ok(unix.Fsync(fd(r)))
		k.ok(unix.Syncfs(fd(r)))
	},
	"O_DIRECT": func(k *Kit) {
		k.union(random("f", 1<<16, 5))
		flags := unix.O_RDWR | unix.O_DIRECT
		probe := k.upperSays("x", func(o *os.File) error {
			fdn, err := unix.Open(o.Name(), flags, 0)
			if err == nil {
				unix.Close(fdn)
			}
			return err
		})
		f, err := k.tryOpen("f", flags)
		if probe != nil {
			k.is(unix.EINVAL, err)
			return
		}
		k.ok(err)
		buf, err := unix.Mmap(-1, 0, 1<<16, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		k.ok(err)
		defer unix.Munmap(buf)
		n, err := unix.Pread(fd(f), buf, 0)
		k.ok(err)
		equal(k, "read", n, 1<<16)
		k.that(bytes.Equal(buf, treegen.Content(5, 1<<16)), "another content")
		copy(buf, treegen.Content(6, 4096))
		_, err = unix.Pwrite(fd(f), buf[:4096], 8192)
		k.ok(err)
		b, err := os.ReadFile(k.p("f"))
		k.ok(err)
		k.that(bytes.Equal(b[8192:12288], treegen.Content(6, 4096)), "the write is not seen")
	},
	"O_DIRECT and buffered see each other": func(k *Kit) {
		if k.fs.kind == "tmpfs" {
			k.skip("tmpfs has no direct I/O of its own")
		}
		k.union(file("x", "x"))
		k.write("f", strings.Repeat("a", 8192))
		d := k.open("f", unix.O_RDWR|unix.O_DIRECT)
		buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		k.ok(err)
		defer unix.Munmap(buf)
		for i := range 5 {
			k.overwrite("f", 0, strings.Repeat(string(rune('b'+i)), 4096))
			_, err = unix.Pread(fd(d), buf, 0)
			k.ok(err)
			equal(k, "direct read", buf[0], byte('b'+i))
			copy(buf, bytes.Repeat([]byte{byte('B' + i)}, 4096))
			_, err = unix.Pwrite(fd(d), buf, 4096)
			k.ok(err)
			b, err := os.ReadFile(k.p("f"))
			k.ok(err)
			equal(k, "buffered read", b[5000], byte('B'+i))
		}
	},
	"SEEK_DATA and SEEK_HOLE": func(k *Kit) {
		k.union(sparse("f", 4<<20), data("f", 1<<20, strings.Repeat("d", 1<<16)))
		k.write("new", "")
		k.truncate("new", 4<<20)
		k.overwrite("new", 1<<20, strings.Repeat("d", 1<<16))
		for _, p := range []string{"f", "new"} {
			f := k.open(p, unix.O_RDWR)
			below, err := os.Open(k.u(p))
			k.ok(err)
			defer below.Close()
			k.ok(unix.Fsync(fd(f)))
			for _, at := range []int64{0, 100, 1 << 20, 1<<20 + 4096, 3 << 20, 4<<20 - 1, 5 << 20} {
				for _, whence := range []int{unix.SEEK_DATA, unix.SEEK_HOLE} {
					got, err := unix.Seek(fd(f), at, whence)
					want, wantErr := unix.Seek(fd(below), at, whence)
					k.that(sameErrno(err, wantErr), "%s from %d: %v, below %v", p, at, err, wantErr)
					equal(k, fmt.Sprintf("%s from %d", p, at), got, want)
				}
			}
		}
	},
	"copy_file_range of a lower's file": func(k *Kit) {
		k.union(random("f", 300_000, 7))
		k.write("g", "")
		k.copyRange("f", "g", 300_000)
		k.reads("g", string(treegen.Content(7, 300_000)))
		k.upperAbsent("f")
	},
	"copy_file_range within a file": func(k *Kit) {
		k.union(file("f", "0123456789"))
		f := k.open("f", unix.O_RDWR)
		from, to := int64(0), int64(10)
		n, err := unix.CopyFileRange(fd(f), &from, fd(f), &to, 5, 0)
		k.ok(err)
		equal(k, "copied", n, 5)
		k.reads("f", "012345678901234")
		from, to = 0, 3
		_, err = unix.CopyFileRange(fd(f), &from, fd(f), &to, 5, 0)
		k.is(unix.EINVAL, err)
	},
	"copy_file_range over 4 GiB": func(k *Kit) {
		k.union(sparse("f", 5<<30), data("f", 5<<30-3, "end"))
		k.write("g", "")
		in, out := k.open("f", unix.O_RDONLY), k.open("g", unix.O_RDWR)
		off := int64(5<<30 - 1<<20)
		to := off
		for off < 5<<30 {
			n, err := unix.CopyFileRange(fd(in), &off, fd(out), &to, 5<<30, 0)
			k.ok(err)
			k.that(n > 0, "nothing copied at %d", off)
		}
		k.size("g", 5<<30)
		b := make([]byte, 3)
		_, err := out.ReadAt(b, 5<<30-3)
		k.ok(err)
		equal(k, "end", string(b), "end")
	},
	"FICLONE": func(k *Kit) {
		k.union(random("f", 1<<20, 8))
		k.write("g", "")
		in, out := k.open("f", unix.O_RDONLY), k.open("g", unix.O_RDWR)
		err := unix.IoctlFileClone(fd(out), fd(in))
		want := k.upperSays("x", func(o *os.File) error {
			src, err := os.Open(k.l(0, "f"))
			k.ok(err)
			defer src.Close()
			return unix.IoctlFileClone(fd(o), fd(src))
		})
		switch {
		case k.differs(NoClone):
			k.that(errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY), "FICLONE answers %v", err)
			k.unlike = k.actor.differs(NoClone)
		default:
			k.that(sameErrno(err, want), "FICLONE answers %v, the file system below %v", err, want)
			if !k.reader.Kernel {
				k.unlike = k.reader.differs(NoClone)
			}
		}
	},
	"sendfile to a socket and to a file": func(k *Kit) {
		k.union(random("f", 100_000, 9))
		in, out := k.open("f", unix.O_RDONLY), k.open("g", unix.O_RDWR|unix.O_CREAT)
		var off int64
		for off < 100_000 {
			n, err := unix.Sendfile(fd(out), fd(in), &off, 1<<20)
			k.ok(err)
			k.that(n > 0, "nothing sent")
		}
		k.reads("g", string(treegen.Content(9, 100_000)))
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		k.ok(err)
		defer unix.Close(p[0])
		defer unix.Close(p[1])
		off = 0
		n, err := unix.Sendfile(p[0], fd(in), &off, 4096)
		k.ok(err)
		b := make([]byte, n)
		_, err = io.ReadFull(os.NewFile(uintptr(must(unix.Dup(p[1]))), "socket"), b)
		k.ok(err)
		k.that(bytes.Equal(b, treegen.Content(9, int64(n))), "another content")
	},
	"splice": func(k *Kit) {
		k.union(file("f", "spliced"))
		in, out := k.open("f", unix.O_RDONLY), k.open("g", unix.O_RDWR|unix.O_CREAT)
		r, w, err := os.Pipe()
		k.ok(err)
		defer r.Close()
		defer w.Close()
		n, err := unix.Splice(fd(in), nil, fd(w), nil, 100, 0)
		k.ok(err)
		_, err = unix.Splice(fd(r), nil, fd(out), nil, int(n), 0)
		k.ok(err)
		k.reads("g", "spliced")
	},
	"a shared mapping of a file of the upper": func(k *Kit) {
		k.union(file("x", "x"))
		k.write("f", strings.Repeat("a", 10_000))
		k.mapped("f")
	},
	"a shared mapping of a file of a lower": func(k *Kit) {
		k.union(file("f", strings.Repeat("a", 10_000)))
		k.mapped("f")
	},
	"a shared mapping of a file without a name": func(k *Kit) {
		k.union(file("x", "x"))
		k.write("f", strings.Repeat("a", 8192))
		f := k.open("f", unix.O_RDWR)
		k.unlink("f")
		m, err := unix.Mmap(fd(f), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		k.ok(err)
		m[5] = 'M'
		k.ok(unix.Munmap(m))
		b := make([]byte, 6)
		_, err = f.ReadAt(b, 0)
		k.ok(err)
		equal(k, "content", string(b), "aaaaaM")
	},
	"a read-only shared mapping before copy-up": func(k *Kit) {
		k.union(file("f", strings.Repeat("a", 4096)))
		f := k.open("f", unix.O_RDONLY)
		m, err := unix.Mmap(fd(f), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
		k.ok(err)
		equal(k, "mapped", m[0], 'a')
		k.write("f", strings.Repeat("b", 4096))
		k.that(m[0] == 'a' || m[0] == 'b', "the mapping shows %q", m[0])
		k.ok(unix.Munmap(m))
		k.readsFile(f, strings.Repeat("b", 4096))
	},
	"execution of a file of a lower and of one copied up": func(k *Kit) {
		k.union(file("run", "#!/bin/sh\necho lower"), chmod("run", 0o755))
		k.executes("run", "lower")
		k.write("run", "#!/bin/sh\necho upper")
		k.executes("run", "upper")
		k.write("new", "#!/bin/sh\necho new")
		k.chmod("new", 0o755)
		k.executes("new", "new")
	},
	"a file being executed is ETXTBSY": func(k *Kit) {
		b, err := os.ReadFile("/bin/sleep")
		k.ok(err)
		k.union(file("x", "x"))
		k.write("sleep", string(b))
		k.chmod("sleep", 0o755)
		cmd := startSleep(k.p("sleep"))
		k.ok(cmd.Start())
		defer cmd.Wait()
		defer cmd.Process.Kill()
		_, err = k.tryOpen("sleep", unix.O_WRONLY)
		k.is(unix.ETXTBSY, err)
	},
	"writes at every boundary": func(k *Kit) {
		k.union(random("f", 20_000, 3))
		want := treegen.Content(3, 20_000)
		f := k.open("f", unix.O_RDWR)
		for i, at := range []int64{0, 1, 4095, 4096, 4097, 8190, 12_288, 19_999} {
			piece := treegen.Content(uint64(i+10), int64(1+i*500))
			_, err := f.WriteAt(piece, at)
			k.ok(err)
			if end := int(at) + len(piece); end > len(want) {
				want = append(want, make([]byte, end-len(want))...)
			}
			copy(want[at:], piece)
			k.readsFile(f, string(want))
		}
		k.ok(f.Close())
		k.dropCaches()
		k.reads("f", string(want))
	},
	"truncate up and down": func(k *Kit) {
		k.union(random("f", 10_000, 3))
		want := treegen.Content(3, 10_000)
		for _, n := range []int64{5000, 15_000, 4096, 1, 0, 9999} {
			k.truncate("f", n)
			if n > int64(len(want)) {
				want = append(want, make([]byte, n-int64(len(want)))...)
			}
			want = want[:n]
			k.reads("f", string(want))
		}
		k.is(unix.EINVAL, unix.Truncate(k.p("f"), -1))
		k.is(unix.EISDIR, unix.Truncate(k.p("."), 0))
	},
	"a file's size over its limits": func(k *Kit) {
		k.union(file("f", "x"))
		f := k.open("f", unix.O_RDWR)
		want := k.upperSays("x", func(o *os.File) error { return unix.Ftruncate(fd(o), 1<<62) })
		k.that(sameErrno(unix.Ftruncate(fd(f), 1<<62), want), "truncate to 2^62 is not %v", want)
	},
	"readv, writev and reads past the end": func(k *Kit) {
		k.union(file("f", "0123456789"))
		f := k.open("f", unix.O_RDWR)
		a, b := make([]byte, 4), make([]byte, 10)
		n, err := unix.Preadv(fd(f), [][]byte{a, b}, 0)
		k.ok(err)
		equal(k, "read", n, 10)
		_, err = unix.Pwritev(fd(f), [][]byte{[]byte("ab"), []byte("cd")}, 3)
		k.ok(err)
		k.reads("f", "012abcd789")
		n, err = unix.Pread(fd(f), a, 100)
		k.ok(err)
		equal(k, "read past the end", n, 0)
	},
	"flags of an open file": func(k *Kit) {
		k.union(file("f", "x"))
		f := k.open("f", unix.O_RDWR)
		_, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, unix.O_APPEND)
		k.ok(err)
		_, err = f.WriteString("y")
		k.ok(err)
		k.reads("f", "xy")
		_, err = k.open("f", unix.O_WRONLY).Read(make([]byte, 1))
		k.is(unix.EBADF, err)
		_, err = k.open("f", unix.O_RDONLY).WriteString("z")
		k.is(unix.EBADF, err)
	},
	"inode flags": func(k *Kit) {
		k.union(file("f", "x"), dir("d"))
		for _, p := range []string{"f", "d"} {
			f := k.open(p, unix.O_RDONLY)
			got, err := unix.IoctlGetInt(fd(f), unix.FS_IOC_GETFLAGS)
			var want int
			wantErr := k.upperSays("x", func(o *os.File) error {
				var err error
				want, err = unix.IoctlGetInt(fd(o), unix.FS_IOC_GETFLAGS)
				return err
			})
			if p == "f" && !sameErrno(err, wantErr) {
				k.Fatalf("GETFLAGS: %v, the file system below %v", err, wantErr)
			}
			if p == "f" && wantErr == nil {
				equal(k, "flags", got, want)
			}
		}
	},
	"FS_IOC_FSGETXATTR": func(k *Kit) {
		k.union(file("f", "x"))
		k.write("new", "n")
		for _, p := range []string{"f", "new"} {
			got, err := fsxattr(k.p(p))
			below := k.l(0, "f")
			if p == "new" {
				below = k.u("new")
			}
			want, wantErr := fsxattr(below)
			k.that(sameErrno(err, wantErr), "%v, the file system below says %v", err, wantErr)
			equal(k, "xflags", got.Xflags, want.Xflags)
		}
	},
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func fsxattr(path string) (sys.FSXattr, error) {
	f, err := sys.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return sys.FSXattr{}, err
	}
	defer f.Close()
	return f.GetFSXattr()
}

func setFSXattr(path string, x sys.FSXattr) error {
	f, err := sys.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.SetFSXattr(x)
}

func appendLines(path string, n, lines int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for i := range lines {
		if _, err := fmt.Fprintf(f, "%03d-%03d\n", n, i); err != nil {
			return err
		}
	}
	return nil
}

// copyRange copies n bytes with copy_file_range.
func (k *Kit) copyRange(from, to string, n int) {
	k.Helper()
	in, out := k.open(from, unix.O_RDONLY), k.open(to, unix.O_RDWR)
	for n > 0 {
		m, err := unix.CopyFileRange(fd(in), nil, fd(out), nil, n, 0)
		k.ok(err)
		k.that(m > 0, "nothing copied, %d left", n)
		n -= m
	}
}

// mapped writes through a shared mapping and through write, and each must see
// the other.
func (k *Kit) mapped(p string) {
	k.Helper()
	f := k.open(p, unix.O_RDWR)
	m, err := unix.Mmap(fd(f), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	k.ok(err)
	defer func() { _ = unix.Munmap(m) }()
	m[0], m[5000] = 'M', 'M'
	b := make([]byte, 1)
	for _, at := range []int64{0, 5000} {
		_, err = f.ReadAt(b, at)
		k.ok(err)
		equal(k, "read of what was mapped", b[0], 'M')
	}
	_, err = f.WriteAt([]byte("W"), 100)
	k.ok(err)
	equal(k, "mapping of what was written", m[100], 'W')
	k.ok(unix.Msync(m, unix.MS_SYNC))
	below, err := os.ReadFile(k.u(p))
	k.ok(err)
	equal(k, "the upper", string([]byte{below[0], below[100], below[5000]}), "MWM")
	k.that(k.stat(p).Mtime.Sec >= k.start.Sec, "mtime %v", k.stat(p).Mtime)
	k.size(p, 10_000)
}

// eventually polls until f is true.
func (k *Kit) eventually(what string, f func() bool) {
	k.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			k.Fatalf("%s: not within %v", what, patience)
		}
	}
}
