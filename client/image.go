package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// maxProblemBytes bounds what is read of an error's body.
const maxProblemBytes = 64 << 10

// PutImage sends a bundle's archive to a node, which keeps it under its digest
// "sha256:<64 hex digits>". With a digest the node refuses other content, and
// nothing is sent when it has the image already. size is the number of bytes,
// -1 if not known. It is not repeated once the sending has begun.
func (c *Client) PutImage(ctx context.Context, digest string, archive io.Reader, size int64) (*blixardv1.Image, error) {
	method, path := http.MethodPost, "/v1/images"
	if digest != "" {
		method, path = http.MethodPut, path+"/"+digest
	}
	body := &onceReader{r: archive}
	var image *blixardv1.Image
	var spent error // why the one attempt that has read from archive failed
	err := c.retry(ctx, func(e *endpoint) error {
		if body.used {
			return blixard.Errorf(blixard.CodeInternal, "the archive can be read once only") // ends the repeats
		}
		answer, err := c.plain(ctx, e, method, path, body, size)
		if err != nil {
			if body.used {
				spent = err
			}
			return err
		}
		defer answer.Body.Close()
		data, err := io.ReadAll(io.LimitReader(answer.Body, maxProblemBytes))
		if err != nil {
			return fmt.Errorf("reading the answer: %w", err)
		}
		image = new(blixardv1.Image)
		return json.Unmarshal(data, image)
	})
	var word *blixard.Error
	switch {
	case err == nil || spent == nil || ctx.Err() != nil:
		return image, err
	case errors.As(spent, &word):
		return nil, word
	default:
		return nil, blixard.Errorf(blixard.CodeUnavailable, "sending the image broke off, send it again: %v", spent)
	}
}

// onceReader notes that reading has begun.
type onceReader struct {
	r    io.Reader
	used bool
}

func (o *onceReader) Read(p []byte) (int, error) {
	o.used = true
	return o.r.Read(p)
}

// GetImage opens the archive of an image, which must be closed. size is -1 if
// not known. CodeNotFound when no node that could be asked has it.
func (c *Client) GetImage(ctx context.Context, digest string) (archive io.ReadCloser, size int64, err error) {
	err = c.retry(ctx, func(e *endpoint) error {
		answer, err := c.plain(ctx, e, http.MethodGet, "/v1/images/"+digest, nil, 0) //nolint:bodyclose // the caller closes it
		if err != nil {
			return err
		}
		archive, size = answer.Body, answer.ContentLength
		return nil
	})
	return archive, size, err
}

// HasImage tells whether the answering node, or one that it asks, keeps an image.
func (c *Client) HasImage(ctx context.Context, digest string) (bool, error) {
	err := c.retry(ctx, func(e *endpoint) error {
		answer, err := c.plain(ctx, e, http.MethodHead, "/v1/images/"+digest, nil, 0)
		if err != nil {
			return err
		}
		return answer.Body.Close()
	})
	if err != nil && blixard.CodeOf(err) == blixard.CodeNotFound {
		return false, nil
	}
	return err == nil, err
}

// plain makes a plain HTTP request. Anything but success is an error.
func (c *Client) plain(ctx context.Context, e *endpoint, method, path string, body io.Reader, size int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, e.url+path, body)
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", err)
	}
	req.Header = c.header.Clone()
	if body != nil {
		req.ContentLength = size
		req.Header.Set("Content-Type", "application/octet-stream")
		// The node can say that it has the image before it is sent.
		req.Header.Set("Expect", "100-continue")
	}
	answer, err := e.plain.Do(req)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode < 300 {
		return answer, nil
	}
	defer answer.Body.Close()
	return nil, problem(answer)
}

// problem reads the error that an answer holds.
func problem(answer *http.Response) error {
	var p struct {
		Code, Title, Detail, Hint, Field string
		Version                          uint64
	}
	data, err := io.ReadAll(io.LimitReader(answer.Body, maxProblemBytes))
	if answer.StatusCode == http.StatusNotFound && answer.Request.Method == http.MethodHead {
		return blixard.Errorf(blixard.CodeNotFound, "%s does not have it", answer.Request.URL.Host) // such an answer has no body
	}
	if err != nil || json.Unmarshal(data, &p) != nil || p.Code == "" {
		return blixard.Errorf(blixard.CodeUnavailable, "%s answered %s", answer.Request.URL.Host, answer.Status)
	}
	return &blixard.Error{Code: blixard.Code(p.Code), Message: p.Detail, Hint: p.Hint, Field: p.Field, Version: p.Version}
}
