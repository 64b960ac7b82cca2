package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// private is a device of our own on a thin device that may be shown elsewhere, too: its
// name is no layer's, and nobody else takes it away while the process that it names is
// alive.
func (d *driver) private(id uint32, sectors uint64, readOnly bool) thin.Volume {
	name := fmt.Sprintf("%s.%s-%d-%d", d.deviceName(0, id), pidNamespace(), os.Getpid(), d.temps.Add(1))
	return thin.Volume{Name: name, ID: id, Sectors: sectors, ReadOnly: readOnly}
}

// pidNamespace is the number of the namespace that our process id is of, "0" if that is
// not known.
var pidNamespace = sync.OnceValue(func() string {
	link, err := os.Readlink("/proc/self/ns/pid") // pid:[4026531836]
	number := strings.TrimSuffix(strings.TrimPrefix(link, "pid:["), "]")
	if _, parseErr := strconv.ParseUint(number, 10, 64); err != nil || parseErr != nil {
		return "0"
	}
	return number
})

// privateOwner is what a private device's name says of its owner; false for others.
func (d *driver) privateOwner(device string) (owner string, ok bool) {
	parts := strings.Split(strings.TrimPrefix(device, d.pool.Prefix()), ".") // 0, THIN, NS-PID-N
	if len(parts) != 3 || parts[0] != "0" {
		return "", false
	}
	return parts[2], true
}

// ownerDied reports whether a private device's owner is dead. One in another pid
// namespace, or in one that is not known, may be alive.
func (d *driver) ownerDied(device string) bool {
	owner, _ := d.privateOwner(device)
	f := strings.Split(owner, "-")
	if len(f) != 3 || f[0] != pidNamespace() || f[0] == "0" {
		return false
	}
	pid, err := strconv.Atoi(f[1])
	return err == nil && pid > 0 && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
}

// shown calls f while a private device is there.
func (d *driver) shown(ctx context.Context, v thin.Volume, f func() error) error {
	if err := d.pool.Exclusive(ctx, func(c *thin.Change) error { return c.Activate(v) }); err != nil {
		return err
	}
	err := f()
	// What was mounted in f is closed; the kernel may take a moment.
	dropErr := d.pool.Release(context.WithoutCancel(ctx), v.Name, time.Minute)
	if err == nil {
		err = dropErr
	}
	return err
}

// temp is an id of the pool that is no layer's yet, locked for its owner's life.
type temp struct {
	id   uint32
	lock *sys.Lock
}

func (d *driver) tempPath(id uint32) string {
	return d.root + "/" + tempDir + "/" + strconv.FormatUint(uint64(id), 10)
}

// reserve writes a free id down in tmp, durably, and calls make, which makes the thin
// device.
func (d *driver) reserve(c *thin.Change, make func(id uint32) error) (t temp, err error) {
	err = d.takeID(c, func(id uint32) error {
		lock, err := sys.LockFile(d.tempPath(id), sys.LockExclusive)
		if err != nil {
			return err
		}
		if err = d.sync(tempDir); err == nil {
			err = make(id)
		}
		if err != nil {
			_ = os.Remove(d.tempPath(id))
			lock.Close()
			return err
		}
		t = temp{id, lock}
		return nil
	})
	return t, err
}

// forget ends a reservation: the id is a layer's now.
func (d *driver) forget(t temp) {
	_ = os.Remove(d.tempPath(t.id)) // what stays is swept: a layer has the id
	t.lock.Close()
}

// trash writes an id down in tmp that is to be deleted.
func (d *driver) trash(id uint32) error {
	f, err := sys.Open(d.tempPath(id), sys.O_RDWR|sys.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	return d.sync(tempDir)
}

// drop deletes a reserved id.
func (d *driver) drop(c *thin.Change, t temp) error {
	defer t.lock.Close()
	return d.deleteTemp(c, t.id)
}

func (d *driver) deleteTemp(c *thin.Change, id uint32) error {
	if err := d.deleteID(c, id); err != nil {
		return err
	}
	if err := os.Remove(d.tempPath(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := d.sync(tempDir); err != nil { // before the id may be another's
		return err
	}
	delete(d.used, id)
	return nil
}

// deleteID deletes a thin device, if need be with the private devices on it of
// processes that have died.
func (d *driver) deleteID(c *thin.Change, id uint32) error {
	err := c.Delete(id)
	if !errdefs.IsFailedPrecondition(err) {
		return err
	}
	names, listErr := d.pool.Devices()
	if listErr != nil {
		return errors.Join(err, listErr)
	}
	dropped := false
	for _, name := range names {
		if strings.HasPrefix(name, d.deviceName(0, id)+".") && d.ownerDied(name) && c.Deactivate(name) == nil {
			dropped = true
		}
	}
	if dropped {
		err = c.Delete(id)
	}
	return err
}

// sweepTemps deletes what stands in tmp, belongs to nobody alive and is no layer's. What
// is still open stays for the next time.
func (d *driver) sweepTemps(c *thin.Change) error {
	temps, err := d.tempIDs()
	if err != nil || len(temps) == 0 {
		return err
	}
	layers, err := d.layerThins()
	if errdefs.IsDataLoss(err) {
		return nil // which ids are layers' cannot be told
	}
	if err != nil {
		return err
	}
	for _, id := range temps {
		lock, err := sys.LockFile(d.tempPath(id), sys.LockExclusive)
		if err != nil {
			continue // somebody is at work
		}
		if layers[id] {
			err = os.Remove(d.tempPath(id))
		} else {
			err = d.deleteTemp(c, id)
		}
		lock.Close()
		if err != nil && !errdefs.IsFailedPrecondition(err) {
			return err
		}
	}
	return nil
}

// layerThins are the ids that layers have, and the templates.
func (d *driver) layerThins() (map[uint32]bool, error) {
	ids, err := d.templateThins()
	if err != nil {
		return nil, err
	}
	err = d.records(func(_ drivers.ID, r *record, err error) error {
		if err == nil {
			ids[r.Thin] = true
		}
		return err
	})
	return ids, err
}

// tempIDs are the ids that stand in tmp.
func (d *driver) tempIDs() (ids []uint32, err error) {
	dir, err := d.open(tempDir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.ReadDir()
	for _, e := range names {
		if id, err := strconv.ParseUint(e.Name, 10, 24); err == nil {
			ids = append(ids, uint32(id))
		}
	}
	return ids, err
}
