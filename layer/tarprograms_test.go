package layer

import (
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
)

// Whole trees, unpacked by the programs that others will use, are the trees: with
// owners, nanoseconds, devices, links and xattrs, as far as the program goes.
func TestTarUnpackedByPrograms(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "ext4")
	for _, p := range []struct {
		name    string
		command []string
		config  treegen.Config
		// libarchive adds the fraction of a time before 1970 on the wrong side, and
		// leaves the time of "." as it is.
		libarchive bool
	}{
		{"tar", []string{"tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "--delay-directory-restore", "-p", "-xf", "-"},
			treegen.Config{Root: true}, false},
		{"bsdtar", []string{"bsdtar", "--numeric-owner", "--same-owner", "-p", "-xf", "-"},
			treegen.Config{Root: true, NoXattrs: true}, true},
	} {
		t.Run(p.name, func(t *testing.T) {
			if _, err := exec.LookPath(p.name); err != nil {
				testenv.Optional(t, p.name+" is not installed")
			}
			for seed := range uint64(10) {
				ops := treegen.New(newRand(seed), p.config).Ops(150)
				for i := range ops {
					if p.libarchive && ops[i].Sec < 0 {
						ops[i].Nsec = 0
					}
				}
				_, b, c := trees(t, dir, nil, withoutEquals(ops))
				pr, pw, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					_, err := WriteTar(t.Context(), pw, DiffTrees(t.Context(), "", b, DiffOptions{}), TarOptions{})
					if err != nil {
						t.Error(err)
					}
					pw.Close()
				}()
				cmd := exec.Command(p.command[0], append(p.command[1:], "-C", c)...)
				cmd.Stdin = pr
				cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
				out, err := cmd.CombinedOutput()
				pr.Close()
				if err != nil {
					t.Fatalf("seed %d: %v: %s", seed, err, out)
				}
				got, want := treeState(t, c), treeState(t, b)
				if p.libarchive {
					delete(got, ".")
					delete(want, ".")
				}
				if d := stateDiff(got, want); d != "" {
					t.Errorf("seed %d: %s%s", seed, out, d)
				}
			}
		})
	}
}

// withoutEquals leaves out the xattr whose name tar does not spell as libarchive does.
func withoutEquals(ops []treegen.Op) []treegen.Op {
	var kept []treegen.Op
	for _, o := range ops {
		if !strings.Contains(o.Attr, "=") {
			kept = append(kept, o)
		}
	}
	return kept
}

func TestChangeSummary(t *testing.T) {
	for want, c := range map[string]Change{
		`{"kind":"D","path":"a"}`: {Kind: Deleted, Entry: Entry{Path: "a"}},
		`{"kind":"C","path":"a/b","changed":["content","xattr"],"type":"file","mode":"4755","uid":0,"gid":5,"size":0,"mtime":"1970-01-01T00:00:01.5Z","hardlink":"a/a","xattrs":["user.a","user.b"]}`: {
			Kind: Modified, Aspects: AspectContent | AspectXattr,
			Entry: Entry{Path: "a/b", Type: TypeReg, Mode: 0o4755, GID: 5, ModTime: Timespec{1, 500_000_000}, Hardlink: "a/a",
				Xattrs: map[string]string{"user.b": "", "user.a": ""}},
		},
		`{"kind":"A","path":"\ufffd","path_bytes":"/w==","type":"character device","mode":"0000","uid":0,"gid":0,"mtime":"1970-01-01T00:00:00Z","device":"1:3"}`: {
			Kind: Added, Entry: Entry{Path: "\xff", Type: TypeChar, Major: 1, Minor: 3},
		},
	} {
		got, err := json.Marshal(c.Summary())
		if err != nil || string(got) != want {
			t.Errorf("got  %s, %v\nwant %s", got, err, want)
		}
	}
}
