package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"sort"
	"strings"

	"github.com/bufbuild/protocompile/linker"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// object is a JSON object; encoding/json writes its keys sorted, so that the
// document is the same every time.
type object = map[string]any

// generator makes the OpenAPI 3.1 description of the google.api.http bindings.
type generator struct {
	paths   object
	schemas object
}

func openAPI(files linker.Files) ([]byte, error) {
	g := &generator{paths: object{}, schemas: object{"Problem": problemSchema()}}
	var tags []any
	for _, f := range files {
		for i := range f.Services().Len() {
			sd := f.Services().Get(i)
			tags = append(tags, object{"name": string(sd.Name()), "description": comment(sd)})
			for j := range sd.Methods().Len() {
				if err := g.method(sd.Methods().Get(j)); err != nil {
					return nil, err
				}
			}
		}
	}
	g.imageContent()
	g.health()
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", " ")
	err := enc.Encode(object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Blixard", "version": "v1", "license": object{"name": "Apache-2.0", "identifier": "Apache-2.0"},
			"description": "The REST interface of Blixard. 64-bit integers are JSON numbers. Errors are problem details (RFC 9457).",
		},
		"servers":  []any{object{"url": "/"}},
		"tags":     tags,
		"security": []any{object{"token": []any{}}},
		"paths":    g.paths,
		"components": object{
			"schemas":         g.schemas,
			"securitySchemes": object{"token": object{"type": "http", "scheme": "bearer"}},
		},
	})
	return b.Bytes(), err
}

func problemSchema() object {
	text := func(d string) object { return object{"type": "string", "description": d} }
	return object{
		"type": "object", "required": []any{"type", "title", "status", "detail", "code"},
		"properties": object{
			"type": text("URI of the kind of problem."), "title": text("The kind in words."), "status": object{"type": "integer"},
			"detail": text("What went wrong and why."), "hint": text("What to do about it."), "field": text("The offending field of the request."),
			"code": object{"type": "string", "enum": []any{
				"invalid", "not_found", "exists", "conflict", "refused", "unavailable", "overloaded", "denied", "gone", "internal",
			}},
			"version": object{"type": "integer", "description": "Version of the existing thing, for exists and conflict."},
		},
	}
}

// binding is one HTTP rule of a method.
type binding struct{ method, path, body string }

// bindings reads the google.api.http option, which is dynamic here.
func bindings(md protoreflect.MethodDescriptor) []binding {
	var out []binding
	md.Options().ProtoReflect().Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if fd.FullName() == "google.api.http" {
			out = rules(v.Message())
		}
		return true
	})
	return out
}

func rules(rule protoreflect.Message) []binding {
	var b binding
	var out []binding
	rule.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch fd.Name() {
		case "body":
			b.body = v.String()
		case "additional_bindings":
			for i := range v.List().Len() {
				out = append(out, rules(v.List().Get(i).Message())...)
			}
		case "get", "put", "post", "delete", "patch":
			b.method, b.path = string(fd.Name()), v.String()
		}
		return true
	})
	return append([]binding{b}, out...)
}

var pathVariable = regexp.MustCompile(`\{(\w+)\}`)

func (g *generator) method(md protoreflect.MethodDescriptor) error {
	for i, b := range bindings(md) {
		if b.path == "" || b.body != "" && b.body != "*" {
			return fmt.Errorf("%s: the binding %+v is of a kind that is not served", md.FullName(), b)
		}
		id := string(md.Name())
		if i > 0 {
			id = fmt.Sprintf("%s_%d", id, i+1)
		}
		op := object{"operationId": id, "tags": []any{string(md.Parent().Name())}, "description": comment(md), "responses": g.responses(md)}
		inPath := map[string]bool{}
		var parameters []any
		path := pathVariable.ReplaceAllStringFunc(b.path, func(s string) string {
			fd := md.Input().Fields().ByName(protoreflect.Name(strings.Trim(s, "{}")))
			inPath[string(fd.Name())] = true
			parameters = append(parameters, object{"name": fd.JSONName(), "in": "path", "required": true, "schema": g.field(fd)})
			return "{" + fd.JSONName() + "}"
		})
		if b.body == "*" {
			op["requestBody"] = object{"content": object{"application/json": object{"schema": g.ref(md.Input())}}}
			parameters = append(parameters, object{
				"name": "Idempotency-Key", "in": "header", "required": false, "schema": object{"type": "string"},
				"description": "A second request with the same key changes nothing and gets the first one's answer.",
			})
		} else {
			parameters = append(parameters, g.query(md.Input(), inPath)...)
		}
		if len(parameters) > 0 {
			op["parameters"] = parameters
		}
		if md.Name() == "Join" {
			op["security"] = []any{}
		}
		if g.paths[path] == nil {
			g.paths[path] = object{}
		}
		g.paths[path].(object)[b.method] = op
	}
	return nil
}

func (g *generator) query(md protoreflect.MessageDescriptor, inPath map[string]bool) []any {
	var out []any
	for i := range md.Fields().Len() {
		fd := md.Fields().Get(i)
		if inPath[string(fd.Name())] || fd.Message() != nil {
			continue
		}
		p := object{"name": fd.JSONName(), "in": "query", "required": false, "schema": g.field(fd)}
		if c := comment(fd); c != "" {
			p["description"] = c
		}
		out = append(out, p)
	}
	return out
}

func (g *generator) responses(md protoreflect.MethodDescriptor) object {
	var content object
	switch md.Name() {
	case "Watch":
		content = object{"text/event-stream": object{"schema": object{"type": "string", "description": "Events whose data is a WatchResponse."}}}
		g.ref(md.Output())
	case "Logs":
		content = object{"text/plain": object{"schema": object{"type": "string"}}}
	case "DownloadSnapshot", "Record":
		content = object{"application/octet-stream": object{"schema": object{"type": "string", "format": "binary"}}}
	default:
		content = object{"application/json": object{"schema": g.ref(md.Output())}}
	}
	return withProblem(object{"description": "Done.", "content": content})
}

func withProblem(done object) object {
	return object{
		"200":     done,
		"default": object{"description": "Refused.", "content": object{"application/problem+json": object{"schema": object{"$ref": "#/components/schemas/Problem"}}}},
	}
}

func (g *generator) ref(md protoreflect.MessageDescriptor) object {
	name := string(md.Name())
	if g.schemas[name] == nil {
		schema := object{"type": "object", "additionalProperties": false}
		g.schemas[name] = schema // before its fields, which may lead back
		if c := comment(md); c != "" {
			schema["description"] = c
		}
		properties := object{}
		for i := range md.Fields().Len() {
			fd := md.Fields().Get(i)
			p := g.field(fd)
			if c := comment(fd); c != "" {
				p["description"] = c // beside a $ref too: allowed since 3.1
			}
			properties[fd.JSONName()] = p
		}
		schema["properties"] = properties
	}
	return object{"$ref": "#/components/schemas/" + name}
}

func (g *generator) field(fd protoreflect.FieldDescriptor) object {
	switch {
	case fd.IsMap():
		return object{"type": "object", "additionalProperties": g.scalar(fd.MapValue())}
	case fd.IsList():
		return object{"type": "array", "items": g.scalar(fd)}
	}
	return g.scalar(fd)
}

func (g *generator) scalar(fd protoreflect.FieldDescriptor) object {
	switch fd.Kind() {
	case protoreflect.MessageKind:
		return g.ref(fd.Message())
	case protoreflect.EnumKind:
		var names []string
		for i := range fd.Enum().Values().Len() {
			full := string(fd.Enum().Values().Get(i).Name())
			names = append(names, full, strings.ToLower(full[strings.IndexByte(full, '_')+1:]))
		}
		sort.Strings(names)
		return object{"type": "string", "enum": names}
	case protoreflect.BoolKind:
		return object{"type": "boolean"}
	case protoreflect.StringKind:
		return object{"type": "string"}
	case protoreflect.BytesKind:
		return object{"type": "string", "contentEncoding": "base64"}
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind:
		return object{"type": "integer", "minimum": 0, "format": fd.Kind().String()}
	default:
		return object{"type": "integer", "format": fd.Kind().String()}
	}
}

// imageContent describes what is plain HTTP, not a procedure.
func (g *generator) imageContent() {
	archive := object{"schema": object{"type": "string", "format": "binary"}}
	digest := object{"name": "digest", "in": "path", "required": true, "schema": object{"type": "string", "pattern": "^(sha256:)?[0-9a-f]{64}$"}}
	image := withProblem(object{"description": "Kept.", "content": object{"application/json": object{"schema": object{"$ref": "#/components/schemas/Image"}}}})
	body := object{"required": true, "content": object{"application/octet-stream": archive}}
	tags := []any{"ImageService"}
	g.paths["/v1/images/{digest}"] = object{
		"get": object{
			"operationId": "GetImage", "tags": tags, "description": "The archive of an image; another node is asked when this one lacks it.",
			"parameters": []any{digest}, "responses": withProblem(object{"description": "The archive.", "content": object{"application/x-tar": archive}}),
		},
		"head": object{
			"operationId": "HasImage", "tags": tags, "description": "Whether this node or another one keeps an image.",
			"parameters": []any{digest}, "responses": object{"200": object{"description": "One does."}, "404": object{"description": "None does."}},
		},
		"put": object{"operationId": "PutImage", "tags": tags, "description": "Keeps an image, if its content has that digest.", "parameters": []any{digest}, "requestBody": body, "responses": image},
	}
	g.paths["/v1/images"].(object)["post"] = object{"operationId": "AddImage", "tags": tags, "description": "Keeps an image and tells its digest.", "requestBody": body, "responses": image}
}

func (g *generator) health() {
	open := func(id, description string) object {
		return object{"get": object{
			"operationId": id, "tags": []any{"SystemService"}, "description": description, "security": []any{},
			"responses": object{"200": object{"description": "Yes."}, "503": object{"description": "Not now."}},
		}}
	}
	g.paths["/healthz"] = open("Healthz", "Whether the process serves.")
	g.paths["/readyz"] = open("Readyz", "Whether the node has a leader and applied all it knows to be committed.")
}

// comment is what stands above a declaration, in one paragraph per paragraph.
func comment(d protoreflect.Descriptor) string {
	text := d.ParentFile().SourceLocations().ByDescriptor(d).LeadingComments
	paragraphs := strings.Split(strings.TrimSpace(text), "\n\n")
	for i, p := range paragraphs {
		paragraphs[i] = strings.Join(strings.Fields(p), " ")
	}
	return strings.Join(paragraphs, "\n\n")
}
