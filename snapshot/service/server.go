package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
)

// Options say what a Server serves, and to whom. Views and Allowed are required.
type Options struct {
	Views   Views
	Only    string  // the one view to serve, whatever requests name; "" for all
	Differ  *Differ // nil: no diff API
	Allowed Allowed
	Limits  Limits
	Log     *slog.Logger // nil: none
	// Observe, if not nil, is told of each call when it begins; what it returns, when
	// the call ends.
	Observe func(Call) (done func(error))
}

// Call is a call of a client.
type Call struct {
	Method string // "/containerd.services.snapshots.v1.Snapshots/Prepare"
	View   string // that serves it; "" where there is none, whatever the request names
}

// Server serves one socket.
type Server struct {
	o      Options
	grpc   *grpc.Server
	health *health.Server
	views  *dispatcher
}

// New returns a Server. ErrNotFound if Only names no view.
func New(o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Observe == nil {
		o.Observe = func(Call) func(error) { return func(error) {} }
	}
	o.Limits = o.Limits.orDefaults()
	views, err := newDispatcher(o.Views, o.Only)
	if err != nil {
		return nil, err
	}
	s := &Server{o: o, health: health.NewServer(), views: views}
	refused := func(p Peer) { s.o.Log.Warn("connection refused", "peer", p.String()) }
	s.grpc = grpc.NewServer(
		grpc.Creds(peerCredentials{o.Allowed, refused}),
		grpc.MaxRecvMsgSize(o.Limits.Message), grpc.MaxSendMsgSize(o.Limits.Message),
		grpc.MaxConcurrentStreams(o.Limits.Streams),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
	)
	snapshotsapi.RegisterSnapshotsServer(s.grpc, views)
	s.health.SetServingStatus(snapshotsapi.Snapshots_ServiceDesc.ServiceName, healthapi.HealthCheckResponse_SERVING)
	if o.Differ != nil {
		diffapi.RegisterDiffServer(s.grpc, diffservice.FromApplierAndComparer(o.Differ, o.Differ))
		s.health.SetServingStatus(diffapi.Diff_ServiceDesc.ServiceName, healthapi.HealthCheckResponse_SERVING)
	}
	healthapi.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	return s, nil
}

// Serve accepts connections on l, a unix socket, until Drain; it closes l.
func (s *Server) Serve(l net.Listener) error {
	err := s.grpc.Serve(l)
	if errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return err
}

// Drain takes no more calls and waits for those at work. When ctx ends they are
// cancelled, which is an error.
func (s *Server) Drain(ctx context.Context) error {
	s.health.Shutdown()
	done := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		s.grpc.Stop()
		<-done
		return fmt.Errorf("calls were cancelled: %w", ctx.Err())
	}
}

// unary is around every call but List.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	end := s.begin(ctx, info.FullMethod, s.views.name(req))
	defer func() { err = end(err, recover()) }()
	if err := s.o.Limits.check(req); err != nil {
		return nil, err
	}
	return handle(ctx, req)
}

// stream is around List, health's Watch and reflection.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	end := s.begin(ss.Context(), info.FullMethod, "")
	defer func() { err = end(err, recover()) }()
	return handle(srv, ss)
}

// begin tells of a call; end of its outcome, which is turned into grpc's form. A
// panic in one call is no reason to end those of others.
func (s *Server) begin(ctx context.Context, method, view string) (end func(err error, panicked any) error) {
	started := time.Now()
	done := s.o.Observe(Call{Method: method, View: view})
	return func(err error, panicked any) error {
		if panicked != nil {
			s.o.Log.Error("panic in a call", "method", method, "panic", fmt.Sprint(panicked), "stack", string(debug.Stack()))
			err = fmt.Errorf("the service made a mistake, its log has more: %w", errdefs.ErrInternal)
		}
		err = toGRPC(err)
		done(err)
		s.log(ctx, method, view, time.Since(started), err)
		return err
	}
}

// toGRPC gives an error the status of its sentinel, unless it has one.
func toGRPC(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return errgrpc.ToGRPC(err)
}

func (s *Server) log(ctx context.Context, method, view string, took time.Duration, err error) {
	level := slog.LevelDebug
	switch native := errgrpc.ToNative(err); {
	case err == nil, errdefs.IsNotFound(native), errdefs.IsAlreadyExists(native), errdefs.IsNotImplemented(native), errdefs.IsCanceled(native):
		// what clients ask to find out
	case errdefs.IsInternal(native), errdefs.IsDataLoss(native), errdefs.IsUnknown(native), errdefs.IsResourceExhausted(native):
		level = slog.LevelError
	default:
		level = slog.LevelWarn
	}
	if !s.o.Log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{slog.String("method", method), slog.Duration("took", took)}
	if view != "" {
		attrs = append(attrs, slog.String("view", view))
	}
	if ns, ok := namespaces.Namespace(ctx); ok {
		attrs = append(attrs, slog.String("namespace", ns))
	}
	if p, ok := PeerOf(ctx); ok {
		attrs = append(attrs, slog.Int("pid", int(p.PID)))
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", status.Convert(err).Message()))
	}
	s.o.Log.LogAttrs(ctx, level, "call", attrs...)
}
