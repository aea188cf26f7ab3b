package gateway

import (
	"encoding/json"
	"testing"
)

// TestFieldsOfTheBody: a handler finds the members of a JSON body in the event,
// which keeps its own.
func TestFieldsOfTheBody(t *testing.T) {
	for body, want := range map[string]string{
		`{"imagePath": "/data/input.jpg", "n": [1, {"a": null}]}`:        `{"imagePath":"/data/input.jpg","n":[1,{"a":null}],"version":"2.0"}`,
		`{"version": "9", "body": "mine", "requestContext": {}, "x": 1}`: `{"version":"2.0","x":1}`,
		`{"a": 1, "a": 2}`:      `{"a":2,"version":"2.0"}`,
		` {"": true, "\"": 1} `: `{"":true,"\"":1,"version":"2.0"}`,
		`{"a": 1`:               `{"version":"2.0"}`,
		`[{"a": 1}]`:            `{"version":"2.0"}`,
		`"a"`:                   `{"version":"2.0"}`,
		``:                      `{"version":"2.0"}`,
	} {
		got := string(append(appendFields([]byte(`{"version":"2.0"`), []byte(body)), '}'))
		var members map[string]any
		if err := json.Unmarshal([]byte(got), &members); err != nil {
			t.Errorf("%s: %s: %v", body, got, err)
			continue
		}
		if again, err := json.Marshal(members); err != nil || string(again) != want {
			t.Errorf("%s: %s, want %s (%v)", body, again, want, err)
		}
	}
}
