// A function for AWS Lambda, which runs in Blixard as it is.
package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/aws/aws-lambda-go/lambda"
	"github.com/aws/aws-lambda-go/lambdacontext"
)

type event struct {
	Name string `json:"name"`
}

type answer struct {
	Message   string `json:"message"`
	RequestID string `json:"requestId"`
}

func handle(ctx context.Context, e event) (answer, error) {
	if e.Name == "" {
		return answer{}, errors.New("whom to greet?")
	}
	fmt.Println("greeting", e.Name)
	call, _ := lambdacontext.FromContext(ctx)
	return answer{Message: "Hello, " + e.Name, RequestID: call.AwsRequestID}, nil
}

func main() { lambda.Start(handle) }
