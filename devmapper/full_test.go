package devmapper

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
)

// loop is a file of so many bytes as a block device, until the test's end.
func loop(t *testing.T, bytes int64) (node, file string) {
	t.Helper()
	file = filepath.Join(testenv.Scratch(t), "disk")
	err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, bytes))
	if err != nil {
		t.Fatal(err)
	}
	l, err := sys.AttachLoop(file, sys.LoopOptions{Autoclear: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Name(), file
}

// A pool that has no space for metadata left in the middle of an Apply is an error of the Apply
// that says so. What was committed before is there, and once the commands that the error names were
// given, and the device made larger, the Apply can be done.
func TestMetadataFullInApply(t *testing.T) {
	needsDM(t)
	data, _ := loop(t, 384*mib)
	metadata, file := loop(t, 2*mib)
	options := map[string]string{"data": data, "metadata": metadata, "size": "320MiB", "filesystem": "ext4"}
	b := newBench(t, 64*mib, options)
	base := b.create(1)
	b.write(base, "base", "base")
	b.commit(base)
	r := b.create(2, 1)
	s, err := b.pool.Status()
	b.check(err)
	large := noise(48 * mib)
	var made []uint32
	// The kernel keeps a tenth of it for itself.
	for free := s.MetadataTotal/10 + 3; free > 0 && err == nil; free /= 2 {
		made = append(made, b.fillMetadata(free, uint32(10_000+len(made)))...)
		err = b.Apply(t.Context(), r, bytes.NewReader(archive(fmt.Sprintf("large%d", free), large)), layer.ApplyOptions{})
	}
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "no space for metadata") {
		s, statusErr := b.pool.Status()
		t.Fatalf("apply: %v; %+v, %v", err, s, statusErr)
	}
	b.file(base, "base", "base")
	b.check(b.Close())
	for _, command := range commands(err.Error())[1:3] {
		b.shell(command)
	}
	b.check(os.Truncate(file, 4*mib))
	b.shell("losetup -c " + metadata)
	b.reopen(options)
	b.check(b.pool.Exclusive(t.Context(), func(c *thin.Change) error {
		for _, id := range made {
			if err := c.Delete(id); err != nil {
				return err
			}
		}
		return nil
	}))
	b.file(base, "base", "base")
	b.remove(2)
	r = b.create(3, 1)
	b.check(b.Apply(t.Context(), r, bytes.NewReader(archive("large", large)), layer.ApplyOptions{}))
	b.commit(r)
	b.file(r, "large", large)
	found, err := b.Examine(t.Context(), drivers.ExamineOptions{})
	b.check(err)
	for _, f := range found {
		if f.Fault != drivers.StorageLeaked { // what the kernel was about to give back may be nobody's
			t.Errorf("at the end: %+v", f)
		}
	}
	b.remove(3, 1)
}

// fillMetadata makes thin devices from an id on until so few blocks of metadata are free.
func (b *bench) fillMetadata(free uint64, first uint32) (made []uint32) {
	b.Helper()
	b.check(b.pool.Exclusive(b.Context(), func(c *thin.Change) error {
		for {
			s, err := b.pool.Status()
			if err != nil || s.MetadataTotal-s.MetadataUsed <= free {
				return err
			}
			for range max(1, (s.MetadataTotal-s.MetadataUsed-free)*3/4) { // each takes one, and a little for the trees of all
				id := first + uint32(len(made))
				if err := c.CreateThin(id); errdefs.IsResourceExhausted(err) {
					return nil
				} else if err != nil {
					return err
				}
				made = append(made, id)
			}
		}
	}))
	return made
}
