package snapshot

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
)

// FuzzIDMapLabel: the label of an id map is refused as wrong, or says what is read of it.
func FuzzIDMapLabel(f *testing.F) {
	for _, s := range []string{"", "0:100000:65536", "0:0:1,1:100000:65535", "0:1", "a:b:c", "-1:0:1", "4294967296:0:1", "0:0:0", ",", "0:0:1,", " 0:0:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		rs, err := idRanges(map[string]string{"l": text}, "l")
		if err != nil {
			if !errdefs.IsInvalidArgument(err) || rs != nil {
				t.Errorf("%q: %v, %v", text, rs, err)
			}
			return
		}
		if (len(rs) == 0) != (text == "") {
			t.Errorf("%q is %v", text, rs)
		}
		var words []string
		for _, r := range rs {
			words = append(words, fmt.Sprintf("%d:%d:%d", r.ContainerID, r.HostID, r.Size))
		}
		again, err := idRanges(map[string]string{"l": strings.Join(words, ",")}, "l")
		if err != nil || !equalRanges(rs, again) {
			t.Errorf("%q is %v, and that is %v, %v", text, rs, again, err)
		}
	})
}

func equalRanges(a, b []drivers.IDRange) bool { return fmt.Sprint(a) == fmt.Sprint(b) }

// FuzzUpdateLabels: an update of some labels changes these alone, and none is kept empty.
func FuzzUpdateLabels(f *testing.F) {
	f.Add("a", "1", "a", "2", "labels.a")
	f.Add("a", "1", "b", "2", "labels")
	f.Add("a", "1", "a", "", "labels.a")
	f.Add("a", "1", "b", "2", "parent")
	f.Add("", "", "", "", "labels.")
	f.Fuzz(func(t *testing.T, name, value, newName, newValue, field string) {
		old, from := map[string]string{name: value}, map[string]string{newName: newValue}
		was := maps.Clone(old)
		got, err := updateLabels(old, from, []string{field})
		if !maps.Equal(old, was) {
			t.Errorf("the old labels were changed: %q", old)
		}
		key, one := strings.CutPrefix(field, "labels.")
		if (err != nil) != (!one && field != "labels") || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("field %q: %v", field, err)
		}
		for k, v := range got {
			if v == "" || v != from[k] && (v != old[k] || one && k == key || !one) {
				t.Errorf("%q updated by %q in field %q: %q", old, from, field, got)
			}
		}
		if one && err == nil && got[key] != from[key] {
			t.Errorf("field %q: %q, want %q", field, got[key], from[key])
		}
	})
}
