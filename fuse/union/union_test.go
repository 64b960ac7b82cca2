package union

import (
	"os"
	"path/filepath"
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
