package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/layerctl/layerctl/fuse/server"
	"github.com/layerctl/layerctl/fuse/union"
)

// options is what -o says.
type options struct {
	union union.Config
	mount mountFlags

	lowers, upper, work bool // given: lowerdir= with layers, upperdir=, workdir=
	noIndex             bool // index=off was
	timeout             time.Duration
	passthrough         server.Passthrough
	passthroughSet      bool
	writeback           bool
	fsync               bool
	noXattrs            bool
	maxIdle, maxThreads int
	log                 string
	remount             bool
}

func defaultOptions() options {
	return options{
		union:       union.Config{Redirect: union.RedirectOn, AUFSWhiteouts: true},
		passthrough: server.PassthroughUppers,
		writeback:   true,
		fsync:       true,
	}
}

// setting is an option of the form KEY=VALUE.
type setting func(o *options, value string) error

var settings = map[string]setting{
	"lowerdir":  (*options).setLowers,
	"lowerdir+": (*options).addLower,
	"datadir+":  (*options).addData,
	"upperdir": func(o *options, v string) error {
		o.union.Upper, o.upper = unescape(v), true
		return notEmpty(v)
	},
	"workdir": func(o *options, v string) error {
		o.union.Work, o.work = unescape(v), true
		return notEmpty(v)
	},
	"uidmapping":     func(o *options, v string) (err error) { o.union.IDMap.UIDs, err = parseRanges(v); return err },
	"gidmapping":     func(o *options, v string) (err error) { o.union.IDMap.GIDs, err = parseRanges(v); return err },
	"squash_to_uid":  func(o *options, v string) (err error) { o.union.Squash.UID, err = parseID(v); return err },
	"squash_to_gid":  func(o *options, v string) (err error) { o.union.Squash.GID, err = parseID(v); return err },
	"aufs_whiteouts": func(o *options, v string) error { return parseBool(&o.union.AUFSWhiteouts, v) },
	"redirect_dir":   (*options).setRedirect,
	"metacopy":       func(o *options, v string) error { return parseBool(&o.union.Metacopy, v) },
	"index": func(o *options, v string) error {
		err := parseBool(&o.union.Index, v)
		o.noIndex = !o.union.Index
		return err
	},
	"nfs_export": func(o *options, v string) error { return parseBool(&o.union.NFSExport, v) },
	"xino": func(o *options, v string) error { // numbers are stable always
		o.union.Xino = v == "on"
		return oneOf("on", "off", "auto")(o, v)
	},
	"uuid":   oneOf("on", "off", "auto", "null"),
	"verity": oneOf("off"),
	"xattr_permissions": func(o *options, v string) error {
		n, err := strconv.ParseUint(v, 10, 8)
		if err != nil || n > uint64(union.PermissionsContainers) {
			return errors.New("must be 0, 1 or 2")
		}
		o.union.Permissions = union.Permissions(n)
		return nil
	},
	"timeout": func(o *options, v string) error {
		seconds, err := strconv.ParseFloat(v, 64)
		if err != nil || !(seconds >= 0) || seconds > 1e9 {
			return errors.New("must be a number of seconds")
		}
		if o.timeout = time.Duration(seconds * float64(time.Second)); o.timeout == 0 {
			o.timeout = -1 // not the server's default
		}
		return nil
	},
	"passthrough": (*options).setPassthrough,
	"fsync":       func(o *options, v string) error { return parseBool(&o.fsync, v) },
	"writeback":   func(o *options, v string) error { return parseBool(&o.writeback, v) },
	"noxattrs":    func(o *options, v string) error { return parseBool(&o.noXattrs, v) },
	// What fuse-overlayfs's are for is always so here.
	"threaded": func(o *options, v string) error {
		threads := true
		if err := parseBool(&threads, v); err != nil {
			return err
		}
		if !threads {
			o.maxThreads = 1
		}
		return nil
	},
	"fast_ino": oneOf("0", "1"),
	"ino32_t":  oneOf("0", "1"),
	"plugins": func(o *options, v string) error {
		if v != "" {
			return errors.New("plugins that fetch layers cannot be loaded")
		}
		return nil
	},
	"max_idle_threads": func(o *options, v string) error { return parseCount(&o.maxIdle, v) },
	"max_threads":      func(o *options, v string) error { return parseCount(&o.maxThreads, v) },
	"log":              func(o *options, v string) error { o.log = v; return notEmpty(v) },
}

// switches are the options without a value.
var switches = map[string]func(o *options){
	"static_nlink": func(o *options) { o.union.StaticNlink = true },
	"noacl":        func(o *options) { o.union.NoACL = true },
	"volatile":     func(o *options) { o.union.Volatile = true },
	"userxattr":    func(o *options) { o.union.Xattrs = union.XattrUser },
	"squash_to_root": func(o *options) {
		zero := uint32(0)
		o.union.Squash.UID, o.union.Squash.GID = &zero, &zero
	},
	"remount":  func(o *options) { o.remount = true },
	"clone_fd": func(*options) {},
	"ino32_t":  func(*options) {}, // fuse-overlayfs has it with a value and without, by its version
	"debug":    func(*options) {},
}

// set takes one option; known says whether there is such a one.
func (o *options) set(key, value string, has bool) (known bool, err error) {
	if f, ok := switches[key]; ok && !has {
		f(o)
		return true, nil
	}
	if f, ok := settings[key]; ok {
		if !has {
			return true, errors.New("needs a value")
		}
		return true, f(o, value)
	}
	return o.mount.set(key, value, has), nil
}

func (o *options) setRedirect(v string) error {
	switch v {
	case "on":
		o.union.Redirect = union.RedirectOn
	case "off", "follow": // as the kernel, whose redirect_always_follow is on
		o.union.Redirect = union.RedirectFollow
	case "nofollow":
		o.union.Redirect = union.RedirectNoFollow
	default:
		return errors.New("must be on, off, follow or nofollow")
	}
	return nil
}

func (o *options) setPassthrough(v string) error {
	o.passthroughSet = true
	switch v {
	case "a":
		o.passthrough = server.PassthroughUppers
	case "b":
		o.passthrough = server.PassthroughAll
	case "c":
		o.passthrough = server.PassthroughReadOnly
	case "off":
		o.passthrough = server.PassthroughOff
	default:
		return errors.New("must be a, b, c or off")
	}
	return nil
}

// setLowers reads the kernel's lowerdir: layers between colons, the nearest
// first, those behind two colons for data only. A colon that belongs to a name
// has a backslash before it.
func (o *options) setLowers(v string) error {
	o.union.Lowers, o.union.DataLowers, o.lowers = nil, nil, v != ""
	if v == "" {
		return nil // as fuse-overlayfs: an upper alone
	}
	data, again := false, false // again: the last part was empty, so this is behind "::"
	for i, part := range splitRaw(v, ':') {
		switch {
		case part != "":
			name := unescape(part)
			if strings.HasPrefix(name, "//") {
				return fmt.Errorf("%s: plugins that fetch layers cannot be loaded", name)
			}
			switch {
			case again:
				o.union.DataLowers = append(o.union.DataLowers, name)
			case data:
				return fmt.Errorf("%s: a plain layer behind a data-only one", name)
			default:
				o.union.Lowers = append(o.union.Lowers, name)
			}
			again = false
		case i == 0 || again:
			return errors.New("a layer without a name")
		default:
			data, again = true, true
		}
	}
	if again {
		return errors.New("a layer without a name")
	}
	return nil
}

// errMixed: layers are given by lowerdir= or one by one, as the kernel takes them.
var errMixed = errors.New("cannot be mixed with lowerdir=")

func (o *options) addLower(v string) error {
	if o.lowers {
		return errMixed
	}
	o.union.Lowers = append(o.union.Lowers, v)
	if len(o.union.DataLowers) > 0 {
		return errors.New("behind a data-only layer")
	}
	return notEmpty(v)
}

func (o *options) addData(v string) error {
	if o.lowers {
		return errMixed
	}
	o.union.DataLowers = append(o.union.DataLowers, v)
	return notEmpty(v)
}

// splitRaw is splitEscaped that leaves every backslash.
func splitRaw(s string, sep byte) []string {
	var parts []string
	from := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case sep:
			parts = append(parts, s[from:i])
			from = i + 1
		}
	}
	return append(parts, s[from:])
}

// check says what is missing or does not go together.
func (o *options) check() error {
	switch {
	case len(o.union.Lowers) == 0 && !o.upper:
		return errors.New("no layers: lowerdir= or upperdir= is needed")
	case o.upper && !o.work:
		return errors.New("upperdir= needs workdir=, an empty directory on the same file system")
	case o.upper && o.union.NFSExport && o.union.Metacopy:
		return errors.New("nfs_export=on does not go together with metacopy=on")
	case o.upper && o.union.NFSExport && o.noIndex:
		return errors.New("nfs_export=on does not go together with index=off")
	}
	o.union.Index = o.union.Index || o.union.NFSExport
	if !o.upper && o.work {
		o.union.Work = "" // as the kernel: of no use
	}
	return nil
}

func notEmpty(v string) error {
	if v == "" {
		return errors.New("must not be empty")
	}
	return nil
}

func oneOf(values ...string) setting {
	return func(_ *options, v string) error {
		for _, x := range values {
			if v == x {
				return nil
			}
		}
		return fmt.Errorf("must be one of %s", strings.Join(values, ", "))
	}
}

func parseBool(to *bool, v string) error {
	switch v {
	case "1", "on", "true", "yes":
		*to = true
	case "0", "off", "false", "no":
		*to = false
	default:
		return errors.New("must be 0 or 1")
	}
	return nil
}

func parseCount(to *int, v string) error {
	n, err := strconv.ParseUint(v, 10, 16)
	if err != nil || n == 0 {
		return errors.New("must be a number above 0")
	}
	*to = int(n)
	return nil
}

func parseID(v string) (*uint32, error) {
	n, err := strconv.ParseUint(v, 10, 32)
	if err != nil || n == 1<<32-1 {
		return nil, errors.New("must be an id")
	}
	id := uint32(n)
	return &id, nil
}

// parseRanges reads HOST:SHOWN:SIZE triples between colons.
func parseRanges(v string) ([]union.IDRange, error) {
	fields := strings.Split(strings.TrimSuffix(v, ":"), ":")
	if len(fields)%3 != 0 {
		return nil, errors.New("must be HOST:SHOWN:SIZE, once or more")
	}
	var ranges []union.IDRange
	for ; len(fields) > 0; fields = fields[3:] {
		var n [3]uint64
		for i := range n {
			var err error
			if n[i], err = strconv.ParseUint(fields[i], 10, 32); err != nil {
				return nil, fmt.Errorf("%q is no id", fields[i])
			}
		}
		if n[2] == 0 || n[0]+n[2] > 1<<32 || n[1]+n[2] > 1<<32 {
			return nil, fmt.Errorf("%s: no range of ids", strings.Join(fields[:3], ":"))
		}
		ranges = append(ranges, union.IDRange{Host: uint32(n[0]), Shown: uint32(n[1]), Size: uint32(n[2])})
	}
	return ranges, nil
}
