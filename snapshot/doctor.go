package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// What Diagnose finds beside what Check knows. Check is about what is on the disk,
// records, layers, listings, bytes, and repairs it; Diagnose is about the
// machine: mounts, processes, devices, and work that somebody has not ended. It
// changes nothing, and says what does.
const (
	MountOrphan  Problem = "mount-orphan"  // a mount of a layer whose snapshot was removed
	MountDead    Problem = "mount-dead"    // a FUSE mount whose server has ended
	MountStuck   Problem = "mount-stuck"   // a FUSE mount whose server does not answer
	ServerOrphan Problem = "server-orphan" // a FUSE server whose mount is in no namespace
	MountHidden  Problem = "mount-hidden"  // a layer in use by what no mount namespace shows
	LoopOrphan   Problem = "loop-orphan"   // a loop device on a file of the store that nobody uses
	ScratchLeft  Problem = "scratch-left"  // a temporary file of a process that ended
	DebtOpen     Problem = "debt-open"     // bytes of a removed snapshot
	MoveOpen     Problem = "move-open"     // copies of a migration that was not ended
	LeaseLeft    Problem = "lease-left"    // IDs of a process that ended
)

// Use is a mount of a layer of the store, with who is in it.
type Use struct {
	View   string     `json:"view,omitempty"` // of the first name; "" if the snapshot was removed
	Key    string     `json:"key,omitempty"`
	Driver string     `json:"driver"`
	ID     drivers.ID `json:"id"`
	Target string     `json:"target"`
	// Namespace is the mount namespace, PID and Comm one of its processes; PID is 0
	// for this process's own.
	Namespace string `json:"namespace"`
	PID       int    `json:"pid,omitempty"`
	Comm      string `json:"comm,omitempty"`
	ReadOnly  bool   `json:"readOnly"`
	// Holders are the processes that use it, but for its server.
	Holders []mount.Holder `json:"holders,omitempty"`
	Server  int            `json:"server,omitempty"` // pid of a FUSE server, where the kernel tells

	info mount.Info
}

// Leftover is a finding with what it costs.
type Leftover struct {
	Finding
	Bytes int64 `json:"bytes"` // that would be free; -1: cannot be known
	// Holders are, of MountHidden, the processes on overlays that no namespace shows:
	// among them is who keeps it in use.
	Holders []mount.Holder `json:"holders,omitempty"`
}

// Diagnosis is what Diagnose found.
type Diagnosis struct {
	Uses []Use
	// Working are the processes that are making layers or committing one.
	Working []string
	Left    []Leftover
}

// Diagnose says who uses the layers of the store on this machine, in whatever
// mount namespace this process may look into, and what is left there that nobody
// needs, what that costs and what removes it. It changes nothing. What Check finds
// of drivers, layers without a record among it, is in it.
func (s *Store) Diagnose(ctx context.Context) (Diagnosis, error) {
	d := &diagnosis{s: s}
	for _, step := range []func(context.Context) error{
		d.open, d.mounts, d.holders, d.servers, d.dead, d.debts, d.moves, d.owners, d.loops, d.scratch, d.checked,
	} {
		if err := step(ctx); err != nil {
			return d.Diagnosis, fmt.Errorf("snapshot: diagnose: %w", err)
		}
	}
	return d.Diagnosis, nil
}

// diagnosis is a Diagnose in progress.
type diagnosis struct {
	s *Store
	Diagnosis
	ds     map[string]drivers.Driver
	places map[string]mount.Place // of the drivers' roots

	namespaces []mount.Namespace
}

func (d *diagnosis) add(p Problem, object string, bytes int64, suggestion, format string, args ...any) {
	d.Left = append(d.Left, Leftover{Finding{Problem: p, Object: object, Detail: fmt.Sprintf(format, args...), Suggestion: suggestion}, bytes, nil})
}

func (d *diagnosis) open(ctx context.Context) (err error) {
	if d.ds, err = d.s.driversInUse(ctx); err != nil {
		return err
	}
	d.places = map[string]mount.Place{}
	for name := range d.ds {
		if d.places[name], err = mount.PlaceOf(d.s.driverRoot(name)); err != nil {
			return err
		}
	}
	return nil
}

// mounts finds the store's layers in every mount namespace.
func (d *diagnosis) mounts(ctx context.Context) error {
	var err error
	if d.namespaces, err = mount.Namespaces(); err != nil {
		return err
	}
	for _, ns := range d.namespaces {
		for _, i := range ns.Mounts {
			driver, id, ok := d.layerOf(i)
			if !ok {
				continue
			}
			d.Uses = append(d.Uses, Use{
				Driver: driver, ID: id, Target: i.Target, Namespace: ns.ID, PID: ns.PID, Comm: ns.Comm, ReadOnly: i.ReadOnly(), info: i,
			})
		}
	}
	var removed []Use
	err = d.s.db.view(ctx, func(t *txn) error {
		removed = nil
		for i := range d.Uses {
			u := &d.Uses[i]
			if names := t.namesOf(u.ID); len(names) > 0 {
				u.View, u.Key = names[0].View, names[0].Key
			} else if l, err := t.layer(u.ID); err == nil && (l == nil || t.isDebt(u.ID)) {
				removed = append(removed, *u)
			}
		}
		return nil
	})
	for _, u := range removed {
		d.add(MountOrphan, u.where(), 0, "unmount it; gc then removes the bytes",
			"shows layer %s of driver %s, whose snapshot was removed", u.ID, u.Driver)
	}
	return err
}

// where is a mountpoint, with its namespace if that is another.
func (u *Use) where() string {
	if u.PID == 0 {
		return u.Target
	}
	return fmt.Sprintf("%s in the mount namespace of process %d (%s)", u.Target, u.PID, u.Comm)
}

// layerOf is the layer that a mount of any namespace shows, or a part of which it
// shows. Paths in mountinfo are the mounter's; a bind is told by where in the file
// system it begins.
func (d *diagnosis) layerOf(i mount.Info) (string, drivers.ID, bool) {
	for name, driver := range d.ds {
		rest, ok := d.places[name].Below(i)
		if !ok || rest == "" {
			continue
		}
		at := d.s.driverRoot(name)
		for part := range strings.SplitSeq(rest, "/") { // the layer's directory is above what of it is shown
			at = filepath.Join(at, part)
			if id, ok := driver.Owner([]mount.Mount{{Type: "bind", Source: at, Options: []string{"bind"}}}); ok {
				return name, id, true
			}
		}
		return "", 0, false
	}
	if i.BindSource != "" && i.Root != "/" { // of something else
		return "", 0, false
	}
	for name, driver := range d.ds {
		if id, ok := driver.Owner([]mount.Mount{i.Mount()}); ok {
			return name, id, true
		}
	}
	return "", 0, false
}

// holders finds the processes that use these mounts.
func (d *diagnosis) holders(context.Context) error {
	ids := map[int]bool{}
	for _, u := range d.Uses {
		ids[u.info.ID] = true
	}
	if len(ids) == 0 {
		return nil
	}
	users := mount.Users(ids)
	for i := range d.Uses {
		d.Uses[i].Holders = users[d.Uses[i].info.ID]
	}
	return nil
}

// servers finds who serves FUSE mounts of the store, and servers that nobody needs:
// with no mount in any namespace, and nobody who started them for himself.
func (d *diagnosis) servers(context.Context) error {
	root := d.s.driverRoot("fuse") + string(filepath.Separator)
	for _, p := range mount.Servers() {
		if !slices.ContainsFunc(p.Args, func(a string) bool { return strings.Contains(a, root) }) {
			continue
		}
		serves := false
		for i := range d.Uses {
			u := &d.Uses[i]
			if u.info.Major == 0 && slices.Contains(p.Connections, int(u.info.Minor)) {
				u.Server, serves = p.PID, true
			}
		}
		if !serves && len(p.Connections) > 0 && p.Parent == 1 {
			d.add(ServerOrphan, fmt.Sprintf("process %d (%s)", p.PID, p.Comm), 0, fmt.Sprintf("end it (kill %d)", p.PID),
				"serves a layer of this store, and no mount namespace shows its mount: a process may still be inside")
		}
	}
	return nil
}

// answers bounds the wait for a FUSE server.
const answers = 10 * time.Second

// dead finds FUSE mounts of this namespace that do not answer. A question to a
// server that hangs stays in the kernel: it is asked beside, and left there.
func (d *diagnosis) dead(ctx context.Context) error {
	for _, u := range d.Uses {
		if u.PID != 0 || !strings.HasPrefix(u.info.Type, "fuse") {
			continue
		}
		answer := make(chan error, 1)
		go func() {
			_, err := sys.StatfsPath(u.Target)
			answer <- err
		}()
		var err error
		select {
		case err = <-answer:
		case <-time.After(answers):
			d.add(MountStuck, u.Target, 0, "see what its server waits for, or end that and unmount", "its server does not answer within %s", answers)
		case <-ctx.Done():
			return ctx.Err()
		}
		if errors.Is(err, syscall.ENOTCONN) || errors.Is(err, syscall.ECONNABORTED) {
			d.add(MountDead, u.Target, 0, "unmount it, and mount the snapshot again: no change that was made is half", "its server has ended")
		}
	}
	return nil
}

// debts lists what was removed and has bytes.
func (d *diagnosis) debts(ctx context.Context) error {
	owed, err := d.s.owed(ctx)
	if err != nil {
		return err
	}
	for _, p := range owed {
		why := "nobody uses it"
		if driver, ok := d.ds[p.layer.Driver]; !ok {
			why = "its driver does not open"
		} else if err := inUse(ctx, driver, p.ref.ID); err != nil {
			why = err.Error()
			d.hidden(p.ref.ID, p.layer.Driver)
		}
		d.add(DebtOpen, p.layer.Driver+"/"+p.ref.ID.String(), d.bytes(ctx, p), "gc removes it when nobody uses it",
			"%s %s ago: %s", p.reason, time.Since(p.since).Round(time.Second), why)
	}
	return nil
}

// inUse asks a driver that can tell.
func inUse(ctx context.Context, d drivers.Driver, id drivers.ID) error {
	if t, ok := d.(drivers.UseTeller); ok {
		return t.InUse(ctx, id)
	}
	return nil
}

// hidden notes a layer that is in use although no namespace shows it.
func (d *diagnosis) hidden(id drivers.ID, driver string) {
	if slices.ContainsFunc(d.Uses, func(u Use) bool { return u.ID == id }) {
		return
	}
	d.add(MountHidden, driver+"/"+id.String(), 0, "end who is inside", "in use, and no mount namespace shows it")
	l := &d.Left[len(d.Left)-1]
	const few = 8
	l.Holders = mount.Hidden(d.namespaces)
	for i, h := range l.Holders[:min(few, len(l.Holders))] {
		l.Detail += []string{"; inside is one of ", ", "}[min(i, 1)] + h.String()
	}
}

func (d *diagnosis) bytes(ctx context.Context, p owing) int64 {
	if driver, ok := d.ds[p.layer.Driver]; ok {
		return d.s.bytesOf(ctx, driver, p.payable)
	}
	return -1
}

// owing is a debt with its history.
type owing struct {
	payable
	since  time.Time
	reason string
}

func (s *Store) owed(ctx context.Context) (all []owing, err error) {
	err = s.db.view(ctx, func(t *txn) error {
		all = nil
		return t.each(bucketDebts, func(k, v []byte) error {
			var b debt
			if _, err := decodeID(v, bucketDebts, k, &b); err != nil {
				return err
			}
			n, err := t.layerNode(keyID(k))
			if err != nil || n == nil {
				return err
			}
			all = append(all, owing{payable{n.ref, n.layer}, time.Unix(0, b.Since), b.Reason})
			return nil
		})
	})
	return all, err
}

// moves lists what an unfinished migration has copied.
func (d *diagnosis) moves(ctx context.Context) error {
	if d.s.o.ReadOnly { // nothing tells who is at work
		return nil
	}
	if !d.s.isFree(migrationPlace) {
		d.Working = append(d.Working, "a migration")
		return nil
	}
	return d.s.db.view(ctx, func(t *txn) error {
		return t.each(bucketMoves, func(k, v []byte) error {
			var m move
			if _, err := decodeID(v, bucketMoves, k, &m); err != nil {
				return err
			}
			l, err := t.layer(m.ID)
			if err != nil || l == nil {
				return err
			}
			d.add(MoveOpen, m.Driver+"/"+m.ID.String(), max(l.Bytes, 0), "migrate again takes it, migrate --call-off removes it",
				"a copy of layer %s, made %s ago by a migration that was not ended", keyID(k), time.Since(time.Unix(0, m.Since)).Round(time.Second))
			return nil
		})
	})
}

// owners says who is at work, and whose work nobody will end. Opening the store
// has repaired what it could of that.
func (d *diagnosis) owners(ctx context.Context) error {
	if d.s.o.ReadOnly {
		return nil
	}
	r, err := d.s.remains(ctx)
	if err != nil {
		return err
	}
	own := os.Getpid()
	for first, l := range r.leases {
		switch {
		case !d.s.isFree(leasePlace(first)):
			if l.Owner.PID != own {
				d.Working = append(d.Working, fmt.Sprintf("%s makes layers, since %s", l.Owner, l.Owner.Since.Format(time.RFC3339)))
			}
		default:
			d.add(LeaseLeft, "lease "+first.String(), 0, "open the store again: what it says then is why", "IDs taken by %s", l.Owner.died())
		}
	}
	for id, i := range r.intents {
		if d.s.isFree(layerPlace(id)) {
			f := i.cutShort()
			f.Suggestion = "commit the snapshot again, or remove it"
			d.Left = append(d.Left, Leftover{Finding: f})
			continue
		}
		d.Working = append(d.Working, fmt.Sprintf("%s commits %s/%s", i.Owner, i.View, i.Key))
	}
	slices.Sort(d.Working)
	return nil
}

// loops finds loop devices on files of the store that nobody uses. Those of a pool
// are its driver's, and Check's.
func (d *diagnosis) loops(context.Context) error {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // just gone
		}
		backing := strings.TrimSuffix(string(b), "\n")
		if !strings.HasPrefix(backing, d.s.root+"/") || strings.HasPrefix(backing, d.s.driverRoot("devmapper")+"/") {
			continue
		}
		sysDir := filepath.Dir(filepath.Dir(f))
		if held, _ := os.ReadDir(filepath.Join(sysDir, "holders")); len(held) > 0 || isMounted(d.namespaces, sysDir) {
			continue
		}
		dev := "/dev/" + filepath.Base(sysDir)
		d.add(LoopOrphan, dev, 0, "losetup -d "+dev, "is on %s, and nobody has mounted it or made a device of it", backing)
	}
	return nil
}

func isMounted(all []mount.Namespace, sysDir string) bool {
	b, err := os.ReadFile(filepath.Join(sysDir, "dev"))
	if err != nil {
		return true // just gone
	}
	dev := strings.TrimSpace(string(b))
	for _, ns := range all {
		if slices.ContainsFunc(ns.Mounts, func(i mount.Info) bool { return fmt.Sprintf("%d:%d", i.Major, i.Minor) == dev }) {
			return true
		}
	}
	return false
}

// scratch finds temporary files of processes that ended while they made the store.
func (d *diagnosis) scratch(context.Context) error {
	files, err := filepath.Glob(filepath.Join(d.s.root, "store.json.*"))
	if err != nil {
		return err
	}
	for _, f := range files {
		st, err := os.Lstat(f)
		if errors.Is(err, fs.ErrNotExist) || err == nil && time.Since(st.ModTime()) < time.Minute {
			continue // somebody is making the store
		}
		d.add(ScratchLeft, f, 4096, "remove it", "a process that made the store was ended")
	}
	return nil
}

// checked takes over what Check knows of drivers and their layers.
func (d *diagnosis) checked(ctx context.Context) error {
	c := &checker{s: d.s, o: CheckOptions{Quick: true}}
	if err := c.drivers(ctx); err != nil {
		return err
	}
	for _, f := range c.found {
		l := Leftover{Finding: f}
		if driver, id, ok := strings.Cut(f.Object, "/"); ok && f.Problem == OrphanLayer {
			l.Bytes = d.orphanBytes(ctx, driver, id)
		}
		d.Left = append(d.Left, l)
	}
	return nil
}

// orphanBytes is what a layer without a record holds, as far as its driver can say
// without knowing its parents.
func (d *diagnosis) orphanBytes(ctx context.Context, driver, name string) int64 {
	id, ok := drivers.ParseID(name)
	if !ok || d.ds[driver] == nil {
		return -1
	}
	u, err := d.ds[driver].Usage(ctx, drivers.Ref{ID: id})
	if err != nil {
		return -1
	}
	return u.Bytes
}
