package dm

import (
	"errors"
	"fmt"
	"syscall"
)

// Info is the state of a device.
type Info struct {
	Name, UUID string
	Dev        Dev
	// Open counts who has it open, Targets the lines of its active table.
	Open, Targets int
	// Event counts what its targets told: thin pools running low, mode changes.
	Event uint32

	Suspended, ReadOnly, DeferredRemove bool
	// ActiveTable and InactiveTable say which tables there are.
	ActiveTable, InactiveTable bool
}

// Path is the node that the kernel makes by itself.
func (i Info) Path() string { return fmt.Sprintf("/dev/dm-%d", i.Dev.Minor) }

func (h *header) info() Info {
	has := func(flag uint32) bool { return h.flags&flag != 0 }
	return Info{Name: h.name, UUID: h.uuid, Dev: decodeDev(h.dev), Open: int(h.open), Targets: int(h.targets), Event: h.event,
		Suspended: has(DM_SUSPEND_FLAG), ReadOnly: has(DM_READONLY_FLAG), DeferredRemove: has(DM_DEFERRED_REMOVE),
		ActiveTable: has(DM_ACTIVE_PRESENT_FLAG), InactiveTable: has(DM_INACTIVE_PRESENT_FLAG)}
}

// named performs a command on one device.
func (c *Control) named(cmd uint32, name string, flags uint32, data []byte) (header, []byte, error) {
	if name == "" {
		return header{}, nil, callError(cmd, `""`, errBadName)
	}
	return c.call(cmd, header{name: name, flags: flags}, data)
}

// Create makes a device without a table. uuid may be empty, and can never be
// changed.
func (c *Control) Create(name, uuid string) (Info, error) {
	if name == "" {
		return Info{}, callError(cmdDevCreate, `""`, errBadName)
	}
	h, _, err := c.call(cmdDevCreate, header{name: name, uuid: uuid}, nil)
	return h.info(), err
}

// Load fills the device's inactive table.
func (c *Control) Load(name string, table []Target, readOnly bool) error {
	data, err := encodeTable(table)
	if err != nil {
		return callError(cmdTableLoad, name, err)
	}
	h := header{name: name, targets: uint32(len(table))}
	if readOnly {
		h.flags = DM_READONLY_FLAG
	}
	if name == "" {
		return callError(cmdTableLoad, `""`, errBadName)
	}
	_, _, err = c.call(cmdTableLoad, h, data)
	return err
}

// Clear empties the inactive table.
func (c *Control) Clear(name string) error {
	_, _, err := c.named(cmdTableClear, name, 0, nil)
	return err
}

// SuspendOptions are how Suspend does without what it would wait for.
type SuspendOptions struct {
	NoFlush    bool // queue what is under way instead of finishing it
	SkipLockFS bool // do not freeze the file system on it
}

// Suspend stops I/O on the device until Resume.
func (c *Control) Suspend(name string, o SuspendOptions) error {
	flags := uint32(DM_SUSPEND_FLAG)
	if o.NoFlush {
		flags |= DM_NOFLUSH_FLAG
	}
	if o.SkipLockFS {
		flags |= DM_SKIP_LOCKFS_FLAG
	}
	_, _, err := c.named(cmdDevSuspend, name, flags, nil)
	return err
}

// Resume makes the inactive table, if there is one, the active one, and lets I/O go
// on.
func (c *Control) Resume(name string) error {
	return c.announced(cmdDevSuspend, name, 0, nil)
}

// Message sends a target of the device a message; the one at that sector.
func (c *Control) Message(name string, sector uint64, message string) (reply string, err error) {
	data := le.AppendUint64(nil, sector)
	data = append(append(data, message...), 0)
	h, out, err := c.named(cmdTargetMsg, name, 0, data)
	if err != nil {
		return "", fmt.Errorf("message %q: %w", message, err)
	}
	if h.flags&DM_DATA_OUT_FLAG == 0 {
		return "", nil
	}
	reply, ok := text(out)
	if !ok {
		return "", callError(cmdTargetMsg, name, errShort)
	}
	return reply, nil
}

// Status asks each target of the active table for its state. noFlush: thin pools
// do not commit their metadata first.
func (c *Control) Status(name string, noFlush bool) ([]Target, error) {
	var flags uint32
	if noFlush {
		flags = DM_NOFLUSH_FLAG
	}
	return c.table(name, flags)
}

// Table returns the active table, or the inactive one.
func (c *Control) Table(name string, inactive bool) ([]Target, error) {
	flags := uint32(DM_STATUS_TABLE_FLAG)
	if inactive {
		flags |= DM_QUERY_INACTIVE_TABLE_FLAG
	}
	return c.table(name, flags)
}

func (c *Control) table(name string, flags uint32) ([]Target, error) {
	h, data, err := c.named(cmdTableStatus, name, flags, nil)
	if err != nil {
		return nil, err
	}
	table, err := decodeTable(data, h.targets)
	if err != nil {
		return nil, callError(cmdTableStatus, name, err)
	}
	return table, nil
}

// Info returns the device's state.
func (c *Control) Info(name string) (Info, error) {
	h, _, err := c.named(cmdDevStatus, name, 0, nil)
	return h.info(), err
}

// Deps returns the block devices that the active table uses.
func (c *Control) Deps(name string) ([]Dev, error) {
	_, data, err := c.named(cmdTableDeps, name, 0, nil)
	if err != nil {
		return nil, err
	}
	deps, err := decodeDeps(data)
	if err != nil {
		return nil, callError(cmdTableDeps, name, err)
	}
	return deps, nil
}

// List returns all devices of the machine.
func (c *Control) List() ([]Name, error) {
	_, data, err := c.call(cmdListDevices, header{}, nil)
	if err != nil {
		return nil, err
	}
	names, err := decodeNames(data)
	if err != nil {
		return nil, callError(cmdListDevices, "", err)
	}
	return names, nil
}

// Targets returns the target types that are in the kernel now, with their versions.
// Others are loaded when a table first names them, if the kernel has them as modules.
func (c *Control) Targets() (map[string]Version, error) {
	_, data, err := c.call(cmdListVersions, header{}, nil)
	if err != nil {
		return nil, err
	}
	all, err := decodeVersions(data)
	if err != nil {
		return nil, callError(cmdListVersions, "", err)
	}
	return all, nil
}

// Rename gives the device another name; an open one, too.
func (c *Control) Rename(name, to string) error {
	h := header{name: to}
	if err := h.valid(); err != nil || to == "" {
		return callError(cmdDevRename, name, fmt.Errorf("new name %q: %w", to, errBadName))
	}
	return c.announced(cmdDevRename, name, 0, append([]byte(to), 0))
}

// Remove removes the device. An open one is refused, or, deferred, goes when the last
// user does.
func (c *Control) Remove(name string, deferred bool) error {
	var flags uint32
	if deferred {
		flags = DM_DEFERRED_REMOVE
	}
	err := c.announced(cmdDevRemove, name, flags, nil)
	if deferred && errors.Is(err, syscall.EBUSY) {
		return fmt.Errorf("deferred: %w", err)
	}
	return err
}
