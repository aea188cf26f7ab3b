package lambdaapi_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/blixard/blixard/internal/lambdaapi"
)

func TestTakeZip(t *testing.T) {
	nested, flat := []string{"Code", "ZipFile"}, []string{"ZipFile"}
	big := bytes.Repeat([]byte("0123456789"), 100_000)
	for name, c := range map[string]struct {
		path       []string
		in         string
		rest, zip  string
		found, bad bool
	}{
		"nested":        {nested, `{"A":"x","Code":{"ZipFile":"aGk="},"B":[1,{"ZipFile":"no"}]}`, `{"A":"x","Code":{"ZipFile":""},"B":[1,{"ZipFile":"no"}]}`, "hi", true, false},
		"elsewhere":     {nested, `{"ZipFile":"aGk=","X":{"Code":{"ZipFile":"aGk="}}}`, `{"ZipFile":"aGk=","X":{"Code":{"ZipFile":"aGk="}}}`, "", false, false},
		"flat":          {flat, `{ "ZipFile" : "aGk=" }`, `{ "ZipFile" : "" }`, "hi", true, false},
		"in a list":     {flat, `[{"ZipFile":"aGk="}]`, `[{"ZipFile":"aGk="}]`, "", false, false},
		"escaped key":   {flat, `{"\u005aipFile":"aGk="}`, `{"\u005aipFile":""}`, "hi", true, false},
		"escaped value": {flat, `{"ZipFile":"aG\u006b\u003d"}`, `{"ZipFile":""}`, "hi", true, false},
		"escaped quote": {flat, `{"A\"":"\\","ZipFile":"aGk="}`, `{"A\"":"\\","ZipFile":""}`, "hi", true, false},
		"null":          {flat, `{"ZipFile":null}`, `{"ZipFile":null}`, "", false, false},
		"large":         {flat, `{"ZipFile":"` + base64.StdEncoding.EncodeToString(big) + `"}`, `{"ZipFile":""}`, string(big), true, false},
		"no document":   {flat, ``, ``, "", false, false},
		"bad base64":    {path: flat, in: `{"ZipFile":"a*"}`, bad: true},
		"cut":           {path: flat, in: `{"ZipFile":"aGk=`, bad: true},
		"behind":        {path: flat, in: `{"ZipFile":"aGk=aGk="}`, bad: true},
		"twice":         {path: flat, in: `{"ZipFile":"aGk=","ZipFile":"aGk="}`, bad: true},
		"closed":        {path: flat, in: `}`, bad: true},
		"deep":          {path: flat, in: strings.Repeat("[", 100), bad: true},
		"large rest":    {path: flat, in: `{"A":"` + strings.Repeat("x", 1<<20) + `"}`, bad: true},
	} {
		t.Run(name, func(t *testing.T) {
			var zip bytes.Buffer
			rest, found, err := lambdaapi.TakeZip(iotest.HalfReader(strings.NewReader(c.in)), c.path, &zip)
			if (err != nil) != c.bad {
				t.Fatalf("err %v", err)
			}
			if err == nil && (string(rest) != c.rest || zip.String() != c.zip || found != c.found) {
				t.Errorf("rest %.200q, %d bytes of zip, found %v", rest, zip.Len(), found)
			}
		})
	}
}

// FuzzTakeZip: what is left means the same as what came, but for the zip.
func FuzzTakeZip(f *testing.F) {
	f.Add(`{"A":"x","Code":{"ZipFile":"aGk="},"B":[1,{"ZipFile":"no"}]}`)
	f.Add(`{"Code":{"\u005aipFile":"aG\u006b="}}`)
	f.Fuzz(func(t *testing.T, in string) {
		var zip bytes.Buffer
		rest, found, err := lambdaapi.TakeZip(strings.NewReader(in), []string{"Code", "ZipFile"}, &zip)
		if err != nil {
			return
		}
		if !found && string(rest) != in {
			t.Errorf("%q became %q", in, rest)
		}
		if json.Valid([]byte(in)) && !json.Valid(rest) {
			t.Errorf("%q became %q, which is no JSON", in, rest)
		}
	})
}
