package mount

import (
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// describe writes a plan in words, the zero parts left out.
func describe(p *plan) string {
	var b strings.Builder
	say := func(name string, v any) {
		if !reflect.ValueOf(v).IsZero() {
			fmt.Fprintf(&b, " %s=%v", name, v)
		}
	}
	fmt.Fprint(&b, p.kind)
	say("type", p.fstype)
	say("source", p.source)
	say("target", p.target)
	say("rec", p.recursive)
	say("super", strings.Join(p.super, ","))
	say("attrs", p.attrs)
	say("clear", p.clear)
	if p.layers != nil {
		say("lowers", fmt.Sprintf("%q", p.layers.Lowers))
		if len(p.layers.Data) > 0 {
			say("data", fmt.Sprintf("%q", p.layers.Data))
		}
		say("upper", p.layers.Upper)
		say("work", p.layers.Work)
	}
	if len(p.params) > 0 {
		say("params", fmt.Sprintf("%q", p.params))
	}
	say("propagation", p.propagation)
	say("propagateTo", p.propagateTo)
	say("loop", p.loop)
	say("direct", p.directIO)
	if !p.ids.empty() {
		say("uids", p.ids.uids)
		say("gids", p.ids.gids)
	}
	say("helper", p.helper)
	return b.String()
}

func TestPlans(t *testing.T) {
	const (
		ro, nosuid, nodev, noexec = sys.MOUNT_ATTR_RDONLY, sys.MOUNT_ATTR_NOSUID, sys.MOUNT_ATTR_NODEV, sys.MOUNT_ATTR_NOEXEC
		noatime, strict           = sys.MOUNT_ATTR_NOATIME, sys.MOUNT_ATTR_STRICTATIME
	)
	for _, c := range []struct {
		m    Mount
		want string
	}{
		{Mount{Type: "bind", Source: "/s", Options: []string{"rbind", "ro"}}, fmt.Sprintf("bind type=bind source=/s rec=true attrs=%d", ro)},
		{Mount{Type: "bind", Source: "/s", Options: []string{"bind", "rw"}}, "bind type=bind source=/s"},
		{Mount{Type: "bind", Source: "/s"}, "bind type=bind source=/s"},
		{Mount{Source: "/s", Options: []string{"bind", "ro", "rw"}}, "bind source=/s"},
		{Mount{Type: "bind", Source: "/s", Options: []string{"bind,nosuid,nodev,noexec", "noatime"}},
			fmt.Sprintf("bind type=bind source=/s attrs=%d clear=%d", nosuid|nodev|noexec|noatime, sys.MOUNT_ATTR__ATIME)},
		{Mount{Type: "bind", Source: "/s", Options: []string{"bind", "relatime"}}, fmt.Sprintf("bind type=bind source=/s clear=%d", sys.MOUNT_ATTR__ATIME)},
		{Mount{Type: "bind", Source: "/s", Options: []string{"bind", "rslave"}},
			fmt.Sprintf("bind type=bind source=/s propagation=%d propagateTo=true", sys.MS_SLAVE)},
		{Mount{Type: "bind", Source: "/s", Options: []string{"bind", "uidmap=0:100000:1000,1000:5:1", "gidmap=0:7:9"}},
			"bind type=bind source=/s uids=[{0 100000 1000} {1000 5 1}] gids=[{0 7 9}]"},
		{Mount{Type: "ext4", Source: "/dev/x", Target: "/t", Options: []string{"ro", "errors=remount-ro", "discard", "sync", "lazytime"}},
			fmt.Sprintf(`filesystem type=ext4 source=/dev/x target=/t super=ro,sync,lazytime attrs=%d params=["errors=remount-ro" "discard"]`, ro)},
		{Mount{Type: "xfs", Source: "/img", Options: []string{"loop", "direct-io", "nouuid"}}, `filesystem type=xfs source=/img params=["nouuid"] loop=true direct=true`},
		{Mount{Type: "nfs", Options: []string{"direct-io"}}, `filesystem type=nfs params=["direct-io"] direct=true`},
		{Mount{Type: "tmpfs", Options: []string{`context="system_u:object_r:t:s0:c1,c2",size=1m`, "strictatime", "noatime"}},
			fmt.Sprintf(`filesystem type=tmpfs attrs=%d params=["context=system_u:object_r:t:s0:c1,c2" "size=1m"]`, noatime)},
		{Mount{Type: "tmpfs", Options: []string{"strictatime", "defaults", ""}}, fmt.Sprintf(`filesystem type=tmpfs attrs=%d`, strict)},
		{Mount{Type: "ext4", Options: []string{"remount", "ro"}}, fmt.Sprintf("remount type=ext4 attrs=%d", ro)},
		{Mount{Type: "overlay", Source: "overlay", Options: []string{"index=off", "workdir=/w", "upperdir=/u", "lowerdir=/b:/a", "userxattr"}},
			`filesystem type=overlay source=overlay lowers=["/b" "/a"] upper=/u work=/w params=["index=off" "userxattr"]`},
		{Mount{Type: "overlay", Options: []string{"lowerdir=/b:/a,upperdir=/u,workdir=/w,volatile"}},
			`filesystem type=overlay lowers=["/b" "/a"] upper=/u work=/w params=["volatile"]`},
		{Mount{Type: "overlay", Options: []string{`lowerdir=/c\:o:/c\,o:/b\\s:/e\x`, `upperdir=/u\:\,\\`, "workdir=/w"}},
			`filesystem type=overlay lowers=["/c:o" "/c,o" "/b\\s" "/ex"] upper=/u:,\ work=/w`},
		{Mount{Type: "overlay", Options: []string{"lowerdir=/a::/d1::/d2"}}, `filesystem type=overlay lowers=["/a"] data=["/d1" "/d2"]`},
		{Mount{Type: "overlay", Options: []string{`lowerdir+=/a\,b`, "lowerdir+=/c", "datadir+=/d"}}, `filesystem type=overlay lowers=["/a,b" "/c"] data=["/d"]`},
		{Mount{Type: "fuse3.fuse-layerfs", Source: "x", Options: []string{"lowerdir=/a:/b", "ro,allow_other"}},
			`helper type=fuse-layerfs source=x params=["lowerdir=/a:/b" "ro,allow_other"] helper=mount.fuse3`},
		{Mount{Type: "fuse.sshfs", Source: "x"}, `helper type=sshfs source=x helper=mount.fuse`},
		{Mount{Type: "fuseblk", Source: "/dev/x"}, `filesystem type=fuseblk source=/dev/x`},
	} {
		p, err := parse(c.m)
		if err != nil {
			t.Errorf("%+v: %v", c.m, err)
			continue
		}
		if got := describe(p); got != c.want {
			t.Errorf("%+v:\ngot  %s\nwant %s", c.m, got, c.want)
		}
	}
}

func TestOptionsThatAreRefused(t *testing.T) {
	for _, c := range []struct {
		m    Mount
		says string
	}{
		{Mount{Type: "overlay", Options: []string{"upperdir=/u", "workdir=/w"}}, "without lowerdir"},
		{Mount{Type: "overlay", Options: []string{"lowerdir=/a", "upperdir=/u"}}, "both upperdir and workdir"},
		{Mount{Type: "overlay", Options: []string{"lowerdir=/a", "workdir=/w"}}, "both upperdir and workdir"},
		{Mount{Type: "overlay", Options: []string{"lowerdir="}}, "empty path"},
		{Mount{Type: "overlay", Options: []string{"lowerdir=:/a"}}, "empty path"},
		{Mount{Type: "overlay", Options: []string{"lowerdir=/a:"}}, "empty path"},
		{Mount{Type: "overlay", Options: []string{"lowerdir=/a:::/b"}}, "empty path"},
		{Mount{Type: "overlay", Options: []string{"lowerdir=/a::/d:/b"}}, "after a data-only one"},
		{Mount{Type: "overlay", Options: []string{"lowerdir=/a", "upperdir=", "workdir=/w"}}, "upperdir is empty"},
		{Mount{Type: "overlay", Options: []string{"X-containerd.mkdir.path=/x"}}, "mount manager"},
		{Mount{Type: "bind", Source: "/s", Options: []string{"bind", "size=3"}}, `"size=3"`},
		{Mount{Type: "bind", Source: "/s", Options: []string{"bind", "uidmap=0:1:2"}}, "go together"},
		{Mount{Type: "bind", Source: "/s", Options: []string{"bind", "uidmap=0:1"}}, "CONTAINER:HOST:SIZE"},
		{Mount{Type: "bind", Source: "/s", Options: []string{"bind", "uidmap=0:-1:5"}}, "32-bit"},
		{Mount{Type: "bind", Source: "/s", Options: []string{"bind", "gidmap=0:4294967296:5"}}, "32-bit"},
		{Mount{Type: "bind", Source: "/s", Options: []string{"bind", "gidmap=0:1:0"}}, "maps nothing"},
	} {
		_, err := parse(c.m)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: %v, want invalid argument with %q", c.m, err, c.says)
		}
	}
	if err := All(t.Context(), nil, "/"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no mounts: %v", err)
	}
}

func TestDataOfMount2IsOnePageOfEscapedOptions(t *testing.T) {
	p, err := parse(Mount{Type: "overlay", Options: []string{`lowerdir=/c\:o:/d::/e`, `upperdir=/u\,`, "workdir=/w", "index=off", "userxattr"}})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := p.data(), `lowerdir=/c\:o:/d::/e,upperdir=/u\,,workdir=/w,index=off,userxattr`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// FuzzOptions: an overlay that parses says the same after being written out and
// parsed again.
func FuzzOptions(f *testing.F) {
	for _, s := range []string{"lowerdir=/a:/b", `lowerdir=/a\:b::/c,upperdir=/u,workdir=/w`, `upperdir=\`, "uidmap=0:1:2", "rbind,ro", `context="a,b"`} {
		f.Add("overlay", s)
		f.Add("bind", s)
	}
	f.Fuzz(func(t *testing.T, fstype, option string) {
		p, err := parse(Mount{Type: fstype, Source: "s", Options: []string{option}})
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("error %v is not about the argument", err)
			}
			return
		}
		if p.kind != filesystem || p.layers == nil {
			return
		}
		again, err := parse(Mount{Type: fstype, Options: p.layers.options()})
		if err != nil || !reflect.DeepEqual(again.layers, p.layers) {
			t.Fatalf("%q parses as %+v, written out as %q it parses as %+v, %v", option, p.layers, p.layers.options(), again, err)
		}
	})
}

func TestMountinfoLines(t *testing.T) {
	const text = `24 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard
31 24 0:40 /sub\040dir /mnt/a\011b\134c ro,nosuid - tmpfs some\040source rw,size=1k
40 24 0:50 / /o rw - overlay overlay rw,lowerdir=/a\134:b:/c,upperdir=/u\134\054,workdir=/w,userxattr
41 24 0:51 / /p ro - overlay none ro,lowerdir+=/a:b\054,lowerdir+=/c\134d,redirect_dir=nofollow
42 24 254:0 /srv/tree /bind ro,relatime - ext4 /dev/vda rw,discard
`
	infos, err := parseMountinfo(strings.NewReader(text))
	if err != nil || len(infos) != 5 {
		t.Fatalf("%d, %v", len(infos), err)
	}
	findBindSources(infos)
	want := []Info{
		{ID: 24, Parent: 1, Major: 254, Root: "/", Target: "/", Options: []string{"rw", "relatime"}, Propagation: []string{"shared:1", "master:2"},
			Type: "ext4", Source: "/dev/vda", SuperOptions: []string{"rw", "discard"}},
		{ID: 31, Parent: 24, Minor: 40, Root: "/sub dir", Target: "/mnt/a\tb\\c", Options: []string{"ro", "nosuid"},
			Type: "tmpfs", Source: "some source", SuperOptions: []string{"rw", "size=1k"}},
	}
	for i, w := range want {
		if !reflect.DeepEqual(infos[i], w) {
			t.Errorf("got  %+v\nwant %+v", infos[i], w)
		}
	}
	for i, w := range map[int]Mount{
		1: {Type: "tmpfs", Source: "some source", Options: []string{"ro", "nosuid", "size=1k"}},
		2: {Type: "overlay", Source: "overlay", Options: []string{"rw", "userxattr", `lowerdir=/a\:b:/c`, `upperdir=/u\,`, "workdir=/w"}},
		3: {Type: "overlay", Source: "none", Options: []string{"ro", "redirect_dir=nofollow", `lowerdir=/a\:b\,:/c\\d`}},
		4: {Type: "bind", Source: "/srv/tree", Options: []string{"bind", "ro", "relatime"}},
	} {
		if got := infos[i].Mount(); !reflect.DeepEqual(got, w) {
			t.Errorf("%s:\ngot  %+v\nwant %+v", infos[i].Target, got, w)
		}
	}
}

func TestMalformedMountinfoIsAnError(t *testing.T) {
	for _, line := range []string{"x", "1 2 3:4 / / rw ext4 /dev rw", "a 2 3:4 / / rw - ext4 /dev rw", "1 2 3 / / rw - ext4 /dev rw", "1 2 3:4 / / rw - ext4"} {
		if infos, err := parseMountinfo(strings.NewReader(line)); err == nil || !strings.Contains(err.Error(), "malformed") {
			t.Errorf("%q: %+v, %v", line, infos, err)
		}
	}
}

func FuzzMountinfo(f *testing.F) {
	own, _ := os.ReadFile("/proc/self/mountinfo")
	f.Add(string(own))
	f.Add("1 2 3:4 / /\\04 rw shared:1 - overlay o lowerdir=\\134,lowerdir+=")
	f.Fuzz(func(t *testing.T, text string) {
		infos, err := parseMountinfo(strings.NewReader(text))
		if err != nil {
			return
		}
		findBindSources(infos)
		for _, i := range infos {
			if m := i.Mount(); m.Type == "overlay" {
				if _, err := OverlayLayers(m); err != nil && !errdefs.IsInvalidArgument(err) {
					t.Fatalf("%+v: %v", m, err)
				}
			}
		}
	})
}
