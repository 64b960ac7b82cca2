package uniontest

import (
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
		k.needRoot("open_by_handle_at")
		k.unread = "of an indexed file with one name the kernel shows one link until it forgets the inode, then two"
		k.options("index=on", "nfs_export=on")
		k.union(file("d/f", "low"), file("g", "low g"), dir("e"))
		k.write("new", "up")
		k.chmod("g", 0o600)
		handles := map[string]unix.FileHandle{}
		for _, p := range []string{"d/f", "g", "new", "d", "e"} {
			h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, k.p(p), 0)
			k.ok(err)
			handles[p] = h
		}
		open := func(p, when string) {
			k.Helper()
			root := k.open(".", unix.O_RDONLY|unix.O_DIRECTORY)
			fdn, err := unix.OpenByHandleAt(fd(root), handles[p], unix.O_RDONLY)
			k.ok(named("open_by_handle_at "+when, p, err))
			f := os.NewFile(uintptr(fdn), p)
			defer f.Close()
			st, err := f.Stat()
			k.ok(err)
			want, err := os.Stat(k.p(p))
			k.ok(err)
			k.that(os.SameFile(st, want), "%s by its handle is another file", p)
		}
		for p := range handles {
			open(p, "at once")
		}
		k.chmod("d/f", 0o600)
		k.dropCaches()
		for p := range handles {
			open(p, "after caches were dropped")
		}
		k.unlink("new")
		root := k.open(".", unix.O_RDONLY|unix.O_DIRECTORY)
		_, err := unix.OpenByHandleAt(fd(root), handles["new"], unix.O_RDONLY)
		k.is(unix.ESTALE, err)
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
