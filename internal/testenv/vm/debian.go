package vm

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// keyring signs what is fetched; Debian's package debian-archive-keyring has it.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// fetch downloads the kernel's packages into dir and returns their names and
// SHA-256, and whether the kernel has the version that k pins. Each mirror that
// the machine is configured with is tried.
func fetch(dir string, k Kernel) (packages map[string]string, pinned bool, err error) {
	mirrors, err := mirrors()
	if err != nil {
		return nil, false, err
	}
	var tried []error
	for _, m := range mirrors {
		a, err := newApt(dir, m, k.Suite)
		if err != nil {
			return nil, false, err
		}
		pinned, err = a.take(k)
		if err == nil {
			packages, err = sums(dir)
			return packages, pinned, err
		}
		tried = append(tried, fmt.Errorf("%s of %s: %w", k.Suite, m, err))
	}
	return nil, false, errors.Join(tried...)
}

// mirrors returns where this machine's apt gets Debian's packages from.
func mirrors() ([]string, error) {
	out, err := exec.Command("apt-get", "indextargets", "--format", "$(REPO_URI) $(SUITE) $(ORIGIN)", "Created-By: Packages").Output()
	if err != nil {
		return nil, fmt.Errorf("apt-get indextargets: %w", err)
	}
	found := mirrorsOf(string(out))
	if len(found) == 0 {
		return nil, errors.New("apt is configured with no mirror of Debian (apt-get indextargets)")
	}
	return found, nil
}

// mirrorsOf picks archives of whole releases. Before the first `apt-get update`
// apt does not know whose they are.
func mirrorsOf(targets string) []string {
	var found []string
	seen := map[string]bool{}
	for line := range strings.Lines(targets) {
		f := strings.Fields(line)
		if len(f) < 2 || strings.Contains(f[1], "-") || strings.Contains(f[0], "security") || len(f) > 2 && f[2] != "Debian" || seen[f[0]] {
			continue
		}
		seen[f[0]] = true
		found = append(found, f[0])
	}
	return found
}

// apt is an apt-get with a state of its own: the system's is not touched, and no
// root is needed.
type apt struct {
	dir     string // for the packages
	options []string
}

func newApt(dir, mirror, suite string) (*apt, error) {
	state, err := os.MkdirTemp(dir, "apt")
	if err != nil {
		return nil, err
	}
	lists, cache := filepath.Join(state, "lists"), filepath.Join(state, "cache")
	for _, d := range []string{lists, filepath.Join(cache, "archives")} {
		if err := os.MkdirAll(filepath.Join(d, "partial"), 0o755); err != nil {
			return nil, err
		}
	}
	list := filepath.Join(state, "sources.list")
	source := fmt.Sprintf("deb [signed-by=%s] %s %s main\n", keyring, mirror, suite)
	if err := os.WriteFile(list, []byte(source), 0o644); err != nil {
		return nil, err
	}
	a := &apt{dir: dir}
	for _, o := range []string{
		"Dir::Etc::SourceList=" + list, "Dir::Etc::SourceParts=/dev/null",
		"Dir::State::Lists=" + lists, "Dir::Cache=" + cache,
		"Acquire::Languages=none", "Acquire::Retries=3",
		"APT::Sandbox::User=", // the private state belongs to whoever runs this
	} {
		a.options = append(a.options, "-o", o)
	}
	return a, nil
}

func (a *apt) get(args ...string) error {
	cmd := exec.Command("apt-get", append(append([]string{"-q"}, a.options...), args...)...)
	cmd.Dir = a.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// take downloads the pinned version, or if the mirror has it no more the newest.
func (a *apt) take(k Kernel) (pinned bool, err error) {
	if err := a.get("-o", "APT::Update::Error-Mode=any", "update"); err != nil {
		return false, err
	}
	const kernel = "user-mode-linux"
	pinned = a.get("download", kernel+"="+k.Version) == nil
	if !pinned {
		if err := a.get("download", kernel); err != nil {
			return false, err
		}
	}
	if k.OwnLibc {
		err = a.get("download", "libc6")
	}
	return pinned, err
}

func sums(dir string) (map[string]string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return nil, err
	}
	sums := map[string]string{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(b)
		sums[filepath.Base(f)] = hex.EncodeToString(sum[:])
	}
	return sums, nil
}
