// Package blixardv1 is the schema of Blixard's API: one set of messages and
// services for gRPC, Connect and REST.
//
// All of it but this file and the two about JSON is generated from the .proto
// files by `make gen` and committed. The messages mirror the types of the root
// package; conversions live in internal/api. OpenAPI holds the description of
// the REST interface, generated from the same files.
//
// The JSON of a message (json.Marshal, REST, the CLI's -o json) is protobuf's
// JSON mapping with one difference: 64-bit integers are numbers, not strings,
// since jq, shells and YAML expect numbers. Versions, indexes and milliseconds
// stay far below 2^53, so JavaScript reads them exactly. Strings are taken too.
package blixardv1

import _ "embed" // for OpenAPI

// OpenAPI is the OpenAPI 3.1 document of the REST interface, as JSON.
//
//go:embed openapi.json
var OpenAPI []byte
