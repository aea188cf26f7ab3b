// An answer that comes in parts, and may be longer than others.
package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/aws/aws-lambda-go/lambda"
)

type event struct {
	Parts int `json:"parts"`
	// Of the request, when it came over HTTP.
	Body   string `json:"body"`
	Base64 bool   `json:"isBase64Encoded"`
}

func handle(ctx context.Context, e event) (io.Reader, error) {
	if e.Body != "" {
		body := []byte(e.Body)
		if e.Base64 {
			var err error
			if body, err = base64.StdEncoding.DecodeString(e.Body); err != nil {
				return nil, fmt.Errorf("decoding the body: %w", err)
			}
		}
		if err := json.Unmarshal(body, &e); err != nil {
			return nil, fmt.Errorf("reading the body: %w", err)
		}
	}
	r, w := io.Pipe()
	go func() {
		for i := range max(1, min(e.Parts, 1000)) {
			if _, err := fmt.Fprintf(w, "part %d\n", i+1); err != nil {
				return
			}
			select {
			case <-ctx.Done():
				w.CloseWithError(ctx.Err())
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
		w.Close()
	}()
	return r, nil
}

func main() { lambda.Start(handle) }
