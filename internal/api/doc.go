// Package api serves Blixard's API: gRPC, gRPC-Web and Connect under
// /blixard.v1.*, REST with server-sent events under /v1, the OpenAPI document
// and health, all by one http.Handler for one port.
//
// It decides nothing about VMs. A request that changes something becomes one
// command, proposed through Backend; a read is answered from a View. Access to
// instances goes to Guests, or is passed on to the node that runs the instance
// (once: a request that was passed on is never passed on again).
//
// One path for all protocols: the REST transcoder decodes into the request
// message and calls the same procedure on the same connect.Server, so that
// authentication, deadlines and errors are the same everywhere. Errors are
// *blixard.Error inside; guard turns them into RPC errors, problem.go into
// problem details (RFC 9457).
//
// Ownership: a Handler has no state of its own but what is open; every
// goroutine it starts ends before the request that started it does.
package api
