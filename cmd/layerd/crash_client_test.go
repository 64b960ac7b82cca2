package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/mount"
)

// tree is what a snapshot shows: the content of its files, by name.
type tree map[string]string

// fake is what a client knows of a snapshot. It is replaced, never changed.
type fake struct {
	kind   snapshots.Kind
	parent string
	label  string
	tree   tree
	unsure bool     // a call that changes the tree was cut short
	layer  []change // that was unpacked onto it last, if it was not committed since
}

// model is what a client knows of its snapshots, by key.
type model map[string]*fake

// crasher is a client whose service is killed. It has keys of its own and knows of each
// snapshot what it must hold; of the one call that was not answered it knows both
// outcomes.
type crasher struct {
	rig   *rig
	name  string
	r     *rand.Rand
	s     snapshots.Snapshotter // of the service that runs
	d     differ
	now   model
	next  model // what is there if the unanswered call took place; nil if there is none
	named int
}

type differ interface {
	diff.Comparer
	diff.Applier
}

// errKilled says that the service died in the call.
var errKilled = errors.New("the service was killed")

// call makes a call which, if it takes place, makes one model of the other. Its error is
// errKilled, or one that should not be.
func (c *crasher) call(what string, call func() error, change func(m model)) error {
	if change != nil {
		c.next = maps.Clone(c.now)
		change(c.next)
	}
	c.rig.began()
	err := call()
	switch {
	case err == nil:
		if change != nil {
			c.now = c.next
		}
		c.next = nil
		return nil
	case (errdefs.IsUnavailable(err) || errdefs.IsCanceled(err)) && c.rig.died():
		return errKilled // next stays
	}
	c.next = nil
	return fmt.Errorf("%s: %s: %w", c.name, what, err)
}

// work makes calls until the service is killed or there were enough.
func (c *crasher) work(ctx context.Context, steps int) error {
	for range steps {
		if err := c.step(ctx); errors.Is(err, errKilled) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return nil
}

// keys are those of snapshots that fit.
func (c *crasher) keys(fits func(key string, f *fake) bool) (keys []string) {
	for _, key := range slices.Sorted(maps.Keys(c.now)) {
		if fits(key, c.now[key]) {
			keys = append(keys, key)
		}
	}
	return keys
}

// pick is one of keys, "" if there is none.
func (c *crasher) pick(keys []string) string {
	if len(keys) == 0 {
		return ""
	}
	return keys[c.r.IntN(len(keys))]
}

func committed(_ string, f *fake) bool { return f.kind == snapshots.KindCommitted }

func known(_ string, f *fake) bool { return f.kind != snapshots.KindCommitted && !f.unsure }

// leaf tells whether nothing is above a snapshot.
func (c *crasher) leaf(key string, _ *fake) bool {
	for _, f := range c.now {
		if f.parent == key {
			return false
		}
	}
	return true
}

func (c *crasher) newKey() string {
	c.named++
	return fmt.Sprintf("%s-%d", c.name, c.named)
}

// most bounds the snapshots of one client.
const most = 9

func (c *crasher) step(ctx context.Context) error {
	if len(c.now) > most {
		return c.remove(ctx)
	}
	switch n := c.r.IntN(20); {
	case n < 6:
		return c.make(ctx)
	case n < 8 && c.rig.rebases:
		return c.unpack(ctx)
	case n == 8:
		return c.again(ctx)
	case n < 10:
		return c.view(ctx)
	case n < 13:
		return c.commit(ctx, c.pick(c.keys(func(_ string, f *fake) bool { return f.kind == snapshots.KindActive && !f.unsure })), "")
	case n < 16:
		return c.remove(ctx)
	case n == 16:
		return c.update(ctx)
	case n == 17:
		return c.compare(ctx)
	case n == 18:
		return c.call("cleanup", func() error { return c.s.(snapshots.Cleaner).Cleanup(ctx) }, nil)
	}
	return c.ask(ctx)
}

const crashLabel = "containerd.io/snapshot/crash"

func (c *crasher) prepare(ctx context.Context, key, parent string) (ms []cmount.Mount, err error) {
	f := &fake{kind: snapshots.KindActive, parent: parent, label: c.word()}
	if parent != "" {
		f.tree = c.now[parent].tree
	}
	err = c.call("prepare", func() (err error) {
		ms, err = c.s.Prepare(ctx, key, parent, snapshots.WithLabels(map[string]string{crashLabel: f.label}))
		return err
	}, func(m model) { m[key] = f })
	return ms, err
}

// make makes a snapshot, changes it by a layer or in a mount, and maybe commits it.
func (c *crasher) make(ctx context.Context) error {
	key, parent := c.newKey(), ""
	if c.r.IntN(4) > 0 {
		parent = c.pick(c.keys(committed))
	}
	ms, err := c.prepare(ctx, key, parent)
	if err != nil {
		return err
	}
	if mounts := map[bool]int{true: 4, false: 2}[c.rig.driver == "fuse"]; c.r.IntN(mounts) > 0 { // each mount is a server there
		err = c.apply(ctx, key, ms, c.changes(c.now[key].tree))
	} else {
		err = c.write(ctx, key, ms)
	}
	if err != nil || c.r.IntN(2) == 0 {
		return err
	}
	return c.commit(ctx, key, "")
}

// unpack unpacks a layer without its parent, which it gets when it is committed.
func (c *crasher) unpack(ctx context.Context) error {
	key, parent := c.newKey(), c.pick(c.keys(committed))
	if parent == "" {
		return nil
	}
	ms, err := c.prepare(ctx, key, "")
	if err != nil {
		return err
	}
	if err := c.apply(ctx, key, ms, c.changes(c.now[parent].tree)); err != nil {
		return err
	}
	alone := *c.now[key]
	alone.unsure = true // it shows whiteouts, too
	c.now[key] = &alone
	return c.commit(ctx, key, parent)
}

// change is a file of a layer; nil is its removal.
type change struct {
	name    string
	content *string
}

// changes are some of a tree.
func (c *crasher) changes(t tree) (all []change) {
	names := slices.Sorted(maps.Keys(t))
	seen := map[string]bool{}
	for range 1 + c.r.IntN(5) {
		if len(names) > 0 && c.r.IntN(3) == 0 {
			if n := names[c.r.IntN(len(names))]; !seen[n] {
				seen[n] = true
				all = append(all, change{n, nil})
			}
			continue
		}
		if n := fmt.Sprintf("f%d", c.r.IntN(12)); !seen[n] {
			seen[n] = true
			text := strings.Repeat(c.word()+" ", 1+c.r.IntN(1<<c.r.IntN(13)))
			all = append(all, change{n, &text})
		}
	}
	return all
}

func (c *crasher) word() string { return fmt.Sprintf("%s-%x", c.name, c.r.Uint32()) }

func (t tree) with(all []change) tree {
	t = maps.Clone(t)
	if t == nil {
		t = tree{}
	}
	for _, ch := range all {
		if ch.content == nil {
			delete(t, ch.name)
		} else {
			t[ch.name] = *ch.content
		}
	}
	return t
}

// apply unpacks a layer onto a snapshot. One in whose Apply the service was killed holds a
// part of it.
func (c *crasher) apply(ctx context.Context, key string, ms []cmount.Mount, all []change) error {
	var b bytes.Buffer
	t := tar.NewWriter(&b)
	for _, ch := range all {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: ch.name, Mode: 0o644}
		text := ""
		if ch.content == nil {
			h.Name = ".wh." + ch.name
		} else {
			text = *ch.content
		}
		h.Size = int64(len(text))
		if err := errors.Join(t.WriteHeader(h), second(t.Write([]byte(text)))); err != nil {
			return err
		}
	}
	if err := t.Close(); err != nil {
		return err
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(b.Bytes()), Size: int64(b.Len())}
	if err := content.WriteBlob(ctx, c.rig.blobs, d.Digest.String(), &b, d); err != nil {
		return err
	}
	part, whole := *c.now[key], *c.now[key]
	part.unsure, part.layer = true, all
	whole.unsure, whole.layer = false, all
	whole.tree = part.tree.with(all)
	c.now[key] = &part
	return c.call("apply", func() error { return second(c.d.Apply(ctx, d, ms)) }, func(m model) { m[key] = &whole })
}

// again unpacks once more the layer in whose Apply the service was killed.
func (c *crasher) again(ctx context.Context) error {
	key := c.pick(c.keys(func(_ string, f *fake) bool { return f.kind == snapshots.KindActive && f.unsure && f.parent != "" }))
	if key == "" {
		return nil
	}
	var ms []cmount.Mount
	err := c.call("mounts", func() (err error) { ms, err = c.s.Mounts(ctx, key); return err }, nil)
	if err != nil {
		return err
	}
	return c.apply(ctx, key, ms, c.now[key].layer)
}

func second[T any](_ T, err error) error { return err }

// write changes a snapshot in a mount, for which it needs no service.
func (c *crasher) write(ctx context.Context, key string, ms []cmount.Mount) error {
	return c.rig.mounted(ctx, ms, func(dir string) error {
		all := c.changes(c.now[key].tree)
		for _, ch := range all {
			var err error
			if path := filepath.Join(dir, ch.name); ch.content == nil {
				err = os.Remove(path)
			} else {
				err = os.WriteFile(path, []byte(*ch.content), 0o644)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
		}
		f := *c.now[key]
		f.tree = f.tree.with(all)
		c.now[key] = &f
		return nil
	})
}

// view makes a read-only snapshot.
func (c *crasher) view(ctx context.Context) error {
	key, parent := c.newKey(), c.pick(c.keys(committed))
	if parent == "" {
		return nil
	}
	f := &fake{kind: snapshots.KindView, parent: parent, tree: c.now[parent].tree}
	return c.call("view", func() error { return second(c.s.View(ctx, key, parent)) }, func(m model) { m[key] = f })
}

// commit commits a snapshot; onto names the parent that it gets, if it had none.
func (c *crasher) commit(ctx context.Context, key, onto string) error {
	if key == "" {
		return nil
	}
	name, f := c.newKey(), *c.now[key]
	f.kind, f.label, f.unsure = snapshots.KindCommitted, c.word(), false
	opts := []snapshots.Opt{snapshots.WithLabels(map[string]string{crashLabel: f.label})}
	if onto != "" {
		f.parent = onto
		f.tree = c.now[onto].tree.with(f.layer)
		opts = append(opts, snapshots.WithParent(onto))
	}
	return c.call("commit", func() error { return c.s.Commit(ctx, name, key, opts...) }, func(m model) {
		delete(m, key)
		f.layer = nil
		m[name] = &f
	})
}

func (c *crasher) remove(ctx context.Context) error {
	key := c.pick(c.keys(c.leaf))
	if key == "" {
		return nil
	}
	return c.call("remove", func() error { return c.s.Remove(ctx, key) }, func(m model) { delete(m, key) })
}

func (c *crasher) update(ctx context.Context) error {
	key := c.pick(c.keys(func(string, *fake) bool { return true }))
	if key == "" {
		return nil
	}
	f := *c.now[key]
	f.label = c.word()
	return c.call("update", func() error {
		return second(c.s.Update(ctx, snapshots.Info{Name: key, Labels: map[string]string{crashLabel: f.label}}, "labels."+crashLabel))
	}, func(m model) { m[key] = &f })
}

// ask asks what changes nothing.
func (c *crasher) ask(ctx context.Context) error {
	key := c.pick(c.keys(known))
	if key == "" {
		return nil
	}
	return c.call("ask", func() error {
		return errors.Join(second(c.s.Stat(ctx, key)), second(c.s.Usage(ctx, key)), second(c.s.Mounts(ctx, key)))
	}, nil)
}

// compare has the service make the layer between two snapshots, which must hold what
// differs and no more.
func (c *crasher) compare(ctx context.Context) error {
	from, to := c.pick(c.keys(known)), c.pick(c.keys(known))
	if from == "" || from == to {
		return nil
	}
	var lower, upper []cmount.Mount
	var d ocispec.Descriptor
	err := c.call("diff", func() (err error) {
		if lower, err = c.s.Mounts(ctx, from); err != nil {
			return err
		}
		if upper, err = c.s.Mounts(ctx, to); err != nil {
			return err
		}
		d, err = c.d.Compare(ctx, lower, upper, diff.WithMediaType(ocispec.MediaTypeImageLayer))
		return err
	}, nil)
	if err != nil {
		return err
	}
	b, err := content.ReadBlob(ctx, c.rig.blobs, d)
	if err != nil {
		return err
	}
	got := tree{}
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		text, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeDir {
			got[h.Name] = string(text)
		}
	}
	a, want := c.now[from].tree, tree{}
	for name, text := range c.now[to].tree {
		if old, ok := a[name]; !ok || old != text {
			want[name] = text
		}
	}
	for name := range a {
		if _, ok := c.now[to].tree[name]; !ok {
			want[".wh."+name] = ""
		}
	}
	for name := range want { // a file may differ in its time alone
		if got[name] != want[name] {
			return fmt.Errorf("%s: diff of %s to %s: %s", c.name, from, to, differs(got, want))
		}
	}
	for name, text := range got {
		if _, ok := want[name]; !ok && c.now[to].tree[name] != text {
			return fmt.Errorf("%s: diff of %s to %s: %s", c.name, from, to, differs(got, want))
		}
	}
	return nil
}

// differs names the files in which two trees differ.
func differs(got, want tree) string {
	var words []string
	for name, text := range want {
		if g, ok := got[name]; !ok {
			words = append(words, "lacks "+name)
		} else if g != text {
			words = append(words, fmt.Sprintf("%s has %d bytes %.20q, not %d %.20q", name, len(g), g, len(text), text))
		}
	}
	for name, text := range got {
		if _, ok := want[name]; !ok {
			words = append(words, fmt.Sprintf("%s should not be there (%d bytes %.20q)", name, len(text), text))
		}
	}
	slices.Sort(words)
	return strings.Join(words, "; ")
}

// settle finds out which model is true, by what the service lists.
func (c *crasher) settle(ctx context.Context) error {
	there := map[string]snapshots.Info{}
	err := c.s.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if strings.HasPrefix(i.Name, c.name+"-") {
			there[i.Name] = i
		}
		return nil
	})
	if errdefs.IsUnavailable(err) && c.rig.died() {
		return errKilled
	}
	if err != nil {
		return err
	}
	m, err := c.which(there)
	if err != nil {
		return err
	}
	c.now, c.next = m, nil
	return nil
}

// which is the model that a list agrees with.
func (c *crasher) which(there map[string]snapshots.Info) (model, error) {
	why := c.now.not(there)
	if why == "" {
		return c.now, nil
	}
	if c.next != nil {
		more := c.next.not(there)
		if more == "" {
			return c.next, nil
		}
		why += "; nor as after the call that was cut short: " + more
	}
	return nil, fmt.Errorf("%s: not as it was: %s", c.name, why)
}

// not says in what a list differs from a model; "" if in nothing.
func (m model) not(there map[string]snapshots.Info) string {
	var words []string
	for key, f := range m {
		i, ok := there[key]
		switch {
		case !ok:
			words = append(words, fmt.Sprintf("%s %s is lost", f.kind, key))
		case i.Kind != f.kind || i.Parent != f.parent || i.Labels[crashLabel] != f.label:
			words = append(words, fmt.Sprintf("%s is %s on %q, label %s; was %s on %q, label %s",
				key, i.Kind, i.Parent, i.Labels[crashLabel], f.kind, f.parent, f.label))
		}
	}
	for key, i := range there {
		if m[key] == nil {
			words = append(words, fmt.Sprintf("%s %s should not be there", i.Kind, key))
		}
	}
	slices.Sort(words)
	return strings.Join(words, "; ")
}

// mounted mounts a snapshot for as long as f runs.
func (g *rig) mounted(ctx context.Context, ms []cmount.Mount, f func(dir string) error) error {
	dir, err := os.MkdirTemp(g.dir, "m")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	if err := mount.All(ctx, ms, dir); err != nil {
		return err
	}
	err = f(dir)
	return errors.Join(err, mount.Unmount(dir, mount.UnmountOptions{Wait: patience}))
}
