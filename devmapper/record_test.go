package devmapper

import (
	"context"
	"errors"
	"os"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
)

// A layer whose record is damaged, or lost, keeps its thin device: neither a template that is
// made nor a Create that fails takes the id, so that with its record back it is whole.
func TestDeviceOfALostRecordIsNotTaken(t *testing.T) {
	for name, lose := range map[string]func(path string) error{
		"damaged": func(path string) error { return os.WriteFile(path, []byte("{"), 0o600) },
		"lost":    os.Remove,
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, 1<<30, map[string]string{"filesystem": "ext4", "size": "320MiB"})
			kept := b.create(1)
			b.write(kept, "f", "is here")
			b.commit(kept)
			l, err := b.layer(1)
			b.check(err)
			path := b.root + "/" + roots.Layers + "/1"
			saved, err := os.ReadFile(path)
			b.check(err)
			b.check(b.Close())
			b.check(lose(path))

			b.reopen(map[string]string{"filesystem": "xfs", "size": "320MiB"})
			if b.template.FS != "xfs" || b.template.Thin == l.Thin {
				t.Errorf("the template: %+v", b.template)
			}
			injected := &os.PathError{Op: "injected", Path: "step", Err: syscall.EIO}
			for n := 0; ; n++ {
				reached, err := steps(t.Context(), n, func() error {
					if r, err := b.read(roots.New, 2); err == nil && r.Thin == l.Thin {
						t.Errorf("step %d: it is given to another", n)
					}
					return injected
				}, func(ctx context.Context) error {
					return b.Create(ctx, drivers.Ref{ID: 2}, drivers.CreateOptions{})
				})
				if errors.Is(err, injected) != reached {
					t.Fatalf("step %d: %v", n, err)
				}
				if !reached {
					break
				}
			}
			b.remove(2)
			b.check(os.WriteFile(path, saved, 0o600))
			b.file(kept, "f", "is here")
			b.remove(1)
			b.dropStray()
		})
	}
}

// An Open that fails, or dies, with its template made and not written down leaves nothing that the
// next one keeps.
func TestOpenStoppedWithItsTemplate(t *testing.T) {
	b := newBench(t, 1<<30, map[string]string{"filesystem": "ext4", "size": "320MiB"})
	first := b.template.Thin
	b.check(b.Close())
	xfs := drivers.Config{Root: b.root, Options: map[string]string{"filesystem": "xfs", "size": "320MiB"}}
	injected := &os.PathError{Op: "injected", Path: "step", Err: syscall.EIO}
	reached, err := steps(t.Context(), 0, func() error { return injected }, func(ctx context.Context) error {
		_, err := Open(ctx, xfs)
		return err
	})
	if !reached || !errors.Is(err, injected) {
		t.Fatalf("reached %v, %v", reached, err)
	}
	if !b.died(b.start(child{Root: b.root, Op: "open", FS: "xfs"})) {
		t.Error("open has no step")
	}
	b.reopen(xfs.Options)
	b.nothingLoose("two opens")
	if all := b.thins(); len(all) != 2 || b.template.Thin == first {
		t.Errorf("thin devices %v, those of the templates are %d and %d", all, first, b.template.Thin)
	}
}

// dropStray deletes what no record names: while one cannot be read a Create that fails leaves
// its device to be listed by check.
func (b *bench) dropStray() {
	b.Helper()
	named, err := b.layerThins()
	b.check(err)
	all := b.thins()
	b.check(b.pool.Exclusive(b.Context(), func(c *thin.Change) error {
		for _, id := range all {
			if !named[id] {
				b.check(c.Delete(id))
			}
		}
		return nil
	}))
}
