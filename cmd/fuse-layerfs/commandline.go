package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// commandLine is what the program was called with.
type commandLine struct {
	help, version     bool
	foreground, debug bool
	source, target    string
	options           options
	warnings          []string
}

// parseCommandLine reads fuse-overlayfs's command line, which is libfuse's:
// [-f|-d] [-o OPTIONS] [SOURCE] MOUNTPOINT, in any order.
func parseCommandLine(args []string) (commandLine, error) {
	c := commandLine{options: defaultOptions()}
	var words []string
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		switch {
		case arg == "--":
			words = append(words, args...)
			args = nil
		case arg == "-o" || arg == "--options":
			if len(args) == 0 {
				return c, fmt.Errorf("%s needs options behind it", arg)
			}
			if err := c.take(args[0]); err != nil {
				return c, err
			}
			args = args[1:]
		case strings.HasPrefix(arg, "-o"):
			if err := c.take(arg[len("-o"):]); err != nil {
				return c, err
			}
		case len(arg) > 1 && arg[0] == '-':
			if err := c.flag(arg); err != nil {
				return c, err
			}
		default:
			words = append(words, arg)
		}
	}
	return c, c.words(words)
}

func (c *commandLine) flag(arg string) error {
	switch arg {
	case "-h", "--help":
		c.help = true
	case "-V", "--version":
		c.version = true
	case "-f", "--foreground":
		c.foreground = true
	case "-d", "--debug":
		c.foreground, c.debug = true, true
	case "-s": // libfuse's: one thread
		c.options.maxThreads = 1
	case "-n", "-v", "--verbose": // mount(8)'s
	default:
		return fmt.Errorf("unknown argument %s; see --help", arg)
	}
	return nil
}

// words takes what is neither a flag nor an option.
func (c *commandLine) words(words []string) error {
	switch {
	case len(words) == 1:
		c.target = words[0]
	case len(words) == 2: // as mount(8) calls its helpers: what is mounted first
		c.source, c.target = words[0], words[1]
	case len(words) > 2:
		return fmt.Errorf("%q: too many arguments", words[2])
	case !c.help && !c.version:
		return errors.New("no mountpoint given; see --help")
	}
	return nil
}

// take reads one -o argument: options between commas; a comma behind a
// backslash is part of an option.
func (c *commandLine) take(list string) error {
	for _, opt := range splitEscaped(list, ',') {
		if opt == "" {
			continue
		}
		key, value, has := strings.Cut(opt, "=")
		known, err := c.options.set(key, value, has)
		if err != nil {
			return fmt.Errorf("option %s: %w", opt, err)
		}
		if !known {
			c.warnings = append(c.warnings, fmt.Sprintf("unknown option %s ignored", opt))
		}
		if key == "debug" && !has {
			c.foreground, c.debug = true, true
		}
	}
	return nil
}

// splitEscaped splits at sep where no backslash is before it, and takes that
// backslash away; all others stay. A label between quotes is one part: an engine
// writes context="system_u:object_r:container_file_t:s0:c1,c2" as mount(8) has it.
func splitEscaped(s string, sep byte) []string {
	var parts []string
	var part []byte
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s):
			if s[i+1] != sep {
				part = append(part, s[i])
			}
			part = append(part, s[i+1])
			i++
		case s[i] == sep && !openLabel(part):
			parts = append(parts, string(part))
			part = part[:0]
		default:
			part = append(part, s[i])
		}
	}
	return append(parts, string(part))
}

// openLabel reports whether a part is the beginning of a label whose quotes are still
// open.
func openLabel(part []byte) bool {
	key, value, _ := bytes.Cut(part, []byte{'='})
	return labelOptions[string(key)] && len(value) > 0 && value[0] == '"' && bytes.IndexByte(value[1:], '"') < 0
}

// unescape takes one level of backslashes away.
func unescape(s string) string {
	var b []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b = append(b, s[i])
	}
	return string(b)
}
