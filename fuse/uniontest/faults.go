package uniontest

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// onSmall puts the upper on a file system of its own of size bytes.
func (k *Kit) onSmall(size int64) {
	k.Helper()
	d := k.tmpfs(size)
	k.spec.Upper, k.spec.Work = d+"/u", d+"/w"
	k.ok(os.Mkdir(k.spec.Upper, 0o755))
	k.ok(os.Mkdir(k.spec.Work, 0o755))
}

// faultCases are about a full upper, a server that dies, and memory that is
// needed again.
var faultCases = map[string]func(*Kit){
	"ENOSPC in copy-up leaves no half file": func(k *Kit) {
		k.onSmall(1 << 20)
		k.union(random("d/big", 4<<20, 1), file("d/small", "s"))
		_, err := k.tryOpen("d/big", unix.O_WRONLY)
		k.is(unix.ENOSPC, err)
		k.is(unix.ENOSPC, unix.Chmod(k.p("d/big"), 0o600))
		k.upperAbsent("d/big")
		k.mode("d/big", 0o644)
		k.appendTo("d/small", "!")
		k.unlink("d/big")
		k.holds("d", "small")
	},
	"ENOSPC on write": func(k *Kit) {
		k.onSmall(1 << 20)
		k.union(file("x", "x"))
		f := k.open("f", unix.O_WRONLY|unix.O_CREAT)
		var err error
		for range 64 {
			if _, err = f.Write(make([]byte, 64<<10)); err != nil {
				break
			}
		}
		if err == nil {
			err = f.Sync()
		}
		k.is(unix.ENOSPC, err)
		k.truncate("f", 0)
		k.write("f", "works again")
		k.reads("f", "works again")
	},
	"no inodes left": func(k *Kit) {
		d := k.mkdir("t0")
		k.ok(unix.Mount("tmpfs", d, "tmpfs", 0, "size=8m,nr_inodes=20"))
		k.tmpfses = append(k.tmpfses, d)
		k.spec.Upper, k.spec.Work = d+"/u", d+"/w"
		k.ok(os.Mkdir(k.spec.Upper, 0o755))
		k.ok(os.Mkdir(k.spec.Work, 0o755))
		k.union(each(numbered("f", 30), func(n string) change { return file(n, n) }))
		failed := 0
		for _, n := range numbered("f", 30) {
			err := unix.Chmod(k.p(n), 0o600)
			if err != nil {
				k.is(unix.ENOSPC, err)
				failed++
			}
			k.reads(n, n)
		}
		k.that(failed > 0, "nothing failed")
		k.unread = "there is no inode left for the workdir"
	},
	"a killed server gives ENOTCONN and a clean remount": func(k *Kit) {
		if k.actor.Kernel {
			return
		}
		k.union(file("d/f", "x"), file("g", "y"))
		k.write("new", "n")
		k.appendTo("d/f", "!")
		k.unlink("g")
		f := k.open("new", unix.O_RDWR)
		k.mounted.Kill()
		_, err := os.Lstat(k.p("new"))
		k.is(unix.ENOTCONN, err)
		_, err = f.Stat()
		k.is(unix.ENOTCONN, err)
		k.remount()
		k.reads("d/f", "x!")
		k.reads("new", "n")
		k.absent("g")
		k.unlike = "the kernel's run does not do this"
	},
	"a server killed at work leaves a state that mounts": func(k *Kit) {
		if k.actor.Kernel {
			return
		}
		names := numbered("d/f", 400)
		k.union(each(names, func(n string) change { return random(n, 50_000, 3) }))
		done := make(chan struct{})
		go func() {
			defer close(done)
			for i, n := range names {
				switch i % 4 {
				case 0:
					_ = os.Chmod(k.p(n), 0o600)
				case 1:
					_ = os.Remove(k.p(n))
				case 2:
					_ = os.Rename(k.p(n), k.p(n+"-moved"))
				case 3:
					_ = os.WriteFile(k.p(n), []byte("new"), 0o644)
				}
			}
		}()
		k.eventually("some work", func() bool {
			names, err := os.ReadDir(k.u("d"))
			return err == nil && len(names) > 40
		})
		k.mounted.Kill()
		<-done
		k.remount()
		for i, n := range names {
			for _, p := range []string{n, n + "-moved"} {
				b, err := os.ReadFile(k.p(p))
				switch {
				case os.IsNotExist(err):
				case err != nil:
					k.Fatal(err)
				case len(b) != 50_000 && !(i%4 == 3 && len(b) <= 3):
					k.Fatalf("%s has %d bytes", p, len(b))
				}
			}
		}
		k.unlike = "how far it came is chance"
	},
	"many inodes and few descriptors": func(k *Kit) {
		k.union(each(numbered("d/s", 40), func(d string) change {
			return each(numbered(d+"/f", 40), func(n string) change { return file(n, "x") })
		}))
		for _, d := range numbered("d/s", 40) {
			for _, n := range k.names(d) {
				k.stat(d + "/" + n)
			}
		}
		if s, ok := k.mounted.(*server); ok {
			fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
			k.ok(err)
			k.that(len(fds) < 1100, "the server has %d descriptors", len(fds))
		}
	},
	"caches dropped under open files": func(k *Kit) {
		k.union(file("d/f", "low"), file("d/g", "low g"), dir("e"))
		k.write("new", "up")
		low, up, d := k.open("d/f", unix.O_RDONLY), k.open("new", unix.O_RDWR), k.open("e", unix.O_RDONLY|unix.O_DIRECTORY)
		gone := k.open("d/g", unix.O_RDWR)
		k.unlink("d/g")
		for range 3 {
			k.dropCaches()
			k.readsFile(low, "low")
			k.readsFile(gone, "low g")
			_, err := up.WriteAt([]byte("UP"), 0)
			k.ok(err)
			_ = unix.Mkdirat(fd(d), "made", 0o755)
		}
		k.reads("new", "UP")
		k.holds("e", "made")
		k.holds("d", "f")
	},
	"lowers that change are no reason to die": func(k *Kit) {
		k.noLowers = true
		k.union(file("d/f", "x"), file("d/g", "y"), file("h", "z"))
		k.holds("d", "f", "g")
		k.ok(os.Remove(k.l(0, "d/f")))
		k.ok(os.WriteFile(k.l(0, "h"), []byte("changed"), 0o644))
		k.ok(os.WriteFile(k.l(0, "d/new"), []byte("new"), 0o644))
		_, _ = os.ReadFile(k.p("d/f"))
		_, _ = os.ReadFile(k.p("h"))
		_ = os.Chmod(k.p("d/f"), 0o600)
		_ = os.Remove(k.p("d/f"))
		_, _ = os.ReadDir(k.p("d"))
		k.reads("d/g", "y")
		k.write("works", "yes")
		k.reads("works", "yes")
		k.unread, k.unlike = "undefined by the kernel's documentation", "undefined"
	},
	"overlay xattrs that are nonsense": func(k *Kit) {
		k.noLowers = true
		k.upper(file("a", "a"), overlay("a", "origin", "nonsense"), file("b", "b"), overlay("b", "origin", strings.Repeat("\xfb", 200)), dir("d"), overlay("d", "opaque", strings.Repeat("y", 200)), overlay("d", "impure", "?"), overlay("d", "origin", ""))
		k.union(file("a", "low"), file("d/x", "x"))
		k.reads("a", "a")
		k.reads("b", "b")
		k.holds("d", "x")
		k.write("d/new", "n")
		k.chmod("a", 0o600)
	},
	"unmount with a file open is EBUSY": func(k *Kit) {
		k.union(file("f", "x"))
		f := k.open("f", unix.O_RDONLY)
		err := unix.Unmount(k.mnt, 0)
		k.is(syscall.EBUSY, err)
		k.readsFile(f, "x")
	},
}
