package uniontest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/sys"
)

// twoNames is a file of the upper that is open by each of its names.
func (k *Kit) twoNames() (a, b *os.File) {
	k.Helper()
	k.union(file("x", "x"))
	k.write("a", "content")
	k.hardlink("a", "b")
	return k.open("a", unix.O_RDWR), k.open("b", unix.O_RDWR)
}

func ofd(f *os.File, typ int16, start, n int64) error {
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: typ, Start: start, Len: n})
}

var lockCases = map[string]func(*Kit){
	"flock over two names": func(k *Kit) {
		a, b := k.twoNames()
		k.ok(unix.Flock(fd(a), unix.LOCK_EX))
		k.is(unix.EWOULDBLOCK, unix.Flock(fd(b), unix.LOCK_EX|unix.LOCK_NB))
		k.is(unix.EWOULDBLOCK, unix.Flock(fd(b), unix.LOCK_SH|unix.LOCK_NB))
		k.ok(unix.Flock(fd(a), unix.LOCK_SH))
		k.ok(unix.Flock(fd(b), unix.LOCK_SH|unix.LOCK_NB))
		k.ok(unix.Flock(fd(a), unix.LOCK_UN))
		k.ok(unix.Flock(fd(b), unix.LOCK_EX|unix.LOCK_NB))
		k.ok(b.Close())
		k.ok(unix.Flock(fd(a), unix.LOCK_EX|unix.LOCK_NB))
	},
	"OFD locks over two names": func(k *Kit) {
		a, b := k.twoNames()
		k.ok(ofd(a, unix.F_WRLCK, 0, 10))
		k.is(unix.EAGAIN, ofd(b, unix.F_WRLCK, 5, 10))
		k.ok(ofd(b, unix.F_WRLCK, 10, 10))
		k.ok(ofd(a, unix.F_RDLCK, 0, 10))
		k.ok(ofd(b, unix.F_RDLCK, 0, 10))
		k.is(unix.EAGAIN, ofd(a, unix.F_WRLCK, 0, 1))
		k.ok(ofd(b, unix.F_UNLCK, 0, 10))
		k.ok(ofd(a, unix.F_WRLCK, 0, 1))
		lk := unix.Flock_t{Type: unix.F_WRLCK, Len: 100}
		k.ok(unix.FcntlFlock(b.Fd(), unix.F_OFD_GETLK, &lk))
		equal(k, "the lock found", lk.Type, unix.F_WRLCK)
		equal(k, "its start", lk.Start, 0)
		equal(k, "its length", lk.Len, 1)
	},
	"a lock held over copy-up": func(k *Kit) {
		k.union(file("f", "x"))
		a := k.open("f", unix.O_RDONLY)
		k.ok(unix.Flock(fd(a), unix.LOCK_EX))
		b := k.open("f", unix.O_RDWR)
		k.is(unix.EWOULDBLOCK, unix.Flock(fd(b), unix.LOCK_EX|unix.LOCK_NB))
		k.ok(a.Close())
		k.ok(unix.Flock(fd(b), unix.LOCK_EX|unix.LOCK_NB))
	},
	"OFD locks held over copy-up": func(k *Kit) {
		k.union(file("f", "x"))
		a := k.open("f", unix.O_RDONLY)
		k.ok(ofd(a, unix.F_RDLCK, 0, 0))
		b := k.open("f", unix.O_RDWR)
		k.is(unix.EAGAIN, ofd(b, unix.F_WRLCK, 0, 0))
		k.ok(a.Close())
		k.ok(ofd(b, unix.F_WRLCK, 0, 0))
	},
	"a lock that is waited for": func(k *Kit) {
		a, b := k.twoNames()
		k.ok(unix.Flock(fd(a), unix.LOCK_EX))
		got := make(chan error)
		go func() { got <- unix.Flock(fd(b), unix.LOCK_EX) }()
		k.ok(unix.Flock(fd(a), unix.LOCK_UN))
		k.ok(<-got)
	},
	"a range lock that is waited for": func(k *Kit) {
		a, b := k.twoNames()
		k.ok(ofd(a, unix.F_WRLCK, 0, 10))
		got := make(chan error)
		go func() {
			got <- unix.FcntlFlock(b.Fd(), unix.F_OFD_SETLKW, &unix.Flock_t{Type: unix.F_WRLCK, Start: 9, Len: 1})
		}()
		k.ok(a.Close())
		k.ok(<-got)
	},
	"fcntl locks": func(k *Kit) {
		a, _ := k.twoNames()
		k.ok(unix.FcntlFlock(a.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 5}))
		lk := unix.Flock_t{Type: unix.F_WRLCK, Len: 5}
		k.ok(unix.FcntlFlock(a.Fd(), unix.F_GETLK, &lk)) // one's own lock is not in the way
		equal(k, "the lock found", lk.Type, unix.F_UNLCK)
		b := k.open("b", unix.O_RDWR)
		k.is(unix.EAGAIN, ofd(b, unix.F_WRLCK, 0, 1))
		k.ok(b.Close()) // closing any of the process's files drops its locks
		c := k.open("a", unix.O_RDWR)
		k.ok(ofd(c, unix.F_WRLCK, 0, 1))
	},
	"a lock needs the right mode": func(k *Kit) {
		k.union(file("f", "x"))
		r := k.open("f", unix.O_RDONLY)
		k.is(unix.EBADF, ofd(r, unix.F_WRLCK, 0, 1))
		k.ok(unix.Flock(fd(r), unix.LOCK_EX|unix.LOCK_NB))
	},
	"flock of a directory": func(k *Kit) {
		k.union(file("d/x", "x"))
		a, b := k.open("d", unix.O_RDONLY), k.open("d", unix.O_RDONLY)
		k.ok(unix.Flock(fd(a), unix.LOCK_EX))
		k.is(unix.EWOULDBLOCK, unix.Flock(fd(b), unix.LOCK_EX|unix.LOCK_NB))
	},
	"leases and inotify see changes": func(k *Kit) {
		k.union(file("d/f", "x"))
		in, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
		k.ok(err)
		defer unix.Close(in)
		_, err = unix.InotifyAddWatch(in, k.p("d"), unix.IN_CREATE|unix.IN_DELETE|unix.IN_MODIFY)
		k.ok(err)
		k.write("d/new", "n")
		k.unlink("d/f")
		b := make([]byte, 4096)
		n, err := unix.Read(in, b)
		k.ok(err)
		k.that(n > 2*unix.SizeofInotifyEvent, "%d bytes of events", n)
	},
	"file handles with nfs_export=on": func(k *Kit) {
		k.exports()
		k.union(file("d/f", "low"), file("g", "low g"), dir("e"))
		k.write("new", "up")
		k.chmod("g", 0o600)
		handles := k.handles("d/f", "g", "new", "d", "e")
		for p, h := range handles {
			k.opens(h, p)
		}
		k.chmod("d/f", 0o600)
		k.dropCaches()
		for p, h := range handles {
			k.opens(h, p)
		}
		k.unlink("new")
		k.staleHandle(handles["new"])
	},
	"file handles outlive a restart": func(k *Kit) {
		k.exports()
		k.union(file("d/f", "low"), file("d/s/t/deep", "deep"), symlink("g", "l"), file("g", "low g"))
		k.write("d/new", "up")
		k.makedir("d/own")
		k.chmod("g", 0o600)
		handles := k.handles("d/f", "d/s/t/deep", "l", "g", "d", "d/s/t", "d/new", "d/own")
		k.remount()
		for p, h := range handles {
			k.opens(h, p)
		}
		k.unlink("d/f")
		k.unlink("d/new")
		k.remount()
		k.staleHandle(handles["d/f"])
		k.staleHandle(handles["d/new"])
		k.opens(handles["d/own"], "d/own")
	},
	"file handles follow what they are of": func(k *Kit) {
		k.exports()
		k.options("redirect_dir=on")
		k.union(file("d/f", "low"), file("d/s/g", "low g"), file("a", "low a"), link("a", "b"))
		k.write("new", "up")
		handles := k.handles("d/f", "d/s/g", "d", "d/s", "a", "new")
		k.rename("d", "moved")
		k.rename("a", "c")
		k.rename("new", "moved/new")
		k.chmod("moved/f", 0o600)
		to := map[string]string{"d/f": "moved/f", "d/s/g": "moved/s/g", "d": "moved", "d/s": "moved/s", "a": "c", "new": "moved/new"}
		for range 2 {
			k.dropCaches()
			for p, h := range handles {
				k.opens(h, to[p])
			}
			k.opens(handles["a"], "b")
			k.rename("moved/s", "s")
			to["d/s"], to["d/s/g"] = "s", "s/g"
			k.remount()
			for p, h := range handles {
				k.opens(h, to[p])
			}
			k.rename("s", "moved/s")
			to["d/s"], to["d/s/g"] = "moved/s", "moved/s/g"
		}
	},
	"what a file handle leads to is written": func(k *Kit) {
		k.exports()
		k.union(file("d/f", "low"), file("d/t", "low"), file("d/m", "low"), file("d/gone", "low"), file("d/l", "low"))
		k.write("d/new", "up")
		handles := k.handles("d/f", "d/t", "d/m", "d/gone", "d/l", "d/new", "d")
		k.dropCaches()
		write := func(p, content string) {
			k.Helper()
			f, err := k.byHandle(handles[p], unix.O_RDWR)
			k.ok(err)
			defer f.Close()
			_, err = f.WriteString(content)
			k.ok(err)
		}
		write("d/f", "LOW")
		write("d/new", "UP")
		f, err := k.byHandle(handles["d/t"], unix.O_WRONLY|unix.O_TRUNC)
		k.ok(err)
		k.ok(f.Close())
		m, err := k.byHandle(handles["d/m"], unix.O_RDONLY)
		k.ok(err)
		k.ok(m.Chmod(0o600))
		k.ok(m.Close())
		gone, err := k.byHandle(handles["d/gone"], unix.O_RDWR)
		k.ok(err)
		k.unlink("d/gone")
		_, err = gone.WriteString("NO ")
		k.ok(err)
		k.readsFile(gone, "NO ")
		k.ok(gone.Close())
		k.reads("d/new", "UP")
		k.absent("d/gone")
		k.dropCaches() // the kernel's has EIO for what a name's inode is not copied up of
		k.reads("d/f", "LOW")
		// What has no name in the upper Linux 6.18 takes for an orphan at the next mount.
		for _, p := range []string{"d/f", "d/t", "d/m"} {
			k.rename(p, p+"2")
			k.opens(handles[p], p+"2")
		}
		k.remount()
		k.reads("d/f2", "LOW")
		k.size("d/t2", 0)
		k.mode("d/m2", 0o600)
		k.absent("d/gone")
		k.opens(handles["d/f"], "d/f2")
		k.staleHandle(handles["d/gone"])
	},
	"file handles without an upper": func(k *Kit) {
		k.needRoot("open_by_handle_at")
		k.readOnly()
		k.options("index=on", "nfs_export=on", "redirect_dir=nofollow")
		k.lower(file("a/b/f", "one"), file("hidden", "x"), whiteout("gone"))
		k.lower(file("a/b/g", "two"), file("only/h", "three"), link("only/h", "only/i"), symlink("t", "only/l"), file("gone", "no"), file("hidden", "no"))
		k.mount()
		all := []string{"a", "a/b", "a/b/f", "a/b/g", "only", "only/h", "only/l", "hidden"}
		handles := k.handles(all...)
		for range 2 {
			k.dropCaches()
			for _, p := range all {
				k.opens(handles[p], p)
			}
		}
		k.dropCaches()
		k.reads("a/b/f", "one")
		k.opens(handles["a/b"], "a/b")
	},
	// What the server looked for without end, and answered nothing else meanwhile.
	"a lower's directory at two places, with file handles": func(k *Kit) {
		k.exports()
		k.options("redirect_dir=on")
		k.lower(dir("m"), overlay("m", "redirect", "o"))
		k.lower(file("o/d/e/f", "x"))
		k.mount()
		for range 2 {
			k.reads("m/d/e/f", "x")
			k.reads("o/d/e/f", "x")
			k.holds("o/d/e", "f")
		}
	},
	"a file handle never leads to another file": func(k *Kit) {
		k.exports()
		k.union(file("d/f", "low"))
		var old []unix.FileHandle
		for round := range 4 {
			for i := range 50 {
				p := fmt.Sprint("d/", i)
				k.write(p, p)
				old = append(old, k.handles(p)[p])
			}
			if round%2 == 0 {
				k.dropCaches()
			}
			for i := range 50 {
				k.unlink(fmt.Sprint("d/", i))
			}
			if round == 1 {
				k.remount()
			}
		}
		for i := range 50 { // inode numbers are used again
			k.write(fmt.Sprint("d/", i), "another")
		}
		for _, h := range old {
			k.staleHandle(h)
		}
	},
	"file handles without nfs_export": func(k *Kit) {
		k.union(file("f", "x"))
		_, _, err := unix.NameToHandleAt(unix.AT_FDCWD, k.p("f"), 0)
		k.is(unix.EOPNOTSUPP, err)
	},
	"the file system's type": func(k *Kit) {
		k.union(file("f", "x"))
		st, err := sys.StatfsPath(k.mnt)
		k.ok(err)
		want := sys.OVERLAYFS_SUPER_MAGIC
		if !k.actor.Kernel {
			want = sys.FUSE_SUPER_MAGIC
		}
		equal(k, "type", st.Type, want)
	},
}

// exports mounts with file handles that last.
func (k *Kit) exports() {
	k.Helper()
	k.needRoot("open_by_handle_at")
	k.unread = "of an indexed file with one name the kernel shows one link until it forgets the inode, then two"
	k.options("index=on", "nfs_export=on")
}

func (k *Kit) handles(paths ...string) map[string]unix.FileHandle {
	k.Helper()
	handles := map[string]unix.FileHandle{}
	for _, p := range paths {
		h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, k.p(p), 0)
		k.ok(named("name_to_handle_at", p, err))
		handles[p] = h
	}
	return handles
}

func (k *Kit) byHandle(h unix.FileHandle, flags int) (*os.File, error) {
	k.Helper()
	root, err := os.Open(k.mnt)
	k.ok(err)
	defer root.Close()
	n, err := unix.OpenByHandleAt(fd(root), h, flags|unix.O_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(n), "by handle"), nil
}

// opens says that a handle leads to what is at p.
func (k *Kit) opens(h unix.FileHandle, p string) {
	k.Helper()
	f, err := k.byHandle(h, unix.O_PATH)
	k.ok(named("open_by_handle_at", p, err))
	defer f.Close()
	st, err := f.Stat()
	k.ok(err)
	want, err := os.Lstat(k.p(p))
	k.ok(err)
	k.that(os.SameFile(st, want), "%s by its handle is another file", p)
	if !st.Mode().IsRegular() {
		return
	}
	f, err = k.byHandle(h, unix.O_RDONLY)
	k.ok(err)
	defer f.Close()
	content, err := os.ReadFile(k.p(p))
	k.ok(err)
	k.readsFile(f, string(content))
}

// staleHandle says that a handle leads nowhere.
func (k *Kit) staleHandle(h unix.FileHandle) {
	k.Helper()
	f, err := k.byHandle(h, unix.O_PATH)
	if err == nil {
		st, _ := f.Stat()
		f.Close()
		k.Fatalf("the handle of what is gone leads to %+v", st)
	}
	k.is(unix.ESTALE, err)
}
