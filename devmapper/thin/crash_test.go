package thin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

const envChild = "LAYERCTL_THIN_CHILD"

// child is what another process of this test binary does with a pool until it dies.
type child struct {
	Dir     string
	Options Options
	Op      string
	Step    int    // at which it dies: the number of those before it; -1: by name
	At      string // the name of that
}

// dies starts a child and returns the step that it died at, "" if there was none such.
func (b *bench) dies(c child) (at string) {
	b.Helper()
	text, err := json.Marshal(c)
	b.check(err)
	var out bytes.Buffer
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestChild$")
	cmd.Env = append(os.Environ(), envChild+"="+string(text))
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	if testenv.Killed(cmd.ProcessState) {
		name, err := os.ReadFile(c.Dir + "/died")
		b.check(err)
		b.check(os.Remove(c.Dir + "/died"))
		return string(name)
	}
	if err != nil {
		b.Fatalf("%+v: %v\n%s", c, err, out.String())
	}
	return ""
}

// TestChild is no test: it is what dies starts.
func TestChild(t *testing.T) {
	text := os.Getenv(envChild)
	if text == "" {
		return
	}
	var c child
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	n := 0
	ctx := faults.With(context.Background(), func(step string) error {
		if n++; n-1 != c.Step && (c.Step >= 0 || step != c.At) {
			return nil
		}
		err := os.WriteFile(c.Dir+"/died", []byte(step), 0o600)
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		return err
	})
	if err := c.run(ctx, t); err != nil {
		t.Fatal(err)
	}
}

func (c child) run(ctx context.Context, t *testing.T) error {
	opening := context.Background()
	if c.Op == "open" {
		opening = ctx
	}
	p, err := Open(opening, c.Dir, c.Options)
	if err != nil {
		return err
	}
	p.stop()
	p.watching.Wait() // or it might be quicker
	switch c.Op {
	case "grow":
		b := &bench{t}
		err = errors.Join(b.write(b.volume(p, 0), 0, 'x', 14*mib), p.Grow(ctx))
	case "policy":
		p.rec.Full = Error
		err = p.Grow(ctx)
	case "snapshot":
		var s *Snapshot
		if s, err = p.Snapshot(ctx); err == nil {
			err = s.release(ctx)
		}
	}
	return errors.Join(err, p.Close())
}

// killedAtEach has a process die at each step of op, on a directory for each, and calls next with
// what it left; want are the steps that there must be.
func (b *bench) killedAtEach(op string, o func() Options, want []string, next func(step, dir string)) {
	b.Helper()
	fs := b.fileSystem(512 * mib)
	var met []string
	for n := 0; ; n++ {
		dir := fmt.Sprintf("%s/%s%d", fs, op, n)
		b.check(os.Mkdir(dir, 0o700))
		step := b.dies(child{Dir: dir, Options: o(), Op: op, Step: n})
		if step == "" {
			break
		}
		met = append(met, step)
		next(step, dir)
	}
	for _, step := range want {
		if !slices.Contains(met, step) {
			b.Errorf("no step %q in %q", step, met)
		}
	}
}

func (b *bench) onFiles() Options { return Options{DataBytes: 16 * mib, MetadataBytes: 2 * mib} }

func (b *bench) onDevices() Options {
	return Options{Data: b.loop(16 * mib), Metadata: b.loop(2 * mib)}
}

// A process dies at each step of the first Open: the next one makes the pool.
func TestProcessDiesAtEachStepOfOpen(t *testing.T) {
	b := newBench(t)
	active := []string{"thin: open: recorded", "thin: open: device created", "thin: open: table loaded", "thin: open: resumed", "thin: open: new no more"}
	files := append([]string{"thin: open: data made", "thin: open: metadata made"}, active...)
	next := func(step, dir string) {
		p := b.open(dir, Options{})
		v := b.volume(p, 0)
		b.check(b.write(v, 0, 'a', 4096))
		b.drop(p, v)
		if s := b.status(p); s.Mode != ReadWrite || p.rec.New {
			t.Errorf("%s: %+v, %+v", step, s, p.rec)
		}
		b.check(p.Close())
		b.gone(p)
	}
	b.killedAtEach("open", b.onFiles, files, next)
	b.killedAtEach("open", b.onDevices, active, next)
}

// A process dies at each step of a pool's growth: what is written to a layer meanwhile waits, and
// goes on with the next Open, which has the pool as large as its file.
func TestProcessDiesAtEachStepOfGrowth(t *testing.T) {
	b := newBench(t)
	steps := []string{"thin: grow: file larger", "thin: grow: loop device larger", "thin: grow: table loaded", "thin: grow: suspended", "thin: grow: resumed"}
	b.killedAtEach("grow", b.onFiles, steps, func(step, dir string) {
		user, err := os.OpenFile(Node(b.onlyVolume(dir).Name), os.O_WRONLY|os.O_SYNC, 0)
		b.check(err)
		written := make(chan error)
		go func() {
			_, err := user.WriteAt(bytes.Repeat([]byte{'y'}, 20*mib), 14*mib) // beyond what there was
			written <- errors.Join(err, user.Close())
		}()
		p := b.open(dir, Options{})
		if err := <-written; err != nil {
			t.Errorf("%s: %v", step, err)
		}
		v := b.onlyVolume(dir)
		b.wantByte(v, 0, 'x')
		b.wantByte(v, 33*mib, 'y')
		i, err := p.Info(p.Name())
		b.check(err)
		file, err := os.Stat(p.DataPath())
		b.check(err)
		if s := b.status(p); i.Suspended || i.InactiveTable || s.Mode != ReadWrite || s.Policy != Queue || int64(s.DataTotal)*p.BlockBytes() != file.Size() {
			t.Errorf("%s: %+v, %+v, a file of %d", step, i, s, file.Size())
		}
		b.drop(p, v)
		b.check(p.Close())
		b.gone(p)
	})
}

// onlyVolume is what volume made in the pool of a directory, whoever called it.
func (b *bench) onlyVolume(dir string) Volume {
	b.Helper()
	root, err := sys.OpenDir(dir)
	b.check(err)
	defer root.Close()
	p := &Pool{dir: dir, root: root}
	p.name, err = p.deviceName()
	b.check(err)
	return Volume{Name: p.Prefix() + "va", Sectors: 64 * mib / 512}
}

// A process that has the pool open resumes it when another dies that had it suspended.
func TestProcessDiesWithThePoolSuspended(t *testing.T) {
	b := newBench(t)
	dir := b.fileSystem(128 * mib)
	p := b.open(dir, b.onFiles())
	v := b.volume(p, 0)
	if at := b.dies(child{Dir: dir, Op: "policy", Step: -1, At: "thin: grow: suspended"}); at == "" {
		t.Error("not killed")
	}
	testenv.Eventually(t, "resumed", func() bool { return !p.suspended() })
	b.check(b.write(v, 0, 'a', 4096))
	b.drop(p, v)
}

// A process dies at each step of taking and giving back a metadata snapshot: the next Open gives
// it back, and there can be another.
func TestProcessDiesAtEachStepOfASnapshot(t *testing.T) {
	b := newBench(t)
	steps := []string{"thin: snapshot: recorded", "thin: snapshot: reserved", "thin: snapshot: taken", "thin: snapshot: released"}
	for _, o := range []func() Options{b.onFiles, b.onDevices} {
		b.killedAtEach("snapshot", o, steps, func(step, dir string) {
			p := b.open(dir, Options{})
			if s := b.status(p); s.HeldRoot != 0 {
				t.Errorf("%s: %+v", step, s)
			}
			s, err := p.Snapshot(t.Context())
			b.check(err)
			b.check(s.Release())
			b.check(p.Close())
			b.gone(p)
		})
	}
}

// A growth that fails at a step leaves a pool that goes on, and can be made larger.
func TestGrowthFailsAtEachStep(t *testing.T) {
	b := newBench(t)
	p := b.open(b.fileSystem(512*mib), b.onFiles())
	p.stop()
	p.watching.Wait()
	v := b.volume(p, 0)
	injected := errors.New("injected")
	for n := 0; ; n++ {
		p.rec.Full = map[Policy]Policy{Queue: Error, Error: Queue}[b.status(p).Policy] // so that there is another table
		at := 0
		err := p.Grow(faults.With(t.Context(), func(string) error {
			if at++; at == n+1 {
				return injected
			}
			return nil
		}))
		var i dm.Info
		if i, _ = p.Info(p.Name()); i.Suspended || i.InactiveTable {
			t.Errorf("step %d: %+v", n, i)
		}
		b.check(b.write(v, 0, 'a', 4096))
		if err == nil {
			break
		}
		if !errors.Is(err, injected) {
			t.Fatalf("step %d: %v", n, err)
		}
	}
	b.drop(p, v)
}
