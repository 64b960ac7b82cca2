package service

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/leases"
	leasesproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

// Containerd is where a Differ reads and writes content: the client's containerd,
// reached by its socket.
type Containerd struct {
	conn *grpc.ClientConn
}

// Connect returns a connection to the containerd at a unix socket. It is made when
// it is first used, and made again when it breaks.
func Connect(address string, lim Limits) (*Containerd, error) {
	lim = lim.orDefaults()
	b := backoff.DefaultConfig
	b.MaxDelay = 3 * time.Second
	path := strings.TrimPrefix(address, "unix://")
	conn, err := grpc.NewClient("passthrough:///"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: b}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(lim.Message), grpc.MaxCallSendMsgSize(lim.Message)),
	)
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", address, err)
	}
	return &Containerd{conn}, nil
}

// Content is its content store.
func (c *Containerd) Content() content.Store { return contentproxy.NewContentStore(c.conn) }

// Leases are its leases.
func (c *Containerd) Leases() leases.Manager {
	return leasesproxy.NewLeaseManager(leasesapi.NewLeasesClient(c.conn))
}

// Close closes the connection.
func (c *Containerd) Close() error { return c.conn.Close() }
