package dispatch

import (
	"io"
	"time"
)

// For tests.

func SendTemplate(w io.Writer, dir string) error { return sendTemplate(w, dir) }

func ReceiveTemplate(r io.Reader, dir string) error { return receiveTemplate(r, dir) }

func ReceivePlain(r io.Reader, dir string) error { return receiveFrames(r, dir) }

func (d *Dispatcher) TidyNow(unused map[string]time.Time) { d.tidyNow(unused) }

// Places hands out addresses of guests.
type Places struct{ d Dispatcher }

func NewPlaces(raftID uint64) (count int, p *Places) {
	return hosts, &Places{Dispatcher{raftID: raftID, places: map[uint32]bool{}}}
}

func (p *Places) Next() string {
	address, _, _ := p.d.placeOf(place{}).addresses()
	return address
}

func (p *Places) Free(host uint32) { p.d.leavePlace(&instance{place: place{host: host}}) }
