// Package lint holds the house rules as tests: which package may import which,
// what has one door only, and what every exported name owes its reader.
package lint

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/layerctl/layerctl"

// level gives each folder its height. A package imports only packages of a
// lower level, or those that sideways names. A folder that is not here fails.
var level = map[string]int{
	"internal/sys":            0,
	"internal/kprobe":         0,
	"internal/faults":         0,
	"internal/treegen":        1,
	"internal/testenv":        1,
	"internal/userns":         1,
	"internal/fusermount":     1,
	"internal/testenv/vm":     1,
	"internal/socket":         1,
	"internal/testenv/vm/cmd": 2,
	"internal/lint":           1,
	"mount":                   2,
	"layer":                   2,
	"layer/inflate":           1,
	"devmapper/dm":            1,
	"devmapper/thin":          2,
	"devmapper/dmtest":        2,
	"devmapper/metadata":      1,
	"devmapper/ext4":          3,
	"drivers":                 3,
	"drivers/roots":           4,
	"drivers/drivertest":      5,
	"drivers/native":          5,
	"drivers/upper":           5,
	"overlay":                 6, // above drivers/upper, which it has in common with other union drivers
	"btrfs":                   5,
	"devmapper":               5,
	"btrfs/ioctl":             2,
	"btrfs/send":              1,
	"fuse":                    6, // the driver; it starts the server as a program, and imports neither server nor union
	"fuse/union":              5,
	"fuse/uniontest":          5,
	"fuse/server":             6,
	"snapshot":                6,
	"image":                   7,
	"snapshot/service":        7,
	"internal/testimage":      7,
	".":                       8,
	"cmd/layerctl":            10,
	"cmd/layerd":              10,
	"cmd/fuse-layerfs":        10,
}

// below lists the arrows within one level, each with its reason.
var sideways = map[[2]string]string{}

// door is an import that only the named folders may have.
type door struct {
	what    string // import path, or its beginning if it ends in "/"
	folders []string
	why     string
}

var doors = []door{
	{"golang.org/x/sys/", []string{"internal/sys", "fuse/uniontest"}, "internal/sys is the kernel door: callers get descriptors with one owner (uniontest's cases are about single system calls)"},
	{"unsafe", []string{"internal/sys"}, "internal/sys is the kernel door"},
	{"go.etcd.io/bbolt", []string{"snapshot"}, "records have one keeper"},
	{"github.com/spf13/", []string{"cmd/layerctl", "cmd/layerd"}, "flags belong to programs"},
	{"flag", []string{"cmd/layerctl", "internal/testenv/vm/cmd"}, "flags belong to programs"},
	{"google.golang.org/grpc", []string{"snapshot/service"}, "a service is a face of the store, and an engine that imports the store gets none"},
	{"google.golang.org/grpc/", []string{"snapshot/service", "cmd/layerd"}, "cmd/layerd counts calls by their status"},
	{"github.com/pelletier/", []string{"cmd/layerd"}, "a configuration file belongs to a program"},
	{"github.com/prometheus/", []string{"cmd/layerd"}, "figures belong to a program"},
	{"github.com/hanwen/go-fuse/", []string{"fuse/server"}, "the FUSE wire has one door"},
	{module, []string{"cmd/layerctl", "cmd/layerd"}, "the root package is for engines: inside, only programs name every driver"},
}

// file is one parsed Go file.
type file struct {
	name   string // relative to the module's root
	folder string
	test   bool
	ast    *ast.File
	fset   *token.FileSet
}

func files(t *testing.T) []file {
	t.Helper()
	root := moduleRoot(t)
	var all []file
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		if d.IsDir() {
			if rel != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || hasFile(p, "go.mod")) {
				return filepath.SkipDir // a nested module has its own house
			}
			return nil
		}
		if !strings.HasSuffix(rel, ".go") {
			return nil
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, p, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		all = append(all, file{name: rel, folder: path.Dir(rel), test: strings.HasSuffix(rel, "_test.go"), ast: f, fset: fset})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 20 {
		t.Fatalf("only %d files found: the walk is wrong", len(all))
	}
	return all
}

func hasFile(dir, name string) bool {
	_, err := os.Stat(filepath.Join(dir, name))
	return err == nil
}

func moduleRoot(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; !hasFile(dir, "go.mod"); dir = filepath.Dir(dir) {
		if dir == "/" {
			t.Fatal("no go.mod above the test")
		}
	}
	return dir
}

func (f *file) imports() []string {
	var paths []string
	for _, i := range f.ast.Imports {
		p, _ := strconv.Unquote(i.Path.Value)
		paths = append(paths, p)
	}
	return paths
}

// TestImportsRunDownwards: an arrow that runs up, or sideways unnamed, fails.
func TestImportsRunDownwards(t *testing.T) {
	for _, f := range files(t) {
		from, known := level[f.folder]
		if !known {
			t.Errorf("%s: folder %s has no level: give it one in internal/lint", f.name, f.folder)
			continue
		}
		for _, imp := range f.imports() {
			to, ours := strings.CutPrefix(imp, module+"/")
			if imp == module {
				to, ours = ".", true
			}
			if !ours || f.test || to == f.folder {
				continue // tests may look down from anywhere
			}
			if lv, ok := level[to]; !ok || lv >= from && sideways[[2]string{f.folder, to}] == "" {
				t.Errorf("%s imports %s: level %d may not import level %d", f.name, to, from, lv)
			}
		}
	}
}

// TestOneDoor: what has one door is imported nowhere else.
func TestOneDoor(t *testing.T) {
	for _, f := range files(t) {
		for _, imp := range f.imports() {
			for _, d := range doors {
				hit := imp == d.what || strings.HasSuffix(d.what, "/") && strings.HasPrefix(imp, d.what)
				if hit && !f.test && !slices.Contains(d.folders, f.folder) {
					t.Errorf("%s imports %s, which only %v may: %s", f.name, imp, d.folders, d.why)
				}
			}
		}
	}
}

// exits lists the folders that may end the process, each with its reason.
var exits = map[string]string{
	"cmd/layerctl":            "a program",
	"cmd/fuse-layerfs":        "a program",
	"cmd/layerd":              "a program",
	"internal/testenv":        "it re-executes the test binary",
	"internal/testenv/vm/cmd": "a program",
	"internal/userns":         "it re-executes the program",
	"internal/faults":         "it simulates a crash",
}

// inits lists the folders that may have an init function, each with its reason.
var inits = map[string]string{
	"internal/testenv": "the main thread can only be locked before main starts",
}

// TestNoExitNoInit: libraries neither end the process nor act when imported.
func TestNoExitNoInit(t *testing.T) {
	for _, f := range files(t) {
		if f.test {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Recv == nil && n.Name.Name == "init" && inits[f.folder] == "" {
					t.Errorf("%s: func init: a package must do nothing by being imported", f.fset.Position(n.Pos()))
				}
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "os" && n.Sel.Name == "Exit" && exits[f.folder] == "" {
					t.Errorf("%s: os.Exit belongs to programs", f.fset.Position(n.Pos()))
				}
			}
			return true
		})
	}
}

// TestNoProgramHasFaults: hooks at the steps of a change are for tests, and no program
// that is shipped sets one.
func TestNoProgramHasFaults(t *testing.T) {
	for _, f := range files(t) {
		if f.test || f.folder == "internal/faults" || f.folder == "drivers/drivertest" {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok {
				if x, ok := s.X.(*ast.Ident); ok && x.Name == "faults" && s.Sel.Name != "Point" {
					t.Errorf("%s: faults.%s is for tests", f.fset.Position(n.Pos()), s.Sel.Name)
				}
			}
			return true
		})
	}
}

// TestExportedNamesAreDocumented in everything an engine can import.
func TestExportedNamesAreDocumented(t *testing.T) {
	packageDoc := map[string]bool{}
	for _, f := range files(t) {
		if f.test || strings.HasPrefix(f.folder, "cmd/") {
			continue
		}
		packageDoc[f.folder] = packageDoc[f.folder] || f.ast.Doc != nil
		for _, d := range f.ast.Decls {
			for _, name := range undocumented(d) {
				t.Errorf("%s: exported %s has no doc comment", f.fset.Position(d.Pos()), name)
			}
		}
	}
	for folder, ok := range packageDoc {
		if !ok {
			t.Errorf("%s: no package comment", folder)
		}
	}
}

func undocumented(d ast.Decl) []string {
	var names []string
	switch d := d.(type) {
	case *ast.FuncDecl:
		if d.Name.IsExported() && d.Doc == nil && exportedReceiver(d) && !wellKnown[d.Name.Name] {
			names = append(names, d.Name.Name)
		}
	case *ast.GenDecl:
		for _, s := range d.Specs {
			switch s := s.(type) {
			case *ast.TypeSpec:
				if s.Name.IsExported() && d.Doc == nil && s.Doc == nil {
					names = append(names, s.Name.Name)
				}
			case *ast.ValueSpec:
				for _, n := range s.Names {
					if n.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil && len(d.Specs) == 1 {
						names = append(names, n.Name)
					}
				}
			}
		}
	}
	return names
}

// wellKnown methods say by their name what they do.
var wellKnown = map[string]bool{"String": true, "Error": true, "Unwrap": true, "Is": true, "Len": true, "Less": true,
	"Swap": true, "MarshalText": true, "MarshalJSON": true, "UnmarshalJSON": true, "UnmarshalText": true, "Read": true, "Write": true, "Close": true}

func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	typ := d.Recv.List[0].Type
	if star, ok := typ.(*ast.StarExpr); ok {
		typ = star.X
	}
	id, ok := typ.(*ast.Ident)
	return ok && id.IsExported()
}

// TestFunctionsAreShort: nine in ten functions are under 50 lines, none is over
// 120 (tables in tests excepted: test files do not count).
func TestFunctionsAreShort(t *testing.T) {
	const most = 120
	var lengths []int
	for _, f := range files(t) {
		if f.test {
			continue
		}
		for _, d := range f.ast.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Body == nil {
				continue
			}
			n := f.fset.Position(fn.End()).Line - f.fset.Position(fn.Pos()).Line + 1
			lengths = append(lengths, n)
			if n > most {
				t.Errorf("%s: %s has %d lines, more than %d", f.fset.Position(fn.Pos()), fn.Name.Name, n, most)
			}
		}
	}
	sort.Ints(lengths)
	p50, p90 := lengths[len(lengths)/2], lengths[len(lengths)*9/10]
	t.Logf("%d functions: median %d lines, nine in ten within %d, longest %d", len(lengths), p50, p90, lengths[len(lengths)-1])
	if p90 >= 50 {
		t.Errorf("nine in ten functions are within %d lines: should be under 50", p90)
	}
}

// heavy is what no driver may pull into an engine.
var heavy = []string{"google.golang.org/grpc", "go.etcd.io/bbolt", "github.com/hanwen/go-fuse", "github.com/spf13/",
	"github.com/containerd/containerd/v2/core/content", "github.com/containerd/containerd/v2/core/images", "net/http"}

// TestDriversAreLight: an engine that imports a driver gets no service, no
// database, no FUSE and no image library with it.
func TestDriversAreLight(t *testing.T) {
	for _, folder := range []string{"drivers", "drivers/native", "drivers/upper", "overlay", "fuse", "btrfs", "devmapper", "layer", "mount"} {
		for _, dep := range deps(t, module+"/"+folder) {
			for _, h := range heavy {
				if strings.HasPrefix(dep, h) {
					t.Errorf("%s pulls in %s", folder, dep)
				}
			}
		}
	}
}

func deps(t *testing.T, pkg string) []string {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command("go", "list", "-deps", pkg)
	cmd.Dir, cmd.Stderr = moduleRoot(t), &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list -deps %s: %v\n%s", pkg, err, stderr.String())
	}
	return strings.Fields(string(out))
}

// shares are the imports and statements that say that goroutines share memory.
var shares = []string{"sync", "sync/atomic", "golang.org/x/sync/errgroup"}

// TestRaceListIsWhole: a package in which goroutines share memory is one that CI
// runs under the race detector, and every name in that list is a package.
func TestRaceListIsWhole(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(moduleRoot(t), "ci/race"))
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && !strings.HasPrefix(line, "#") {
			listed[f[0]] = false
		}
	}
	for _, f := range files(t) {
		if _, ok := listed[f.folder]; ok {
			listed[f.folder] = true // it exists
			continue
		}
		if f.test {
			continue
		}
		for _, imp := range f.imports() {
			if slices.Contains(shares, imp) {
				t.Errorf("%s imports %s: add %s to ci/race, with what goroutines share there", f.name, imp, f.folder)
			}
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if g, ok := n.(*ast.GoStmt); ok {
				t.Errorf("%s: a go statement: add %s to ci/race, with what goroutines share there", f.fset.Position(g.Pos()), f.folder)
			}
			return true
		})
	}
	for folder, exists := range listed {
		if !exists {
			t.Errorf("ci/race names %s, which is no folder", folder)
		}
	}
}

// TestDoorsNameFoldersThatExist keeps the tables above from rotting.
func TestDoorsNameFoldersThatExist(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range files(t) {
		seen[f.folder] = true
	}
	var stale []string
	for folder := range level {
		if !seen[folder] {
			stale = append(stale, folder)
		}
	}
	if len(stale) > 0 {
		sort.Strings(stale)
		t.Errorf("internal/lint gives levels to folders that do not exist: %v", stale)
	}
}
