package drivertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/layer"
)

var stepCases = []testCase{
	{"an error at each step", func(k *kit) { k.eachOp(k.errorAt) }},
	{"the context ends at each step", func(k *kit) { k.eachOp(k.cancelAt) }},
	{"a crash at each step", func(k *kit) { k.eachOp(k.crashAt) }},
}

// stepOp is a change that has steps.
type stepOp struct {
	// ready makes what the change needs, on top of base.
	ready func(k *kit, base drivers.Ref) drivers.Ref
	call  func(ctx context.Context, d drivers.Driver, r drivers.Ref, tar []byte) error
	// stays: after an error the layer is still there, and the call may be tried
	// again.
	stays bool
}

var stepOps = map[string]stepOp{
	"create": {
		ready: func(k *kit, base drivers.Ref) drivers.Ref { return k.ref(base) },
		call: func(ctx context.Context, d drivers.Driver, r drivers.Ref, _ []byte) error {
			return d.Create(ctx, r, drivers.CreateOptions{})
		}},
	"create without parent": {
		ready: func(k *kit, _ drivers.Ref) drivers.Ref { return k.ref(drivers.Ref{}) },
		call: func(ctx context.Context, d drivers.Driver, r drivers.Ref, _ []byte) error {
			return d.Create(ctx, r, drivers.CreateOptions{})
		}},
	"create of a view": {
		ready: func(k *kit, base drivers.Ref) drivers.Ref { return k.ref(base) },
		call: func(ctx context.Context, d drivers.Driver, r drivers.Ref, _ []byte) error {
			return d.Create(ctx, r, drivers.CreateOptions{ReadOnly: true})
		}},
	"commit": {
		ready: func(k *kit, base drivers.Ref) drivers.Ref {
			r := k.create(base, drivers.CreateOptions{})
			k.edit(r, func(dir string) { k.check(os.WriteFile(dir+"/f", []byte("changed"), 0o644)) })
			return r
		},
		call: func(ctx context.Context, d drivers.Driver, r drivers.Ref, _ []byte) error {
			_, err := d.Commit(ctx, r, drivers.CommitOptions{})
			return err
		},
		stays: true},
	"remove": {
		ready: func(k *kit, base drivers.Ref) drivers.Ref {
			return k.layer(base, func(dir string) { k.check(os.WriteFile(dir+"/f", []byte("changed"), 0o644)) })
		},
		call: func(ctx context.Context, d drivers.Driver, r drivers.Ref, _ []byte) error { return d.Remove(ctx, r.ID) }},
	"apply": {
		ready: func(k *kit, base drivers.Ref) drivers.Ref { return k.create(base, drivers.CreateOptions{}) },
		call: func(ctx context.Context, d drivers.Driver, r drivers.Ref, tar []byte) error {
			a, ok := d.(drivers.Applier)
			if !ok {
				return nil
			}
			return a.Apply(ctx, r, bytes.NewReader(tar), layer.ApplyOptions{})
		}},
}

// eachOp finds the steps of each change by doing it once, and then calls at for
// each of them.
func (k *kit) eachOp(at func(name string, base drivers.Ref, tar []byte, step int)) {
	base := k.layer(drivers.Ref{}, func(dir string) {
		k.check(os.MkdirAll(dir+"/d", 0o755))
		k.check(os.WriteFile(dir+"/d/f", []byte("base"), 0o644))
		k.check(os.WriteFile(dir+"/f", []byte("base"), 0o644))
		k.check(os.Link(dir+"/f", dir+"/g"))
	})
	want, tar := k.tree(base), k.walkDiff(drivers.Ref{}, base).Tar
	total := 0
	for _, name := range []string{"create", "create without parent", "create of a view", "commit", "remove", "apply"} {
		steps := k.steps(name, base, tar)
		total += len(steps)
		for i := range steps {
			at(name, base, tar, i)
			k.same(fmt.Sprintf("the parent after %s was stopped at %q", name, steps[i]), k.tree(base), want)
		}
	}
	if total == 0 {
		k.Skip("the driver names no steps")
	}
}

// steps records the steps of one change.
func (k *kit) steps(name string, base drivers.Ref, tar []byte) []string {
	k.Helper()
	op := stepOps[name]
	r := op.ready(k, base)
	var mu sync.Mutex
	var steps []string
	ctx := faults.With(k.ctx, func(step string) error {
		mu.Lock()
		defer mu.Unlock()
		steps = append(steps, step)
		return nil
	})
	k.check(op.call(ctx, k.driver, r, tar))
	k.check(k.driver.Remove(k.ctx, r.ID))
	for _, s := range steps {
		if !strings.HasPrefix(s, k.caps.Driver+": ") && !strings.HasPrefix(s, "layer: ") {
			k.Errorf("step %q names not its driver", s)
		}
	}
	return steps
}

// errorAt fails the step'th step.
func (k *kit) errorAt(name string, base drivers.Ref, tar []byte, step int) {
	k.Helper()
	op := stepOps[name]
	r := op.ready(k, base)
	injected := &os.PathError{Op: "injected", Path: name, Err: syscall.EIO}
	var n int
	ctx := faults.With(k.ctx, func(string) error {
		if n++; n == step+1 {
			return injected
		}
		return nil
	})
	err := op.call(ctx, k.driver, r, tar)
	var got *os.PathError
	if !errors.As(err, &got) || got != injected {
		k.Fatalf("%s, step %d: %v, want the injected error", name, step, err)
	}
	k.oneSentinel(err)
	k.afterwards(name, op, base, r)
}

// cancelAt ends the context at the step'th step.
func (k *kit) cancelAt(name string, base drivers.Ref, tar []byte, step int) {
	k.Helper()
	op := stepOps[name]
	r := op.ready(k, base)
	ctx, cancel := context.WithCancel(k.ctx)
	defer cancel()
	var n int
	err := op.call(faults.With(ctx, func(string) error {
		if n++; n == step+1 {
			cancel()
		}
		return nil
	}), k.driver, r, tar)
	if !errors.Is(err, context.Canceled) {
		k.Fatalf("%s, cancelled at step %d: %v", name, step, err)
	}
	k.afterwards(name, op, base, r)
}

// crashAt ends another process at the step'th step.
func (k *kit) crashAt(name string, base drivers.Ref, tar []byte, step int) {
	k.Helper()
	op := stepOps[name]
	r := op.ready(k, base)
	file := k.dir() + "/tar"
	k.check(os.WriteFile(file, tar, 0o600))
	k.check(k.driver.Close())
	k.crashed(job{Crash: true, Op: name, Root: k.root, Step: step, Ref: r, Tar: file})
	k.driver = k.open(k.root)
	k.afterwards(name, op, base, r)
}

// afterwards checks what the contract says of a change that was stopped: IDs
// lists nothing but what is known, the layer is absent or acceptable to Remove,
// and its ID can be made again.
func (k *kit) afterwards(name string, op stepOp, base, r drivers.Ref) {
	k.Helper()
	for _, id := range k.ids() {
		if id != base.ID && id != r.ID {
			k.Errorf("%s: IDs() has %s, which nobody made", name, id)
		}
	}
	if !slices.Contains(k.ids(), base.ID) {
		k.Errorf("%s: IDs() has lost the parent", name)
	}
	if op.stays {
		k.commitAfter(name, r)
	}
	k.check(k.driver.Remove(k.ctx, r.ID))
	if slices.Contains(k.ids(), r.ID) {
		k.Errorf("%s: IDs() has %s after its removal", name, r.ID)
	}
	k.check(k.driver.Create(k.ctx, r, drivers.CreateOptions{}))
	if len(r.Parents) > 0 {
		k.same(name+": the layer made again", k.tree(r), k.tree(base))
	}
	k.check(k.driver.Remove(k.ctx, r.ID))
}

// commitAfter checks that a commit that was stopped can be done again, unless
// it had been done.
func (k *kit) commitAfter(name string, r drivers.Ref) {
	k.Helper()
	_, again := k.driver.Commit(k.ctx, r, drivers.CommitOptions{})
	dir := k.mount(r, drivers.MountOptions{})
	defer k.umount(dir)
	if b, err := os.ReadFile(dir + "/f"); err != nil || string(b) != "changed" {
		k.Errorf("%s: f afterwards: %q, %v", name, b, err)
	}
	if err := os.WriteFile(dir+"/new", nil, 0o644); !errors.Is(err, syscall.EROFS) {
		k.Errorf("%s: tried again: %v; and then a write into the layer: %v, want EROFS", name, again, err)
	}
}
