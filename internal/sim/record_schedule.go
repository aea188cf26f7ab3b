package sim

import (
	"encoding/json"
	"fmt"
	"io"
)

// ReadSchedule reads a schedule as JSON, as Shrink's is written, and checks
// that it can be played.
func ReadSchedule(r io.Reader) (*Schedule, error) {
	s := new(Schedule)
	dec := json.NewDecoder(r)
	dec.DisallowUnknownFields()
	if err := dec.Decode(s); err != nil {
		return nil, fmt.Errorf("reading a schedule: %w", err)
	}
	return s, s.check()
}
