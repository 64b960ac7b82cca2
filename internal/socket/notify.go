package socket

import (
	"net"
	"os"
)

// Notify tells systemd of the service's state (sd_notify(3)), where it wants to
// know. What it answers is of no use to the service, so errors are not told.
func Notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = c.Write([]byte(state))
}
