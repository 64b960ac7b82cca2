package main

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/layerctl/layerctl/fuse/server"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
)

func parse(t *testing.T, args ...string) commandLine {
	t.Helper()
	c, err := parseCommandLine(args)
	if err != nil {
		t.Fatalf("%q: %v", args, err)
	}
	return c
}

func TestCommandLine(t *testing.T) {
	for name, x := range map[string]struct {
		args string
		want func(c *commandLine)
	}{
		"a mountpoint":          {"/m", func(c *commandLine) { c.target = "/m" }},
		"as mount(8) calls it":  {"overlay /m -o rw", func(c *commandLine) { c.source, c.target, c.options.mount.set0 = "overlay", "/m", sys.MS_RDONLY }},
		"options last":          {"/m -o ro", func(c *commandLine) { c.target, c.options.mount.set1 = "/m", sys.MS_RDONLY }},
		"options in one word":   {"-oro /m", func(c *commandLine) { c.target, c.options.mount.set1 = "/m", sys.MS_RDONLY }},
		"foreground":            {"-f /m", func(c *commandLine) { c.target, c.foreground = "/m", true }},
		"debug":                 {"-d /m", func(c *commandLine) { c.target, c.foreground, c.debug = "/m", true, true }},
		"debug as an option":    {"-o debug /m", func(c *commandLine) { c.target, c.foreground, c.debug = "/m", true, true }},
		"version":               {"--version", func(c *commandLine) { c.version = true }},
		"version, short":        {"-V", func(c *commandLine) { c.version = true }},
		"help":                  {"--help", func(c *commandLine) { c.help = true }},
		"the later flag wins":   {"-o ro,rw /m", func(c *commandLine) { c.target, c.options.mount.set0 = "/m", sys.MS_RDONLY }},
		"several -o":            {"-o metacopy=on -o index=1 /m", func(c *commandLine) { c.target, c.options.union.Metacopy, c.options.union.Index = "/m", true, true }},
		"a descriptor":          {"/dev/fd/7", func(c *commandLine) { c.target = "/dev/fd/7" }},
		"a name like a flag":    {"-- -m", func(c *commandLine) { c.target = "-m" }},
		"empty options":         {"-o ,,ro, /m", func(c *commandLine) { c.target, c.options.mount.set1 = "/m", sys.MS_RDONLY }},
		"libfuse's one thread":  {"-s /m", func(c *commandLine) { c.target, c.options.maxThreads = "/m", 1 }},
		"fuse-overlayfs's, off": {"-o threaded=0 /m", func(c *commandLine) { c.target, c.options.maxThreads = "/m", 1 }},
		"what mount(8) hands on": {"x /m -o rw,relatime,x-systemd.automount,_netdev,uhelper=udisks2", func(c *commandLine) {
			c.source, c.target, c.options.mount.set0, c.options.mount.set1 = "x", "/m", sys.MS_RDONLY, sys.MS_RELATIME
		}},
	} {
		t.Run(name, func(t *testing.T) {
			want := commandLine{options: defaultOptions()}
			x.want(&want)
			if got := parse(t, strings.Fields(x.args)...); !reflect.DeepEqual(got, want) {
				t.Errorf("%s:\n got %+v\nwant %+v", x.args, got, want)
			}
		})
	}
}

func TestCommandLineErrors(t *testing.T) {
	for args, want := range map[string]string{
		"":                                "no mountpoint",
		"-o":                              "needs options",
		"a b c":                           "too many arguments",
		"-x /m":                           "unknown argument -x",
		"-o lowerdir /m":                  "needs a value",
		"-o lowerdir=a::: /m":             "without a name",
		"-o lowerdir=a::d:b /m":           "plain layer behind",
		"-o lowerdir=:a /m":               "without a name",
		"-o lowerdir=a: /m":               "without a name",
		"-o lowerdir=//stargz/x /m":       "plugins",
		"-o plugins=/usr/lib/x.so /m":     "plugins",
		"-o datadir+=d,lowerdir+=l /m":    "behind a data-only layer",
		"-o lowerdir=l,lowerdir+=m /m":    "mixed with lowerdir=",
		"-o lowerdir=l,datadir+=m /m":     "mixed with lowerdir=",
		"-o upperdir= /m":                 "must not be empty",
		"-o redirect_dir=maybe /m":        "must be on, off, follow or nofollow",
		"-o passthrough=d /m":             "must be a, b, c or off",
		"-o xattr_permissions=3 /m":       "must be 0, 1 or 2",
		"-o squash_to_uid=-1 /m":          "must be an id",
		"-o squash_to_uid=4294967295 /m":  "must be an id",
		"-o uidmapping=0:1 /m":            "must be HOST:SHOWN:SIZE",
		"-o uidmapping=0:1:x /m":          `"x" is no id`,
		"-o uidmapping=4294967295:1:2 /m": "no range",
		"-o timeout=soon /m":              "number of seconds",
		"-o timeout=NaN /m":               "number of seconds",
		"-o max_threads=0 /m":             "above 0",
		"-o metacopy=perhaps /m":          "must be 0 or 1",
	} {
		if _, err := parseCommandLine(strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, not %q", args, err, want)
		}
	}
}

func TestLowers(t *testing.T) {
	for v, want := range map[string][2][]string{
		"":              {nil, nil},
		"a":             {{"a"}, nil},
		"a:b:c":         {{"a", "b", "c"}, nil},
		"a::d":          {{"a"}, {"d"}},
		"a:b::d::e":     {{"a", "b"}, {"d", "e"}},
		`a\:b:c`:        {{"a:b", "c"}, nil},
		`a\\:c`:         {{`a\`, "c"}, nil},
		`/x\,y:/z`:      {{"/x,y", "/z"}, nil},
		`a\:::d\:`:      {{"a:"}, {"d:"}},
		"/a b:/\xff\n:": {nil, nil}, // an error, see above
	} {
		c, err := parseCommandLine([]string{"-o", "ro,lowerdir=" + v + ",metacopy=1", "/m"})
		if err != nil {
			if want[0] != nil || v == "" {
				t.Errorf("%q: %v", v, err)
			}
			continue
		}
		u := &c.options.union
		if !slices.Equal(u.Lowers, want[0]) || !slices.Equal(u.DataLowers, want[1]) || !u.Metacopy {
			t.Errorf("%q: lowers %q, data %q", v, u.Lowers, u.DataLowers)
		}
	}
	c := parse(t, "-o", `lowerdir+=/a:b,lowerdir+=/c,datadir+=/d`, "/m")
	if u := c.options.union; !slices.Equal(u.Lowers, []string{"/a:b", "/c"}) || !slices.Equal(u.DataLowers, []string{"/d"}) {
		t.Errorf("lowerdir+=: %q, %q", u.Lowers, u.DataLowers)
	}
}

// Every option that fuse-overlayfs(1) has, and the kernel's overlayfs, does
// something or is known to need nothing.
func TestOptions(t *testing.T) {
	id, zero := uint32(5), uint32(0)
	for opt, want := range map[string]func(o *options){
		"upperdir=/u,workdir=/w": func(o *options) { o.union.Upper, o.upper, o.union.Work, o.work = "/u", true, "/w", true },
		`upperdir=/u\,\:x`:       func(o *options) { o.union.Upper, o.upper = "/u,:x", true },
		"uidmapping=0:100:1:1:2:3": func(o *options) {
			o.union.IDMap.UIDs = []union.IDRange{{Shown: 100, Host: 0, Size: 1}, {Shown: 2, Host: 1, Size: 3}}
		},
		"gidmapping=7:8:9:":      func(o *options) { o.union.IDMap.GIDs = []union.IDRange{{Shown: 8, Host: 7, Size: 9}} },
		"squash_to_root":         func(o *options) { o.union.Squash = union.Squash{UID: &zero, GID: &zero} },
		"squash_to_uid=5":        func(o *options) { o.union.Squash.UID = &id },
		"squash_to_gid=5":        func(o *options) { o.union.Squash.GID = &id },
		"xattr_permissions=1":    func(o *options) { o.union.Permissions = union.PermissionsPrivileged },
		"xattr_permissions=2":    func(o *options) { o.union.Permissions = union.PermissionsContainers },
		"static_nlink":           func(o *options) { o.union.StaticNlink = true },
		"noacl":                  func(o *options) { o.union.NoACL = true },
		"volatile":               func(o *options) { o.union.Volatile = true },
		"fsync=0":                func(o *options) { o.fsync = false },
		"writeback=0":            func(o *options) { o.writeback = false },
		"noxattrs=1":             func(o *options) { o.noXattrs = true },
		"timeout=1.5":            func(o *options) { o.timeout = 1500 * time.Millisecond },
		"timeout=0":              func(o *options) { o.timeout = -1 },
		"max_idle_threads=3":     func(o *options) { o.maxIdle = 3 },
		"max_threads=4":          func(o *options) { o.maxThreads = 4 },
		"redirect_dir=off":       func(o *options) { o.union.Redirect = union.RedirectFollow },
		"redirect_dir=nofollow":  func(o *options) { o.union.Redirect = union.RedirectNoFollow },
		"redirect_dir=on":        func(*options) {},
		"metacopy=on":            func(o *options) { o.union.Metacopy = true },
		"index=on":               func(o *options) { o.union.Index = true },
		"nfs_export=on":          func(o *options) { o.union.NFSExport = true },
		"userxattr":              func(o *options) { o.union.Xattrs = union.XattrUser },
		"aufs_whiteouts=0":       func(o *options) { o.union.AUFSWhiteouts = false },
		"passthrough=off":        func(o *options) { o.passthrough, o.passthroughSet = server.PassthroughOff, true },
		"passthrough=b":          func(o *options) { o.passthrough, o.passthroughSet = server.PassthroughAll, true },
		"fsname=a=b":             func(o *options) { o.mount.fsname = "a=b" },
		"subtype=x":              func(o *options) { o.mount.subtype = "x" },
		"allow_other":            func(o *options) { o.mount.allowOther = true },
		`context="u:r:t:s0\,c1"`: func(o *options) { o.mount.extra = []string{`context="u:r:t:s0,c1"`} },
		`context="u:r:t:s0:c1,c2",squash_to_uid=5,rootcontext=a:b`: func(o *options) {
			o.mount.extra, o.union.Squash.UID = []string{`context="u:r:t:s0:c1,c2"`, "rootcontext=a:b"}, &id
		},
		"noexec,exec":         func(o *options) { o.mount.set0 = sys.MS_NOEXEC },
		"dev,nosuid,lazytime": func(o *options) { o.mount.set0, o.mount.set1 = sys.MS_NODEV, sys.MS_NOSUID|sys.MS_LAZYTIME },
		"fast_ino=1,ino32_t=0,ino32_t,plugins=,threaded=1,xino=auto,clone_fd,default_permissions,max_read=131072,nonempty": func(*options) {},
	} {
		want2 := defaultOptions()
		want(&want2)
		c := parse(t, "-o", opt, "/m")
		if !reflect.DeepEqual(c.options, want2) {
			t.Errorf("%s:\n got %+v\nwant %+v", opt, c.options, want2)
		}
		if len(c.warnings) > 0 {
			t.Errorf("%s: warns %q", opt, c.warnings)
		}
	}
}

func TestUnknownOptionsWarn(t *testing.T) {
	c := parse(t, "-o", "lowerdir=/a,frobnicate=7,ro=1,blink", "/m")
	want := []string{"unknown option frobnicate=7 ignored", "unknown option ro=1 ignored", "unknown option blink ignored"}
	if !slices.Equal(c.warnings, want) {
		t.Errorf("%q", c.warnings)
	}
}

func TestMountFlags(t *testing.T) {
	for _, x := range []struct {
		opts string
		root bool
		want uintptr
	}{
		{"rw", true, sys.MS_NODEV},
		{"rw", false, sys.MS_NODEV | sys.MS_NOSUID},
		{"dev,suid", false, 0},
		{"nosuid,dev,ro", true, sys.MS_NOSUID | sys.MS_RDONLY},
	} {
		c := parse(t, "-o", x.opts, "/m")
		if got := c.options.mount.flags(x.root); got != x.want {
			t.Errorf("%s root %v: %#x, not %#x", x.opts, x.root, got, x.want)
		}
	}
}

func TestCheck(t *testing.T) {
	for opt, want := range map[string]string{
		"ro":                                 "no layers",
		"upperdir=/u":                        "needs workdir=",
		"lowerdir=/a":                        "",
		"lowerdir=/a,workdir=/w":             "",
		"lowerdir=,upperdir=/u,workdir=/w":   "",
		"lowerdir=/a,upperdir=/u,workdir=/w": "",

		"lowerdir=/a,upperdir=/u,workdir=/w,nfs_export=on":           "",
		"lowerdir=/a,upperdir=/u,workdir=/w,nfs_export=on,index=off": "index=off",
		"lowerdir=/a,upperdir=/u,workdir=/w,nfs_export=1,metacopy=1": "metacopy=on",
	} {
		c := parse(t, "-o", opt, "/m")
		if err := c.options.check(); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, not %q", opt, err, want)
		}
		if u := c.options.union; want == "" && u.Index != u.NFSExport {
			t.Errorf("%s: index %v", opt, u.Index)
		}
	}
}

// FuzzCommandLine: nothing that anybody writes on the command line crashes the
// parser, and a name that is escaped comes back as it was.
func FuzzCommandLine(f *testing.F) {
	f.Add("-f", `lowerdir=a\:b:c::d,upperdir=/u\,x,uidmapping=0:1:2`, "/m")
	f.Add("src", "ro,timeout=1e3,redirect_dir=on", "--")
	f.Fuzz(func(t *testing.T, first, opts, last string) {
		if c, err := parseCommandLine([]string{first, "-o", opts, last}); err == nil {
			_ = c.options.check()
			_ = c.options.mount.flags(true)
		}
		name := opts
		if name == "" || strings.HasPrefix(name, "//") {
			return
		}
		escaped := strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`).Replace(name)
		c, err := parseCommandLine([]string{"-o", "lowerdir=" + escaped + ":next", "/m"})
		if err != nil || !slices.Equal(c.options.union.Lowers, []string{name, "next"}) {
			t.Fatalf("%q as %q: %q, %v", name, escaped, c.options.union.Lowers, err)
		}
	})
}
