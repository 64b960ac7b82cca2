package layer

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"maps"

	"github.com/layerctl/layerctl/internal/testenv"
)

// parseTar makes an archive from lines of words: "d a" a directory, "f a=x" a
// file, "l a->t" a symlink, "h a->t" a hard link, "p a" a fifo, "w a/b" a
// whiteout of a/b, "o a" an opaque marker in a.
func parseTar(lines string) []byte {
	a := newTar()
	for line := range strings.Lines(lines) {
		kind, rest, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			continue
		}
		name, to, _ := strings.Cut(rest, "->")
		switch kind {
		case "d":
			a.dir(name + "/")
		case "f":
			name, content, _ := strings.Cut(rest, "=")
			a.file(name, content)
		case "l":
			a.symlink(name, to)
		case "h":
			a.link(name, to)
		case "p":
			genEntry{Kind: "fifo", Path: name, Mode: 0o644}.addTo(a)
		case "w":
			genEntry{Kind: "whiteout", Path: name}.addTo(a)
		case "o":
			genEntry{Kind: "opaque", Path: name}.addTo(a)
		default:
			panic("unknown kind " + kind)
		}
	}
	return a.bytes()
}

// shortTree is a tree without metadata, in the words of parseTar; a hard link
// shows its group's first name.
func shortTree(t testing.TB, dir string) string {
	t.Helper()
	var out []string
	first := map[uint64]string{}
	paths := slices.SortedFunc(maps.Keys(treeState(t, dir)), ComparePaths)
	for _, p := range paths {
		if p == "." {
			continue
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(dir+"/"+p, &st); err != nil {
			t.Fatal(err)
		}
		switch st.Mode & syscall.S_IFMT {
		case syscall.S_IFDIR:
			out = append(out, "d "+p)
			continue
		case syscall.S_IFLNK:
			to, _ := os.Readlink(dir + "/" + p)
			out = append(out, "l "+p+"->"+to)
			continue
		case syscall.S_IFIFO:
			out = append(out, "p "+p)
			continue
		}
		if f := first[st.Ino]; f != "" {
			out = append(out, "h "+p+"->"+f)
			continue
		}
		first[st.Ino] = p
		b, _ := os.ReadFile(dir + "/" + p)
		out = append(out, "f "+p+"="+string(b))
	}
	return strings.Join(out, "\n")
}

func trimLines(s string) string {
	var out []string
	for line := range strings.Lines(s) {
		if l := strings.TrimSpace(line); l != "" {
			out = append(out, l)
		}
	}
	return strings.Join(out, "\n")
}

// applyCases are rules of unpacking: a lower tree, a layer, and what comes of it
// (or the words of the refusal). Each runs on a plain tree and on an overlay
// upper, which the kernel must show the same.
var applyCases = []struct {
	name, lower, layer, want, err string
}{
	{name: "whiteout of a file", lower: "f a=1\nf b=2", layer: "w a", want: "f b=2"},
	{name: "whiteout of a directory", lower: "d a\nf a/b=2\nf c=3", layer: "w a", want: "f c=3"},
	{name: "whiteout of a symlink, not of its target", lower: "f t=1\nl s->t", layer: "w s", want: "f t=1"},
	{name: "whiteout of nothing", lower: "f a=1", layer: "w b\nw c/d\nw a/x", want: "f a=1"},
	{name: "whiteout in a directory", lower: "d a\nf a/x=1\nf a/y=2", layer: "w a/x", want: "d a\nf a/y=2"},
	{name: "whiteout through a symlink", lower: "d a\nf a/x=1\nl s->a", layer: "w s/x", want: "d a\nl s->a"},
	{name: "whiteout, then the same name", lower: "f a=1", layer: "w a\nf a=2", want: "f a=2"},
	{name: "the name, then its whiteout", lower: "f a=1", layer: "f a=2\nw a", want: "f a=2"},
	{name: "whiteout, then a directory of the name", lower: "d a\nf a/x=1", layer: "w a\nd a\nf a/y=2", want: "d a\nf a/y=2"},
	{name: "the directory, then its whiteout", lower: "d a\nf a/x=1", layer: "d a\nf a/y=2\nw a", want: "d a\nf a/y=2"},
	{name: "whiteout, then something below", lower: "d a\nf a/x=1", layer: "w a\nf a/y=2", want: "d a\nf a/y=2"},
	{name: "something below, then the whiteout", lower: "d a\nf a/x=1", layer: "f a/y=2\nw a", want: "d a\nf a/y=2"},
	{name: "deep below, then the whiteout", lower: "d a\nd a/b\nd a/b/c\nf a/b/c/x=1\nf a/b/z=1", layer: "f a/b/c/y=2\nw a", want: "d a\nd a/b\nd a/b/c\nf a/b/c/y=2"},
	{name: "whiteouts of what this layer alone has", lower: "", layer: "d a\nf a/x=1\nw a/x\nw a", want: "d a\nf a/x=1"},
	{name: "opaque first", lower: "d a\nf a/x=1\nd a/d\nf a/d/z=1", layer: "d a\no a\nf a/y=2", want: "d a\nf a/y=2"},
	{name: "opaque last", lower: "d a\nf a/x=1\nd a/d\nf a/d/z=1", layer: "d a\nf a/y=2\nf a/d/w=3\no a", want: "d a\nd a/d\nf a/d/w=3\nf a/y=2"},
	{name: "opaque without its directory", lower: "d a\nf a/x=1", layer: "o a", want: "d a"},
	{name: "opaque root", lower: "d a\nf a/x=1\nf b=1\nd c", layer: "f b=2\nf a/y=1\no .", want: "d a\nf a/y=1\nf b=2"},
	{name: "opaque and a whiteout in it", lower: "d a\nf a/x=1\nf a/y=1", layer: "w a/x\no a\nf a/y=2", want: "d a\nf a/y=2"},
	{name: "opaque of a file", lower: "f a=1", layer: "o a", want: "f a=1"},
	{name: "opaque of nothing", lower: "f a=1", layer: "o b/c\nf b/c/d=1", want: "f a=1\nd b\nd b/c\nf b/c/d=1"},
	{name: "file over directory", lower: "d a\nf a/x=1", layer: "f a=2", want: "f a=2"},
	{name: "directory over file", lower: "f a=1", layer: "d a\nf a/x=2", want: "d a\nf a/x=2"},
	{name: "directory over a symlink to a directory", lower: "d t\nf t/x=1\nl a->t", layer: "d a\nf a/y=1", want: "d a\nf a/y=1\nd t\nf t/x=1"},
	{name: "symlink over directory", lower: "d a\nf a/x=1\nd t", layer: "l a->t\nf a/y=1", want: "l a->t\nd t\nf t/y=1"},
	{name: "directory over directory keeps its content", lower: "d a\nf a/x=1", layer: "d a", want: "d a\nf a/x=1"},
	{name: "directory, file, directory again", lower: "d a\nf a/x=1", layer: "d a\nf a/z=1\nf a=1\nd a\nf a/y=2", want: "d a\nf a/y=2"},
	{name: "the later of two files", lower: "f a=0", layer: "f a=1\nf a=2", want: "f a=2"},
	{name: "the later of a file and its link", lower: "", layer: "f a=1\nh b->a\nf a=2", want: "f a=2\nf b=1"},
	{name: "below a file", lower: "f a=1", layer: "f a/b=2", err: `"a" is in the way`},
	{name: "below a fifo", lower: "p a", layer: "f a/b=2", err: `"a" is in the way`},
	{name: "implied directories", lower: "", layer: "f a/b/c=1", want: "d a\nd a/b\nf a/b/c=1"},
	{name: "a dangling symlink as parent", lower: "l a->b/c", layer: "f a/x=1", want: "l a->b/c\nd b\nd b/c\nf b/c/x=1"},
	{name: "hard link in the layer", lower: "", layer: "f a=1\nh b->a\nh c->b", want: "f a=1\nh b->a\nh c->a"},
	{name: "hard link to below", lower: "d d\nf d/a=1", layer: "h b->d/a", want: "f b=1\nd d\nh d/a->b"},
	{name: "hard link to a symlink", lower: "l a->t", layer: "h b->a", want: "l a->t\nl b->t"},
	{name: "hard link through a symlink", lower: "d d\nf d/a=1\nl s->d", layer: "h b->s/a", want: "f b=1\nd d\nh d/a->b\nl s->d"},
	{name: "hard link to itself", lower: "", layer: "f a=1\nh a->a", want: "f a=1"},
	{name: "hard link again", lower: "", layer: "f a=1\nh b->a\nh b->a", want: "f a=1\nh b->a"},
	{name: "hard link over a directory", lower: "d b\nf b/x=1", layer: "f a=1\nh b->a", want: "f a=1\nh b->a"},
	{name: "hard link over the directory its target is in", lower: "d b\nf b/x=1", layer: "h b->b/x", err: "directory above it"},
	{name: "hard link to what is deleted", lower: "f a=1", layer: "w a\nh b->a", err: `"b" (header at byte 1536): hard link to "a"`},
	{name: "link, then the whiteout of its target", lower: "f a=1", layer: "h b->a\nw a", want: "f b=1"},
	{name: "link, then its directory opaque", lower: "d d\nf d/a=1", layer: "h b->d/a\no d", want: "f b=1\nd d"},
	{name: "hard link to a directory", lower: "d a", layer: "h b->a", err: "is a directory"},
	{name: "hard link to nothing", lower: "", layer: "h b->a", err: `hard link to "a"`},
	{name: "reserved name in the middle", lower: "", layer: "f .wh.a/b=1", err: "reserved name"},
	{name: "whiteout of nothing at all", lower: "", layer: "f d/.wh.=1", err: "a whiteout of"},
	{name: "whiteout of the directory itself", lower: "", layer: "f d/.wh..=1", err: "a whiteout of"},
	{name: "whiteout of the directory above", lower: "", layer: "f d/.wh...=1", err: "a whiteout of"},
	{name: "metadata of aufs", lower: "", layer: "f .wh..wh.plnk/1.2=x", err: "metadata of aufs"},
	{name: "metadata of aufs as a whiteout", lower: "", layer: "f .wh..wh.foo=x", err: "metadata of aufs"},
	{name: "a file in place of the root", lower: "", layer: "f .=1", err: "the path is a directory"},
}

func TestApply(t *testing.T) {
	testenv.Root(t)
	fs := testenv.FS(t, "tmpfs")
	for i, c := range applyCases {
		for _, w := range []Whiteouts{WhiteoutsTrusted, WhiteoutsUser} {
			t.Run(c.name+"/"+w.overlayXattr("x")[:4], func(t *testing.T) {
				s := newStack(t, fs, fmt.Sprint(i, w), w)
				if !s.applyTar(parseTar(c.lower), c.lower) {
					t.Fatalf("lower: %v", s.err)
				}
				s.commit()
				ok := s.applyTar(parseTar(c.layer), c.layer)
				checkError(t, s.err, c.err)
				if !ok {
					return
				}
				if got, want := shortTree(t, s.plain), trimLines(c.want); got != want {
					t.Errorf("got\n%s\nwant\n%s", got, want)
				}
				s.compare(t, c.lower+"\n--\n"+c.layer)
			})
		}
	}
}

func checkError(t testing.TB, err error, words string) {
	t.Helper()
	switch {
	case words == "" && err != nil:
		t.Fatal(err)
	case words != "" && err == nil:
		t.Fatalf("no error, want one with %q", words)
	case words != "" && !strings.Contains(err.Error(), words):
		t.Fatalf("%v\nwant an error with %q", err, words)
	}
}
