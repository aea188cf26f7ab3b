// Command lambda is a function on an unmodified aws-lambda-go that does what its
// event says.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/aws/aws-lambda-go/lambda"
	"github.com/aws/aws-lambda-go/lambdacontext"
)

type event struct {
	Do   string `json:"do"`
	N    int    `json:"n"`
	Text string `json:"text"`
}

var calls int

func handle(ctx context.Context, e event) (any, error) {
	calls++
	switch e.Do {
	case "error":
		return nil, errors.New(e.Text)
	case "panic":
		panic(e.Text)
	case "exit":
		fmt.Println("going")
		os.Exit(e.N)
	case "hang":
		time.Sleep(time.Hour)
	case "exit-later":
		time.AfterFunc(50*time.Millisecond, func() { os.Exit(1) })
	case "fork": // a grandchild that has left the session and ignores what it can
		command := exec.Command("setsid", "sh", "-c", "trap '' TERM HUP INT; echo $$ > "+e.Text+"; while :; do sleep 0.05; done")
		if err := command.Start(); err != nil {
			return nil, err
		}
		time.Sleep(time.Hour)
	case "big":
		return strings.Repeat("x", e.N), nil
	case "print":
		line := strings.Repeat("y", 1023) + "\n"
		for range e.N {
			os.Stdout.WriteString(line)
		}
		fmt.Println("last words")
	case "memory":
		var hold [][]byte
		for {
			hold = append(hold, bytes.Repeat([]byte{1}, 1<<20))
		}
	case "fill":
		file, err := os.Create("/tmp/fill")
		if err != nil {
			return nil, err
		}
		defer os.Remove("/tmp/fill")
		defer file.Close()
		for {
			if _, err := file.Write(make([]byte, 1<<20)); err != nil {
				return err.Error(), nil
			}
		}
	case "stream":
		return io.MultiReader(strings.NewReader("first "), &slow{text: e.Text}), nil
	case "breaks":
		return io.MultiReader(strings.NewReader("first "), &slow{text: e.Text, err: errors.New("in the middle")}), nil
	}
	about, _ := lambdacontext.FromContext(ctx)
	deadline, _ := ctx.Deadline()
	wd, _ := os.Getwd()
	return map[string]any{
		"text": e.Text, "calls": calls, "id": about.AwsRequestID, "arn": about.InvokedFunctionArn, "left_ms": time.Until(deadline).Milliseconds(),
		"env": os.Environ(), "wd": wd, "uid": os.Getuid(),
	}, nil
}

// slow gives its text once, and then its error or the end.
type slow struct {
	text string
	err  error
}

func (s *slow) Read(p []byte) (int, error) {
	if s.text == "" {
		if s.err != nil {
			return 0, s.err
		}
		return 0, io.EOF
	}
	n := copy(p, s.text)
	s.text = s.text[n:]
	return n, nil
}

func main() {
	if len(os.Args) > 1 {
		os.Exit(3)
	}
	switch os.Getenv("START") {
	case "exit":
		os.Exit(7)
	case "hang":
		time.Sleep(time.Hour)
	}
	if os.Getenv("SIGTERM") != "" {
		lambda.StartWithOptions(handle, lambda.WithEnableSIGTERM(func() { fmt.Println("told to go") }))
	}
	lambda.Start(handle)
}
