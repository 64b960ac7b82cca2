package vm

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/layerctl/layerctl/internal/sys"
)

// Kernel names a kernel to run. Debian's user-mode-linux has no other package
// in it that would have to fit to the host, so that any release's will do.
type Kernel struct {
	Suite   string // the release of Debian whose kernel it is
	Version string // the package's version that this was tested with, taken if the mirror still has it
	OwnLibc bool   // it wants a newer C library than a stable release has
}

// Kernels are those that can be asked for. "new" moves with Debian's unstable,
// which has one version at a time: which one it was is in Installed.
var Kernels = map[string]Kernel{
	"new":    {Suite: "sid", Version: "7.2um1", OwnLibc: true},
	"stable": {Suite: "bookworm", Version: "6.1um4+b13"},
}

// Installed is a kernel on this machine.
type Installed struct {
	Dir string `json:"-"`
	// Release is what uname says, Packages are the files it came in, with their SHA-256.
	Release  string
	Packages map[string]string
	Tested   bool // it is the very version that Kernel.Version names
}

func (i Installed) String() string {
	s := fmt.Sprintf("Linux %s (%s)", i.Release, strings.Join(slices.Sorted(maps.Keys(i.Packages)), ", "))
	if !i.Tested {
		s += ", newer than the one that the tests were made with"
	}
	return s
}

const (
	kernelFile = "linux"
	moduleDir  = "modules"
	libDir     = "lib"
	aboutFile  = "about.json"
)

// CacheDir is where kernels are kept: in the user's cache, or where there is no
// home in the machine's.
func CacheDir() string {
	if dir, err := os.UserCacheDir(); err == nil {
		return filepath.Join(dir, "layerctl", "vm")
	}
	return "/var/cache/layerctl/vm"
}

// Install returns the kernel of that name, taken from cache if it is there, else
// fetched from the mirror of Debian that apt is configured with. Processes that
// want the same one at once wait for each other.
func Install(cache, name string) (Installed, error) {
	k, ok := Kernels[name]
	if !ok {
		return Installed{}, fmt.Errorf("vm: no kernel %q: there are %s", name, strings.Join(slices.Sorted(maps.Keys(Kernels)), ", "))
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return Installed{}, err
	}
	lock, err := sys.WaitLock(filepath.Join(cache, name+".lock"), sys.O_RDWR|sys.O_CREAT, sys.LockExclusive)
	if err != nil {
		return Installed{}, err
	}
	defer lock.Close()
	dir := filepath.Join(cache, name)
	if i, err := readAbout(dir); err == nil {
		return i, nil
	}
	i, err := install(cache, dir, k)
	if err != nil {
		return Installed{}, fmt.Errorf("vm: kernel %q could not be had: %w", name, err)
	}
	return i, nil
}

func readAbout(dir string) (Installed, error) {
	b, err := os.ReadFile(filepath.Join(dir, aboutFile))
	if err != nil {
		return Installed{}, err
	}
	i := Installed{Dir: dir}
	return i, json.Unmarshal(b, &i)
}

// install fills dir in one rename: about.json stands only in whole ones.
func install(cache, dir string, k Kernel) (Installed, error) {
	tmp, err := os.MkdirTemp(cache, "new")
	if err != nil {
		return Installed{}, err
	}
	defer os.RemoveAll(tmp)
	made := Installed{Dir: filepath.Join(tmp, "kernel")}
	if made.Packages, made.Tested, err = fetch(tmp, k); err != nil {
		return Installed{}, err
	}
	if err := unpack(tmp, made, k.OwnLibc); err != nil {
		return Installed{}, err
	}
	if made.Release, err = release(made.Dir); err != nil {
		return Installed{}, err
	}
	about, err := json.MarshalIndent(made, "", "\t")
	if err != nil {
		return Installed{}, err
	}
	if err := os.WriteFile(filepath.Join(made.Dir, aboutFile), append(about, '\n'), 0o644); err != nil {
		return Installed{}, err
	}
	if err := os.RemoveAll(dir); err != nil {
		return Installed{}, err
	}
	if err := os.Rename(made.Dir, dir); err != nil {
		return Installed{}, err
	}
	made.Dir = dir
	return made, nil
}

// unpack takes out of the packages in tmp what a kernel needs.
func unpack(tmp string, i Installed, ownLibc bool) error {
	all := filepath.Join(tmp, "all")
	for p := range i.Packages {
		if out, err := exec.Command("dpkg-deb", "--extract", filepath.Join(tmp, p), all).CombinedOutput(); err != nil {
			return fmt.Errorf("dpkg-deb: %s: %w\n%s", p, err, out)
		}
	}
	if err := os.MkdirAll(filepath.Join(i.Dir, libDir), 0o755); err != nil {
		return err
	}
	releases, err := filepath.Glob(filepath.Join(all, "usr/lib/uml/modules/*"))
	if err != nil || len(releases) != 1 {
		return fmt.Errorf("modules of %d releases in the package, want those of one", len(releases))
	}
	moves := [][2]string{{filepath.Join(all, "usr/bin/linux.uml"), kernelFile}, {releases[0], moduleDir}}
	if ownLibc {
		lib := filepath.Join(all, "usr/lib/x86_64-linux-gnu")
		moves = append(moves, [2]string{filepath.Join(lib, loaderFile), ownLoader},
			[2]string{filepath.Join(lib, "libc.so.6"), libDir + "/libc.so.6"})
	}
	for _, m := range moves {
		if err := os.Rename(m[0], filepath.Join(i.Dir, m[1])); err != nil {
			return err
		}
	}
	if !ownLibc {
		return nil
	}
	return setLoader(filepath.Join(i.Dir, kernelFile))
}

const (
	loaderFile = "ld-linux-x86-64.so.2"
	ownLoader  = libDir + "/ld.so"
)

// setLoader has the program started by the loader beside it instead of the
// host's: the path in it is overwritten, relative to the working directory, which
// is the kernel's. (Started as the loader's argument it could not execute itself
// again, which it does.)
func setLoader(program string) error {
	b, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	old := []byte("/lib64/" + loaderFile + "\x00")
	if n := bytes.Count(b, old); n != 1 {
		return fmt.Errorf("%s names its loader %d times, want once", program, n)
	}
	own := make([]byte, len(old))
	copy(own, ownLoader)
	return os.WriteFile(program, bytes.Replace(b, old, own, 1), 0o755)
}

// release asks the kernel for its version, which shows that it starts at all.
func release(dir string) (string, error) {
	cmd := exec.Command("./"+kernelFile, "--version")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "LD_LIBRARY_PATH="+filepath.Join(dir, libDir))
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("the kernel does not start: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// wanted modules, if they are not built in. What a kernel lacks a test will say.
var wanted = []string{"loop", "crc32c_generic", "overlay", "fuse", "btrfs", "xfs", "quota_v2",
	"dm-mod", "dm-thin-pool", "dm-flakey", "dm-log-writes", "dm-snapshot", "dm-delay", "dm-dust"}

// modules returns the files of the wanted modules, each after those it needs.
func (i Installed) modules() ([]string, error) {
	dir := filepath.Join(i.Dir, moduleDir)
	b, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	return moduleOrder(string(b), wanted, dir), nil
}

// moduleOrder reads modules.dep: after each module's file and a colon the files
// that it needs, the last of which is to be loaded first.
func moduleOrder(dep string, names []string, dir string) []string {
	lines := map[string][]string{}
	for line := range strings.Lines(dep) {
		if f := strings.Fields(strings.Replace(line, ":", " ", 1)); len(f) > 0 {
			lines[moduleName(f[0])] = f
		}
	}
	var order []string
	for _, n := range names {
		for _, file := range slices.Backward(lines[moduleName(n)]) {
			if file = filepath.Join(dir, file); !slices.Contains(order, file) {
				order = append(order, file)
			}
		}
	}
	return order
}

func moduleName(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".")
	return strings.ReplaceAll(name, "-", "_")
}
