package main

import (
	"strings"
	"testing"
)

func TestPlainName(t *testing.T) {
	key := "sha256:" + strings.Repeat("0123456789abcdef", 4)
	for _, c := range [][3]string{
		{"base", "base", "base"},
		{key, key, "0123456789ab"},
		{key, "0123", "0123456789ab"},
		{key, "fedc12", "0123456789ab"}, // of the image's manifest
		{key, "sha256:01234", "0123456789ab"},
		{key, "localhost/some/app:latest", "app"},
		{key, "localhost:5000/app", "app"},
		{key, "app@" + key, "app"},
		{"sha256:abc", "x", "sha256:abc"},
	} {
		if got := plainName(c[0], c[1]); got != c[2] {
			t.Errorf("%q called %q: %q, want %q", c[0], c[1], got, c[2])
		}
	}
}

func TestCheckName(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "a b": true, "ü": true, "-x": true, "a/b:c": true, strings.Repeat("x", 255): true,
		"": false, "a\nb": false, "\x1b[31m": false, "\xff": false, "\u0085": false, strings.Repeat("x", 256): false,
	} {
		if err := checkName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}
