package main

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// TestDefaultConfigIsTheDefault: what `config default` prints says what an empty
// file does, and names every option.
func TestDefaultConfigIsTheDefault(t *testing.T) {
	b, err := newConfig().text()
	must(t, err)
	c := newConfig()
	must(t, c.parse(b))
	if !reflect.DeepEqual(c, newConfig()) {
		t.Errorf("read back: %+v\nwant %+v", c, newConfig())
	}
	empty := newConfig()
	must(t, empty.parse(nil))
	if !reflect.DeepEqual(empty, newConfig()) {
		t.Errorf("an empty file: %+v", empty)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if i := strings.Index(line, "# "); i > 0 {
			t.Errorf("a comment beside an option: %q", line)
		}
	}
}

// TestConfigErrors name the option, and its line where there is one.
func TestConfigErrors(t *testing.T) {
	for text, want := range map[string]string{
		"root = 'relative'":                          "root",
		"no_such = 1":                                "line 1: no option no_such",
		"\n[log]\nlevel = 'loud'":                    "line 3",
		"[log]\nformat = 'xml'":                      "log.format",
		"stop_timeout = 'soon'":                      "soon",
		"[listen]\nmode = '0999'":                    "0999",
		"[views.a]\ndriver = 'zfs'":                  "views.a",
		"[views.a]\ndriver = 'btrfs'\nrebase = true": "no rebase",
		"[diff]\nenabled = false\n[views.a]\ndriver = 'overlay'\nrebase = true": "diff service",
		"[views.a]\ndriver = 'native'\nsocket = '/run/layerd/layerd.sock'":      "listen.address",
		"[driver_options.overlay]\nno_such = 'x'":                               "no_such",
		"root = ": "line 1",
	} {
		err := newConfig().parse([]byte(text))
		if err == nil || !strings.Contains(err.Error(), want) || !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
			t.Errorf("%q: %v, want something about %q", text, err, want)
		}
	}
}

// TestConfigFile: a file that is named must be there; the usual one need not.
func TestConfigFile(t *testing.T) {
	if _, err := readConfig(filepath.Join(t.TempDir(), "missing")); err == nil {
		t.Error("a named file that is missing is taken for empty")
	}
	path := filepath.Join(t.TempDir(), "config.toml")
	must(t, os.WriteFile(path, []byte("root = '/a'\n[views.one]\ndriver = 'native'\n[diff]\nenabled = false"), 0o644))
	c, err := (&flags{config: path, root: "/b", address: "/c", logLevel: "debug"}).settings()
	must(t, err)
	if c.Root != "/b" || c.Listen.Address != "/c" || len(c.Views) != 1 || c.Log.Level >= 0 {
		t.Errorf("got %+v", c)
	}
}

// TestDropIn: what is printed is TOML and has in it what the version of containerd
// knows.
func TestDropIn(t *testing.T) {
	for version, want := range map[string]struct{ has, lacks []string }{
		"1.6":  {[]string{"version = 2", "layerd-native"}, []string{"diff-service", "capabilities", "unpack_config", "[proxy_plugins.layerd]"}},
		"1.7":  {[]string{"version = 2", "diff-service", "capabilities", "exports"}, []string{"unpack_config"}},
		"v2.1": {[]string{"version = 3", "diff-service", "unpack_config", `"walking"`}, nil},
	} {
		var out bytes.Buffer
		cmd := newCommand()
		cmd.SetOut(&out)
		cmd.SetArgs([]string{"config", "containerd", "--containerd-version", version, "--root", t.TempDir()})
		must(t, cmd.Execute())
		for _, s := range want.has {
			if !strings.Contains(out.String(), s) {
				t.Errorf("%s: lacks %q:\n%s", version, s, &out)
			}
		}
		for _, s := range want.lacks {
			if strings.Contains(out.String(), s) {
				t.Errorf("%s: has %q:\n%s", version, s, &out)
			}
		}
		var parsed map[string]any
		if err := toml.Unmarshal(out.Bytes(), &parsed); err != nil {
			t.Errorf("%s: %v:\n%s", version, err, &out)
		}
	}
	if _, err := findContainerd(t.Context(), "", "new"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("version: %v", err)
	}
	if _, err := findContainerd(t.Context(), "/no/such/program", ""); err == nil || !strings.Contains(err.Error(), "--containerd-version") {
		t.Errorf("program: %v", err)
	}
}
