package drivertest

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// pair is a tree and a change of it. One pair gives three tests: the driver
// shows both trees as a plain directory does, its changeset between them is
// exact in both directions, and the changeset applied to the first gives the
// second.
type pair struct {
	name   string
	base   func(w *work)
	change func(w *work)
	// root: needs owners, devices or trusted xattrs that only root has.
	root bool
	// lost says what a layer cannot carry of the pair: "sockets".
	lost string
}

func exactCases() []testCase {
	cs := []testCase{
		{"owners that this process may not set are kept", foreignOwners},
		{"a name that no layer can carry is refused by name", whiteoutName},
	}
	for _, p := range pairs {
		cs = append(cs, testCase{"exact " + p.name, func(k *kit) { p.run(k) }})
	}
	return cs
}

// foreignOwners: a layer goes in and out with its owners, whatever the process
// may set; what it may not it keeps elsewhere, in copies too.
func foreignOwners(k *kit) {
	var in bytes.Buffer
	tw := tar.NewWriter(&in)
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o2750, Uid: 4_000_000_000, Gid: 70_000},
		{Typeflag: tar.TypeReg, Name: "d/f", Mode: 0o4755, Uid: 3_000_000_000, Gid: 5},
		{Typeflag: tar.TypeReg, Name: "g", Mode: 0o600, Uid: 1000, Gid: 1000},
	} {
		h.ModTime, h.Format = time.Unix(1_500_000_000, 0), tar.FormatPAX
		k.check(tw.WriteHeader(&h))
	}
	k.check(tw.Close())
	r := k.applied(drivers.Ref{}, in.Bytes())
	k.wantOwners(k.diffIsExact(drivers.Ref{}, r).Tar)
	child := k.create(r, drivers.CreateOptions{})
	k.edit(child, func(dir string) { (&work{TB: k, dir: dir}).mtime("d/f", 1_000_000_000, 0) })
	k.commit(child)
	if c := k.diffIsExact(r, child); !slices.Equal(c.Lines, []string{"C d/f (time)"}) {
		k.Errorf("after a change of one time: %q", c.Lines)
	}
	k.wantOwners(k.diffIsExact(drivers.Ref{}, child).Tar)
}

// wantOwners reads a tar back and compares the owners that foreignOwners set.
func (k *kit) wantOwners(layer []byte) {
	k.Helper()
	want := map[string][3]int{"d/": {4_000_000_000, 70_000, 0o2750}, "d/f": {3_000_000_000, 5, 0o4755}, "g": {1000, 1000, 0o600}}
	for tr := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		k.check(err)
		w, ok := want[h.Name]
		if got := [3]int{h.Uid, h.Gid, int(h.Mode)}; ok && got != w {
			k.Errorf("%s came out with owner and mode %d, want %d", h.Name, got, w)
		}
		delete(want, h.Name)
	}
	if len(want) > 0 {
		k.Errorf("the layer lacks %v", want)
	}
}

func whiteoutName(k *kit) {
	base := k.layer(drivers.Ref{}, func(dir string) { (&work{TB: k, dir: dir}).file("d/f", "x") })
	r := k.layer(base, func(dir string) { (&work{TB: k, dir: dir}).file("d/.wh.f", "no deletion") })
	differ, ok := k.driver.(drivers.Differ)
	if !ok {
		k.Skip("the driver has no diff")
	}
	_, err := Collect(k.ctx, differ.Diff(k.ctx, base, r))
	k.wants("diff", err, errdefs.ErrInvalidArgument)
	if !strings.Contains(err.Error(), "d/.wh.f") {
		k.Errorf("the error names not the file: %v", err)
	}
}

// both are the two states of a pair, on the driver and as plain directories.
type both struct {
	base, child       drivers.Ref
	plainBase, plain  string
	wantBase, wantNew []string
}

func (p pair) run(k *kit) {
	if p.root && !k.fs.privileged {
		k.Skip("needs root: " + p.name)
	}
	var b both
	k.sub("seen", func(k *kit) { b = p.seen(k) })
	if b.child.ID == 0 {
		return
	}
	k.sub("diff", func(k *kit) { p.diff(k, b) })
	k.sub("apply", func(k *kit) { p.apply(k, b) })
}

// plain makes the pair's trees as plain directories.
func (p pair) plain(k *kit) both {
	b := both{plainBase: k.dir(), plain: k.dir()}
	for _, dir := range []string{b.plainBase, b.plain} {
		k.check(os.Chmod(dir, 0o755))
		p.base(&work{TB: k, dir: dir})
		k.check(pin(dir))
	}
	p.change(&work{TB: k, dir: b.plain, separates: k.caps.BreaksHardLinks})
	k.check(pin(b.plain))
	b.wantBase, b.wantNew = k.list(b.plainBase), k.list(b.plain)
	return b
}

func (p pair) seen(k *kit) both {
	b := p.plain(k)
	base := k.create(drivers.Ref{}, drivers.CreateOptions{})
	k.edit(base, func(dir string) {
		p.base(&work{TB: k, dir: dir})
		k.check(pin(dir))
		k.same("the writable layer", k.list(dir), b.wantBase)
	})
	k.commit(base)
	k.same("the committed layer", k.tree(base), b.wantBase)
	child := k.create(base, drivers.CreateOptions{})
	k.edit(child, func(dir string) {
		k.same("the child before its change", k.list(dir), b.wantBase)
		p.change(&work{TB: k, dir: dir})
		k.check(pin(dir))
		if !k.caps.LinksSettle {
			k.same("the child after its change", k.list(dir), b.wantNew)
		}
	})
	k.same("the child mounted again", k.tree(child), b.wantNew)
	k.commit(child)
	k.same("the committed child", k.tree(child), b.wantNew)
	k.same("the parent after its child's change", k.tree(base), b.wantBase)
	b.base, b.child = base, child
	return b
}

// diff checks the changeset there, back, and from nothing; and that it is the
// one of the plain directories: equal trees give equal bytes on every driver.
func (p pair) diff(k *kit, b both) {
	there := k.diffIsExact(b.base, b.child)
	k.diffIsExact(b.child, b.base)
	k.diffIsExact(drivers.Ref{}, b.child)
	if same := k.diffIsExact(b.child, b.child); len(same.Lines) > 0 {
		k.Errorf("a layer differs from itself: %q", same.Lines)
	}
	o := layer.DiffOptions{OverrideStat: !k.fs.privileged}
	plain, err := Collect(k.ctx, layer.DiffTrees(k.ctx, b.plainBase, b.plain, o))
	k.check(err)
	k.same("the changes of plain directories", there.Lines, plain.Lines)
	if !bytes.Equal(there.Tar, plain.Tar) {
		k.Error("the tar of plain directories is another")
	}
}

func (p pair) apply(k *kit, b both) {
	tar := k.walkDiff(b.base, b.child).Tar
	want := b.wantNew
	if p.lost == "sockets" {
		want = b.wantBase // sockets are all that such a pair changes
	}
	r := k.applied(b.base, tar)
	k.same("the changeset applied to the parent", k.tree(r), want)
	r = k.applied(drivers.Ref{}, k.walkDiff(drivers.Ref{}, b.base).Tar)
	if p.lost == "" {
		k.same("the parent's changeset applied to nothing", k.tree(r), b.wantBase)
	}
}

const (
	// struct vfs_cap_data, revision 2 (include/uapi/linux/capability.h):
	// cap_net_raw+ep and cap_net_bind_service+ep.
	capNetRaw  = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	capNetBind = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

	// struct posix_acl_xattr (include/uapi/linux/posix_acl_xattr.h), version 2:
	// u::rw- u:1000:rwx g::r-- m::rwx o::r--, and the same with user 1001.
	acl1000 = "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x07\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x07\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"
	acl1001 = "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x07\x00\xe9\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x07\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"

	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

var (
	longName = strings.Repeat("n", 255)
	badUTF8  = "caf\xe9\xff\xfe"
)

var pairs = []pair{
	{name: "files added, changed and deleted",
		base: func(w *work) {
			w.file("etc/passwd", "root\n")
			w.file("etc/group", "root\n")
			w.file("bin/sh", strings.Repeat("sh", 5000))
			w.file("empty", "")
		},
		change: func(w *work) {
			w.file("etc/new", "new")
			w.append("etc/passwd", "more\n")
			w.unlink("etc/group")
			w.remove("bin")
			w.file("empty", "no more")
		}},
	{name: "owners", root: true,
		base: func(w *work) {
			w.file("d/f", "x")
			w.symlink("f", "d/l")
			w.chown("d", 1000, 1001)
			w.chown("d/f", 4_000_000_000, 65_534)
			w.chown("d/l", 5, 6)
		},
		change: func(w *work) {
			w.chown("d/f", 0, 4_000_000_000)
			w.chown("d/l", 7, 8)
			w.chown("d", 2_097_152, 0)
			w.chown(".", 3, 4)
		}},
	{name: "owners of a user namespace",
		base:   func(w *work) { w.file("f", "x"); w.chown("f", 1000, 1000) },
		change: func(w *work) { w.chown("f", 0, 1001); w.file("g", ""); w.chown("g", 1, 2) }},
	{name: "modes",
		base: func(w *work) {
			for _, m := range []uint32{0, 0o444, 0o644, 0o777, 0o1777, 0o2755, 0o4755, 0o7777} {
				name := strconv.FormatUint(uint64(m), 8)
				w.file("f"+name, name)
				w.mkdir("d" + name)
				w.chmod("f"+name, m)
				w.chmod("d"+name, m)
			}
		},
		change: func(w *work) {
			w.chmod("f644", 0o4711)
			w.chmod("f4755", 0o755)
			w.chmod("f0", 0o600)
			w.chmod("d0", 0o700)
			w.chmod("d1777", 0)
			w.chmod(".", 0o700)
		}},
	{name: "setuid and setgid of a file that is written",
		base: func(w *work) { w.file("f", "x"); w.chmod("f", 0o6755); w.file("g", "x"); w.chmod("g", 0o6755) },
		change: func(w *work) {
			w.overwrite("f", 0, "y")
			w.chmod("f", 0o6755)
			w.mtime("g", 1_000_000_000, 1)
		}},
	{name: "times",
		base: func(w *work) {
			w.file("d/f", "x")
			w.file("old", "x")
			w.file("e/f", "x")
			w.symlink("f", "d/l")
			w.mtime("old", -86_400*365, 999_999_999)
			w.mtime("d/f", 1_000_000_000, 1)
			w.mtime("d/l", 1_000_000_000, 2)
			w.mtime("d", 1_000_000_000, 3)
			w.mtime(".", 1_000_000_000, 4)
		},
		change: func(w *work) {
			w.mtime("d/f", 1_000_000_000, 2)
			w.mtime("d/l", 999_999_999, 999_999_999)
			w.mtime("d", 0, 0)
			w.mtime("old", -1, 1)
			w.mtime(".", 1_234_567_890, 987_654_321)
		}},
	{name: "xattrs",
		base: func(w *work) {
			w.file("d/f", "x")
			w.xattr("d", "user.a", "1")
			w.xattr("d/f", "user.a", "1")
			w.xattr("d/f", "user.b", "")
			w.xattr("d/f", "user.binary", "\x00\xff\n=\x00")
			w.xattr("d/f", "user.long", strings.Repeat("v", 1000))
			w.file("only", "x")
			w.file("gone", "x")
			w.xattr("gone", "user.a", "1")
			w.xattr(".", "user.root", "1")
		},
		change: func(w *work) {
			w.xattr("d/f", "user.b", "not empty")
			w.rmxattr("d/f", "user.long")
			w.xattr("d", "user.b", "2")
			w.xattr("only", "user.now", "1")
			w.rmxattr("gone", "user.a")
			w.rmxattr(".", "user.root")
		}},
	{name: "trusted xattrs", root: true,
		base: func(w *work) {
			w.file("f", "x")
			w.symlink("f", "l")
			w.mknod("p", sys.S_IFIFO|0o600, 0, 0)
			for _, n := range []string{"f", "l", "p", "."} {
				w.xattr(n, "trusted.t", n)
			}
		},
		change: func(w *work) {
			w.xattr("l", "trusted.t", "2")
			w.rmxattr("p", "trusted.t")
			w.xattr("f", "trusted.u", "")
		}},
	{name: "ACLs",
		base: func(w *work) {
			w.file("f", "x")
			w.file("g", "x")
			w.mkdir("d")
			w.xattr("f", aclAccess, acl1000)
			w.xattr("d", aclDefault, acl1000)
			w.file("d/inherits", "x")
			w.mkdir("d/sub")
		},
		change: func(w *work) {
			w.xattr("f", aclAccess, acl1001)
			w.xattr("g", aclAccess, acl1000)
			w.rmxattr("d", aclDefault)
			w.xattr("d/sub", aclAccess, acl1001)
			w.file("d/sub/f", "x")
		}},
	{name: "file capabilities",
		base: func(w *work) {
			w.file("ping", "x")
			w.file("httpd", "x")
			w.xattr("ping", "security.capability", capNetRaw)
		},
		change: func(w *work) {
			w.xattr("ping", "security.capability", capNetBind)
			w.xattr("httpd", "security.capability", capNetBind)
		}},
	{name: "file capability of a file that changes hands", root: true,
		base: func(w *work) {
			w.file("f", "x")
			w.chown("f", 10, 10)
			w.chmod("f", 0o4755)
			w.xattr("f", "security.capability", capNetRaw)
		},
		change: func(w *work) { w.mtime("f", 1_000_000_000, 5) }},
	{name: "hard links added and removed",
		base: func(w *work) {
			w.file("a", "one file")
			w.link("a", "b")
			w.mkdir("d")
			w.link("a", "d/c")
			w.file("single", "x")
		},
		change: func(w *work) {
			w.separate("single")
			w.link("single", "double")
			w.unlink("b")
		}},
	{name: "hard link to a lower group",
		base: func(w *work) { w.file("a", "one file"); w.link("a", "b"); w.link("a", "c") },
		change: func(w *work) {
			w.separate("b")
			w.link("b", "d")
		}},
	{name: "one name of a hard-link group written",
		base: func(w *work) { w.file("a", "one file"); w.link("a", "b"); w.file("c", "x"); w.link("c", "d") },
		change: func(w *work) {
			w.separate("b")
			w.append("b", " more")
			w.separate("c")
			w.chmod("c", 0o600)
		}},
	{name: "one name of a hard-link group replaced",
		base:   func(w *work) { w.file("a", "one file"); w.link("a", "b"); w.link("a", "c") },
		change: func(w *work) { w.unlink("b"); w.file("b", "another") }},
	{name: "hard links of symlinks and fifos",
		base: func(w *work) {
			w.symlink("x", "l")
			w.link("l", "l2")
			w.mknod("p", sys.S_IFIFO|0o600, 0, 0)
			w.link("p", "p2")
		},
		change: func(w *work) { w.unlink("l"); w.unlink("p2"); w.file("f", "x"); w.link("f", "f2") }},
	{name: "sparse files",
		base: func(w *work) {
			w.file("hole", "")
			w.truncate("hole", 1<<21)
			w.file("both", "data")
			w.truncate("both", 1<<20)
			w.overwrite("both", 1<<19, "in the middle")
		},
		change: func(w *work) {
			w.overwrite("both", 1<<18, "more")
			w.truncate("both", 3<<19)
			w.file("new", "x")
			w.truncate("new", 1<<20)
		}},
	{name: "fifos",
		base: func(w *work) { w.mknod("p", sys.S_IFIFO|0o622, 0, 0); w.mknod("q", sys.S_IFIFO|0o600, 0, 0) },
		change: func(w *work) {
			w.chmod("p", 0o666)
			w.unlink("q")
			w.file("q", "a file now")
			w.mknod("r", sys.S_IFIFO|0o600, 0, 0)
		}},
	{name: "sockets", lost: "sockets",
		base:   func(w *work) { w.file("f", "x") },
		change: func(w *work) { w.mknod("s", sys.S_IFSOCK|0o755, 0, 0); w.mtime(".", pinned.Sec, pinned.Nsec) }},
	{name: "devices", root: true,
		base: func(w *work) {
			w.mknod("null", sys.S_IFCHR|0o666, 1, 3)
			w.mknod("sda", sys.S_IFBLK|0o660, 8, 0)
			w.mknod("large", sys.S_IFCHR|0o600, 511, 262_143) // the most that xfs takes
		},
		change: func(w *work) {
			w.unlink("sda")
			w.mknod("sda", sys.S_IFBLK|0o660, 8, 1)
			w.chmod("null", 0o600)
			w.unlink("large")
		}},
	{name: "names",
		base: func(w *work) {
			for _, n := range []string{longName, badUTF8, "new\nline", " ", "-rf", "a=b", "日本語", "\x01\x7f", "back\\slash", "co:lon", "com,ma", ".hidden", "..."} {
				w.file("d/"+n+"/f", n)
				w.file(n, n)
			}
		},
		change: func(w *work) {
			w.append(longName, "x")
			w.append(badUTF8, "x")
			w.remove("d/" + badUTF8)
			w.remove("d/co:lon")
			w.file("d/"+longName+"/"+longName, "x")
			w.unlink("new\nline")
		}},
	{name: "names that order a directory's content",
		base:   func(w *work) { w.file("a/b", "x"); w.file("a.b", "x"); w.file("a-", "x"); w.file("a/b.c", "x") },
		change: func(w *work) { w.append("a/b", "y"); w.append("a.b", "y"); w.append("a-", "y"); w.unlink("a/b.c") }},
	{name: "symlinks",
		base: func(w *work) {
			w.symlink("/etc/passwd", "absolute")
			w.symlink("../../../up", "up")
			w.symlink("nowhere", "dangling")
			w.symlink(strings.Repeat("t", 1000), "long") // xfs takes 1,024
			w.symlink(".", "self")
		},
		change: func(w *work) {
			w.unlink("absolute")
			w.symlink("/etc/shadow", "absolute")
			w.unlink("long")
			w.unlink("self")
			w.file("self", "a file")
			w.mtime("up", 1_000_000_000, 0)
		}},
	{name: "file replaced by a directory",
		base:   func(w *work) { w.file("x", "file"); w.file("y/x", "file") },
		change: func(w *work) { w.unlink("x"); w.file("x/in/it", "1"); w.unlink("y/x"); w.mkdir("y/x") }},
	{name: "directory replaced by a file",
		base: func(w *work) { w.file("x/in/it", "1"); w.mkdir("empty"); w.file("l/f", "") },
		change: func(w *work) {
			w.remove("x")
			w.file("x", "file")
			w.remove("empty")
			w.file("empty", "")
			w.remove("l")
			w.symlink("x", "l")
		}},
	{name: "directory deleted and made again",
		base: func(w *work) { w.file("d/old/f", "old"); w.file("d/same", "same"); w.file("e/f", "x") },
		change: func(w *work) {
			w.remove("d")
			w.file("d/new", "new")
			w.file("d/same", "same")
			w.remove("e")
			w.mkdir("e")
		}},
	{name: "directory deleted and made again as it was",
		base:   func(w *work) { w.file("d/s/f", "x"); w.file("d/g", "y") },
		change: func(w *work) { w.remove("d"); w.file("d/s/f", "x"); w.file("d/g", "y") }},
	{name: "everything deleted",
		base:   func(w *work) { w.file("a/b/c", "x"); w.file("d", "x"); w.symlink("d", "e") },
		change: func(w *work) { w.remove("a"); w.unlink("d"); w.unlink("e") }},
	{name: "same size and mtime, other bytes",
		base: func(w *work) {
			w.file("f", "aaaa")
			w.mtime("f", 1_000_000_000, 0)
			w.file("large", strings.Repeat("b", 300_000))
			w.mtime("large", 1_000_000_000, 0)
		},
		change: func(w *work) { w.overwrite("f", 1, "b"); w.overwrite("large", 299_999, "c") }},
	{name: "touched and put back",
		base: func(w *work) {
			w.file("d/f", "aaaa")
			w.mtime("d/f", 1_000_000_000, 7)
			w.file("g", "x")
			w.chmod("g", 0o644)
		},
		change: func(w *work) {
			w.overwrite("d/f", 0, "aaaa")
			w.chmod("g", 0o600)
			w.chmod("g", 0o644)
			w.file("t", "")
			w.unlink("t")
		}},
	{name: "files renamed",
		base: func(w *work) { w.file("a", "1"); w.file("b", "2"); w.file("d/c", "3") },
		change: func(w *work) {
			w.rename("a", "d/a")
			w.rename("d/c", "b")
			w.file("n", "new")
			w.rename("n", "m")
		}},
	{name: "new directories renamed",
		base:   func(w *work) { w.file("d/f", "x") },
		change: func(w *work) { w.file("n/a/b", "1"); w.rename("n", "d/m"); w.rename("d/m/a", "a") }},
	{name: "many entries of one directory",
		base: func(w *work) {
			for i := range 600 {
				w.file("d/"+itoa(i), "")
			}
		},
		change: func(w *work) {
			for i := 0; i < 600; i += 10 {
				w.unlink("d/" + itoa(i))
			}
			w.append("d/77", "x")
		}},
	{name: "large file changed in one place",
		base:   func(w *work) { w.file("f", strings.Repeat("0123456789abcdef", 1<<16)) },
		change: func(w *work) { w.overwrite("f", 1<<19, "changed") }},
	{name: "deep directories",
		base:   func(w *work) { w.file(strings.Repeat("d/", 60)+"f", "x") },
		change: func(w *work) { w.append(strings.Repeat("d/", 60)+"f", "y"); w.remove(strings.Repeat("d/", 59) + "e") }},
	{name: "path longer than PATH_MAX",
		base:   func(w *work) { deep(w, "f", "x") },
		change: func(w *work) { deep(w, "g", "y") }},
	{name: "root directory's own metadata",
		base:   func(w *work) { w.chmod(".", 0o750); w.file("f", "x") },
		change: func(w *work) { w.chmod(".", 0o1777); w.xattr(".", "user.x", "y") }},
	{name: "nothing changed",
		base:   func(w *work) { w.file("d/f", "x"); w.symlink("d", "l") },
		change: func(w *work) {}},
}

// deep makes a file 20 directories of 255 bytes down: 5,120 bytes of path, which
// no single system call takes.
func deep(w *work, name, content string) {
	w.Helper()
	w.root(func(root *sys.Fd) error {
		d, err := root.Dup()
		for range 20 {
			if err != nil {
				return err
			}
			_ = d.Mkdir(longName, 0o755) // may be there
			var next *sys.Fd
			next, err = d.Openat(longName, sys.O_RDONLY|sys.O_DIRECTORY, 0)
			d.Close()
			d = next
		}
		if err != nil {
			return err
		}
		defer d.Close()
		f, err := d.Openat(name, sys.O_WRONLY|sys.O_CREAT|sys.O_TRUNC, 0o644)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.Write([]byte(content))
		return err
	})
}
