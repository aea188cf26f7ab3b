package blixardv1

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/blixard/blixard"
)

// maxDepth bounds the nesting of what is read. The schema is far shallower.
const maxDepth = 32

// DecodeJSON replaces m by what data says. Names of fields are those of the
// schema, in camelCase or snake_case; null is the same as leaving out. Errors
// are *blixard.Error with the path of the field, and for an unknown field the
// nearest known one.
func DecodeJSON(data []byte, m proto.Message) error {
	proto.Reset(m)
	return MergeJSON(data, m)
}

// MergeJSON is DecodeJSON that keeps the fields of m that data does not name.
func MergeJSON(data []byte, m proto.Message) error {
	d := decoder{dec: json.NewDecoder(bytes.NewReader(data))}
	d.dec.UseNumber()
	tok, err := d.next()
	if err != nil {
		return err
	}
	if err := d.message(tok, m.ProtoReflect(), 0); err != nil {
		return err
	}
	if _, err := d.dec.Token(); !errors.Is(err, io.EOF) {
		return blixard.Invalid("", "", "the JSON goes on after its end at byte %d", d.dec.InputOffset())
	}
	return nil
}

type decoder struct {
	dec  *json.Decoder
	path []string
}

func (d *decoder) next() (json.Token, error) {
	tok, err := d.dec.Token()
	switch {
	case err == nil:
		return tok, nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, blixard.Invalid(d.field(), "", "the JSON ends too early, at byte %d", d.dec.InputOffset())
	default:
		return nil, blixard.Invalid(d.field(), "", "the JSON cannot be read at byte %d: %v", d.dec.InputOffset(), err)
	}
}

// field is the path to where the decoder is, such as "spec.publish[0].hostPort".
func (d *decoder) field() string {
	var b strings.Builder
	for _, p := range d.path {
		if b.Len() > 0 && !strings.HasPrefix(p, "[") {
			b.WriteByte('.')
		}
		b.WriteString(p)
	}
	return b.String()
}

// at reads on with one more step in the path.
func (d *decoder) at(step string, read func() error) error {
	d.path = append(d.path, step)
	err := read()
	d.path = d.path[:len(d.path)-1]
	return err
}

func (d *decoder) wrong(want string, got json.Token) error {
	where := d.field()
	if where == "" {
		where = "the document"
	}
	return blixard.Invalid(d.field(), "", "%s must be %s, not %s", where, want, describe(got))
}

func describe(tok json.Token) string {
	switch v := tok.(type) {
	case json.Delim:
		if v == '{' {
			return "an object"
		}
		return "a list"
	case string:
		return "the text " + strconv.Quote(clip(v))
	case json.Number:
		return "the number " + clip(v.String())
	case bool:
		return strconv.FormatBool(v)
	default:
		return "null"
	}
}

func clip(s string) string {
	if len(s) > 40 {
		return strings.ToValidUTF8(s[:40], "") + "…"
	}
	return s
}

func (d *decoder) message(tok json.Token, m protoreflect.Message, depth int) error {
	if tok != json.Delim('{') {
		return d.wrong("an object", tok)
	}
	if depth > maxDepth {
		return blixard.Invalid(d.field(), "", "the JSON is nested more than %d deep", maxDepth)
	}
	seen := map[protoreflect.FieldNumber]bool{}
	for {
		tok, err := d.next()
		if err != nil {
			return err
		}
		if tok == json.Delim('}') {
			return nil
		}
		name, ok := tok.(string)
		if !ok {
			return d.wrong("an object with names", tok)
		}
		fd, err := d.find(m.Descriptor(), name)
		if err != nil {
			return err
		}
		err = d.at(fd.JSONName(), func() error {
			if seen[fd.Number()] {
				return blixard.Invalid(d.field(), "", "%s is given twice", d.field())
			}
			seen[fd.Number()] = true
			if o := fd.ContainingOneof(); o != nil && m.WhichOneof(o) != nil && !o.IsSynthetic() {
				return blixard.Invalid(d.field(), "", "%s excludes %s", d.field(), m.WhichOneof(o).JSONName())
			}
			tok, err := d.next()
			if err != nil || tok == nil {
				return err
			}
			return d.set(tok, m, fd, depth)
		})
		if err != nil {
			return err
		}
	}
}

func (d *decoder) find(md protoreflect.MessageDescriptor, name string) (protoreflect.FieldDescriptor, error) {
	fd, err := findField(md, name)
	if err != nil {
		d.path = append(d.path, clip(name))
		defer func() { d.path = d.path[:len(d.path)-1] }()
		err.Field = d.field()
		return nil, err
	}
	return fd, nil
}

// findField finds a field by its JSON or schema name.
func findField(md protoreflect.MessageDescriptor, name string) (protoreflect.FieldDescriptor, *blixard.Error) {
	fields := md.Fields()
	if fd := fields.ByJSONName(name); fd != nil {
		return fd, nil
	}
	if fd := fields.ByTextName(name); fd != nil {
		return fd, nil
	}
	known := make([]string, fields.Len())
	for i := range known {
		known[i] = fields.Get(i).JSONName()
	}
	hint := "known: " + strings.Join(known, ", ")
	if len(known) == 0 {
		hint = "nothing can be given here"
	}
	if near := blixard.Nearest(name, known); near != "" {
		hint = "did you mean " + near + "? " + hint
	}
	return nil, blixard.Invalid(clip(name), hint, "the field %q is not known", clip(name))
}

func (d *decoder) set(tok json.Token, m protoreflect.Message, fd protoreflect.FieldDescriptor, depth int) error {
	switch {
	case fd.IsList():
		return d.list(tok, m, fd, depth)
	case fd.IsMap():
		return d.mapping(tok, m, fd, depth)
	case fd.Message() != nil:
		return d.message(tok, m.Mutable(fd).Message(), depth+1)
	}
	v, err := d.scalar(tok, fd)
	if err != nil {
		return err
	}
	m.Set(fd, v)
	return nil
}

func (d *decoder) list(tok json.Token, m protoreflect.Message, fd protoreflect.FieldDescriptor, depth int) error {
	if tok != json.Delim('[') {
		return d.wrong("a list", tok)
	}
	list := m.Mutable(fd).List()
	for i := 0; ; i++ {
		tok, err := d.next()
		if err != nil {
			return err
		}
		if tok == json.Delim(']') {
			return nil
		}
		err = d.at("["+strconv.Itoa(i)+"]", func() error {
			if fd.Message() != nil {
				e := list.NewElement()
				list.Append(e)
				return d.message(tok, e.Message(), depth+1)
			}
			v, err := d.scalar(tok, fd)
			if err != nil {
				return err
			}
			list.Append(v)
			return nil
		})
		if err != nil {
			return err
		}
	}
}

func (d *decoder) mapping(tok json.Token, m protoreflect.Message, fd protoreflect.FieldDescriptor, depth int) error {
	if tok != json.Delim('{') {
		return d.wrong("an object", tok)
	}
	values := m.Mutable(fd).Map()
	for {
		tok, err := d.next()
		if err != nil {
			return err
		}
		if tok == json.Delim('}') {
			return nil
		}
		name, ok := tok.(string)
		if !ok {
			return d.wrong("an object with names", tok)
		}
		err = d.at(clip(name), func() error {
			key := protoreflect.ValueOfString(name).MapKey()
			if fd.MapKey().Kind() != protoreflect.StringKind {
				return blixard.Invalid(d.field(), "", "maps of this kind cannot be read")
			}
			if values.Has(key) {
				return blixard.Invalid(d.field(), "", "%s is given twice", d.field())
			}
			tok, err := d.next()
			if err != nil {
				return err
			}
			if fd.MapValue().Message() != nil {
				v := values.NewValue()
				values.Set(key, v)
				return d.message(tok, v.Message(), depth+1)
			}
			v, err := d.scalar(tok, fd.MapValue())
			if err != nil {
				return err
			}
			values.Set(key, v)
			return nil
		})
		if err != nil {
			return err
		}
	}
}

func (d *decoder) scalar(tok json.Token, fd protoreflect.FieldDescriptor) (protoreflect.Value, error) {
	none := protoreflect.Value{}
	switch v := tok.(type) {
	case bool:
		if fd.Kind() == protoreflect.BoolKind {
			return protoreflect.ValueOfBool(v), nil
		}
	case json.Number:
		if numeric(fd) {
			return d.text(v.String(), fd)
		}
	case string:
		switch fd.Kind() {
		case protoreflect.StringKind:
			return protoreflect.ValueOfString(v), nil
		case protoreflect.BytesKind, protoreflect.EnumKind, protoreflect.Int64Kind, protoreflect.Uint64Kind:
			return d.text(v, fd)
		}
	}
	return none, d.wrong(wants(fd), tok)
}

func numeric(fd protoreflect.FieldDescriptor) bool {
	switch fd.Kind() {
	case protoreflect.Int32Kind, protoreflect.Int64Kind, protoreflect.Uint32Kind, protoreflect.Uint64Kind:
		return true
	}
	return false
}

func wants(fd protoreflect.FieldDescriptor) string {
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return "true or false"
	case protoreflect.StringKind:
		return "a text in quotes"
	case protoreflect.BytesKind:
		return "a base64 text"
	case protoreflect.EnumKind:
		return "one of " + strings.Join(enumNames(fd), ", ")
	default:
		return "a whole number"
	}
}

// text reads a scalar from its text, as in a query.
func (d *decoder) text(s string, fd protoreflect.FieldDescriptor) (protoreflect.Value, error) {
	v, why := parseText(s, fd)
	if why != "" {
		return v, blixard.Invalid(d.field(), "", "%s must be %s, not %q", d.field(), why, clip(s))
	}
	return v, nil
}

// parseText reads a scalar from its text; why says what it must be.
func parseText(s string, fd protoreflect.FieldDescriptor) (v protoreflect.Value, why string) {
	var err error
	switch fd.Kind() {
	case protoreflect.BoolKind:
		var b bool
		b, err = strconv.ParseBool(s)
		v = protoreflect.ValueOfBool(b)
	case protoreflect.StringKind:
		v = protoreflect.ValueOfString(s)
	case protoreflect.BytesKind:
		var b []byte
		b, err = base64.StdEncoding.DecodeString(s)
		v = protoreflect.ValueOfBytes(b)
	case protoreflect.EnumKind:
		return parseEnum(s, fd)
	case protoreflect.Int32Kind:
		var n int64
		n, err = strconv.ParseInt(s, 10, 32)
		v = protoreflect.ValueOfInt32(int32(n))
	case protoreflect.Int64Kind:
		var n int64
		n, err = strconv.ParseInt(s, 10, 64)
		v = protoreflect.ValueOfInt64(n)
	case protoreflect.Uint32Kind:
		var n uint64
		n, err = strconv.ParseUint(s, 10, 32)
		v = protoreflect.ValueOfUint32(uint32(n))
	case protoreflect.Uint64Kind:
		var n uint64
		n, err = strconv.ParseUint(s, 10, 64)
		v = protoreflect.ValueOfUint64(n)
	default:
		return v, "left out here"
	}
	switch {
	case errors.Is(err, strconv.ErrRange):
		return v, "a smaller number"
	case err != nil && (fd.Kind() == protoreflect.Uint32Kind || fd.Kind() == protoreflect.Uint64Kind):
		return v, "a whole number from 0 on"
	case err != nil:
		return v, wants(fd)
	}
	return v, ""
}

// parseEnum takes the full name or, in queries, its last part in lower case:
// consistency=stale.
func parseEnum(s string, fd protoreflect.FieldDescriptor) (protoreflect.Value, string) {
	values := fd.Enum().Values()
	for i := range values.Len() {
		name := string(values.Get(i).Name())
		if name == s || strings.HasSuffix(name, "_"+strings.ToUpper(s)) && s == strings.ToLower(s) {
			return protoreflect.ValueOfEnum(values.Get(i).Number()), ""
		}
	}
	return protoreflect.Value{}, wants(fd)
}

func enumNames(fd protoreflect.FieldDescriptor) []string {
	values := fd.Enum().Values()
	names := make([]string, values.Len())
	for i := range names {
		full := string(values.Get(i).Name())
		names[i] = strings.ToLower(full[strings.IndexByte(full, '_')+1:])
	}
	return names
}

// DecodeText sets a scalar field, or adds to a list of scalars, from texts as
// they stand in a query. The error has the field's name.
func DecodeText(m proto.Message, name string, values []string) error {
	r := m.ProtoReflect()
	fd, unknown := findField(r.Descriptor(), name)
	if unknown != nil {
		return unknown
	}
	if fd.Message() != nil {
		return blixard.Invalid(fd.JSONName(), "", "%s cannot be given in the query", fd.JSONName())
	}
	if !fd.IsList() && len(values) > 1 {
		return blixard.Invalid(fd.JSONName(), "", "%s is given twice", fd.JSONName())
	}
	for _, text := range values {
		parts := []string{text}
		if fd.IsList() {
			parts = strings.Split(text, ",")
		}
		for _, part := range parts {
			v, why := parseText(part, fd)
			if why != "" {
				return blixard.Invalid(fd.JSONName(), "", "%s must be %s, not %q", fd.JSONName(), why, clip(part))
			}
			if fd.IsList() {
				r.Mutable(fd).List().Append(v)
			} else {
				r.Set(fd, v)
			}
		}
	}
	return nil
}
