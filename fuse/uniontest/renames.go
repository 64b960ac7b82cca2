package uniontest

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// state is what a name can be in a union.
type state struct {
	name  string
	lower func(p string) change // in the lower
	upper func(p string) change // in the upper
	kind  string                // "file", "dir", "symlink", "" for nothing there
	full  bool                  // a directory with names in it
	moved bool                  // a directory that cannot be renamed without redirects
}

func none(string) change                { return all() }
func asFile(p string) change            { return file(p, "content of "+p) }
func asDir(p string) change             { return dir(p) }
func asFullDir(p string) change         { return file(p+"/in", "in "+p) }
func asLink(p string) change            { return symlink("target of "+p, p) }
func asWhiteout(p string) change        { return whiteout(p) }
func asHollow(p string) change          { return whiteout(p + "/in") }
func asOpaque(p string) change          { return all(dir(p), opaque(p, "y")) }
func asFullOpaque(p string) change      { return all(file(p+"/new", "new"), opaque(p, "y")) }
func asFullUpperDir(p string) change    { return file(p+"/new", "new") }
func asOtherFile(p string) change       { return file(p, "upper content of "+p) }
func asOtherSymlink(p string) change    { return symlink("upper target of "+p, p) }
func asFullLowerAndDir(p string) change { return file(p+"/in", "in") }

// states: {pure upper, lower, merged, opaque, absent} of {file, dir, symlink}.
var states = []state{
	{name: "absent", lower: none, upper: none},
	{name: "whiteout", lower: asFile, upper: asWhiteout},
	{name: "whiteout of a directory", lower: asFullDir, upper: asWhiteout},
	{name: "lower file", lower: asFile, upper: none, kind: "file"},
	{name: "upper file", lower: none, upper: asOtherFile, kind: "file"},
	{name: "upper file over a lower one", lower: asFile, upper: asOtherFile, kind: "file"},
	{name: "upper file over a lower directory", lower: asFullDir, upper: asOtherFile, kind: "file"},
	{name: "lower symlink", lower: asLink, upper: none, kind: "symlink"},
	{name: "upper symlink", lower: none, upper: asOtherSymlink, kind: "symlink"},
	{name: "lower empty dir", lower: asDir, upper: none, kind: "dir", moved: true},
	{name: "lower dir", lower: asFullDir, upper: none, kind: "dir", full: true, moved: true},
	{name: "upper empty dir", lower: none, upper: asDir, kind: "dir"},
	{name: "upper dir", lower: none, upper: asFullUpperDir, kind: "dir", full: true},
	{name: "merged empty dir", lower: asDir, upper: asDir, kind: "dir", moved: true},
	{name: "merged dir of whiteouts", lower: asFullDir, upper: asHollow, kind: "dir", moved: true},
	{name: "merged dir", lower: asFullLowerAndDir, upper: asFullUpperDir, kind: "dir", full: true, moved: true},
	{name: "opaque empty dir", lower: asFullDir, upper: asOpaque, kind: "dir"},
	{name: "opaque dir", lower: asFullDir, upper: asFullOpaque, kind: "dir", full: true},
	{name: "upper dir over a lower file", lower: asFile, upper: asFullUpperDir, kind: "dir", full: true},
}

// renameFlag is a flag of renameat2.
type renameFlag struct {
	name string
	bits uint
}

var (
	plainRename = []renameFlag{{"p", 0}}
	flagRenames = []renameFlag{{"n", unix.RENAME_NOREPLACE}, {"x", unix.RENAME_EXCHANGE}, {"w", unix.RENAME_WHITEOUT}}
)

// renameCases renames every state to every state, in one directory and into
// another, with each flag, and directories with redirect_dir off and on.
func renameCases() map[string]func(*Kit) {
	cases := map[string]func(*Kit){}
	for _, from := range states {
		if from.kind != "dir" {
			cases[from.name] = func(k *Kit) { k.renames(from, slices.Concat(plainRename, flagRenames), false) }
			continue
		}
		for _, redirect := range []string{"off", "on"} {
			cases[from.name+", redirect_dir="+redirect] = func(k *Kit) { k.renames(from, plainRename, redirect == "on") }
			cases[from.name+", flags, redirect_dir="+redirect] = func(k *Kit) { k.renames(from, flagRenames, redirect == "on") }
		}
	}
	for name, f := range otherRenames {
		cases[name] = f
	}
	return cases
}

// renames renames one state to all states.
func (k *Kit) renames(from state, flags []renameFlag, redirect bool) {
	if redirect {
		k.options("redirect_dir=on")
	}
	if from.kind == "dir" && flags[0].bits == 0 {
		k.unlikeBy(FailedRenames)
	}
	var lower, upper []change
	var then []func()
	for _, flag := range flags {
		for i, to := range states {
			for _, where := range []string{"same", "other"} {
				d := fmt.Sprintf("%s-%s-%d", flag.name, where, i)
				dst := "dst"
				if where == "other" {
					dst = "sub/dst"
					lower = append(lower, dir(d+"/sub"))
				}
				lower = append(lower, dir(d), from.lower(d+"/src"), to.lower(d+"/"+dst))
				upper = append(upper, from.upper(d+"/src"), to.upper(d+"/"+dst))
				then = append(then, func() { k.renameOne(d, "src", dst, from, to, flag.bits, redirect) })
			}
		}
	}
	k.upper(upper...)
	k.union(lower...)
	for _, f := range then {
		f()
	}
}

// renameOne renames and compares what was and what is.
func (k *Kit) renameOne(d, src, dst string, from, to state, flags uint, redirect bool) {
	k.Helper()
	source, target := k.look(d+"/"+src), k.look(d+"/"+dst)
	before := k.inodeOr(d + "/" + src)
	err := k.tryRename(d+"/"+src, d+"/"+dst, flags)
	var got syscall.Errno
	errors.As(err, &got)
	want := renameErrno(from, to, flags, redirect)
	if !slices.Contains(want, got) {
		k.Errorf("%s to %s (%s): got %v, want %v", from.name, to.name, dst, got, want)
		return
	}
	wantSource, wantTarget := source, target
	switch {
	case got != 0:
	case flags == unix.RENAME_EXCHANGE:
		wantSource, wantTarget = target, source
	default:
		wantSource, wantTarget = "", source
		if now := k.inodeOr(d + "/" + dst); now != before {
			k.Errorf("%s to %s (%s): inode was %v, now %v", from.name, to.name, dst, before, now)
		}
	}
	if now := k.look(d + "/" + src); now != wantSource {
		k.Errorf("%s to %s (%s): the source is %q, want %q", from.name, to.name, dst, now, wantSource)
	}
	if now := k.look(d + "/" + dst); now != wantTarget {
		k.Errorf("%s to %s (%s): the target is %q, want %q", from.name, to.name, dst, now, wantTarget)
	}
}

func (k *Kit) inodeOr(p string) inode {
	if _, err := os.Lstat(k.p(p)); err != nil {
		return inode{}
	}
	return k.inode(p)
}

// look says in a few words what a name is, "" for nothing.
func (k *Kit) look(p string) string {
	k.Helper()
	st, err := os.Lstat(k.p(p))
	switch {
	case errors.Is(err, syscall.ENOENT):
		return ""
	case err != nil:
		return err.Error()
	case st.IsDir():
		return fmt.Sprintf("dir %q", k.names(p))
	case st.Mode().Type() == os.ModeSymlink:
		to, err := os.Readlink(k.p(p))
		return fmt.Sprintf("symlink %s %v", to, err)
	}
	b, err := os.ReadFile(k.p(p))
	return fmt.Sprintf("file %s %v", b, err)
}

// renameErrno is what rename may answer: more than one where several things are
// wrong.
func renameErrno(from, to state, flags uint, redirect bool) []syscall.Errno {
	var wrong []syscall.Errno
	exchange := flags == unix.RENAME_EXCHANGE
	if flags == unix.RENAME_WHITEOUT {
		wrong = append(wrong, unix.EINVAL)
	}
	if from.kind == "" || exchange && to.kind == "" {
		wrong = append(wrong, unix.ENOENT)
	}
	if flags == unix.RENAME_NOREPLACE && to.kind != "" {
		wrong = append(wrong, unix.EEXIST)
	}
	if !exchange && from.kind != "" && to.kind != "" {
		switch {
		case from.kind == "dir" && to.kind != "dir":
			wrong = append(wrong, unix.ENOTDIR)
		case from.kind != "dir" && to.kind == "dir":
			wrong = append(wrong, unix.EISDIR)
		case to.full:
			wrong = append(wrong, unix.ENOTEMPTY)
		}
	}
	if !redirect && (from.moved || exchange && to.moved) {
		wrong = append(wrong, unix.EXDEV)
	}
	if wrong == nil {
		return []syscall.Errno{0}
	}
	return wrong
}

var otherRenames = map[string]func(*Kit){
	"onto itself": func(k *Kit) {
		k.union(file("a", "x"), dir("d"))
		k.rename("a", "a")
		k.exchange("a", "a")
		k.reads("a", "x")
		k.upperHolds(".")
	},
	"a directory into its own child": func(k *Kit) {
		k.union(file("x", "x"))
		k.ok(os.MkdirAll(k.p("d/s"), 0o755))
		k.is(unix.EINVAL, k.tryRename("d", "d/s/d", 0))
		k.is(unix.ENOTEMPTY, k.tryRename("d/s", "d", 0))
		k.is(unix.EINVAL, k.tryRename("d", "d/s", unix.RENAME_EXCHANGE))
		k.is(unix.EINVAL, k.tryRename("d/s", "d", unix.RENAME_EXCHANGE))
	},
	"a directory of a lower onto one of the upper with names": func(k *Kit) {
		k.options("redirect_dir=on")
		k.upper(file("b/f", "y"))
		k.union(file("a/f", "x"))
		k.unlikeBy(FailedRenames)
		k.is(unix.ENOTEMPTY, k.tryRename("a", "b", 0))
		if k.differs(FailedRenames) {
			k.upperHolds(".", "b")
		} else {
			k.upperHolds(".", "a", "b")
		}
		k.reads("a/f", "x")
		k.reads("b/f", "y")
	},
	"flags that exclude each other": func(k *Kit) {
		k.union(file("a", "x"), file("b", "y"))
		k.is(unix.EINVAL, k.tryRename("a", "b", unix.RENAME_EXCHANGE|unix.RENAME_NOREPLACE))
		k.is(unix.EINVAL, k.tryRename("a", "c", 1<<7))
	},
	"the root": func(k *Kit) {
		k.union(file("a", "x"))
		k.is(unix.EBUSY, k.tryRename(".", "b", 0))
	},
	"a chain of a hundred": func(k *Kit) {
		k.union(file("n0", "x"))
		for i := range 100 {
			k.rename(fmt.Sprintf("n%d", i), fmt.Sprintf("n%d", i+1))
		}
		k.reads("n100", "x")
		k.holds(".", "n100")
		k.upperHolds(".", "n0", "n100")
	},
	"the old and the new name at once": func(k *Kit) {
		k.union(each(numbered("d/f", 20), func(n string) change { return file(n, n) }), dir("e"))
		for _, n := range numbered("f", 20) {
			k.rename("d/"+n, "e/"+n)
		}
		k.holds("d")
		equal(k, "names", len(k.names("e")), 20)
		k.rmdir("d")
		k.rename("e/f0", "d")
		k.reads("d", "d/f0")
	},
	"over a file that is open": func(k *Kit) {
		k.union(file("a", "new"), file("b", "old"))
		f := k.open("b", unix.O_RDWR)
		k.rename("a", "b")
		k.reads("b", "new")
		_, err := f.WriteAt([]byte("OLD"), 0)
		k.ok(err)
		k.readsFile(f, "OLD")
		k.reads("b", "new")
	},
	"of an open directory": func(k *Kit) {
		k.union(file("x", "x"))
		k.makedir("d")
		k.write("d/a", "1")
		d := k.open("d", unix.O_RDONLY|unix.O_DIRECTORY)
		k.rename("d", "e")
		names, err := d.Readdirnames(-1)
		k.ok(err)
		equal(k, "names", fmt.Sprint(names), "[a]")
		k.ok(unix.Mkdirat(fd(d), "made", 0o755))
		k.holds("e", "a", "made")
	},
	"with a trailing slash": func(k *Kit) {
		k.union(file("a", "x"))
		k.makedir("d")
		k.ok(unix.Rename(k.p("d")+"/", k.p("e")+"/"))
		k.is(unix.ENOTDIR, unix.Rename(k.p("a")+"/", k.p("b")))
	},
	"of special files": func(k *Kit) {
		k.union(node("p", unix.S_IFIFO|0o600, 0, 0), node("s", unix.S_IFSOCK|0o600, 0, 0), dir("d"))
		k.rename("p", "d/p")
		k.rename("s", "d/s")
		equal(k, "type", k.stat("d/p").Type(), uint32(unix.S_IFIFO))
		k.upperWhiteout("p")
	},
	"changes ctime and the directories' mtime": func(k *Kit) {
		k.union(file("d/a", "x"), dir("e"))
		k.rename("d/a", "e/a")
		for _, p := range []string{"d", "e"} {
			k.that(k.stat(p).Mtime.Sec > born.Sec, "%s keeps its mtime", p)
		}
		equal(k, "mtime of the file", k.stat("e/a").Mtime, born)
		k.that(k.stat("e/a").Ctime.Sec >= k.start.Sec, "ctime was not changed")
	},
}
