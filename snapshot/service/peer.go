package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// Peer is the process at the other end of a unix socket, as the kernel knew it
// when it connected.
type Peer struct {
	PID int32
	UID uint32
	GID uint32
}

// AuthType says how the peer is known.
func (Peer) AuthType() string { return "SO_PEERCRED" }

func (p Peer) String() string { return fmt.Sprintf("process %d (uid %d, gid %d)", p.PID, p.UID, p.GID) }

// PeerOf returns who made the call of ctx; false if it did not come by a unix
// socket.
func PeerOf(ctx context.Context) (Peer, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Peer{}, false
	}
	c, ok := p.AuthInfo.(Peer)
	return c, ok
}

// Allowed are the users and groups that may connect. Its zero value admits nobody.
type Allowed struct{ UIDs, GIDs []uint32 }

// admits tells whether a peer may connect. The group is the peer's first one: the
// kernel does not say the others.
func (a Allowed) admits(p Peer) bool {
	return slices.Contains(a.UIDs, p.UID) || slices.Contains(a.GIDs, p.GID)
}

// peerCredentials lets in who is allowed, and tells handlers who that is. A unix
// socket needs no encryption.
type peerCredentials struct {
	allowed Allowed
	refused func(Peer)
}

func (c peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, err := peerOfConn(conn)
	if err != nil {
		return nil, nil, err
	}
	if !c.allowed.admits(p) {
		c.refused(p)
		return nil, nil, fmt.Errorf("%v may not connect: %w", p, errdefs.ErrPermissionDenied)
	}
	return conn, p, nil
}

// ClientHandshake is for clients, which this is not.
func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errdefs.ErrNotImplemented
}

// Info is grpc's description of the credentials.
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: Peer{}.AuthType()}
}

// Clone is credentials.TransportCredentials's; c holds nothing that changes.
func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName is for clients.
func (peerCredentials) OverrideServerName(string) error { return errdefs.ErrNotImplemented }

func peerOfConn(conn net.Conn) (p Peer, err error) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return Peer{}, fmt.Errorf("%T is no unix socket: %w", conn, errdefs.ErrInvalidArgument)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var c *syscall.Ucred
		if c, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			p = Peer{PID: c.Pid, UID: c.Uid, GID: c.Gid}
		}
	})
	if err = errors.Join(err, cerr); err != nil {
		return Peer{}, fmt.Errorf("who connects (SO_PEERCRED): %w", err)
	}
	return p, nil
}
