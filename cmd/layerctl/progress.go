package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/term"
)

var progressModes = []string{"auto", "plain", "json", "none"}

func checkProgress(mode string) error {
	if !slices.Contains(progressModes, mode) {
		return fmt.Errorf("--progress %q: not one of %s", mode, strings.Join(progressModes, ", "))
	}
	return nil
}

// progress shows how far one piece of work is. Its methods may be called from
// any goroutine; a nil progress shows nothing.
type progress struct {
	verb    string
	done    atomic.Int64 // bytes
	total   atomic.Int64 // bytes; 0 as long as it is not known
	started time.Time
	object  atomic.Value // string: what is being worked on
	count   bool         // done and total are objects, not bytes
	draw    func(state)  // called by one goroutine
	stop    chan struct{}
	stopped sync.WaitGroup
	once    sync.Once
}

// state is what is drawn.
type state struct {
	Verb    string  `json:"verb"`
	Object  string  `json:"object,omitempty"` // what is being worked on
	Unit    string  `json:"unit"`             // "bytes" or "objects"
	Done    int64   `json:"done"`
	Total   int64   `json:"total,omitempty"` // 0: not known
	Rate    float64 `json:"rate"`            // per second
	Elapsed float64 `json:"elapsed"`         // seconds
	ETA     float64 `json:"eta,omitempty"`   // seconds; 0: not known
	End     bool    `json:"end,omitempty"`
}

// startProgress shows progress on standard error as --progress says: bars on a
// terminal, and in auto nothing where there is none. total 0 is unknown.
func (a *app) startProgress(verb string, total int64) *progress {
	return a.start(&progress{verb: verb}, total)
}

// startSteps is startProgress of work that is counted in objects.
func (a *app) startSteps(verb string) *progress {
	return a.start(&progress{verb: verb, count: true}, 0)
}

func (a *app) start(p *progress, total int64) *progress {
	draw, every := a.renderer()
	if draw == nil {
		return nil
	}
	p.started, p.draw, p.stop = time.Now(), draw, make(chan struct{})
	p.total.Store(total)
	p.object.Store("")
	p.stopped.Go(func() { p.loop(every) })
	return p
}

// renderer returns how to draw, and how often; nil for not at all.
func (a *app) renderer() (func(state), time.Duration) {
	tty := isTerminal(a.err)
	switch {
	case a.progress == "json":
		return jsonRenderer(a.err), 250 * time.Millisecond
	case a.progress == "plain" || a.progress == "auto" && tty && os.Getenv("TERM") == "dumb":
		return plainRenderer(a.err), 5 * time.Second
	case a.progress == "auto" && tty && !a.quiet:
		return barRenderer(a.err), 100 * time.Millisecond
	}
	return nil, 0
}

func (p *progress) loop(every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.draw(p.state(false))
		case <-p.stop:
			p.draw(p.state(true))
			return
		}
	}
}

func (p *progress) state(end bool) state {
	s := state{Verb: p.verb, Object: p.object.Load().(string), Unit: "bytes", Done: p.done.Load(), Total: p.total.Load(), Elapsed: time.Since(p.started).Seconds(), End: end}
	if s.Elapsed > 0 {
		s.Rate = float64(s.Done) / s.Elapsed
	}
	if p.count {
		s.Unit = "objects"
	}
	if s.Rate > 0 && s.Total > s.Done {
		s.ETA = float64(s.Total-s.Done) / s.Rate
	}
	return s
}

// Set tells how many bytes are done.
func (p *progress) Set(n int64) {
	if p != nil {
		p.done.Store(n)
	}
}

// SetTotal tells how many bytes there are.
func (p *progress) SetTotal(n int64) {
	if p != nil {
		p.total.Store(n)
	}
}

// Step tells what is being worked on, and how far that is.
func (p *progress) Step(object string, done, total int64) {
	if p != nil {
		p.object.Store(object)
		p.done.Store(done)
		p.total.Store(total)
	}
}

// Stop draws the last state. Idempotent.
func (p *progress) Stop() {
	if p == nil {
		return
	}
	p.once.Do(func() { close(p.stop); p.stopped.Wait() })
}

// Reader counts what is read from r.
func (p *progress) Reader(r io.Reader) io.Reader {
	if p == nil {
		return r
	}
	return progressReader{r, p}
}

type progressReader struct {
	r io.Reader
	p *progress
}

func (r progressReader) Read(b []byte) (int, error) {
	n, err := r.r.Read(b)
	r.p.done.Add(int64(n))
	return n, err
}

func jsonRenderer(w io.Writer) func(state) {
	e := json.NewEncoder(w)
	return func(s state) { _ = e.Encode(s) }
}

func plainRenderer(w io.Writer) func(state) {
	return func(s state) { fmt.Fprintf(w, "layerctl: %s\n", describe(s)) }
}

// barRenderer redraws one line; the last state clears it.
func barRenderer(w io.Writer) func(state) {
	return func(s state) {
		if s.End {
			fmt.Fprint(w, "\r\x1b[K")
			return
		}
		fmt.Fprintf(w, "\r%s\x1b[K", barLine(s, terminalWidth(w)))
	}
}

func terminalWidth(w io.Writer) int {
	if f, ok := w.(*os.File); ok {
		if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
			return width
		}
	}
	return 80
}

// barLine is a bar and its description in at most width-1 columns.
func barLine(s state, width int) string {
	text := describe(s)
	room := width - 1 - len(text) - 3
	if s.Total <= 0 || room < 8 {
		return text[:min(len(text), max(width-1, 0))]
	}
	room = min(room, 40)
	full := int(int64(room) * min(s.Done, s.Total) / s.Total)
	return "[" + strings.Repeat("#", full) + strings.Repeat("-", room-full) + "] " + text
}

// describe says a state in words.
func describe(s state) string {
	amount := humanBytes
	if s.Unit == "objects" {
		amount = humanCount
	}
	text := s.Verb + " " + amount(s.Done)
	if s.Total > 0 {
		text += fmt.Sprintf(" of %s (%d%%)", amount(s.Total), 100*min(s.Done, s.Total)/s.Total)
	}
	if s.Unit == "bytes" {
		text += ", " + humanBytes(int64(s.Rate)) + "/s"
	}
	switch {
	case s.End:
		return text + ", " + seconds(s.Elapsed)
	case s.ETA > 0:
		text += ", " + seconds(s.ETA) + " left"
	}
	if s.Object != "" {
		text += ", " + printable(shortName(s.Object))
	}
	return text
}

func seconds(s float64) string {
	if s < 10 {
		return fmt.Sprintf("%.1f s", s)
	}
	return time.Duration(s * float64(time.Second)).Round(time.Second).String()
}
