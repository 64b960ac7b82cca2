package uniontest

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// mountCases are about options, layers and what is refused.
var mountCases = map[string]func(*Kit){
	"no upper is read-only": func(k *Kit) {
		k.readOnly()
		k.lower(file("a", "1"), file("d/x", "x"), whiteout("gone"))
		k.union(file("b", "2"), file("d/y", "y"), file("gone", "g"))
		k.holds("d", "x", "y")
		k.holds(".", "a", "b", "d")
		k.isReadOnly()
	},
	"ro with an upper": func(k *Kit) {
		k.options("ro")
		k.upper(file("a", "1"))
		k.union(file("d/y", "y"))
		k.holds(".", "a", "d")
		k.isReadOnly()
	},
	"500 lowers": func(k *Kit) {
		for i := range 500 {
			k.lower(file(fmt.Sprintf("d/f%d", i), fmt.Sprint(i)), file("same", fmt.Sprint(i)))
		}
		k.mount()
		k.reads("same", "0")
		equal(k, "names", len(k.names("d")), 500)
		k.reads("d/f499", "499")
		// As a user a copied-up file keeps its number for as long as it is in memory, out of
		// which whoever drops caches, in another test as well, would take it.
		_ = k.open("d/f250", unix.O_RDONLY)
		k.appendTo("d/f250", "!")
		k.unlink("d/f0")
		k.dinoEqual("d")
	},
	"lowerdir= with colons, commas and backslashes": func(k *Kit) {
		a, b := k.mkdir(`l:a,b\c`), k.mkdir(`l:b`)
		k.ok(build(a, k.ov(""), []change{file("a", "1")}))
		k.ok(build(b, k.ov(""), []change{file("b", "2")}))
		k.spec.Lowers = []string{a, b}
		k.spec.LowerDir = mount.EscapeLayer(a) + ":" + mount.EscapeLayer(b)
		k.mount()
		k.holds(".", "a", "b")
	},
	"upperdir= with colons, commas and backslashes": func(k *Kit) {
		k.lower(file("a", "1"))
		k.spec.Upper, k.spec.Work = k.mkdir(`u:a,b\c`), k.mkdir(`w:a,b\c`)
		k.spec.LowerDir = k.spec.Lowers[0]
		k.mount()
		k.write("b", "2")
		k.upperHolds(".", "b")
	},
	"lowerdir= with :: and data-only lowers": func(k *Kit) {
		k.needRoot("data-only lowers")
		k.options("metacopy=on", "redirect_dir=on")
		k.datalower(random("blobs/1", metaSize, 5))
		k.datalower(file("blobs/2", "x"))
		k.lower(dataFile("f", "/blobs/1"))
		k.spec.LowerDir = k.spec.Lowers[0] + "::" + k.spec.Data[0] + "::" + k.spec.Data[1]
		k.mount()
		k.holds(".", "f")
		_ = k.open("f", unix.O_RDONLY)
	},
	"lowerdir= that is refused": func(k *Kit) {
		k.lower(file("a", "1"))
		k.lower(file("b", "2"))
		l, m := k.spec.Lowers[0], k.spec.Lowers[1]
		for _, bad := range []string{"", ":" + l, l + ":", l + ":::" + m, l + "::" + m + ":" + l, l + "::", "/none/there"} {
			k.spec.LowerDir = bad
			if bad == "" {
				k.spec.LowerDir = ":"
			}
			if err := k.tryMount(); err == nil {
				k.Errorf("lowerdir=%s is mounted", bad)
				k.unmount()
			}
		}
		k.spec.LowerDir = ""
		k.unread = "nothing was mounted"
	},
	"nfs_export=on without index": func(k *Kit) {
		k.needRoot("nfs_export=on")
		k.lower(file("a", "1"))
		k.options("nfs_export=on")
		k.refused(unix.EINVAL)
	},
	"nfs_export=on with metacopy": func(k *Kit) {
		k.lower(file("a", "1"))
		k.options("nfs_export=on", "index=on", "metacopy=on")
		k.refused(unix.EINVAL)
	},
	"a lower that is not there": func(k *Kit) {
		k.lower(file("a", "1"))
		k.before = [][]string{}
		k.noLowers = true
		k.spec.Lowers = append(k.spec.Lowers, k.dir+"/none")
		k.refused(unix.ENOENT)
	},
	"a lower that is a file": func(k *Kit) {
		k.lower(file("a", "1"))
		k.before = [][]string{}
		k.noLowers = true
		k.spec.Lowers = append(k.spec.Lowers, k.spec.Lowers[0]+"/a")
		k.refused(unix.EINVAL)
	},
	"an upper that is not there": func(k *Kit) {
		k.lower(file("a", "1"))
		upper := k.spec.Upper
		k.spec.Upper = k.dir + "/none"
		k.refused(unix.ENOENT)
		k.spec.Upper = upper
	},
	"a workdir that is not there": func(k *Kit) {
		k.lower(file("a", "1"))
		k.spec.Work = k.dir + "/none"
		k.refused(unix.ENOENT)
	},
	"a workdir on another file system": func(k *Kit) {
		k.lower(file("a", "1"))
		k.spec.Work = k.tmpfs(1 << 20)
		k.refused(unix.EINVAL)
	},
	"a workdir that is the upper": func(k *Kit) {
		k.lower(file("a", "1"))
		k.spec.Work = k.spec.Upper
		k.refused(unix.EINVAL)
	},
	"a workdir in the upper": func(k *Kit) {
		k.lower(file("a", "1"))
		k.spec.Work = k.spec.Upper + "/w"
		k.ok(os.Mkdir(k.spec.Work, 0o755))
		k.refused(unix.EINVAL)
	},
	"an upper in the workdir": func(k *Kit) {
		k.lower(file("a", "1"))
		k.spec.Upper = k.spec.Work + "/u"
		k.ok(os.Mkdir(k.spec.Upper, 0o755))
		k.refused(unix.EINVAL)
	},
	"an upper that is a lower": func(k *Kit) {
		k.lower(file("a", "1"))
		k.noLowers = true
		k.spec.Upper = k.spec.Lowers[0]
		k.refused(unix.ELOOP)
	},
	"a lower twice": func(k *Kit) {
		k.lower(file("a", "1"))
		k.spec.Lowers = append(k.spec.Lowers, k.spec.Lowers[0])
		k.refused(unix.ELOOP)
	},
	"a lower in a lower": func(k *Kit) {
		k.lower(file("a", "1"), file("in/b", "2"))
		k.spec.Lowers = append(k.spec.Lowers, k.spec.Lowers[0]+"/in")
		k.refused(unix.ELOOP)
	},
	"what an earlier mount left in the workdir is cleared": func(k *Kit) {
		k.lower(file("a", "1"))
		k.ok(os.MkdirAll(k.spec.Work+"/work/#1/deep", 0o755))
		k.ok(os.WriteFile(k.spec.Work+"/work/#2", []byte("x"), 0o600))
		k.mount()
		equal(k, "names in work/work", len(k.namesAt(k.spec.Work+"/work")), 0)
		k.reads("a", "1")
	},
	"what somebody put beside work stays": func(k *Kit) {
		k.lower(file("a", "1"))
		k.ok(os.WriteFile(k.spec.Work+"/mine", []byte("x"), 0o600))
		k.mount()
		_ = k.statAt(k.spec.Work + "/mine")
	},
	"an upper or workdir in use with index=on": func(k *Kit) {
		k.options("index=on")
		k.union(file("a", "1"))
		k.busy(func(s *Spec) { s.Work = k.mkdir("w2") }, func(s *Spec) { s.Upper = k.mkdir("u2") }, func(*Spec) {})
	},
	"an upper or workdir in use with index=off": func(k *Kit) {
		k.union(file("a", "1"))
		if k.differs(InUseRefused) && k.fs.user { // it waits, and as root has done so with index=on
			k.busy(func(s *Spec) { s.Work = k.mkdir("w2") }, func(s *Spec) { s.Upper = k.mkdir("u2") }, func(*Spec) {})
		}
	},
	"an upper free again is mounted at once": func(k *Kit) {
		k.options("index=on")
		k.union(file("a", "1"))
		for range 5 {
			k.remount()
		}
	},
	"volatile": func(k *Kit) {
		k.options("volatile")
		k.union(file("a", "1"))
		k.write("b", "2")
		k.chmod("a", 0o600)
		f := k.open("b", unix.O_RDWR)
		k.ok(f.Sync())
		k.ok(unix.Syncfs(fd(f)))
		_ = k.statAt(k.spec.Work + "/work/incompat/volatile")
		k.closeAll()
		k.unmount()
		_ = k.statAt(k.spec.Work + "/work/incompat/volatile")
		k.refused(unix.EINVAL)
		k.ok(os.RemoveAll(k.spec.Work + "/work/incompat"))
		k.mount()
		k.holds(".", "a", "b")
		k.unmount()
		k.ok(os.RemoveAll(k.spec.Work + "/work/incompat"))
	},
	"after volatile a durable mount is refused, too": func(k *Kit) {
		k.options("volatile")
		k.union(file("a", "1"))
		k.unmount()
		k.options("redirect_dir=off")
		k.spec.Options = k.spec.Options[:0]
		if k.fs.user {
			k.options("userxattr")
		}
		k.refused(unix.EINVAL)
	},
	"userxattr uses user.overlay": func(k *Kit) {
		k.options("userxattr")
		k.lower(file("d/x", "1"))
		k.union(file("d/a", "1"), file("f", "2"))
		k.chmod("f", 0o600)
		k.unlink("d/a")
		k.removeAll("d")
		k.makedir("d")
		equal(k, "opaque", k.xattrAt(k.u("d"), "user.overlay.opaque"), "y")
		k.noXattr(k.u("d"), "trusted.overlay.opaque")
		k.noXattr(k.u("f"), "trusted.overlay.origin")
	},
	"userxattr reads user.overlay and not trusted.overlay": func(k *Kit) {
		k.needRoot("trusted xattrs")
		k.options("userxattr")
		k.lower(dir("d"), xattr("d", "user.overlay.opaque", "y"), dir("e"), xattr("e", "trusted.overlay.opaque", "y"))
		k.union(file("d/a", "1"), file("e/b", "2"))
		k.holds("d")
		k.holds("e", "b")
	},
	"trusted.overlay and not user.overlay without userxattr": func(k *Kit) {
		k.needRoot("trusted xattrs")
		k.lower(dir("d"), xattr("d", "user.overlay.opaque", "y"))
		k.union(file("d/a", "1"))
		k.holds("d", "a")
		equal(k, "xattr", k.xattr("d", "user.overlay.opaque"), "y")
	},
	"userxattr: user.overlay is hidden": func(k *Kit) {
		k.options("userxattr")
		k.lower(file("d/f", "x"), overlay("d", "impure", "y"), overlay("d/f", "origin", "?"), xattr("d/f", "user.mine", "1"))
		k.union(file("d/g", "y"))
		_, err := getxattr(k.p("d"), "user.overlay.impure")
		k.is(unix.ENODATA, err)
		equal(k, "xattrs", strings.Join(k.xattrNames("d/f"), " "), "user.mine")
	},
	"upper on tmpfs": func(k *Kit) {
		d := k.tmpfs(16 << 20)
		k.spec.Upper, k.spec.Work = d+"/u", d+"/w"
		k.ok(os.Mkdir(k.spec.Upper, 0o755))
		k.ok(os.Mkdir(k.spec.Work, 0o755))
		k.union(rich("a"), file("d/b", "2"))
		k.appendTo("a", "!")
		k.unlink("d/b")
		k.reads("a", "content of a!")
	},
	"remount read-only and back": func(k *Kit) {
		k.needRoot("mount(2) of the mount")
		k.union(file("a", "1"))
		k.ok(sys.Mount("", k.mnt, "", sys.MS_REMOUNT|sys.MS_RDONLY|unix.MS_BIND, ""))
		_, err := k.tryOpen("a", unix.O_WRONLY)
		k.is(unix.EROFS, err)
		k.ok(sys.Mount("", k.mnt, "", sys.MS_REMOUNT|unix.MS_BIND, ""))
		k.write("a", "2")
	},
	"a mountpoint in a lower": func(k *Kit) {
		l := k.lower(file("a", "1"), dir("mnt"))
		k.mnt = l + "/mnt"
		k.mount()
		k.reads("a", "1")
		k.holds("mnt")
		k.write("mnt/x", "y")
		k.unmount()
		k.mount()
		k.holds("mnt", "x")
	},
	"a mountpoint that is the upper": func(k *Kit) {
		k.mnt = k.spec.Upper
		k.union(file("a", "1"))
		k.write("b", "2")
		k.holds(".", "a", "b")
		k.unlink("a")
		k.holds(".", "b")
	},
	"a mountpoint that is a lower": func(k *Kit) {
		k.mnt = k.lower(file("a", "1"), file("d/b", "2"))
		k.mount()
		k.write("b", "2")
		k.chmod("d/b", 0o600)
		k.holds(".", "a", "b", "d")
	},
	"statfs is that of the upper": func(k *Kit) {
		k.union(file("a", "1"))
		var up, mnt unix.Statfs_t
		k.ok(unix.Statfs(k.spec.Upper, &up))
		k.ok(unix.Statfs(k.mnt, &mnt))
		equal(k, "blocks", mnt.Blocks, up.Blocks)
		equal(k, "bsize", mnt.Bsize, up.Bsize)
		equal(k, "files", mnt.Files, up.Files)
		equal(k, "namelen", mnt.Namelen, up.Namelen)
	},
	"statfs of a read-only union": func(k *Kit) {
		k.readOnly()
		k.lower(file("a", "1"))
		k.union(file("b", "1"))
		var low, mnt unix.Statfs_t
		k.ok(unix.Statfs(k.spec.Lowers[0], &low))
		k.ok(unix.Statfs(k.mnt, &mnt))
		equal(k, "blocks", mnt.Blocks, low.Blocks)
	},
	"nested: a union's directories as lowers of another": func(k *Kit) {
		k.needRoot("unions of unions")
		k.lower(file("a", "1"), file("d/x", "x"))
		k.mount()
		k.write("b", "2")
		k.unlink("a")
		inner := &Kit{T: k.T, fs: k.fs, actor: k.actor, reader: k.reader, dir: k.mkdir("inner"), start: k.start}
		inner.mnt, inner.spec.Upper, inner.spec.Work = inner.mkdir("m"), inner.mkdir("u"), inner.mkdir("w")
		inner.spec.Lowers = []string{k.mnt}
		inner.before = [][]string{}
		inner.noLowers = true
		inner.mount()
		inner.holds(".", "b", "d")
		inner.write("d/y", "y")
		inner.unlink("b")
		inner.holds(".", "d")
		inner.holds("d", "x", "y")
		inner.unmount()
		k.ok(os.RemoveAll(inner.dir))
	},
}

// isReadOnly says that nothing can be changed.
func (k *Kit) isReadOnly() {
	k.Helper()
	for call, err := range map[string]error{
		"mkdir":    unix.Mkdir(k.p("new"), 0o755),
		"unlink":   unix.Unlink(k.p("a")),
		"rmdir":    unix.Rmdir(k.p("d")),
		"rename":   unix.Rename(k.p("a"), k.p("z")),
		"chmod":    unix.Chmod(k.p("a"), 0o600),
		"chown":    unix.Chown(k.p("a"), 1, 1),
		"setxattr": setxattr(k.p("a"), "user.x", "y"),
		"truncate": unix.Truncate(k.p("a"), 0),
		"symlink":  unix.Symlink("x", k.p("new")),
		"link":     unix.Link(k.p("a"), k.p("new")),
		"mknod":    unix.Mknod(k.p("new"), unix.S_IFIFO|0o600, 0),
		"access":   unix.Access(k.p("a"), unix.W_OK),
	} {
		if err != unix.EROFS {
			k.Errorf("%s on a read-only mount: %v", call, err)
		}
	}
	_, err := k.tryOpen("a", unix.O_WRONLY)
	k.is(unix.EROFS, err)
	_, err = k.tryOpen("new", unix.O_WRONLY|unix.O_CREAT)
	k.is(unix.EROFS, err)
}

// busy says that a second mount of the same layers, changed by each of changes,
// is refused. All are tried at once: a server may wait some seconds for another
// that is just going away.
func (k *Kit) busy(changes ...func(*Spec)) {
	k.Helper()
	errs := make(chan error, len(changes))
	for i, change := range changes {
		s := k.full()
		change(&s)
		at := k.mkdir(fmt.Sprintf("busy%d", i))
		go func() {
			m, err := k.actor.Mount(k.Context(), s, at)
			if err == nil {
				err = errors.Join(errors.New("the second mount was made"), m.Unmount())
			} else if !k.actor.Kernel || errors.Is(err, unix.EBUSY) {
				err = nil
			}
			errs <- err
		}()
	}
	for range changes {
		k.ok(<-errs)
	}
	k.reads("a", "1")
}

// xattrNames lists the xattrs of a name in the mount.
func (k *Kit) xattrNames(p string) []string {
	k.Helper()
	b := make([]byte, 1<<16)
	n, err := unix.Llistxattr(k.p(p), b)
	k.ok(err)
	if n == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b[:n]), "\x00"), "\x00")
}
