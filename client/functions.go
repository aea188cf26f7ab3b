package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// CreateFunction registers a function; its template is built at once. CodeExists when the name is taken.
func (c *Client) CreateFunction(ctx context.Context, req *blixardv1.CreateFunctionRequest) (*blixardv1.FunctionChange, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.CreateFunctionRequest) (*blixardv1.FunctionChange, error) {
		return e.functions.CreateFunction
	})
}

// GetFunction returns a function with what nodes do for it. CodeNotFound when there is none.
func (c *Client) GetFunction(ctx context.Context, req *blixardv1.GetFunctionRequest) (*blixardv1.GetFunctionResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.GetFunctionRequest) (*blixardv1.GetFunctionResponse, error) {
		return e.functions.GetFunction
	})
}

// ListFunctions returns functions by name.
func (c *Client) ListFunctions(ctx context.Context, req *blixardv1.ListFunctionsRequest) (*blixardv1.ListFunctionsResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ListFunctionsRequest) (*blixardv1.ListFunctionsResponse, error) {
		return e.functions.ListFunctions
	})
}

// UpdateFunction changes code, configuration or settings. CodeConflict while an update is
// under way, or when $LATEST has another revision than the given one.
func (c *Client) UpdateFunction(ctx context.Context, req *blixardv1.UpdateFunctionRequest) (*blixardv1.FunctionChange, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.UpdateFunctionRequest) (*blixardv1.FunctionChange, error) {
		return e.functions.UpdateFunction
	})
}

// DeleteFunction deletes a function, or one published version.
func (c *Client) DeleteFunction(ctx context.Context, req *blixardv1.DeleteFunctionRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.DeleteFunctionRequest) (*blixardv1.Change, error) {
		return e.functions.DeleteFunction
	})
}

// PublishFunction makes a version of $LATEST.
func (c *Client) PublishFunction(ctx context.Context, req *blixardv1.PublishFunctionRequest) (*blixardv1.FunctionChange, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.PublishFunctionRequest) (*blixardv1.FunctionChange, error) {
		return e.functions.PublishFunction
	})
}

// ListFunctionVersions returns $LATEST and the published versions.
func (c *Client) ListFunctionVersions(ctx context.Context, req *blixardv1.ListFunctionVersionsRequest) (*blixardv1.ListFunctionVersionsResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ListFunctionVersionsRequest) (*blixardv1.ListFunctionVersionsResponse, error) {
		return e.functions.ListFunctionVersions
	})
}

// SetFunctionAlias makes or changes an alias.
func (c *Client) SetFunctionAlias(ctx context.Context, req *blixardv1.SetFunctionAliasRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.SetFunctionAliasRequest) (*blixardv1.Change, error) {
		return e.functions.SetFunctionAlias
	})
}

// DeleteFunctionAlias deletes an alias.
func (c *Client) DeleteFunctionAlias(ctx context.Context, req *blixardv1.DeleteFunctionAliasRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.DeleteFunctionAliasRequest) (*blixardv1.Change, error) {
		return e.functions.DeleteFunctionAlias
	})
}

// AddFunctionTrigger makes HTTP requests of a path call a function.
func (c *Client) AddFunctionTrigger(ctx context.Context, req *blixardv1.AddFunctionTriggerRequest) (*blixardv1.AddFunctionTriggerResponse, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.AddFunctionTriggerRequest) (*blixardv1.AddFunctionTriggerResponse, error) {
		return e.functions.AddFunctionTrigger
	})
}

// DeleteFunctionTrigger deletes a trigger.
func (c *Client) DeleteFunctionTrigger(ctx context.Context, req *blixardv1.DeleteFunctionTriggerRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.DeleteFunctionTriggerRequest) (*blixardv1.Change, error) {
		return e.functions.DeleteFunctionTrigger
	})
}

// SetFunctionURL gives a qualifier of a function a URL of its own.
func (c *Client) SetFunctionURL(ctx context.Context, req *blixardv1.SetFunctionURLRequest) (*blixardv1.SetFunctionURLResponse, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.SetFunctionURLRequest) (*blixardv1.SetFunctionURLResponse, error) {
		return e.functions.SetFunctionURL
	})
}

// DeleteFunctionURL takes the URL away.
func (c *Client) DeleteFunctionURL(ctx context.Context, req *blixardv1.DeleteFunctionURLRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.DeleteFunctionURLRequest) (*blixardv1.Change, error) {
		return e.functions.DeleteFunctionURL
	})
}

// ExplainFunction tells for each node whether it would take a call now.
func (c *Client) ExplainFunction(ctx context.Context, req *blixardv1.ExplainFunctionRequest) (*blixardv1.ExplainFunctionResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ExplainFunctionRequest) (*blixardv1.ExplainFunctionResponse, error) {
		return e.functions.ExplainFunction
	})
}

// GetFunctionMetrics sums up the invocations that nodes remember.
func (c *Client) GetFunctionMetrics(ctx context.Context, req *blixardv1.GetFunctionMetricsRequest) (*blixardv1.GetFunctionMetricsResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.GetFunctionMetricsRequest) (*blixardv1.GetFunctionMetricsResponse, error) {
		return e.functions.GetFunctionMetrics
	})
}

// ListFunctionEvents returns asynchronous invocations that have not ended or have failed for good.
func (c *Client) ListFunctionEvents(ctx context.Context, req *blixardv1.ListFunctionEventsRequest) (*blixardv1.ListFunctionEventsResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ListFunctionEventsRequest) (*blixardv1.ListFunctionEventsResponse, error) {
		return e.functions.ListFunctionEvents
	})
}

// ReplayFunctionEvent has a failed event tried again from the beginning.
func (c *Client) ReplayFunctionEvent(ctx context.Context, req *blixardv1.FunctionEventRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.FunctionEventRequest) (*blixardv1.Change, error) {
		return e.functions.ReplayFunctionEvent
	})
}

// DeleteFunctionEvent forgets an event.
func (c *Client) DeleteFunctionEvent(ctx context.Context, req *blixardv1.FunctionEventRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.FunctionEventRequest) (*blixardv1.Change, error) {
		return e.functions.DeleteFunctionEvent
	})
}

// CreateAccessKey makes a key for signed requests. Its secret is told this once.
func (c *Client) CreateAccessKey(ctx context.Context, req *blixardv1.CreateAccessKeyRequest) (*blixardv1.CreateAccessKeyResponse, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.CreateAccessKeyRequest) (*blixardv1.CreateAccessKeyResponse, error) {
		return e.access.CreateAccessKey
	})
}

// ListAccessKeys returns the keys, without secrets.
func (c *Client) ListAccessKeys(ctx context.Context, req *blixardv1.ListAccessKeysRequest) (*blixardv1.ListAccessKeysResponse, error) {
	return read(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.ListAccessKeysRequest) (*blixardv1.ListAccessKeysResponse, error) {
		return e.access.ListAccessKeys
	})
}

// RevokeAccessKey ends a key at once.
func (c *Client) RevokeAccessKey(ctx context.Context, req *blixardv1.RevokeAccessKeyRequest) (*blixardv1.Change, error) {
	return change(ctx, c, req, func(e *endpoint) func(context.Context, *blixardv1.RevokeAccessKeyRequest) (*blixardv1.Change, error) {
		return e.access.RevokeAccessKey
	})
}

// Code is a code package that the cluster keeps.
type Code struct {
	Digest        string `json:"digest"` // SHA-256 of the zip, 64 hexadecimal digits
	Bytes         int64  `json:"bytes"`
	UnzippedBytes int64  `json:"unzippedBytes"`
	Files         int    `json:"files"`
}

// PutCode sends the zip of a function's code to a node, which keeps it under its
// digest. What is there already is no error.
func (c *Client) PutCode(ctx context.Context, zip []byte) (Code, error) {
	var code Code
	err := c.retry(ctx, func(e *endpoint) error {
		answer, err := c.plain(ctx, e, http.MethodPost, "/v1/code", bytes.NewReader(zip), int64(len(zip)))
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		data, err := io.ReadAll(io.LimitReader(answer.Body, maxProblemBytes))
		if err != nil {
			return fmt.Errorf("reading the answer: %w", err)
		}
		return json.Unmarshal(data, &code)
	})
	return code, err
}

// GetCode opens the zip of a function's code, which must be closed. size is -1
// if not known.
func (c *Client) GetCode(ctx context.Context, digest string) (zip io.ReadCloser, size int64, err error) {
	err = c.retry(ctx, func(e *endpoint) error {
		answer, err := c.plain(ctx, e, http.MethodGet, "/v1/code/"+digest, nil, 0) //nolint:bodyclose // the caller closes it
		if err != nil {
			return err
		}
		zip, size = answer.Body, answer.ContentLength
		return nil
	})
	return zip, size, err
}

// InvokeFunction calls a function and hands the parts of the answer to take: a
// head, the payload in pieces, a report. A synchronous call goes to a node that
// has just answered, and is not repeated once it was sent: it may have run.
func (c *Client) InvokeFunction(ctx context.Context, req *blixardv1.InvokeFunctionRequest, take func(*blixardv1.InvokeFunctionResponse) error) error {
	return openStream(ctx, c, func(ctx context.Context, e *endpoint) (receiver[blixardv1.InvokeFunctionResponse], error) {
		if err := e.answers(ctx); err != nil {
			return nil, err
		}
		return e.invoke.InvokeFunction(ctx, req)
	}, take, false)
}

// FunctionLogs hands what a function's instances have written to take, piece by
// piece, until it ends or (with follow) until ctx ends.
func (c *Client) FunctionLogs(ctx context.Context, req *blixardv1.FunctionLogsRequest, take func(*blixardv1.LogsResponse) error) error {
	return openStream(ctx, c, func(ctx context.Context, e *endpoint) (receiver[blixardv1.LogsResponse], error) {
		return e.invoke.FunctionLogs(ctx, req)
	}, take, true)
}

// WatchFunction hands scaling and placement decisions to take as they are made,
// until ctx ends.
func (c *Client) WatchFunction(ctx context.Context, req *blixardv1.WatchFunctionRequest, take func(*blixardv1.FunctionActivity) error) error {
	return openStream(ctx, c, func(ctx context.Context, e *endpoint) (receiver[blixardv1.FunctionActivity], error) {
		return e.invoke.WatchFunction(ctx, req)
	}, take, true)
}

// receiver is the client's side of a server's stream.
type receiver[M any] interface{ Receive() (*M, error) }

// openStream opens a stream and hands its messages to take. With again the
// opening is repeated until a first message comes; without, only until it was
// sent.
func openStream[M any](ctx context.Context, c *Client, open func(context.Context, *endpoint) (receiver[M], error), take func(*M) error, again bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var stream receiver[M]
	var first *M
	var sent error
	err := c.retry(ctx, func(e *endpoint) error {
		s, err := open(ctx, e)
		if err != nil {
			return err
		}
		stream = s
		if first, err = s.Receive(); errors.Is(err, io.EOF) {
			first, err = nil, nil // there is nothing to tell
		}
		if err != nil && !again {
			sent = c.asError(ctx, err)
			return nil
		}
		return err
	})
	if err == nil {
		err = sent
	}
	if err != nil || first == nil {
		return err
	}
	for m := first; ; {
		if err := take(m); err != nil {
			return err
		}
		if m, err = stream.Receive(); err != nil {
			return ignoreEOF(c.asError(ctx, err))
		}
	}
}
