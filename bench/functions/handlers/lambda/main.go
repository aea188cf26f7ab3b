// Command lambda is a function that does nothing, made with aws-lambda-go as for
// AWS.
package main

import (
	"context"
	"encoding/json"

	"github.com/aws/aws-lambda-go/lambda"
)

type answer struct {
	StatusCode int    `json:"statusCode"`
	Body       string `json:"body"`
}

func handle(context.Context, json.RawMessage) (answer, error) {
	return answer{StatusCode: 200, Body: "hello"}, nil
}

func main() { lambda.Start(handle) }
