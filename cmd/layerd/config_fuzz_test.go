package main

import (
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
)

// FuzzConfig: whatever is in a configuration file, it is refused as wrong or it is a
// configuration that, printed and read again, is the same.
func FuzzConfig(f *testing.F) {
	all, err := newConfig().text()
	must(f, err)
	f.Add(all)
	for _, text := range []string{
		"", "root = '/a'\nvolatile = true\ngc_interval = '0s'",
		"[listen]\nmode = '0660'\nuid = 5\nallow_gids = [1, 2]", "[listen]\naddress = '/run/s'\n[views.a]\ndriver = 'native'\nsocket = '/run/a'",
		"[diff]\nenabled = false\n[views.a]\ndriver = 'overlay'", "[driver_options.overlay]\nredirect_dir = 'on'",
		"[limits]\nmessage_bytes = 1\nwindow_bytes = 5", "[log]\nlevel = 'debug+3'\nformat = 'json'", "stop_timeout = '-1h'", "[views]", "views = 1",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := newConfig()
		if err := c.parse(b); err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) { // no such driver
				t.Errorf("%q: %v", b, err)
			}
			return
		}
		text, err := c.text()
		must(t, err)
		again := newConfig()
		if err := again.parse(text); err != nil {
			t.Fatalf("what was printed of %q is refused: %v\n%s", b, err, text)
		}
		if twice, err := again.text(); err != nil || string(twice) != string(text) {
			t.Errorf("%q, printed:\n%s\nread and printed again: %v\n%s", b, text, err, twice)
		}
		if !reflect.DeepEqual(again.Views, c.Views) || again.Listen.Mode != c.Listen.Mode || again.Stop != c.Stop {
			t.Errorf("%q: %+v, read again %+v", b, c, again)
		}
	})
}
