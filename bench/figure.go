package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
)

// figure is one number that was measured, as it is printed.
type figure struct {
	Bench   string  `json:"bench"`
	Name    string  `json:"name"`
	Clients int     `json:"clients,omitempty"`
	Value   float64 `json:"value"`
	Unit    string  `json:"unit,omitempty"`
	// Target is what Blixard wants to reach, in words; Reached tells whether it
	// did, absent where there is no target.
	Target  string `json:"target,omitempty"`
	Reached *bool  `json:"reached,omitempty"`
	Peer    *peer  `json:"peer,omitempty"`
	// Rounds are the single measurements that Value is the median of.
	Rounds []float64 `json:"rounds,omitempty"`
	Method string    `json:"method,omitempty"`
	Error  string    `json:"error,omitempty"`
}

// peer is what another system reached beside it.
type peer struct {
	Name   string    `json:"name"`
	Value  float64   `json:"value"`
	Ratio  float64   `json:"ratio"` // ours to the peer's
	Rounds []float64 `json:"rounds,omitempty"`
}

// recorder prints figures and keeps them for the end.
type recorder struct {
	out     io.Writer
	bench   string
	machine machine
	figures []figure
}

func newRecorder(out io.Writer, m machine) *recorder { return &recorder{out: out, machine: m} }

// add prints a figure.
func (r *recorder) add(f figure) {
	f.Bench = r.bench
	f.Value, f.Rounds = short(f.Value), shorts(f.Rounds)
	if f.Peer != nil {
		if f.Peer.Value != 0 {
			f.Peer.Ratio = short(f.Value / f.Peer.Value)
		}
		f.Peer.Value, f.Peer.Rounds = short(f.Peer.Value), shorts(f.Peer.Rounds)
	}
	r.figures = append(r.figures, f)
	r.print(f)
}

// missing notes that a benchmark could not be run, or not to its end.
func (r *recorder) missing(err error) { r.add(figure{Name: "missing", Error: err.Error()}) }

// finish prints everything once more as one object.
func (r *recorder) finish() error {
	return r.print(struct {
		Machine machine  `json:"machine"`
		Figures []figure `json:"figures"`
	}{r.machine, r.figures})
}

func (r *recorder) print(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding a figure: %w", err)
	}
	if _, err := fmt.Fprintf(r.out, "%s\n", b); err != nil {
		return fmt.Errorf("printing a figure: %w", err)
	}
	return nil
}

// reached is a figure's verdict.
func reached(ok bool) *bool { return &ok }

// short rounds to four digits.
func short(x float64) float64 {
	if x == 0 || math.IsNaN(x) || math.IsInf(x, 0) {
		return 0
	}
	unit := math.Pow(10, math.Floor(math.Log10(math.Abs(x)))-3)
	rounded := math.Round(x/unit) * unit
	return math.Round(rounded*1e9) / 1e9
}

func shorts(xs []float64) []float64 {
	out := make([]float64, 0, len(xs))
	for _, x := range xs {
		out = append(out, short(x))
	}
	return out
}

// median of measurements, 0 of none.
func median(xs []float64) float64 {
	if len(xs) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(xs))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}
