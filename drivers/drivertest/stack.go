package drivertest

import (
	"fmt"
	"os"

	"github.com/layerctl/layerctl/drivers"
)

var stackCases = []testCase{
	{"stack of 1", func(k *kit) { k.stack(1) }},
	{"stack of 2", func(k *kit) { k.stack(2) }},
	{"stack of 50", func(k *kit) { k.stack(50) }},
	{"a deep stack", func(k *kit) { k.stack(k.fs.deep()) }},
	{"a layer from the middle of a stack", middleOfStack},
}

// deep is 500 on the first of the kinds: each layer is mounted, which costs with
// the depth, and the depth is not the file system's concern.
func (f *fsys) deep() int {
	if f.kind == f.cfg.kinds()[0] {
		return 500
	}
	return 100
}

// storey changes the tree as layer n of a stack does: it keeps a file now and
// then, changes a shared one, replaces a directory and deletes what the layer
// below added.
func storey(w *work, n int) {
	w.Helper()
	if n%50 == 0 { // a driver of copies copies them all in every layer
		w.file(fmt.Sprintf("kept/%d", n), itoa(n))
	}
	w.file("shared", itoa(n))
	w.file(fmt.Sprintf("short-lived-%d", n), "")
	if n > 0 {
		w.unlink(fmt.Sprintf("short-lived-%d", n-1))
	}
	if n%5 == 4 {
		w.remove("again")
	}
	w.file(fmt.Sprintf("again/%d", n), "")
	w.check(pin(w.dir))
}

// stack builds depth layers, each with a change of its own, and compares the
// last with a plain directory.
func (k *kit) stack(depth int) {
	if k.caps.MaxParents != 0 && depth > k.caps.MaxParents {
		k.Skipf("the driver takes %d parents", k.caps.MaxParents)
	}
	plain := k.dir()
	k.check(os.Chmod(plain, 0o755))
	var top drivers.Ref
	for n := range depth {
		storey(&work{TB: k, dir: plain}, n)
		top = k.quick(top, func(dir string) { storey(&work{TB: k, dir: dir}, n) })
	}
	want := k.list(plain)
	k.same("the top layer", k.tree(top), want)
	view := k.create(top, drivers.CreateOptions{ReadOnly: true})
	k.same("a view of it", k.tree(view), want)
	child := k.create(top, drivers.CreateOptions{})
	k.edit(child, func(dir string) { storey(&work{TB: k, dir: dir}, depth) })
	storey(&work{TB: k, dir: plain}, depth)
	k.same("a writable child", k.tree(child), k.list(plain))
	k.diffIsExact(top, child)
	if depth > 1 {
		k.diffIsExact(drivers.Ref{ID: top.Parents[depth-2]}, child)
	}
}

// quick makes a committed layer that need not survive a power cut.
func (k *kit) quick(parent drivers.Ref, change func(dir string)) drivers.Ref {
	k.Helper()
	r := k.create(parent, drivers.CreateOptions{Volatile: true})
	if change != nil {
		k.edit(r, change)
	}
	_, err := k.driver.Commit(k.ctx, r, drivers.CommitOptions{Volatile: true})
	k.check(err)
	return r
}

// chain makes a committed layer with so many parents, none of which changes
// anything.
func (k *kit) chain(parents int) drivers.Ref {
	k.Helper()
	var top drivers.Ref
	for range parents + 1 {
		top = k.quick(top, nil)
	}
	return top
}

// A diff takes any two layers of a stack, whichever lies above.
func middleOfStack(k *kit) {
	var refs []drivers.Ref
	var top drivers.Ref
	for n := range 6 {
		top = k.quick(top, func(dir string) { storey(&work{TB: k, dir: dir}, n) })
		refs = append(refs, top)
	}
	fork := k.quick(refs[2], func(dir string) { storey(&work{TB: k, dir: dir}, 3); (&work{TB: k, dir: dir}).file("fork", "") })
	for _, pair := range [][2]drivers.Ref{{refs[0], refs[5]}, {refs[5], refs[0]}, {refs[1], refs[3]}, {fork, refs[5]}, {refs[5], fork}, {{}, refs[4]}} {
		k.diffIsExact(pair[0], pair[1])
	}
}
