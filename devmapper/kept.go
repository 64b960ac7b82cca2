package devmapper

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
)

// keptUsages are the usages of writable layers whose devices are active, each for as long as
// nothing is written to its device. The pool's superblock would not do: the kernel takes the
// lowest free blocks for its trees, so that a superblock can come to be what it was two commits
// ago, and the trees below it others.
type keptUsages struct {
	mu sync.Mutex
	of map[drivers.ID]keptUsage
}

type keptUsage struct {
	at    written
	usage drivers.Usage
}

func (k *keptUsages) get(id drivers.ID, at written) (drivers.Usage, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	u, ok := k.of[id]
	return u.usage, ok && u.at == at
}

func (k *keptUsages) put(id drivers.ID, at written, u drivers.Usage) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.of == nil {
		k.of = map[drivers.ID]keptUsage{}
	}
	k.of[id] = keptUsage{at, u}
}

func (k *keptUsages) drop(id drivers.ID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.of, id)
}

// written is what the kernel has counted of a block device.
type written struct {
	sequence                             uint64 // of the device: no other has it
	writes, sectors, discards, discarded uint64
}

// The fields of a block device's stat (Documentation/block/stat.rst).
const (
	statReads     = 0
	statWrites    = 4
	statSectors   = 6
	statInFlight  = 8
	statDiscards  = 11
	statDiscarded = 13
	statLeast     = 15
)

// written is what was ever written to a device; false if that is not known: without a device,
// while something is being written, before Linux 5.15 (which gave devices their sequence), and
// where counting is switched off. Nothing that was done is missing in the pool's mappings: the
// kernel has them first.
func (d *driver) written(name string) (w written, ok bool) {
	i, err := d.pool.Info(name)
	if err != nil || !i.ActiveTable {
		return w, false
	}
	dir := blockDir(i)
	if on := numbers(dir+iostats, 1); !d.alwaysCounts && (on == nil || on[0] != 1) {
		return w, false
	}
	sequence, stat := numbers(dir+"diskseq", 1), numbers(dir+"stat", statLeast)
	if sequence == nil || stat == nil || stat[statInFlight] != 0 {
		return w, false
	}
	return written{sequence[0], stat[statWrites], stat[statSectors], stat[statDiscards], stat[statDiscarded]}, true
}

// iostats says whether the kernel counts.
const iostats = "queue/iostats"

func blockDir(i dm.Info) string { return fmt.Sprintf("/sys/dev/block/%s/", i.Dev) }

// countsUntold tells a device of our own not to count, and reports whether it does when it is
// read, as device-mapper's devices did for long.
func (d *driver) countsUntold(name string, read func() error) (counts bool, err error) {
	i, err := d.pool.Info(name)
	if err != nil {
		return false, err
	}
	told := os.WriteFile(blockDir(i)+iostats, []byte("0"), 0) == nil
	before := numbers(blockDir(i)+"stat", statLeast)
	err = read()
	after := numbers(blockDir(i)+"stat", statLeast)
	return told && before != nil && after != nil && after[statReads] > before[statReads], err
}

// numbers reads at least so many from a file of sysfs; nil if they are not there.
func numbers(path string, least int) (all []uint64) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	for _, word := range strings.Fields(string(b)) {
		n, err := strconv.ParseUint(word, 10, 64)
		if err != nil {
			return nil
		}
		all = append(all, n)
	}
	if len(all) < least {
		return nil
	}
	return all
}

// usageOfActive is measure for a writable layer, whose usage is kept until something is written.
// A pool that takes no changes may have lost some: measure says so.
func (d *driver) usageOfActive(r drivers.Ref, l *record, measure func() (drivers.Usage, error)) (drivers.Usage, error) {
	name := d.deviceName(r.ID, l.Thin)
	before, ok := d.written(name)
	if ok {
		u, kept := d.kept.get(r.ID, before)
		if s, err := d.pool.Status(); kept && err == nil && (s.Mode == thin.ReadWrite || s.Mode == thin.OutOfData) {
			return u, nil
		}
	}
	u, err := measure()
	if err != nil || !ok {
		return u, err
	}
	if after, ok := d.written(name); ok && after == before {
		d.kept.put(r.ID, before, u)
	}
	return u, nil
}
