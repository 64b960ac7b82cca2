package inflate

import "io"

const (
	// inputSize is how much is read at a time.
	inputSize = 64 << 10
	// wordBytes is what a look at the input by the word takes.
	wordBytes = 8
)

// input is the compressed stream: in[pos:end] is read from below and not used.
type input struct {
	r        io.Reader
	in       []byte
	pos, end int
	before   int64 // bytes of the stream before in[0]
	err      error // of r; nothing comes after it
}

func newInput(r io.Reader) input {
	return input{r: r, in: make([]byte, inputSize)}
}

// more reads until at least n bytes are there, or there are no more; n is small.
func (in *input) more(n int) {
	if in.end-in.pos >= n || in.err != nil {
		return
	}
	keep := min(in.pos, wordBytes) // alignToByte goes back by less
	in.before += int64(in.pos - keep)
	in.end = copy(in.in, in.in[in.pos-keep:in.end])
	in.pos = keep
	idle := 0
	for in.end-in.pos < n && in.err == nil {
		var got int
		got, in.err = in.r.Read(in.in[in.end:])
		in.end += got
		if idle++; got > 0 {
			idle = 0
		}
		if idle == 100 && in.err == nil {
			in.err = io.ErrNoProgress
		}
	}
}

// full fills p; io.EOF if there was nothing.
func (in *input) full(p []byte) error {
	for n := 0; n < len(p); {
		in.more(1)
		if in.pos == in.end {
			if in.err == io.EOF && n > 0 {
				return io.ErrUnexpectedEOF
			}
			return in.err
		}
		got := copy(p[n:], in.in[in.pos:in.end])
		in.pos += got
		n += got
	}
	return nil
}
