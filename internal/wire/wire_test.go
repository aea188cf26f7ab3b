package wire_test

import (
	"errors"
	"math"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard/internal/wire"
)

type inner struct {
	Name string
	N    int64
}

func (i *inner) code(c *wire.Coder) {
	wire.String(c, &i.Name)
	wire.Int(c, &i.N)
}

type outer struct {
	U     uint64
	I     int64
	Small int8
	B     bool
	S     string
	Blob  []byte
	List  []inner
	Names []string
	Opt   *inner
	Last  inner
}

func (o *outer) code(c *wire.Coder) {
	wire.Uint(c, &o.U)
	wire.Int(c, &o.I)
	wire.Int(c, &o.Small)
	wire.Bool(c, &o.B)
	wire.String(c, &o.S)
	c.Blob(&o.Blob)
	wire.List(c, &o.List, func(c *wire.Coder, i *inner) { c.Record(i.code) })
	wire.Strings(c, &o.Names)
	wire.Optional(c, &o.Opt, func(c *wire.Coder, i *inner) { i.code(c) })
	c.Record(o.Last.code)
}

func encode(o *outer) []byte {
	c := wire.Writer(nil)
	o.code(c)
	return c.Bytes()
}

func genInner(t *rapid.T) inner {
	return inner{rapid.StringN(0, 300, -1).Draw(t, "name"), rapid.Int64().Draw(t, "n")}
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := outer{
			U: rapid.Uint64().Draw(t, "u"), I: rapid.Int64().Draw(t, "i"), Small: rapid.Int8().Draw(t, "small"), B: rapid.Bool().Draw(t, "b"),
			S: rapid.String().Draw(t, "s"), Blob: rapid.SliceOfN(rapid.Byte(), 1, 200).Draw(t, "blob"), Last: genInner(t),
		}
		for range rapid.IntRange(0, 5).Draw(t, "n") {
			in.List = append(in.List, genInner(t))
			in.Names = append(in.Names, rapid.String().Draw(t, "name"))
		}
		if rapid.Bool().Draw(t, "has") {
			i := genInner(t)
			in.Opt = &i
		}
		var out outer
		c := wire.Reader(encode(&in))
		out.code(c)
		if err := c.Done(); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(in, out) {
			t.Fatalf("wrote %+v, read %+v", in, out)
		}
	})
}

// An older release reads what a newer one wrote, and the other way round.
func TestRecordsGrow(t *testing.T) {
	newer := func(c *wire.Coder, a *string, b *int64) {
		c.Record(func(c *wire.Coder) {
			wire.String(c, a)
			wire.Int(c, b)
		})
	}
	older := func(c *wire.Coder, a *string) { c.Record(func(c *wire.Coder) { wire.String(c, a) }) }
	a, b, tail := strings.Repeat("x", 500), int64(math.MinInt64), uint8(7)

	w := wire.Writer(nil)
	newer(w, &a, &b)
	wire.Uint(w, &tail)
	var gotA string
	var gotTail uint8
	r := wire.Reader(w.Bytes())
	older(r, &gotA)
	wire.Uint(r, &gotTail)
	if r.Done() != nil || gotA != a || gotTail != 7 {
		t.Errorf("the older reader got %d bytes, %d, %v", len(gotA), gotTail, r.Err())
	}

	w = wire.Writer(nil)
	older(w, &a)
	wire.Uint(w, &tail)
	gotB := int64(5)
	r = wire.Reader(w.Bytes())
	newer(r, &gotA, &gotB)
	wire.Uint(r, &gotTail)
	if r.Done() != nil || gotB != 0 || gotTail != 7 {
		t.Errorf("the newer reader got %d, %d, %v", gotB, gotTail, r.Err())
	}
}

func TestOutOfRangeIsRefused(t *testing.T) {
	w := wire.Writer(nil)
	big := uint64(300)
	wire.Uint(w, &big)
	var small uint8
	r := wire.Reader(w.Bytes())
	wire.Uint(r, &small)
	if !errors.Is(r.Err(), wire.ErrMalformed) {
		t.Errorf("300 was read into a byte as %d, %v", small, r.Err())
	}
}

func FuzzReader(f *testing.F) {
	f.Add(encode(&outer{S: "seed", List: []inner{{"a", 1}}, Opt: &inner{"b", 2}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var o outer
		c := wire.Reader(b)
		o.code(c)
		if c.Done() != nil {
			return
		}
		var again outer
		r := wire.Reader(encode(&o))
		again.code(r)
		if r.Done() != nil || !reflect.DeepEqual(o, again) {
			t.Fatalf("read %+v, then %+v, %v", o, again, r.Err())
		}
	})
}
