package vm

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestModulesComeAfterThoseTheyNeed(t *testing.T) {
	const dep = `kernel/a/dm-thin-pool.ko.xz: kernel/a/dm-bufio.ko.xz kernel/a/dm-mod.ko.xz
kernel/a/dm-mod.ko.xz:
kernel/a/dm-bufio.ko.xz: kernel/a/dm-mod.ko.xz
kernel/a/other.ko.xz:
`
	got := moduleOrder(dep, []string{"dm_mod", "dm-thin-pool", "built-in"}, "/m")
	want := []string{"/m/kernel/a/dm-mod.ko.xz", "/m/kernel/a/dm-bufio.ko.xz", "/m/kernel/a/dm-thin-pool.ko.xz"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestMirrorsAreTheMachines(t *testing.T) {
	const targets = `http://a/debian/ oldstable Debian
http://a/debian/ oldstable-updates Debian
http://a/debian-security/ oldstable-security Debian
http://vendor/apt stable Vendor
http://b/debian/ bookworm
http://a/debian/ sid Debian
`
	got := mirrorsOf(targets)
	if want := []string{"http://a/debian/", "http://b/debian/"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestLoaderIsReplacedInPlace(t *testing.T) {
	f := filepath.Join(t.TempDir(), "program")
	const before = "ELF\x00/lib64/ld-linux-x86-64.so.2\x00rest"
	if err := os.WriteFile(f, []byte(before), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := setLoader(f); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(f)
	if err != nil || len(b) != len(before) || !strings.HasPrefix(string(b), "ELF\x00lib/ld.so\x00\x00") || !strings.HasSuffix(string(b), "\x00rest") {
		t.Errorf("%q, %v", b, err)
	}
	if err := setLoader(f); err == nil {
		t.Error("a program without a loader's name was taken")
	}
}

// A mirror that lacks the kernel fails the run: nothing is skipped.
func TestUnknownAndUnobtainableKernelsAreErrors(t *testing.T) {
	if _, err := Install(t.TempDir(), "newest"); err == nil || !strings.Contains(err.Error(), "there are new, stable") {
		t.Errorf("%v", err)
	}
	bin := t.TempDir()
	script := "#!/bin/sh\ncase \"$*\" in indextargets*) echo http://m/debian stable Debian;; *) echo E: no such suite; exit 100;; esac\n"
	if err := os.WriteFile(filepath.Join(bin, "apt-get"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	cache := t.TempDir()
	_, err := Install(cache, "new")
	if err == nil || !strings.Contains(err.Error(), "sid of http://m/debian") || !strings.Contains(err.Error(), "E: no such suite") {
		t.Errorf("%v; want the suite, the mirror and apt's words", err)
	}
	left, _ := filepath.Glob(cache + "/new?*")
	if len(left) != 1 || filepath.Base(left[0]) != "new.lock" {
		t.Errorf("left in the cache: %q", left)
	}
}
