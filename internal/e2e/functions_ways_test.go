package e2e

import (
	"archive/zip"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/lambda"
	"github.com/aws/aws-sdk-go-v2/service/lambda/types"
)

// Updates while calls run, versions, aliases and a canary, and the way back.
func testVersions(d *deployer) {
	d.laterFunction("shop")
	d.ok("function", "create", "shop", "--config", d.probe(), "--env", "VERSION=one", "--timeout", "20s", "--publish")
	d.answers("shop", `{}`, `"hello one"`)
	// While the next is being built, and while calls run, somebody answers.
	stop := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		last := "hello one"
		for {
			select {
			case <-stop:
				if last != "hello two" {
					d.Errorf("the last answer was %q", last)
				}
				return
			default:
			}
			out, words, code := d.c.CLI("function", "invoke", "shop")
			got := strings.Trim(strings.TrimSpace(out), `"`)
			if code != 0 || got != last && (last != "hello one" || got != "hello two") {
				d.Errorf("during the update: exit code %d, %q after %q\n%s", code, got, last, words)
			}
			last = got
		}
	})
	d.says("published as version 2", "function", "update", "shop", "--env", "VERSION=two", "--publish")
	d.answers("shop", `{}`, `"hello two"`)
	close(stop)
	group.Wait()
	d.answers("shop:1", `{}`, `"hello one"`)
	d.ok("function", "alias", "shop", "live", "1")
	d.answers("shop:live", `{}`, `"hello one"`)
	d.ok("function", "alias", "shop", "live", "1", "--canary", "2=50%")
	ones, twos := 0, 0
	for range 40 {
		switch got := string(d.invoke("shop:live", `{}`).Payload); got {
		case `"hello one"`:
			ones++
		case `"hello two"`:
			twos++
		default:
			d.Fatalf("the canary says %s", got)
		}
	}
	if ones < 8 || twos < 8 { // less often than once in 10,000 runs
		d.Errorf("half of the calls each: %d and %d", ones, twos)
	}
	d.ok("function", "alias", "shop", "live", "2")
	d.answers("shop:live", `{}`, `"hello two"`)
	d.says("rolled back to version 1", "function", "rollback", "shop", "1")
	d.answers("shop", `{}`, `"hello one"`)
	d.answers("shop:2", `{}`, `"hello two"`)
	d.fails(5, nil, "function", "delete", "shop", "--version", "2")
	d.ok("function", "alias", "shop", "live", "--delete")
	d.ok("function", "delete", "shop", "--version", "2")
	d.fails(3, nil, "function", "invoke", "shop:2")
	d.answers("shop", `{}`, `"hello one"`)
}

// HTTP triggers and function URLs, on every node.
func testFunctionHTTP(d *deployer) {
	d.deploy("site2", d.probe())
	d.trigger("site2", "/site2/*", "--method", "POST")
	url := host(d, d.ok("function", "url", "site2"))
	for _, n := range d.c.Nodes {
		if got := d.http(n, 201, "POST", "/site2/a/b?c=d", "", `{"op":"raw","text":"{\"statusCode\":201,\"headers\":{\"x-a\":\"b\"},\"cookies\":[\"c=1\"],\"body\":\"made\"}"}`); got.body != "made" {
			d.Errorf("%+v", got)
		}
	}
	n := d.c.Nodes[1]
	d.http(n, 405, "GET", "/site2/a", "", "")
	d.http(n, 404, "POST", "/site", "", "")
	if got := d.http(n, 200, "POST", "/", url, `{}`); got.body != `"hello"` {
		d.Errorf("%+v", got)
	}
	d.http(n, 403, "POST", "/", "0000"+url[4:], `{}`)
	// With a lock: nobody without a signature.
	d.ok("function", "url", "site2", "--auth", "AWS_IAM")
	d.http(n, 403, "POST", "/", url, `{}`)
	d.ok("function", "url", "site2", "--delete")
	d.http(n, 403, "POST", "/", url, `{}`)
	if got := d.http(n, 413, "POST", "/site2/a", "", strings.Repeat("a", 7<<20)); got.problem() == "" {
		d.Errorf("too much: %s", got.body)
	}
}

// An AWS SDK as it is, with an access key.
func testSDK(d *deployer) {
	key := decode[struct {
		Key    struct{ ID string }
		Secret string
	}](d.T, d.ok("auth", "create-key", "--name", "sdk", "-o", "json"))
	ctx, cancel := context.WithTimeout(d.Context(), 90*time.Second)
	defer cancel()
	at := func(n *Node, secret string) *lambda.Client {
		return lambda.New(lambda.Options{
			Region: "us-east-1", BaseEndpoint: aws.String("http://" + n.Address), RetryMaxAttempts: 1,
			Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
				return aws.Credentials{AccessKeyID: key.Key.ID, SecretAccessKey: secret}, nil
			}),
		})
	}
	client := at(d.c.Nodes[1], key.Secret)
	program, err := os.ReadFile(d.program("bootstrap", examples+"/bootstrap-go"))
	if err != nil {
		d.Fatal(err)
	}
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	h := &zip.FileHeader{Name: "bootstrap", Method: zip.Deflate}
	h.SetMode(0o755)
	f, err := w.CreateHeader(h)
	if err == nil {
		_, err = f.Write(program)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		d.Fatal(err)
	}
	d.laterFunction("sdk")
	made, err := client.CreateFunction(ctx, &lambda.CreateFunctionInput{
		FunctionName: aws.String("sdk"), Runtime: types.RuntimeProvidedal2023, Role: aws.String("arn:aws:iam::000000000000:role/r"), Handler: aws.String("bootstrap"),
		Code: &types.FunctionCode{ZipFile: b.Bytes()}, Timeout: aws.Int32(20),
	})
	if err != nil {
		d.Fatalf("creating: %v", err)
	}
	if !strings.HasSuffix(aws.ToString(made.FunctionArn), ":function:sdk") {
		d.Errorf("its ARN is %s", aws.ToString(made.FunctionArn))
	}
	if err := lambda.NewFunctionActiveV2Waiter(client).Wait(ctx, &lambda.GetFunctionInput{FunctionName: aws.String("sdk")}, time.Minute); err != nil {
		d.Fatalf("waiting: %v", err)
	}
	got, err := client.Invoke(ctx, &lambda.InvokeInput{FunctionName: aws.String("sdk"), Payload: []byte(`{"name":"SDK"}`), LogType: types.LogTypeTail})
	if err != nil || got.StatusCode != 200 || got.FunctionError != nil || !strings.Contains(string(got.Payload), "Hello, SDK") || aws.ToString(got.LogResult) == "" {
		d.Fatalf("invoking: %+v, %v", got, err)
	}
	got, err = client.Invoke(ctx, &lambda.InvokeInput{FunctionName: aws.String("sdk"), Payload: []byte(`{}`)})
	if err != nil || aws.ToString(got.FunctionError) != "Unhandled" && aws.ToString(got.FunctionError) != "Handled" {
		d.Errorf("an error of the function's: %+v, %v", got, err)
	}
	got, err = client.Invoke(ctx, &lambda.InvokeInput{FunctionName: aws.String("sdk"), InvocationType: types.InvocationTypeEvent, Payload: []byte(`{"name":"later"}`)})
	if err != nil || got.StatusCode != 202 {
		d.Errorf("as an event: %+v, %v", got, err)
	}
	got, err = client.Invoke(ctx, &lambda.InvokeInput{FunctionName: aws.String("sdk"), InvocationType: types.InvocationTypeDryRun})
	if err != nil || got.StatusCode != 204 {
		d.Errorf("as a dry run: %+v, %v", got, err)
	}
	if _, err = client.Invoke(ctx, &lambda.InvokeInput{FunctionName: aws.String("sdk"), Payload: []byte(`{no json`)}); !errors.As(err, new(*types.InvalidRequestContentException)) {
		d.Errorf("no JSON: %v", err)
	}
	if _, err = client.Invoke(ctx, &lambda.InvokeInput{FunctionName: aws.String("sdk"), Qualifier: aws.String("9")}); !errors.As(err, new(*types.ResourceNotFoundException)) {
		d.Errorf("no such version: %v", err)
	}
	if _, err := at(d.c.Nodes[0], "wrong").GetFunction(ctx, &lambda.GetFunctionInput{FunctionName: aws.String("sdk")}); err == nil {
		d.Error("a wrong secret opens")
	}
	if _, err := client.DeleteFunction(ctx, &lambda.DeleteFunctionInput{FunctionName: aws.String("sdk")}); err != nil {
		d.Errorf("deleting: %v", err)
	}
	if _, err := client.GetFunction(ctx, &lambda.GetFunctionInput{FunctionName: aws.String("sdk")}); !errors.As(err, new(*types.ResourceNotFoundException)) {
		d.Errorf("after the end: %v", err)
	}
	d.ok("auth", "revoke-key", key.Key.ID)
	d.until("the key is of no use", 10*time.Second, func() error {
		if _, err := client.ListFunctions(ctx, &lambda.ListFunctionsInput{}); err == nil {
			return fmt.Errorf("it is still taken")
		}
		return nil
	})
}
