package btrfs

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
)

const (
	envUser = "LAYERCTL_BTRFS_USER" // the root that an ordinary user's test works in
	nobody  = 65534
)

// TestOrdinaryUser: what somebody without any privilege and without a user
// namespace can do, in a directory of his own, and that a removal is one call where
// the file system is mounted with user_subvol_rm_allowed.
func TestOrdinaryUser(t *testing.T) {
	if dir := os.Getenv(envUser); dir != "" {
		asOrdinaryUser(t, dir)
		return
	}
	for name, opts := range map[string][]testenv.Option{
		"deletes file by file": nil, "user_subvol_rm_allowed": {testenv.MountOptions("user_subvol_rm_allowed")},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.Leaks(t)
			dir := testenv.FS(t, "btrfs", append(opts, testenv.Size(256<<20))...)
			if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil { // the scratch directory is root's
				t.Fatal(err)
			}
			if err := os.Chown(dir, nobody, nobody); err != nil {
				t.Fatal(err)
			}
			runAsNobody(t, dir)
		})
	}
}

func runAsNobody(t *testing.T, dir string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestOrdinaryUser$", "-test.v")
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "LAYERCTL_EXPECT=") }), envUser+"="+dir, "TMPDIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestOrdinaryUser")) {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
}

func asOrdinaryUser(t *testing.T, dir string) {
	h := newHistory(t, dir+"/r")
	if h.d.admin || h.d.caps.Quota || h.d.caps.UsageBytes || h.d.caps.IDMap || len(h.d.caps.Lost) == 0 {
		t.Errorf("capabilities: %+v", h.d.caps)
	}
	base, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	h.must(os.MkdirAll(tree+"/a/b", 0o755))
	h.must(os.WriteFile(tree+"/a/b/f", []byte("1"), 0o444))
	h.must(os.Chmod(tree+"/a/b", 0o555))
	h.commit(base)
	r, tree := h.create(base, drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/a/g", []byte("2"), 0o644))
	var tar bytes.Buffer
	_, err := layer.WriteTar(h.ctx, &tar, h.d.Diff(h.ctx, base, r), layer.TarOptions{})
	h.must(err)
	h.commit(r)
	again, tree := h.create(base, drivers.CreateOptions{})
	h.must(h.d.Apply(h.ctx, again, &tar, layer.ApplyOptions{}))
	if b, err := os.ReadFile(tree + "/a/g"); string(b) != "2" {
		t.Errorf("applied: %q, %v", b, err)
	}
	if u, err := h.d.Usage(h.ctx, r); err != nil || u != (drivers.Usage{Bytes: -1, Inodes: -1}) {
		t.Errorf("usage %+v, %v", u, err)
	}
	if err := h.d.WaitFreed(h.ctx); !errdefs.IsUnavailable(err) {
		t.Errorf("wait: %v", err)
	}
	if _, err := h.d.Dedup(h.ctx, []drivers.Ref{base}, drivers.DedupOptions{}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("dedup: %v", err)
	}
	if err := h.d.EnableQuota(h.ctx, quotaQgroups); !errdefs.IsPermissionDenied(err) {
		t.Errorf("quota: %v", err)
	}
	root, err := sys.OpenDir(tree)
	h.must(err)
	defer root.Close()
	h.must(ioctl.Create(root, "nested"))
	h.must(os.WriteFile(tree+"/nested/f", []byte("3"), 0o400))
	nested, err := sys.OpenDir(tree + "/nested")
	h.must(err)
	h.must(errors.Join(ioctl.SetReadOnly(nested, true), nested.Close()))
	for _, r := range []drivers.Ref{again, r, base} {
		h.must(h.d.Remove(h.ctx, r.ID))
	}
	if ids := slices.Collect(idsOf(h)); len(ids) > 0 {
		t.Errorf("left: %v", ids)
	}
}
