package main

import (
	"fmt"
	"os"

	"github.com/layerctl/layerctl/internal/sys"
)

// remount changes the flags of a mount that is there, as mount(8) asks its helpers
// to with `mount -o remount,ro`. The server goes on as it is: what it was not opened
// for, as writing, it still refuses.
func remount(c *commandLine) error {
	flags := c.options.mount.flags(os.Geteuid() == 0) | sys.MS_REMOUNT
	if err := sys.Mount("", c.target, "", flags, ""); err != nil {
		return fmt.Errorf("remounting %s: %w", c.target, err)
	}
	return nil
}
