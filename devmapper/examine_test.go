package devmapper

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

// finds has Examine find what is wanted and nothing else: of each finding its kind, its
// object and a part of its words, in any order.
func (b *bench) finds(what string, o drivers.ExamineOptions, want ...[3]string) []drivers.Finding {
	b.Helper()
	found, err := b.Examine(b.Context(), o)
	b.check(err)
	b.same(what, found, want)
	return found
}

func (b *bench) same(what string, found []drivers.Finding, want [][3]string) {
	b.Helper()
	left := slices.Clone(want)
	for _, f := range found {
		i := slices.IndexFunc(left, func(w [3]string) bool {
			return string(f.Fault) == w[0] && f.Object == w[1] && strings.Contains(f.Detail+f.Done+f.Suggestion, w[2])
		})
		if i < 0 {
			b.Errorf("%s: found %+v", what, f)
			continue
		}
		left = slices.Delete(left, i, i+1)
	}
	if len(left) > 0 {
		b.Errorf("%s: not found: %q, of %+v", what, left, found)
	}
}

// commands are what stands between backquotes.
func commands(text string) (all []string) {
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(text, -1) {
		all = append(all, m[1])
	}
	return all
}

func (b *bench) shell(command string) {
	b.Helper()
	cmd := exec.Command("/bin/sh", "-ec", command)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("%s: %v\n%s", command, err, out)
	}
}

// rewrite changes a layer's record, and returns what puts it back.
func (b *bench) rewrite(id drivers.ID, f func(r *record)) (back func()) {
	b.Helper()
	r, err := b.read(roots.Layers, id)
	b.check(err)
	changed := *r
	f(&changed)
	b.check(b.driver.write(roots.Layers, id, &changed))
	return func() {
		b.Helper()
		b.check(b.driver.write(roots.Layers, id, r))
	}
}

// What the pool and the records say of each other does not agree, in each way that
// there is: each is found and named, and nothing that is sound.
func TestExamineFindsWhatDoesNotAgree(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	none := drivers.ExamineOptions{Repair: true}
	for id := drivers.ID(1); id <= 3; id++ {
		b.write(b.create(id), "f", "content")
		b.commit(drivers.Ref{ID: id})
	}
	view := drivers.Ref{ID: 4, Parents: []drivers.ID{3}}
	b.check(b.Create(t.Context(), view, drivers.CreateOptions{ReadOnly: true}))
	_, unmount := b.mount(b.create(5, 3))
	b.finds("sound", none)

	b.check(b.pool.Exclusive(t.Context(), func(c *thin.Change) error { return c.CreateThin(77) }))
	stray := b.finds("stray", none, [3]string{"stray-storage", "thin device 77", "no record names it"})
	l, err := os.ReadFile(b.root + "/l/2")
	b.check(err)
	b.check(os.WriteFile(b.root+"/l/2", []byte("{"), 0o600))
	b.finds("stray, and a record that cannot be read", none, [3]string{"stray-storage", "thin device 77", "may be that of layer 2"},
		[3]string{"stray-storage", "thin device 2", "may be that of layer 2"})
	b.check(os.WriteFile(b.root+"/l/2", l, 0o600))
	b.shell(commands(stray[0].Suggestion)[0])
	b.finds("stray deleted by the command", none)

	back := b.rewrite(2, func(r *record) { r.Thin = 1 })
	b.finds("two of one", none, [3]string{"storage-damaged", "thin device 1", "is that of layer 1 and of layer 2put back the metadata"}, [3]string{"stray-storage", "thin device 2", "no record"},
		[3]string{"storage-damaged", "layer 2", "its record is of transaction 2 of the pool, thin device 1 of 1"})
	back()
	back = b.rewrite(1, func(r *record) { r.Sectors = 128 })
	b.finds("beyond the end", none, [3]string{"storage-damaged", "layer 1", "its record says that it has 1"})
	back()
	back = b.rewrite(1, func(r *record) { r.Tx = 3 })
	b.finds("older than the record", none, [3]string{"storage-damaged", "layer 1", "its record is of transaction 3 of the pool, thin device 1 of 1"})
	back()
	b.finds("sound again", none)
	unmount()
	b.remove(5, 4, 3, 2, 1)
}

// leaves makes a layer and its device in a pool, and dies.
func (d *driver) leaves(ctx context.Context, id drivers.ID) error {
	r := drivers.Ref{ID: id}
	if err := d.Create(ctx, r, drivers.CreateOptions{}); err != nil {
		return err
	}
	if _, err := d.Mounts(ctx, r, drivers.MountOptions{}); err != nil {
		return err
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// Devices that no layer has are listed, and removed by a repair: but for those that
// somebody has open, whose owner is alive, or that are not ours.
func TestExamineRemovesOrphanDevices(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	for id := drivers.ID(1); id <= 2; id++ {
		b.write(b.create(id), "f", "content")
	}
	dead, pids := exec.Command("/bin/true"), b.pool.Prefix()+"0.1."+pidNamespace()
	b.check(dead.Run())
	if !b.died(b.start(child{Root: b.fs + "/gone", Op: "leaves", ID: 5, Step: -1})) {
		t.Fatal("the child lives")
	}
	ctl, err := dm.Open()
	b.check(err)
	defer ctl.Close()
	b.finds("a pool without its owner is not gone", drivers.ExamineOptions{Repair: true})
	b.check(os.RemoveAll(b.fs + "/gone"))
	gone := devicesBut(t, ctl, b.pool.Prefix())
	if len(gone) != 2 {
		t.Fatalf("the dead child's devices: %v", gone)
	}
	orphans := []string{b.deviceName(99, 1), b.deviceName(1, 2), b.deviceName(0, 2), fmt.Sprintf("%s-%d-1", pids, dead.Process.Pid), b.pool.Prefix() + "x"}
	alive := []string{fmt.Sprintf("%s-%d-1", pids, os.Getppid()), fmt.Sprintf("%s0.1.7-%d-1", b.pool.Prefix(), dead.Process.Pid), b.deviceName(1, 1)}
	for _, name := range append(slices.Clone(orphans), alive...) {
		b.check(b.pool.Exclusive(t.Context(), func(c *thin.Change) error {
			return c.Activate(thin.Volume{Name: name, ID: 1, Sectors: 2048, ReadOnly: true})
		}))
	}
	theirs := b.deviceName(98, 1)
	_, err = ctl.Create(theirs, "of another program")
	b.check(err)
	defer ctl.Remove(theirs, false)
	user, err := os.Open(thin.Node(orphans[0]))
	b.check(err)
	defer user.Close()
	var listed, removed [][3]string
	for _, name := range append(slices.Clone(orphans[1:]), gone...) {
		listed = append(listed, [3]string{"orphan-device", "device " + name, "check with repair removes it"})
		removed = append(removed, [3]string{"orphan-device", "device " + name, "removed"})
	}
	foreign := [3]string{"orphan-device", "device " + theirs, "`dmsetup remove " + theirs}
	b.finds("listed", drivers.ExamineOptions{}, append(listed, foreign, [3]string{"orphan-device", "device " + orphans[0], "somebody has it open"})...)
	b.finds("repaired", drivers.ExamineOptions{Repair: true}, append(removed, foreign, [3]string{"orphan-device", "device " + orphans[0], "then check again"})...)
	user.Close()
	b.check(ctl.Remove(theirs, false))
	b.finds("closed", drivers.ExamineOptions{Repair: true}, [3]string{"orphan-device", "device " + orphans[0], "removed"})
	b.finds("nothing left", drivers.ExamineOptions{})
	for _, name := range alive {
		if _, err := ctl.Info(name); err != nil {
			t.Errorf("%s, whose owner may be alive: %v", name, err)
		}
		b.check(b.pool.Release(t.Context(), name, 0))
	}
	if left := devicesBut(t, ctl, b.pool.Prefix()); len(left) > 0 {
		t.Errorf("left of the pool that is gone: %v", left)
	}
	b.file(drivers.Ref{ID: 1}, "f", "content")
	b.remove(1, 2)
}

// devicesBut lists our devices of other pools.
func devicesBut(t *testing.T, ctl *dm.Control, prefix string) (names []string) {
	t.Helper()
	all, err := ctl.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range all {
		if strings.HasPrefix(n.Name, "layerctl-") && !strings.HasPrefix(n.Name, prefix) {
			names = append(names, n.Name)
		}
	}
	return names
}

// superblock changes a pool's, which is not active, and gives it its checksum.
func (b *bench) superblock(change func(sb []byte)) {
	b.Helper()
	f, err := os.OpenFile(b.root+"/metadata", os.O_RDWR, 0)
	b.check(err)
	defer f.Close()
	sb := make([]byte, 4096)
	_, err = f.ReadAt(sb, 0)
	b.check(err)
	change(sb)
	binary.LittleEndian.PutUint32(sb, ^crc32.Checksum(sb[4:], crc32.MakeTable(crc32.Castagnoli))^160774)
	_, err = f.WriteAt(sb, 0)
	b.check(err)
}

// flip changes a bit in the metadata where a pointer in the superblock leads.
func (b *bench) flip(pointer int64) {
	b.Helper()
	f, err := os.OpenFile(b.root+"/metadata", os.O_RDWR, 0)
	b.check(err)
	defer f.Close()
	var p [8]byte
	_, err = f.ReadAt(p[:], pointer)
	b.check(err)
	at := int64(binary.LittleEndian.Uint64(p[:]))*4096 + 4000
	_, err = f.ReadAt(p[:1], at)
	b.check(err)
	p[0] ^= 8
	_, err = f.WriteAt(p[:1], at)
	b.check(err)
}

const mappingRoot = 320 // where the superblock has it

// Damage of the metadata of a pool at work is found by layerctl and by thin_check, and where
// that is not installed it is said so.
func TestExamineOfDamagedMetadata(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	b.write(b.create(1), "f", "content")
	b.commit(drivers.Ref{ID: 1})
	var notes []string
	o := drivers.ExamineOptions{Note: func(text string) { notes = append(notes, text) }}
	damage := [3]string{"storage-damaged", "pool metadata", "has checksum"}
	b.flip(mappingRoot)
	b.finds("damaged", o, damage, [3]string{"storage-damaged", "pool metadata", "`thin_check -m " + b.root + "/metadata` (exit status 1)"})
	b.without("thin_check")
	b.finds("damaged, without the tool", o, damage)
	b.flip(mappingRoot)
	b.finds("whole", o)
	if len(notes) != 2 || !strings.Contains(notes[0], "no thin_check in PATH") {
		t.Errorf("notes %q", notes)
	}
	b.remove(1)
}

// without hides a program until the test's end.
func (b *bench) without(program string) {
	b.Helper()
	path, err := filepath.EvalSymlinks(testenv.Program(b, program, "thin-provisioning-tools"))
	b.check(err)
	b.check(sys.Mount("/dev/null", path, "", sys.MS_BIND, ""))
	b.Cleanup(func() { b.check(sys.Umount(path, 0)) })
}

// A pool that the kernel takes no changes of is explained with commands, of which each does
// what it says: with sound metadata, and with metadata to be repaired. Nobody else having
// it open it is inactive then, as the commands want it.
func TestPoolThatNeedsACheckIsExplained(t *testing.T) {
	b := newBench(t, 512*mib, nil)
	b.write(b.create(1), "f", "content")
	b.commit(drivers.Ref{ID: 1})
	for _, damaged := range []bool{false, true} {
		b.check(b.Close())
		b.superblock(func(sb []byte) { sb[4] |= 1 })
		_, err := Open(t.Context(), drivers.Config{Root: b.root})
		if err == nil || !strings.Contains(err.Error(), "needs a check") {
			t.Fatalf("open: %v", err)
		}
		if damaged {
			b.flip(88) // an index of bitmaps
		}
		do := commands(err.Error())
		if len(do) != 4 || !strings.HasPrefix(do[0], "dmsetup remove layerctl-") || !strings.HasPrefix(do[1], "thin_check ") {
			t.Fatalf("commands %q", do)
		}
		if out, err := exec.Command("dmsetup", "info", strings.Fields(do[0])[2]).CombinedOutput(); err == nil {
			t.Errorf("it is active still: %s", out)
		}
		found, err := Factory().Examine(t.Context(), drivers.Config{Root: b.root}, drivers.ExamineOptions{})
		b.check(err)
		if !damaged {
			b.same("sound", found, nil)
			b.shell(do[1])
			b.shell(do[2])
		} else {
			b.same("damaged", found, [][3]string{{"storage-damaged", "pool metadata", "space map of data"}, {"storage-damaged", "pool metadata", "`thin_check "}})
			if err := exec.Command("/usr/sbin/thin_check", b.root+"/metadata").Run(); err == nil {
				t.Error("thin_check finds nothing")
			}
			b.shell(strings.ReplaceAll(do[3], "/var/tmp", b.fs))
		}
		b.reopen(nil)
		b.file(drivers.Ref{ID: 1}, "f", "content")
		b.finds("after the commands", drivers.ExamineOptions{})
	}
	b.remove(1)
}

// A store's check asks the driver: of a pool that is open, and of one that does not open.
func TestStoreChecksThePool(t *testing.T) {
	needsDM(t)
	testenv.Leaks(t)
	root := testenv.FS(t, "ext4", testenv.Size(512*mib)) + "/s"
	open := func() *snapshot.Store {
		s, err := snapshot.Open(t.Context(), root, snapshot.Options{Registry: drivers.NewRegistry(Factory())})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	v, err := s.View("v", Name)
	if err == nil {
		_, err = v.Prepare(t.Context(), "lost", "")
	}
	if err == nil {
		_, err = v.Prepare(t.Context(), "kept", "")
	}
	if err != nil {
		t.Fatal(err)
	}
	check := func(want ...string) {
		t.Helper()
		found, err := s.Check(t.Context(), snapshot.CheckOptions{Quick: true})
		var got []string
		for _, f := range found {
			got = append(got, string(f.Problem)+" "+f.Object)
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q, %v: %v; want %q", got, err, found, want)
		}
	}
	check()
	opened, err := s.Driver(t.Context(), Name)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t, driver: opened.(*driver)}
	r, err := v.Record(t.Context(), "lost")
	b.check(err)
	b.check(b.pool.Exclusive(t.Context(), func(c *thin.Change) error {
		l, err := b.layer(r.ID)
		names, listErr := b.pool.Devices()
		for _, name := range names {
			err = errors.Join(err, c.Deactivate(name))
		}
		return errors.Join(err, listErr, c.Delete(l.Thin), c.CreateThin(50))
	}))
	check("stray-storage devmapper: thin device 50", "layer-missing v/lost")
	b.check(b.pool.Exclusive(t.Context(), func(c *thin.Change) error { return c.Delete(50) }))
	b.check(s.Close())
	b.superblock(func(sb []byte) { sb[4] |= 1 })
	b.flip(mappingRoot)
	s = open()
	check("driver-broken devmapper", "storage-damaged devmapper: pool metadata", "storage-damaged devmapper: pool metadata")
	b.check(s.Close())
}
