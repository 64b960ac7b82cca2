package devmapper

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/ext4"
	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// fileSystem is what is particular to one kind of file system in the layers. A layer's
// is its parent's, being a snapshot of it.
type fileSystem struct {
	name  string
	least int64 // bytes, of the smallest one

	program, from string                     // makes one, and the package that has it
	args          func(bytes int64) []string // of the program, before the device
	pretend       string                     // one more, with which it writes nothing

	every    []string // options of every mount
	clean    []string // of one that must not look at the log: the device cannot be written to
	writable []string
	volatile []string // of a writable one whose content may be lost
	growing  []string // instead of writable, while it gets larger

	// identify reads the superblock of one that is not mounted; ErrDataLoss if there
	// is none.
	identify func(io.ReaderAt) (identity, error)
	// inMemory: the program writes zeros that the device has by itself.
	inMemory bool
	// grow gives one that is mounted so many bytes; dev is its device.
	grow func(root, dev *sys.Fd, bytes int64) error
	// byBlocks: package ext4 understands it.
	byBlocks bool
}

// identity is what a superblock tells.
type identity struct {
	uuid string
	log  logState
}

// logState is whether a log, or journal, holds what is nowhere else yet.
type logState int

const (
	logUnknown logState = iota // a mount tells, and leaves it empty
	logEmpty
	logFull
)

// fileSystems are those that there are, the default first.
var fileSystems = []*fileSystem{
	{
		name: "ext4", least: 40 << 20,
		program: "mke2fs", from: "e2fsprogs, 1.47 or newer", args: ext4Args, pretend: "-n",
		clean: []string{"noload"}, writable: []string{"discard", "noinit_itable"}, volatile: []string{"nobarrier"}, growing: []string{"discard"},
		identify: identifyExt4, grow: growExt4, byBlocks: true,
	},
	{
		name: "xfs", least: 300 << 20,
		program: "mkfs.xfs", from: "xfsprogs", args: xfsArgs, pretend: "-N",
		every: []string{"nouuid"}, clean: []string{"norecovery"}, writable: []string{"discard"}, growing: []string{"discard"},
		identify: identifyXFS, inMemory: true, grow: growXFS,
	},
}

// ext4Args make a small file system: thin devices read as zeros where nothing was
// written, so that no inode table needs to be, neither now nor by the kernel later
// (noinit_itable: of a file system that has grown; while it grows, that same option
// would have the kernel write the zeros at once);
// a short journal, as each layer comes to have its own copy; and features that every
// kernel since 5.10 knows. Blocks are reserved for the descriptors of 4 TiB more: growth
// needs room for all that are reserved in one transaction, which in Linux 6.1 is a quarter of the
// journal at most, and mke2fs would reserve 1024, just more than that. Where they are used up the
// kernel does without.
func ext4Args(bytes int64) []string {
	extended := "assume_storage_prezeroed=1,lazy_itable_init=1,packed_meta_blocks=1,nodiscard,root_owner=0:0"
	const asItIs = 4 << 30 // mke2fs reserves for 1024 times the size at most
	if most := min(bytes+4<<40, mostBytes); bytes > asItIs && bytes < most {
		extended += fmt.Sprintf(",resize=%d", most/ext4Block)
	}
	return []string{"-q", "-F", "-t", "ext4", "-b", strconv.Itoa(ext4Block), "-m", "0", "-J", "size=16", "-O", "^orphan_file,^metadata_csum_seed", "-E", extended}
}

const ext4Block = 4096

// xfsArgs leave the size of the pool's blocks alone: it would be the unit of each write
// to the log. Sectors of 4096 bytes suit every device below.
func xfsArgs(int64) []string {
	return []string{"-q", "-f", "-K", "-d", "noalign", "-s", "size=4096"}
}

// knownFS is the file system of a name, the default for none.
func knownFS(name string) (*fileSystem, error) {
	if name == "" {
		return fileSystems[0], nil
	}
	i := slices.IndexFunc(fileSystems, func(f *fileSystem) bool { return f.name == name })
	if i < 0 {
		return nil, fmt.Errorf("file system %q: layers have one of %s: %w", name, fsNames(), errdefs.ErrInvalidArgument)
	}
	return fileSystems[i], nil
}

func fsNames() string {
	var names []string
	for _, f := range fileSystems {
		names = append(names, f.name)
	}
	return strings.Join(names, ", ")
}

// find finds the program.
func (f *fileSystem) find() (string, error) { return thin.FindTool(f.program, f.from) }

// tryProgram has the program look at what it would be told, which an older one may not
// understand.
func (f *fileSystem) tryProgram(ctx context.Context) error {
	image, err := f.inFile(ctx, f.least, f.pretend)
	image.Close()
	if errors.As(err, new(*exec.ExitError)) && ctx.Err() == nil {
		err = fmt.Errorf("%s does not make what layers have, is it too old? %w: %w", f.program, errdefs.ErrUnavailable, words{err})
	}
	return err
}

// make makes one on a device.
func (f *fileSystem) make(ctx context.Context, v thin.Volume) error {
	if !f.inMemory {
		return f.run(ctx, thin.Node(v.Name), int64(v.Sectors)*512)
	}
	image, err := f.inFile(ctx, int64(v.Sectors)*512)
	if err != nil {
		return err
	}
	defer image.Close()
	dev, err := sys.Open(thin.Node(v.Name), sys.O_RDWR|sys.O_EXCL, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	if err := copyNonZero(dev, image); err != nil {
		return err
	}
	return dev.Sync() // the file system does not look at what the device has cached
}

// inFile makes one in a file in memory.
func (f *fileSystem) inFile(ctx context.Context, bytes int64, more ...string) (*sys.Fd, error) {
	image, err := sys.MemFile("layerctl-" + f.program)
	if err != nil {
		return nil, err
	}
	if err = image.Truncate(bytes); err == nil {
		err = f.run(ctx, pathForOthers(image), bytes, more...)
	}
	if err != nil {
		image.Close()
		return nil, err
	}
	return image, nil
}

// pathForOthers names an open file of ours to other processes.
func pathForOthers(f *sys.Fd) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Int()) }

func (f *fileSystem) run(ctx context.Context, path string, bytes int64, more ...string) error {
	program, err := f.find()
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, program, append(append(f.args(bytes), more...), path)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s (of %s): %w: %s", program, f.from, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// copyNonZero writes to a device that is all zeros what is not zero in a sparse file.
func copyNonZero(dev, file *sys.Fd) error {
	const most = 64 << 10
	buf, zeros := make([]byte, most), make([]byte, most)
	for end := int64(0); ; {
		at, err := file.SeekData(end)
		if errors.Is(err, syscall.ENXIO) {
			return nil
		}
		if err == nil {
			end, err = file.SeekHole(at)
		}
		for ; err == nil && at < end; at += most {
			b := buf[:min(most, end-at)]
			if _, err = file.ReadAt(b, at); err == nil && !bytes.Equal(b, zeros[:len(b)]) {
				_, err = dev.WriteAt(b, at)
			}
		}
		if err != nil {
			return err
		}
	}
}

// mount is pure: the plan of a mount of a device.
func (f *fileSystem) mount(v thin.Volume, o drivers.MountOptions) mount.Mount {
	options := []string{"ro"}
	if !v.ReadOnly && !o.ReadOnly {
		options[0] = "rw"
	}
	options = append(options, f.every...)
	switch {
	case v.ReadOnly: // a clean log, which must not be looked at, or the mount fails
		options = append(options, f.clean...)
	case !o.ReadOnly: // what is deleted goes back to the pool
		options = append(options, f.writable...)
		if o.Volatile {
			options = append(options, f.volatile...)
		}
	}
	return mount.Mount{Type: f.name, Source: thin.Node(v.Name), Options: append(options, o.IDMap.MountOptions()...)}
}

// mountToGrow is mount for grow.
func (f *fileSystem) mountToGrow(v thin.Volume) mount.Mount {
	return mount.Mount{Type: f.name, Source: thin.Node(v.Name), Options: slices.Concat([]string{"rw"}, f.every, f.growing)}
}

func growExt4(root, _ *sys.Fd, bytes int64) error {
	err := root.GrowExt4(uint64(bytes / ext4Block))
	switch {
	case errors.Is(err, syscall.EPERM):
		err = fmt.Errorf("the kernel makes an ext4 larger for those who have CAP_SYS_RESOURCE: %w", err)
	case errors.Is(err, syscall.ENOSPC):
		err = fmt.Errorf("the pool is full, or this kernel wants a larger journal for that, as 6.1 does of file systems that layerctl made at first: %w", err)
	}
	return err
}

func growXFS(root, dev *sys.Fd, bytes int64) error {
	s, err := readXFS(dev)
	if err != nil {
		return err
	}
	return root.GrowXFS(uint64(bytes/s.block), s.inodePercent)
}

func identifyExt4(r io.ReaderAt) (identity, error) {
	s, err := ext4.Identify(r)
	i := identity{uuid: s.UUID, log: logEmpty}
	if s.Dirty {
		i.log = logFull
	}
	return i, err
}

// xfsSuper is what is read of a superblock of xfs (struct xfs_dsb).
type xfsSuper struct {
	uuid         string
	block        int64
	inodePercent uint32 // of the blocks that inodes may take
}

func readXFS(r io.ReaderAt) (xfsSuper, error) {
	b := make([]byte, 512)
	n, err := r.ReadAt(b, 0)
	if n < len(b) && err != nil && !errors.Is(err, io.EOF) {
		return xfsSuper{}, err
	}
	be := binary.BigEndian
	block := int64(be.Uint32(b[4:]))
	if n < len(b) || string(b[:4]) != "XFSB" || block == 0 {
		return xfsSuper{}, fmt.Errorf("no xfs on it: %w", errdefs.ErrDataLoss)
	}
	u := b[32:48]
	return xfsSuper{
		uuid:         fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]),
		block:        block,
		inodePercent: uint32(b[127]),
	}, nil
}

// identifyXFS cannot tell whether the log is empty: a snapshot of a frozen xfs has one
// that is not, and which records are the last ones its kernel knows best.
func identifyXFS(r io.ReaderAt) (identity, error) {
	s, err := readXFS(r)
	return identity{uuid: s.uuid}, err
}
