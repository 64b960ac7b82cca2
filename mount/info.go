package mount

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Info is one mount of a mount namespace, as /proc/PID/mountinfo tells it.
type Info struct {
	ID, Parent   int
	Major, Minor uint32 // device of the superblock
	Root         string // what of the file system is mounted: "/" for all of it
	Target       string // where, seen from the reader's root
	Options      []string
	Propagation  []string // "shared:2", "master:1", "unbindable"; empty: private
	Type         string   // "ext4", "overlay", "fuse.sshfs"
	Source       string   // as the mounter gave it: a device, or any word
	SuperOptions []string // of the superblock, shared by all its mounts

	// BindSource is the path, in the same namespace, of the directory that a bind
	// mount shows; "" for a mount of a whole file system, and where no mount shows
	// that directory elsewhere. Filled in by List.
	BindSource string
}

// List returns the mounts of the calling process's mount namespace, parents
// first.
func List() ([]Info, error) {
	return listFile("/proc/thread-self/mountinfo")
}

func listFile(file string) ([]Info, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("mount: list: %w", err)
	}
	defer f.Close()
	infos, err := parseMountinfo(f)
	if err != nil {
		return nil, fmt.Errorf("mount: list %s: %w", file, err)
	}
	findBindSources(infos)
	return infos, nil
}

// parseMountinfo reads the format of proc(5). An overlay of 500 lowers has one
// line of 50 KiB and more, so lines have no bound.
func parseMountinfo(r io.Reader) ([]Info, error) {
	var all []Info
	b := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := b.ReadString('\n')
		if line = strings.TrimSuffix(line, "\n"); line != "" {
			i, perr := parseInfo(line)
			if perr != nil {
				return nil, perr
			}
			all = append(all, i)
		}
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// parseInfo reads one line: ID PARENT MAJOR:MINOR ROOT TARGET OPTIONS
// [PROPAGATION...] - TYPE SOURCE SUPEROPTIONS.
func parseInfo(line string) (Info, error) {
	f := strings.Split(line, " ")
	dash := slices.Index(f, "-")
	if dash < 6 || len(f) < dash+4 {
		return Info{}, fmt.Errorf("malformed mountinfo line %q", line)
	}
	i := Info{
		Root: unescapeOctal(f[3]), Target: unescapeOctal(f[4]),
		Options: splitList(f[5]), Propagation: f[6:dash:dash],
		Type: unescapeOctal(f[dash+1]), Source: unescapeOctal(f[dash+2]),
		SuperOptions: splitList(f[dash+3]),
	}
	if len(i.Propagation) == 0 {
		i.Propagation = nil
	}
	var err1, err2 error
	i.ID, err1 = strconv.Atoi(f[0])
	i.Parent, err2 = strconv.Atoi(f[1])
	major, minor, ok := strings.Cut(f[2], ":")
	maj, err3 := strconv.ParseUint(major, 10, 32)
	mnr, err4 := strconv.ParseUint(minor, 10, 32)
	if err1 != nil || err2 != nil || err3 != nil || err4 != nil || !ok {
		return Info{}, fmt.Errorf("malformed mountinfo line %q", line)
	}
	i.Major, i.Minor = uint32(maj), uint32(mnr)
	return i, nil
}

// splitList splits at the commas and then undoes the escapes: a comma inside an
// overlay's path is written \054.
func splitList(s string) []string {
	parts := strings.Split(s, ",")
	for i, p := range parts {
		parts[i] = unescapeOctal(p)
	}
	return parts
}

// unescapeOctal undoes seq_file's escapes (fs/seq_file.c: mangle_path): three
// octal digits after a backslash. Anything else stays.
func unescapeOctal(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b = append(b, byte(n))
				i += 3
				continue
			}
		}
		b = append(b, s[i])
	}
	return string(b)
}

// findBindSources fills in BindSource. A mount of another root is not
// necessarily a bind (a btrfs subvolume has one, too), but if a mount that came
// before shows the same directory, mounting it from there is the same.
func findBindSources(infos []Info) {
	first := map[[2]uint32][]int{} // by device: the mounts so far
	for n := range infos {
		i := &infos[n]
		dev := [2]uint32{i.Major, i.Minor}
		for _, m := range first[dev] {
			if p, ok := below(i.Root, infos[m].Root); ok && i.Root != "/" {
				i.BindSource = path.Join(infos[m].Target, p)
				break
			}
		}
		first[dev] = append(first[dev], n)
	}
}

// below returns the part of p below dir.
func below(p, dir string) (string, bool) {
	if dir == "/" {
		return p, strings.HasPrefix(p, "/")
	}
	rest, ok := strings.CutPrefix(p, dir)
	return rest, ok && (rest == "" || rest[0] == '/')
}

// ReadOnly reports whether the mount or its file system is read-only.
func (i Info) ReadOnly() bool {
	return slices.Contains(i.Options, "ro") || slices.Contains(i.SuperOptions, "ro")
}

// Mount gives back a Mount that performs the same, as far as mountinfo tells:
// a bind of BindSource, an overlay with escaped lowerdir=, upperdir= and
// workdir=, else type, source and all options. An id map is not told.
func (i Info) Mount() Mount {
	if i.BindSource != "" {
		return Mount{Type: "bind", Source: i.BindSource, Options: append([]string{"bind"}, i.Options...)}
	}
	m := Mount{Type: i.Type, Source: i.Source, Options: slices.Clone(i.Options)}
	if i.Type == "overlay" {
		m.Options = append(m.Options, i.overlayOptions()...)
		return m
	}
	for _, o := range i.SuperOptions {
		if !slices.Contains(m.Options, o) && o != "rw" {
			m.Options = append(m.Options, o)
		}
	}
	return m
}

// overlayOptions brings an overlay's options to the form that the options of a
// Mount have. After mount(2) the kernel shows lowerdir= and the other
// directories as they were given, escapes included; after fsconfig with
// lowerdir+ it shows plain names.
func (i Info) overlayOptions() []string {
	var l Layers
	var others []string
	plain := slices.ContainsFunc(i.SuperOptions, func(o string) bool { return strings.HasPrefix(o, "lowerdir+=") })
	for _, o := range i.SuperOptions {
		key, value, _ := strings.Cut(o, "=")
		if plain {
			value = EscapeLayer(value)
		}
		switch ours, err := l.set(key, value); {
		case ours && err == nil:
		case o != "rw" && !slices.Contains(i.Options, o):
			others = append(others, o)
		}
	}
	return append(others, l.options()...)
}
