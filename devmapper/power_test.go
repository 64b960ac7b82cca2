package devmapper

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/testenv/vm"
	"github.com/layerctl/layerctl/layer"
)

const (
	// envVM names the kernel of the machine whose power is cut; `make test-vm` sets it.
	envVM = "LAYERCTL_VM"
	// envCuts is how often it is.
	envCuts = "LAYERCTL_CUTS"
	// envKept is what the machine is told that it has committed before; envLook says
	// that it is to look at that, and no more.
	envKept = "LAYERCTL_KEPT"
	envLook = "LAYERCTL_LOOK"
)

func TestMain(m *testing.M) {
	vm.Init() // does not return in the guest's first process
	drivertest.Main(m)
}

// A machine at work on a pool loses its power again and again: each time, all that it
// said to have committed is there and whole, and the pool's metadata is sound.
func TestMachineLosesItsPower(t *testing.T) {
	name := os.Getenv(envVM)
	if name == "" {
		testenv.Optional(t, "starts a virtual machine: make test-vm")
	}
	kernel, err := vm.Install(vm.CacheDir(), name)
	if err != nil {
		t.Fatal(err)
	}
	cuts, err := strconv.Atoi(os.Getenv(envCuts))
	if err != nil {
		cuts = 4
	}
	disk := filepath.Join(testenv.Scratch(t), "disk")
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 1<<30)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(testenv.Program(t, "mkfs.ext4", "e2fsprogs"), "-q", disk).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{T: t, config: vm.Config{Kernel: kernel, Init: exe, Argv: []string{exe, "-test.run=^TestMachineAtWork$", "-test.v"},
		Dir: filepath.Dir(exe), Disks: []string{disk}, Memory: 1 << 30}, committed: map[string]bool{}}
	for cut := range cuts + 1 {
		m.run(cut < cuts)
	}
	t.Logf("%d cuts, %d layers committed and there", cuts, len(m.committed))
}

// machine is a guest that is cut off and started again.
type machine struct {
	*testing.T
	config    vm.Config
	committed map[string]bool
}

// run starts it, takes note of what it says, and cuts it off at some moment; or lets it
// end after it has looked at what is there.
func (m *machine) run(cut bool) {
	m.Helper()
	var kept []string
	for id := range m.committed {
		kept = append(kept, id)
	}
	slices.Sort(kept)
	c := m.config
	c.Env = append(os.Environ(), envKept+"="+strings.Join(kept, ","), "LAYERCTL_EXPECT_DM=1")
	if !cut {
		c.Env = append(c.Env, envLook+"=1")
	}
	ctx, off := context.WithTimeout(m.Context(), 5*time.Minute)
	defer off()
	r, w := io.Pipe()
	var errs bytes.Buffer
	c.Stdout, c.Stderr = w, &errs
	lines := 3 + rand.IntN(8)
	delay := time.Duration(rand.IntN(60)) * time.Millisecond
	done := make(chan string)
	go func() {
		var all strings.Builder
		s := bufio.NewScanner(r)
		for s.Scan() {
			fmt.Fprintln(&all, s.Text())
			if id, ok := strings.CutPrefix(s.Text(), "committed "); ok {
				m.committed[id] = true
				if lines--; cut && lines == 0 {
					time.AfterFunc(delay, off)
				}
			}
			if id, ok := strings.CutPrefix(s.Text(), "removing "); ok {
				delete(m.committed, id)
			}
		}
		done <- all.String()
	}()
	status, err := vm.Run(ctx, c)
	w.Close()
	out := <-done
	if cut && (!errors.Is(err, context.Canceled) || lines > 0) || !cut && (err != nil || status != 0) {
		m.Fatalf("status %d, %v\n%s%s", status, err, out, &errs)
	}
}

// TestMachineAtWork is what runs in the machine: a look at what is there, and then work
// until the power goes.
func TestMachineAtWork(t *testing.T) {
	if _, ok := os.LookupEnv(envKept); !ok {
		return // the machine has it
	}
	needsDM(t)
	dir := testenv.Scratch(t)
	if err := sys.Mount("/dev/ubda", dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer sys.Umount(dir, 0)
	if _, err := os.Stat(dir + "/r/metadata"); err == nil {
		thinCheck(t, dir)
	}
	b := &bench{T: t, fs: dir}
	b.reopen(nil)
	last := b.lookAtKept(strings.FieldsFunc(os.Getenv(envKept), func(r rune) bool { return r == ',' }))
	if t.Failed() || os.Getenv(envLook) != "" {
		b.check(b.Close())
		thinCheck(t, dir)
		return
	}
	for id := last + 1; ; id++ {
		b.workOn(id)
	}
}

// thinCheck checks the metadata of a pool that is not active.
func thinCheck(t *testing.T, dir string) {
	t.Helper()
	program, err := exec.LookPath("/usr/sbin/thin_check")
	if err != nil {
		t.Fatalf("no thin_check (Debian: thin-provisioning-tools): %v", err)
	}
	if out, err := exec.Command(program, dir+"/r/metadata").CombinedOutput(); err != nil {
		t.Errorf("thin_check: %v\n%s", err, out)
	}
}

// lookAtKept checks what was committed before the cut, and removes all else.
func (b *bench) lookAtKept(kept []string) (last drivers.ID) {
	for _, name := range kept {
		id, _ := drivers.ParseID(name)
		l, err := b.layer(id)
		if err != nil || l.Kind != committed {
			b.Errorf("layer %s, which was committed: %+v, %v", name, l, err)
			continue
		}
		b.check(b.lookAt(b.Context(), drivers.Ref{ID: id}, func(s seen) error {
			got, err := os.ReadFile(s.path + "/own")
			if want := contentOf(id); string(got) != want {
				b.Errorf("layer %s: %d bytes, %v; want %d", name, len(got), err, len(want))
			}
			return nil
		}))
	}
	var others []drivers.ID
	for id, err := range b.IDs(b.Context()) {
		b.check(err)
		last = max(last, id)
		if !slices.Contains(kept, id.String()) {
			others = append(others, id)
		}
	}
	slices.Sort(others)
	slices.Reverse(others)
	b.remove(others...)
	if loose := b.whole(); len(loose) > 0 {
		b.Errorf("thin devices %v are nobody's", loose)
	}
	return last
}

func contentOf(id drivers.ID) string { return strings.Repeat(id.String()+" ", 50_000) }

// workOn makes one layer on nothing, commits it, now and then under a mount, and
// removes every other one but some.
func (b *bench) workOn(id drivers.ID) {
	r := b.create(id)
	b.check(b.Apply(b.Context(), r, bytes.NewReader(archive("own", contentOf(id))), layer.ApplyOptions{}))
	unmount := func() {}
	if id%3 == 0 {
		_, unmount = b.mount(r)
	}
	b.commit(r)
	fmt.Printf("committed %s\n", id)
	unmount()
	if id%2 == 0 {
		fmt.Printf("removing %s\n", id-1)
		b.remove(id - 1)
	}
}
