package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc/status"

	"github.com/layerctl/layerctl/internal/socket"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/snapshot"
	"github.com/layerctl/layerctl/snapshot/service"
)

// metrics are the service's figures, served over HTTP.
type metrics struct {
	calls   *prometheus.CounterVec
	seconds *prometheus.HistogramVec
	atWork  *prometheus.GaugeVec
	bytes   *prometheus.CounterVec
	http    *http.Server
	ended   chan struct{}
}

// newMetrics begins to serve them at HOST:PORT or at a unix socket.
func newMetrics(address string, s *snapshot.Store, log *slog.Logger) (*metrics, error) {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "layerd_calls_total",
			Help: "Calls that have ended."}, []string{"method", "view", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "layerd_call_seconds",
			Help: "How long calls took.", Buckets: prometheus.ExponentialBuckets(0.0005, 4, 10)}, []string{"method", "view"}),
		atWork: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "layerd_calls_at_work",
			Help: "Calls that have not ended yet."}, []string{"method"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "layerd_layer_bytes_total",
			Help: "Uncompressed bytes of layers that were made (diff) or unpacked (apply)."}, []string{"op"}),
		ended: make(chan struct{}),
	}
	r := prometheus.NewRegistry()
	r.MustRegister(m.calls, m.seconds, m.atWork, m.bytes, newStoreCollector(s),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	l, err := listenHTTP(address)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 30 * time.Second}))
	m.http = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		defer close(m.ended)
		if err := m.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("metrics", "error", err)
		}
	}()
	log.Info("metrics", "address", l.Addr().String())
	return m, nil
}

func listenHTTP(address string) (net.Listener, error) {
	if filepath.IsAbs(address) {
		return socket.Listen(address, socket.Options{})
	}
	return net.Listen("tcp", address)
}

// observe is service.Options.Observe.
func (m *metrics) observe(c service.Call) func(error) {
	started := time.Now()
	m.atWork.WithLabelValues(c.Method).Inc()
	return func(err error) {
		m.atWork.WithLabelValues(c.Method).Dec()
		m.seconds.WithLabelValues(c.Method, c.View).Observe(time.Since(started).Seconds())
		m.calls.WithLabelValues(c.Method, c.View, status.Code(err).String()).Inc()
	}
}

func (m *metrics) transferred(op string, bytes int64) {
	m.bytes.WithLabelValues(op).Add(float64(bytes))
}

func (m *metrics) close() error {
	err := m.http.Close()
	<-m.ended
	return err
}

// storeCollector counts what is in the store when it is asked.
type storeCollector struct {
	s                                 *snapshot.Store
	snapshots, mounts, free, size, up *prometheus.Desc
}

func newStoreCollector(s *snapshot.Store) *storeCollector {
	return &storeCollector{s: s,
		snapshots: prometheus.NewDesc("layerd_snapshots", "Snapshots of a view.", []string{"view"}, nil),
		mounts:    prometheus.NewDesc("layerd_mounts", "Mounts of layers in layerd's mount namespace.", []string{"driver"}, nil),
		free:      prometheus.NewDesc("layerd_store_free_bytes", "What is free on the store's file system.", nil, nil),
		size:      prometheus.NewDesc("layerd_store_size_bytes", "Size of the store's file system.", nil, nil),
		up:        prometheus.NewDesc("layerd_store_up", "1 if the store's records could be read.", nil, nil),
	}
}

// Describe is prometheus.Collector's.
func (c *storeCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.snapshots, c.mounts, c.free, c.size, c.up} {
		ch <- d
	}
}

// Collect is prometheus.Collector's.
func (c *storeCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	up := 1.0
	counts, err := c.s.Counts(ctx)
	if err != nil {
		up = 0
	}
	for view, n := range counts {
		gauge(c.snapshots, float64(n), view)
	}
	if ms, err := c.s.Mounted(ctx); err == nil {
		n := map[string]int{}
		for _, m := range ms {
			n[m.Driver]++
		}
		for driver, n := range n {
			gauge(c.mounts, float64(n), driver)
		}
	}
	if st, err := sys.StatfsPath(c.s.Root()); err == nil {
		gauge(c.free, float64(st.BlocksUser)*float64(st.BlockSize))
		gauge(c.size, float64(st.Blocks)*float64(st.BlockSize))
	}
	gauge(c.up, up)
}
