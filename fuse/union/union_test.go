package union

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// long ago: times that must survive copy-up.
var longAgo = time.Unix(1_000_000_000, 123456789)

func put(t testing.TB, dir, name, data string) {
	t.Helper()
	p := filepath.Join(dir, name)
	must(t, os.MkdirAll(filepath.Dir(p), 0o755))
	must(t, os.WriteFile(p, []byte(data), 0o644))
	must(t, os.Chtimes(p, longAgo, longAgo))
}

func plainLowers(t testing.TB) func(l []string) {
	return func(l []string) {
		put(t, l[0], "a", "lower a")
		put(t, l[0], "d/x", "x of the first")
		put(t, l[0], "d/sub/y", "y")
		put(t, l[0], "d/large", "large")
		must(t, os.Truncate(filepath.Join(l[0], "d/large"), largeFile))
		must(t, os.Chtimes(filepath.Join(l[0], "d/large"), longAgo, longAgo))
		put(t, l[0], "empty/f", "")
		must(t, os.Remove(filepath.Join(l[0], "empty/f")))
		must(t, os.Symlink("target", filepath.Join(l[0], "sym")))
		if len(l) > 1 {
			put(t, l[1], "a", "hidden a")
			put(t, l[1], "d/x", "hidden x")
			put(t, l[1], "d/z", "z of the second")
			put(t, l[1], "d/sub/w", "w")
			put(t, l[1], "e/v", "v")
		}
	}
}

func TestReads(t *testing.T) {
	both(t, 2, Config{}, plainLowers(t), func(s side, say func(string, ...any)) {
		_, err := s.stat("nothing")
		say("stat of nothing: %s", errno(err))
		_, err = s.stat("a/b")
		say("stat below a file: %s", errno(err))
	})
}
func TestPlainChanges(t *testing.T) {
	both(t, 2, Config{}, plainLowers(t), func(s side, say func(string, ...any)) {
		say("create %s", errno(s.create("new", "data")))
		say("create in merged %s", errno(s.create("d/new", "data")))
		say("create existing %s", errno(s.create("d/z", "data")))
		say("mkdir %s", errno(s.mkdir("d/nd", 0o755)))
		say("mkdir existing %s", errno(s.mkdir("d/sub", 0o755)))
		say("append %s", errno(s.write("a", 5, "MORE")))
		say("append deep %s", errno(s.write("d/sub/w", 1, "MORE")))
		say("unlink lower %s", errno(s.unlink("d/x")))
		say("unlink twice %s", errno(s.unlink("d/x")))
		say("unlink new %s", errno(s.unlink("d/new")))
		say("unlink dir %s", errno(s.unlink("d/sub")))
		say("rmdir full %s", errno(s.rmdir("d")))
		say("rmdir empty %s", errno(s.rmdir("empty")))
		say("mkdir over whiteout %s", errno(s.mkdir("empty", 0o700)))
		say("create over whiteout %s", errno(s.create("d/x", "new x")))
		say("chmod %s", errno(s.chmod("d/z", 0o600)))
		say("chown %s", errno(s.chown("e/v", 10, 20)))
		say("truncate %s", errno(s.truncate("e/v", 0)))
		say("rename %s", errno(s.rename("d/z", "zz", 0)))
		say("rename over %s", errno(s.rename("zz", "a", 0)))
		say("rename dir %s", errno(s.rename("d", "dd", 0)))
		say("rename pure dir %s", errno(s.rename("d/nd", "nd", 0)))
		say("setxattr %s", errno(s.setxattr("sym", "trusted.x", "y")))
		say("symlink %s", errno(s.symlink("to", "e/s")))
		say("link %s", errno(s.link("new", "e/l")))
		say("link lower %s", errno(s.link("d/sub/y", "e/y")))
	})
}

// A layer is what it is without the mounts on it, the union's own among them: a
// server that looked through its own mount would ask itself.
func TestMountsBelowALayerDoNotShow(t *testing.T) {
	both(t, 1, Config{}, func(l []string) {
		put(t, l[0], "d/f", "below the mount")
	}, func(s side, say func(string, ...any)) {
		// Both sides are open already: mounts come and go under them.
		var lower, upper string
		switch s := s.(type) {
		case *kernelSide:
			lower, upper = s.config.Lowers[0], s.config.Upper
		case *unionSide:
			lower, upper = s.fs.config.Lowers[0], s.fs.config.Upper
		}
		must(t, syscall.Mount("tmpfs", filepath.Join(lower, "d"), "tmpfs", 0, ""))
		defer syscall.Unmount(filepath.Join(lower, "d"), 0)
		data, err := s.read("d/f")
		say("read %q %s", data, errno(err))
		say("write %s", errno(s.write("d/f", 0, "BELOW")))
		must(t, syscall.Mount("tmpfs", filepath.Join(upper, "d"), "tmpfs", 0, ""))
		defer syscall.Unmount(filepath.Join(upper, "d"), 0)
		say("create %s", errno(s.create("d/new", "new")))
		data, err = s.read("d/f")
		say("read %q %s", data, errno(err))
		say("unlink %s", errno(s.unlink("d/f")))
	})
}

// With index=on and metacopy=off, removing one name of a lower file with several made a metacopy file, which nothing may read then: the copy-up for the sake
// of the name did not ask whether metadata alone may be copied.
func TestIndexedNameMadeAMetacopyFileWithMetacopyOff(t *testing.T) {
	both(t, 1, Config{Index: true}, func(l []string) {
		put(t, l[0], "one", "several names")
		must(t, os.Link(filepath.Join(l[0], "one"), filepath.Join(l[0], "two")))
		must(t, os.Link(filepath.Join(l[0], "one"), filepath.Join(l[0], "three")))
	}, func(s side, say func(string, ...any)) {
		say("unlink %s", errno(s.unlink("two")))
		say("rename %s", errno(s.rename("one", "four", 0)))
	})
}
