package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
)

const units = "../../dist/systemd/"

// settingsOf reads a unit: its settings by name.
func settingsOf(t *testing.T, unit string) map[string][]string {
	t.Helper()
	b, err := os.ReadFile(units + unit)
	must(t, err)
	all := map[string][]string{}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(line, "#") {
			all[name] = append(all[name], value)
		}
	}
	return all
}

// namespaces are the settings that give a service a mount namespace of its own
// (systemd.exec(5)), in which mounts of others would not show up.
var namespaces = regexp.MustCompile(`^(Private.*|Protect(System|Home|KernelTunables|KernelModules|KernelLogs|ControlGroups|Proc|Hostname|Clock)|` +
	`ProcSubset|(ReadOnly|ReadWrite|Inaccessible|Exec|NoExec)Paths|Bind.*Paths|TemporaryFileSystem|Root(Directory|Image)|MountAPIVFS|` +
	`MountFlags|DynamicUser|BindLogSockets|NetworkNamespacePath|ExtensionImages|ExtensionDirectories|MountImages|StateDirectory|CacheDirectory|LogsDirectory)$`)

// TestUnits: systemd understands the units, layerd keeps the host's mount
// namespace, and its end ends nobody else.
func TestUnits(t *testing.T) {
	s := settingsOf(t, "layerd.service")
	for name := range s {
		if namespaces.MatchString(name) {
			t.Errorf("%s= may give layerd a mount namespace of its own", name)
		}
	}
	for name, want := range map[string]string{"KillMode": "process", "Type": "notify", "ExecStart": "/usr/local/bin/layerd"} {
		if !slices.Equal(s[name], []string{want}) {
			t.Errorf("%s=%q, want %q", name, s[name], want)
		}
	}
	if got := settingsOf(t, "layerd.socket")["ListenStream"]; !slices.Equal(got, []string{newConfig().Listen.Address}) {
		t.Errorf("the socket listens at %q", got)
	}
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		testenv.Optional(t, "no systemd-analyze (Debian: systemd)")
	}
	dir := t.TempDir() // where the program is installed does not matter to systemd's grammar
	for _, name := range []string{"layerd.service", "layerd.socket"} {
		b, err := os.ReadFile(units + name)
		must(t, err)
		b = []byte(strings.ReplaceAll(string(b), "=/usr/local/bin/layerd", "=/bin/true"))
		must(t, os.WriteFile(filepath.Join(dir, name), b, 0o644))
	}
	out, err := exec.Command(analyze, "verify", filepath.Join(dir, "layerd.service"), filepath.Join(dir, "layerd.socket")).CombinedOutput()
	if err != nil || strings.Contains(string(out), dir) {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// confined is the beginning of a command line that leaves a program what the unit
// leaves layerd.
func confined(t *testing.T) []string {
	t.Helper()
	s := settingsOf(t, "layerd.service")
	setpriv := testenv.Program(t, "setpriv", "util-linux")
	known, err := exec.Command(setpriv, "--list-caps").Output()
	must(t, err)
	kept := strings.Fields(strings.ToLower(strings.Join(s["CapabilityBoundingSet"], " ")))
	if len(kept) < 5 {
		t.Fatalf("CapabilityBoundingSet=%q", kept)
	}
	var drop []string
	for _, c := range strings.Fields(string(known)) {
		if !slices.Contains(kept, "cap_"+c) {
			drop = append(drop, "-"+c)
		}
	}
	return []string{setpriv, "--no-new-privs", "--inh-caps=-all", "--bounding-set=" + strings.Join(drop, ",")}
}
