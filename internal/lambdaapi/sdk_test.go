package lambdaapi_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/lambda"
	"github.com/aws/aws-sdk-go-v2/service/lambda/types"
	"github.com/aws/smithy-go"

	"github.com/blixard/blixard"
)

// The life of a function, by AWS' own SDK.
func TestFunctionLife(t *testing.T) {
	w := newWorld(t, nil)
	c, ctx := w.client(), t.Context()
	in := createInput("hello")
	in.Environment = &types.Environment{Variables: map[string]string{"A": "never", "BB": "1"}}
	in.Environment.Variables = map[string]string{"BB": "1", "CC": "x=y"}
	in.Tags = map[string]string{"team": "blue"}
	in.Description, in.MemorySize, in.Timeout = aws.String("says hello"), aws.Int32(256), aws.Int32(7)
	made, err := c.CreateFunction(ctx, in)
	if err != nil {
		t.Fatal(err)
	}
	if made.State != types.StatePending || made.StateReasonCode != types.StateReasonCodeCreating || *made.Version != "$LATEST" || *made.Role != role {
		t.Errorf("created as %v %v %s %s", made.State, made.StateReasonCode, *made.Version, *made.Role)
	}
	if want := "arn:aws:lambda:us-east-1:000000000000:function:hello"; *made.FunctionArn != want {
		t.Errorf("ARN %s", *made.FunctionArn)
	}
	if made.Runtime != types.RuntimeProvidedal2023 || *made.MemorySize != 256 || *made.Timeout != 7 || *made.EphemeralStorage.Size != 512 || made.Environment.Variables["CC"] != "x=y" {
		t.Errorf("configuration %+v", made)
	}
	if _, err := time.Parse("2006-01-02T15:04:05.000-0700", *made.LastModified); err != nil {
		t.Error(err)
	}
	_, err = c.CreateFunction(ctx, createInput("hello"))
	want[*types.ResourceConflictException](t, err, "Function already exist: hello")
	_, err = c.Invoke(ctx, &lambda.InvokeInput{FunctionName: aws.String("hello")})
	want[*types.ResourceConflictException](t, err, "currently in the following state: Pending")
	_, err = c.PublishVersion(ctx, &lambda.PublishVersionInput{FunctionName: aws.String("hello")})
	want[*types.ResourceConflictException](t, err, "An update is in progress for resource: arn:aws:lambda:us-east-1:000000000000:function:hello")

	// The waiters see the build end.
	w.whileWaiting("hello", 0)
	quick := func(o *lambda.FunctionActiveV2WaiterOptions) {
		o.MinDelay, o.MaxDelay = time.Millisecond, 10*time.Millisecond
	}
	if err := lambda.NewFunctionActiveV2Waiter(c, quick).Wait(ctx, &lambda.GetFunctionInput{FunctionName: aws.String("hello")}, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	got, err := c.GetFunction(ctx, &lambda.GetFunctionInput{FunctionName: made.FunctionArn})
	if err != nil {
		t.Fatal(err)
	}
	if got.Configuration.LastUpdateStatus != types.LastUpdateStatusSuccessful || got.Tags["team"] != "blue" || got.Concurrency != nil {
		t.Errorf("%+v", got)
	}
	status, body, _ := w.send("GET", strings.TrimPrefix(*got.Code.Location, w.url), "")
	if status != http.StatusOK || body != string(zipOf("one")) {
		t.Errorf("the code's link gave %d and %d bytes", status, len(body))
	}
	if status, _, _ := w.send("GET", strings.TrimPrefix(strings.Replace(*got.Code.Location, "Expires=", "Expires=1", 1), w.url), ""); status != http.StatusForbidden {
		t.Errorf("a forged link gave %d", status)
	}

	// An update of the code: the former code answers meanwhile.
	code, err := c.UpdateFunctionCode(ctx, &lambda.UpdateFunctionCodeInput{FunctionName: aws.String("hello"), ZipFile: zipOf("two"), RevisionId: got.Configuration.RevisionId})
	if err != nil {
		t.Fatal(err)
	}
	if code.State != types.StateActive || code.LastUpdateStatus != types.LastUpdateStatusInProgress || *code.CodeSha256 == *made.CodeSha256 || *code.RevisionId == *made.RevisionId {
		t.Errorf("updated: %+v", code)
	}
	if _, err := c.Invoke(ctx, &lambda.InvokeInput{FunctionName: aws.String("hello")}); err != nil {
		t.Errorf("a call during the update: %v", err)
	}
	_, err = c.UpdateFunctionConfiguration(ctx, &lambda.UpdateFunctionConfigurationInput{FunctionName: aws.String("hello"), MemorySize: aws.Int32(512)})
	want[*types.ResourceConflictException](t, err, "An update is in progress for resource")
	w.whileWaiting("hello", 0)
	updated := func(o *lambda.FunctionUpdatedV2WaiterOptions) {
		o.MinDelay, o.MaxDelay = time.Millisecond, 10*time.Millisecond
	}
	if err := lambda.NewFunctionUpdatedV2Waiter(c, updated).Wait(ctx, &lambda.GetFunctionInput{FunctionName: aws.String("hello")}, 10*time.Second); err != nil {
		t.Fatal(err)
	}

	// An update that fails.
	if _, err := c.UpdateFunctionConfiguration(ctx, &lambda.UpdateFunctionConfigurationInput{FunctionName: aws.String("hello"), Environment: &types.Environment{}}); err != nil {
		t.Fatal(err)
	}
	w.build("hello", 0, blixard.FunctionFailed)
	conf, err := c.GetFunctionConfiguration(ctx, &lambda.GetFunctionConfigurationInput{FunctionName: aws.String("hello")})
	if err != nil {
		t.Fatal(err)
	}
	if conf.State != types.StateActive || conf.LastUpdateStatus != types.LastUpdateStatusFailed || *conf.LastUpdateStatusReason != "it said no" || conf.Environment != nil {
		t.Errorf("a failed update: %+v", conf)
	}
	_, err = c.UpdateFunctionConfiguration(ctx, &lambda.UpdateFunctionConfigurationInput{FunctionName: aws.String("hello"), RevisionId: made.RevisionId, Timeout: aws.Int32(9)})
	want[*types.PreconditionFailedException](t, err, "The Revision Id provided does not match the latest Revision Id")
	_, err = c.UpdateFunctionCode(ctx, &lambda.UpdateFunctionCodeInput{FunctionName: aws.String("hello"), ZipFile: zipOf("x"), RevisionId: made.RevisionId})
	want[*types.PreconditionFailedException](t, err, "")
	dry, err := c.UpdateFunctionCode(ctx, &lambda.UpdateFunctionCodeInput{FunctionName: aws.String("hello"), ZipFile: zipOf("dry"), DryRun: true})
	if err != nil || *dry.CodeSha256 == *conf.CodeSha256 {
		t.Errorf("a dry run: %v", err)
	}
	if again, err := c.GetFunctionConfiguration(ctx, &lambda.GetFunctionConfigurationInput{FunctionName: aws.String("hello")}); err != nil || *again.RevisionId != *conf.RevisionId {
		t.Errorf("the dry run changed something: %v", err)
	}

	if _, err := c.DeleteFunction(ctx, &lambda.DeleteFunctionInput{FunctionName: aws.String("hello")}); err != nil {
		t.Fatal(err)
	}
	_, err = c.GetFunction(ctx, &lambda.GetFunctionInput{FunctionName: aws.String("hello")})
	want[*types.ResourceNotFoundException](t, err, "Function not found: arn:aws:lambda:us-east-1:000000000000:function:hello")
	_, err = c.DeleteFunction(ctx, &lambda.DeleteFunctionInput{FunctionName: aws.String("hello")})
	want[*types.ResourceNotFoundException](t, err, "Function not found")
}

// whileWaiting lets a build succeed once somebody has looked at it, as a waiter
// would.
func (w *world) whileWaiting(name string, number int) {
	w.record.onNext(func() { w.build(name, number, blixard.FunctionActive) })
}

func TestVersionsAndAliases(t *testing.T) {
	w := newWorld(t, nil)
	c, ctx := w.client(), t.Context()
	f := aws.String("f")
	made := w.create("f")
	one, err := c.PublishVersion(ctx, &lambda.PublishVersionInput{FunctionName: f, Description: aws.String("first"), CodeSha256: made.CodeSha256})
	if err != nil {
		t.Fatal(err)
	}
	if *one.Version != "1" || *one.FunctionArn != *made.FunctionArn+":1" || *one.Description != "first" || one.State != types.StatePending {
		t.Errorf("published %+v", one)
	}
	if same, err := c.PublishVersion(ctx, &lambda.PublishVersionInput{FunctionName: f}); err != nil || *same.Version != "1" {
		t.Errorf("published the same again: %v", err)
	}
	_, err = c.PublishVersion(ctx, &lambda.PublishVersionInput{FunctionName: f, CodeSha256: aws.String("x")})
	want[*types.InvalidParameterValueException](t, err, "is different from current CodeSHA256 in $LATEST")
	w.build("f", 1, blixard.FunctionActive)
	in := &lambda.UpdateFunctionCodeInput{FunctionName: f, ZipFile: zipOf("two"), Publish: true}
	two, err := c.UpdateFunctionCode(ctx, in)
	if err != nil || *two.Version != "2" {
		t.Fatalf("%+v, %v", two, err)
	}
	w.build("f", 0, blixard.FunctionActive)
	w.build("f", 2, blixard.FunctionActive)
	v1, err := c.GetFunctionConfiguration(ctx, &lambda.GetFunctionConfigurationInput{FunctionName: aws.String("f:1")})
	if err != nil || *v1.CodeSha256 != *made.CodeSha256 || *v1.Version != "1" {
		t.Errorf("f:1 is %+v, %v", v1, err)
	}

	alias, err := c.CreateAlias(ctx, &lambda.CreateAliasInput{FunctionName: f, Name: aws.String("live"), FunctionVersion: aws.String("1"), Description: aws.String("d")})
	if err != nil || *alias.AliasArn != *made.FunctionArn+":live" || *alias.FunctionVersion != "1" || alias.RoutingConfig != nil {
		t.Fatalf("%+v, %v", alias, err)
	}
	_, err = c.CreateAlias(ctx, &lambda.CreateAliasInput{FunctionName: f, Name: aws.String("live"), FunctionVersion: aws.String("2")})
	want[*types.ResourceConflictException](t, err, "Alias already exists: arn:aws:lambda:us-east-1:000000000000:function:f:live")
	_, err = c.CreateAlias(ctx, &lambda.CreateAliasInput{FunctionName: f, Name: aws.String("12"), FunctionVersion: aws.String("2")})
	wantCode(t, err, "ValidationException", "1 validation error detected: Value '12' at 'name' failed to satisfy constraint: Member must satisfy regular expression pattern: (?!^[0-9]+$)([a-zA-Z0-9-_]+)")
	_, err = c.CreateAlias(ctx, &lambda.CreateAliasInput{FunctionName: f, Name: aws.String("x"), FunctionVersion: aws.String("9")})
	want[*types.ResourceNotFoundException](t, err, "Function not found: arn:aws:lambda:us-east-1:000000000000:function:f:9")
	weights := func(m map[string]float64) *types.AliasRoutingConfiguration {
		return &types.AliasRoutingConfiguration{AdditionalVersionWeights: m}
	}
	moved, err := c.UpdateAlias(ctx, &lambda.UpdateAliasInput{FunctionName: f, Name: aws.String("live"), RoutingConfig: weights(map[string]float64{"2": 0.05}), RevisionId: alias.RevisionId})
	if err != nil || moved.RoutingConfig.AdditionalVersionWeights["2"] != 0.05 || *moved.Description != "d" {
		t.Fatalf("%+v, %v", moved, err)
	}
	_, err = c.UpdateAlias(ctx, &lambda.UpdateAliasInput{FunctionName: f, Name: aws.String("live"), Description: aws.String("e"), RevisionId: alias.RevisionId})
	want[*types.PreconditionFailedException](t, err, "The Revision Id provided does not match")
	for _, bad := range []map[string]float64{{"1": 0.1}, {"2": 1.5}, {"2": 0.1, "1": 0.1}, {"x": 0.1}} {
		if _, err := c.UpdateAlias(ctx, &lambda.UpdateAliasInput{FunctionName: f, Name: aws.String("live"), RoutingConfig: weights(bad)}); err == nil {
			t.Errorf("the weights %v were taken", bad)
		}
	}
	// An empty configuration takes the weights away.
	back, err := c.UpdateAlias(ctx, &lambda.UpdateAliasInput{FunctionName: f, Name: aws.String("live"), FunctionVersion: aws.String("2"), RoutingConfig: weights(nil)})
	if err != nil || back.RoutingConfig != nil || *back.FunctionVersion != "2" {
		t.Errorf("%+v, %v", back, err)
	}
	_, err = c.DeleteFunction(ctx, &lambda.DeleteFunctionInput{FunctionName: f, Qualifier: aws.String("2")})
	want[*types.ResourceConflictException](t, err, "")
	_, err = c.GetAlias(ctx, &lambda.GetAliasInput{FunctionName: f, Name: aws.String("none")})
	want[*types.ResourceNotFoundException](t, err, "Cannot find alias arn: arn:aws:lambda:us-east-1:000000000000:function:f:none")
	if viaAlias, err := c.GetFunction(ctx, &lambda.GetFunctionInput{FunctionName: f, Qualifier: aws.String("live")}); err != nil || !strings.HasSuffix(*viaAlias.Configuration.FunctionArn, ":live") {
		t.Errorf("by alias: %v", err)
	}
	list, err := c.ListAliases(ctx, &lambda.ListAliasesInput{FunctionName: f})
	if err != nil || len(list.Aliases) != 1 {
		t.Errorf("aliases %+v, %v", list, err)
	}
	for range 2 { // deleting what is gone is fine
		if _, err := c.DeleteAlias(ctx, &lambda.DeleteAliasInput{FunctionName: f, Name: aws.String("live")}); err != nil {
			t.Error(err)
		}
	}
	if _, err := c.DeleteFunction(ctx, &lambda.DeleteFunctionInput{FunctionName: aws.String("f:1")}); err != nil {
		t.Error(err)
	}
	_, err = c.DeleteFunction(ctx, &lambda.DeleteFunctionInput{FunctionName: f, Qualifier: aws.String("$LATEST")})
	want[*types.InvalidParameterValueException](t, err, "$LATEST version cannot be deleted")
	_, err = c.GetFunction(ctx, &lambda.GetFunctionInput{FunctionName: aws.String("f:1"), Qualifier: aws.String("2")})
	want[*types.InvalidParameterValueException](t, err, "The derived qualifier from the function name does not match the specified qualifier.")
}

func wantCode(t *testing.T, err error, code, message string) {
	t.Helper()
	e, ok := errors.AsType[smithy.APIError](err)
	if !ok || e.ErrorCode() != code || !strings.Contains(e.ErrorMessage(), message) {
		t.Errorf("error %v, want %s: %s", err, code, message)
	}
}

func TestPaginators(t *testing.T) {
	w := newWorld(t, nil)
	c, ctx := w.client(), t.Context()
	var want []string
	for i := range 7 {
		name := fmt.Sprintf("f%d", i)
		want = append(want, name)
		w.create(name)
	}
	var got []string
	pages := 0
	for p := lambda.NewListFunctionsPaginator(c, &lambda.ListFunctionsInput{MaxItems: aws.Int32(3)}); p.HasMorePages(); pages++ {
		out, err := p.NextPage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range out.Functions {
			got = append(got, *f.FunctionName)
			if f.State != "" {
				t.Error("a list tells states")
			}
		}
	}
	if !slices.Equal(got, want) || pages != 3 {
		t.Errorf("%d pages: %v", pages, got)
	}
	if _, err := c.PublishVersion(ctx, &lambda.PublishVersionInput{FunctionName: aws.String("f3")}); err != nil {
		t.Fatal(err)
	}
	got = nil
	for p := lambda.NewListFunctionsPaginator(c, &lambda.ListFunctionsInput{MaxItems: aws.Int32(2), FunctionVersion: types.FunctionVersionAll}); p.HasMorePages(); {
		out, err := p.NextPage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range out.Functions {
			got = append(got, (*f.FunctionArn)[strings.LastIndex(*f.FunctionArn, "function:")+9:])
		}
	}
	if len(got) != 8 || got[3] != "f3:$LATEST" || got[4] != "f3:1" || got[5] != "f4:$LATEST" {
		t.Errorf("all versions: %v", got)
	}
	got = nil
	for p := lambda.NewListVersionsByFunctionPaginator(c, &lambda.ListVersionsByFunctionInput{FunctionName: aws.String("f3"), MaxItems: aws.Int32(1)}); p.HasMorePages(); {
		out, err := p.NextPage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range out.Versions {
			got = append(got, *f.Version)
		}
	}
	if !slices.Equal(got, []string{"$LATEST", "1"}) {
		t.Errorf("versions: %v", got)
	}
	_, err := c.ListFunctions(ctx, &lambda.ListFunctionsInput{Marker: aws.String("???")})
	wantCode(t, err, "InvalidParameterValueException", "marker")
	_, err = c.ListFunctions(ctx, &lambda.ListFunctionsInput{MaxItems: aws.Int32(0)})
	wantCode(t, err, "ValidationException", "Value '0' at 'maxItems'")
}

func TestSettings(t *testing.T) {
	w := newWorld(t, nil)
	c, ctx := w.client(), t.Context()
	f := aws.String("f")
	made := w.create("f")
	w.create("sink")

	// Concurrency.
	if out, err := c.GetFunctionConcurrency(ctx, &lambda.GetFunctionConcurrencyInput{FunctionName: f}); err != nil || out.ReservedConcurrentExecutions != nil {
		t.Errorf("%+v, %v", out, err)
	}
	for _, n := range []int32{5, 0} {
		if out, err := c.PutFunctionConcurrency(ctx, &lambda.PutFunctionConcurrencyInput{FunctionName: f, ReservedConcurrentExecutions: &n}); err != nil || *out.ReservedConcurrentExecutions != n {
			t.Errorf("%+v, %v", out, err)
		}
		if out, err := c.GetFunction(ctx, &lambda.GetFunctionInput{FunctionName: f}); err != nil || *out.Concurrency.ReservedConcurrentExecutions != n {
			t.Errorf("%+v, %v", out, err)
		}
		if have := w.cluster.View().Function("f").MaxConcurrent; have != int(n) {
			t.Errorf("the state says %d", have)
		}
	}
	if _, err := c.DeleteFunctionConcurrency(ctx, &lambda.DeleteFunctionConcurrencyInput{FunctionName: f}); err != nil {
		t.Error(err)
	}
	if have := w.cluster.View().Function("f"); have.MaxConcurrent != blixard.DefaultMaxConcurrent || have.Reserved {
		t.Errorf("the state says %d", have.MaxConcurrent)
	}

	// Tags.
	if _, err := c.TagResource(ctx, &lambda.TagResourceInput{Resource: made.FunctionArn, Tags: map[string]string{"a": "1", "b": "2"}}); err != nil {
		t.Error(err)
	}
	if _, err := c.UntagResource(ctx, &lambda.UntagResourceInput{Resource: made.FunctionArn, TagKeys: []string{"b", "zz"}}); err != nil {
		t.Error(err)
	}
	if out, err := c.ListTags(ctx, &lambda.ListTagsInput{Resource: made.FunctionArn}); err != nil || len(out.Tags) != 1 || out.Tags["a"] != "1" {
		t.Errorf("%+v, %v", out, err)
	}
	_, err := c.ListTags(ctx, &lambda.ListTagsInput{Resource: aws.String(*made.FunctionArn + ":1")})
	want[*types.InvalidParameterValueException](t, err, "Tags on function aliases and versions are not supported")

	// Policy.
	permission := &lambda.AddPermissionInput{FunctionName: f, StatementId: aws.String("s3"), Action: aws.String("lambda:InvokeFunction"), Principal: aws.String("s3.amazonaws.com"), SourceArn: aws.String("arn:aws:s3:::b")}
	added, err := c.AddPermission(ctx, permission)
	if err != nil {
		t.Fatal(err)
	}
	const statement = `{"Sid":"s3","Effect":"Allow","Principal":{"Service":"s3.amazonaws.com"},"Action":"lambda:InvokeFunction","Resource":"arn:aws:lambda:us-east-1:000000000000:function:f","Condition":{"ArnLike":{"AWS:SourceArn":"arn:aws:s3:::b"}}}`
	if *added.Statement != statement {
		t.Errorf("statement %s", *added.Statement)
	}
	_, err = c.AddPermission(ctx, permission)
	want[*types.ResourceConflictException](t, err, "The statement id (s3) provided already exists")
	policy, err := c.GetPolicy(ctx, &lambda.GetPolicyInput{FunctionName: f})
	if err != nil || *policy.Policy != `{"Version":"2012-10-17","Id":"default","Statement":[`+statement+`]}` {
		t.Fatalf("%+v, %v", policy, err)
	}
	_, err = c.RemovePermission(ctx, &lambda.RemovePermissionInput{FunctionName: f, StatementId: aws.String("s3"), RevisionId: aws.String("old")})
	want[*types.PreconditionFailedException](t, err, "")
	if _, err := c.RemovePermission(ctx, &lambda.RemovePermissionInput{FunctionName: f, StatementId: aws.String("s3"), RevisionId: policy.RevisionId}); err != nil {
		t.Error(err)
	}
	_, err = c.GetPolicy(ctx, &lambda.GetPolicyInput{FunctionName: f})
	want[*types.ResourceNotFoundException](t, err, "The resource you requested does not exist.")

	// Asynchronous calls.
	sink := "arn:aws:lambda:us-east-1:000000000000:function:sink"
	put, err := c.PutFunctionEventInvokeConfig(ctx, &lambda.PutFunctionEventInvokeConfigInput{
		FunctionName: f, MaximumRetryAttempts: aws.Int32(1), DestinationConfig: &types.DestinationConfig{OnFailure: &types.OnFailure{Destination: &sink}},
	})
	if err != nil || *put.MaximumRetryAttempts != 1 || put.MaximumEventAgeInSeconds != nil || *put.DestinationConfig.OnFailure.Destination != sink || time.Since(*put.LastModified) > time.Minute {
		t.Fatalf("%+v, %v", put, err)
	}
	merged, err := c.UpdateFunctionEventInvokeConfig(ctx, &lambda.UpdateFunctionEventInvokeConfigInput{FunctionName: f, MaximumEventAgeInSeconds: aws.Int32(60)})
	if err != nil || *merged.MaximumRetryAttempts != 1 || *merged.MaximumEventAgeInSeconds != 60 {
		t.Errorf("%+v, %v", merged, err)
	}
	_, err = c.PutFunctionEventInvokeConfig(ctx, &lambda.PutFunctionEventInvokeConfigInput{FunctionName: f, DestinationConfig: &types.DestinationConfig{OnFailure: &types.OnFailure{Destination: aws.String("arn:aws:sqs:us-east-1:000000000000:q")}}})
	want[*types.InvalidParameterValueException](t, err, "destinations are functions of this cluster")
	_, err = c.PutFunctionEventInvokeConfig(ctx, &lambda.PutFunctionEventInvokeConfigInput{FunctionName: f, MaximumRetryAttempts: aws.Int32(3)})
	wantCode(t, err, "ValidationException", "Value '3' at 'maximumRetryAttempts' failed to satisfy constraint: Member must have value less than or equal to 2")
	if out, err := c.ListFunctionEventInvokeConfigs(ctx, &lambda.ListFunctionEventInvokeConfigsInput{FunctionName: f}); err != nil || len(out.FunctionEventInvokeConfigs) != 1 {
		t.Errorf("%+v, %v", out, err)
	}
	if _, err := c.DeleteFunctionEventInvokeConfig(ctx, &lambda.DeleteFunctionEventInvokeConfigInput{FunctionName: f}); err != nil {
		t.Error(err)
	}
	_, err = c.GetFunctionEventInvokeConfig(ctx, &lambda.GetFunctionEventInvokeConfigInput{FunctionName: f})
	want[*types.ResourceNotFoundException](t, err, "The function arn:aws:lambda:us-east-1:000000000000:function:f:$LATEST doesn't have an EventInvokeConfig")

	// URLs.
	url, err := c.CreateFunctionUrlConfig(ctx, &lambda.CreateFunctionUrlConfigInput{FunctionName: f, AuthType: types.FunctionUrlAuthTypeNone, Cors: &types.Cors{AllowOrigins: []string{"*"}, MaxAge: aws.Int32(5)}})
	if err != nil || !strings.Contains(*url.FunctionUrl, ".lambda-url.us-east-1.") || url.InvokeMode != types.InvokeModeBuffered || *url.Cors.MaxAge != 5 {
		t.Fatalf("%+v, %v", url, err)
	}
	_, err = c.CreateFunctionUrlConfig(ctx, &lambda.CreateFunctionUrlConfigInput{FunctionName: f, AuthType: types.FunctionUrlAuthTypeNone})
	want[*types.ResourceConflictException](t, err, "FunctionUrlConfig exists for this Lambda function")
	changed, err := c.UpdateFunctionUrlConfig(ctx, &lambda.UpdateFunctionUrlConfigInput{FunctionName: f, AuthType: types.FunctionUrlAuthTypeAwsIam, InvokeMode: types.InvokeModeResponseStream})
	if err != nil || *changed.FunctionUrl != *url.FunctionUrl || changed.AuthType != types.FunctionUrlAuthTypeAwsIam || changed.Cors == nil {
		t.Errorf("%+v, %v", changed, err)
	}
	if out, err := c.ListFunctionUrlConfigs(ctx, &lambda.ListFunctionUrlConfigsInput{FunctionName: f}); err != nil || len(out.FunctionUrlConfigs) != 1 {
		t.Errorf("%+v, %v", out, err)
	}
	if _, err := c.DeleteFunctionUrlConfig(ctx, &lambda.DeleteFunctionUrlConfigInput{FunctionName: f}); err != nil {
		t.Error(err)
	}
	_, err = c.GetFunctionUrlConfig(ctx, &lambda.GetFunctionUrlConfigInput{FunctionName: f})
	want[*types.ResourceNotFoundException](t, err, "")

	// What tools look at.
	if out, err := c.GetAccountSettings(ctx, &lambda.GetAccountSettingsInput{}); err != nil || out.AccountUsage.FunctionCount != 2 || out.AccountUsage.TotalCodeSize == 0 || out.AccountLimit.ConcurrentExecutions != 1000 {
		t.Errorf("%+v, %v", out, err)
	}
	if out, err := c.GetFunctionCodeSigningConfig(ctx, &lambda.GetFunctionCodeSigningConfigInput{FunctionName: f}); err != nil || out.CodeSigningConfigArn != nil {
		t.Errorf("%+v, %v", out, err)
	}
	if out, err := c.GetRuntimeManagementConfig(ctx, &lambda.GetRuntimeManagementConfigInput{FunctionName: f}); err != nil || out.UpdateRuntimeOn != types.UpdateRuntimeOnAuto {
		t.Errorf("%+v, %v", out, err)
	}
	if out, err := c.GetFunctionRecursionConfig(ctx, &lambda.GetFunctionRecursionConfigInput{FunctionName: f}); err != nil || out.RecursiveLoop != types.RecursiveLoopTerminate {
		t.Errorf("%+v, %v", out, err)
	}
	if out, err := c.ListEventSourceMappings(ctx, &lambda.ListEventSourceMappingsInput{}); err != nil || len(out.EventSourceMappings) != 0 {
		t.Errorf("%+v, %v", out, err)
	}
	if out, err := c.ListProvisionedConcurrencyConfigs(ctx, &lambda.ListProvisionedConcurrencyConfigsInput{FunctionName: f}); err != nil || len(out.ProvisionedConcurrencyConfigs) != 0 {
		t.Errorf("%+v, %v", out, err)
	}
	_, err = c.GetProvisionedConcurrencyConfig(ctx, &lambda.GetProvisionedConcurrencyConfigInput{FunctionName: f, Qualifier: aws.String("$LATEST")})
	want[*types.ProvisionedConcurrencyConfigNotFoundException](t, err, "")
	_, err = c.CreateEventSourceMapping(ctx, &lambda.CreateEventSourceMappingInput{FunctionName: f, EventSourceArn: aws.String("arn:aws:sqs:us-east-1:000000000000:q")})
	wantCode(t, err, "UnsupportedOperationException", "there are no event source mappings")
	_, err = c.PublishLayerVersion(ctx, &lambda.PublishLayerVersionInput{LayerName: aws.String("l"), Content: &types.LayerVersionContentInput{ZipFile: zipOf("x")}})
	wantCode(t, err, "UnsupportedOperationException", "there are no layers")
}

func TestRefusedConfigurations(t *testing.T) {
	w := newWorld(t, nil)
	c, ctx := w.client(), t.Context()
	const invalid, validation = "InvalidParameterValueException", "ValidationException"
	for name, x := range map[string]struct {
		change     func(*lambda.CreateFunctionInput)
		code, says string
	}{
		"layers":    {func(in *lambda.CreateFunctionInput) { in.Layers = []string{"x"} }, invalid, "does not know layers"},
		"vpc":       {func(in *lambda.CreateFunctionInput) { in.VpcConfig = &types.VpcConfig{SubnetIds: []string{"s"}} }, invalid, "VPCs"},
		"empty vpc": {change: func(in *lambda.CreateFunctionInput) { in.VpcConfig = &types.VpcConfig{} }},
		"x-ray": {func(in *lambda.CreateFunctionInput) {
			in.TracingConfig = &types.TracingConfig{Mode: types.TracingModeActive}
		}, invalid, "X-Ray"},
		"queue": {func(in *lambda.CreateFunctionInput) {
			in.DeadLetterConfig = &types.DeadLetterConfig{TargetArn: aws.String("arn:aws:sqs:us-east-1:000000000000:q")}
		}, invalid, "dead-letter"},
		"json log": {func(in *lambda.CreateFunctionInput) {
			in.LoggingConfig = &types.LoggingConfig{LogFormat: types.LogFormatJson}
		}, invalid, "formats of logs"},
		"log group": {func(in *lambda.CreateFunctionInput) {
			in.LoggingConfig = &types.LoggingConfig{LogGroup: aws.String("x")}
		}, invalid, "log groups"},
		"text log": {change: func(in *lambda.CreateFunctionInput) {
			in.LoggingConfig = &types.LoggingConfig{LogFormat: types.LogFormatText, LogGroup: aws.String("/aws/lambda/text-log")}
		}},
		"kms":   {func(in *lambda.CreateFunctionInput) { in.KMSKeyArn = aws.String("x") }, invalid, "KMS"},
		"image": {func(in *lambda.CreateFunctionInput) { in.PackageType = types.PackageTypeImage }, invalid, "container images"},
		"s3": {func(in *lambda.CreateFunctionInput) {
			in.Code = &types.FunctionCode{S3Bucket: aws.String("b"), S3Key: aws.String("k")}
		}, invalid, "S3"},
		"image uri":    {func(in *lambda.CreateFunctionInput) { in.Code = &types.FunctionCode{ImageUri: aws.String("x")} }, invalid, "container images"},
		"no code":      {func(in *lambda.CreateFunctionInput) { in.Code = &types.FunctionCode{} }, invalid, "Please provide a source for function code."},
		"not a zip":    {func(in *lambda.CreateFunctionInput) { in.Code.ZipFile = []byte("hello") }, invalid, "Could not unzip uploaded file. Please check your file, then try to upload again."},
		"no bootstrap": {func(in *lambda.CreateFunctionInput) { in.Runtime, in.Handler = "nix", aws.String("a.nix") }, invalid, ""},
		"python":       {func(in *lambda.CreateFunctionInput) { in.Runtime = types.RuntimePython313 }, invalid, "Value python3.13 at 'runtime' failed to satisfy constraint: Member must satisfy enum value set: [provided.al2023"},
		"no runtime":   {func(in *lambda.CreateFunctionInput) { in.Runtime = "" }, invalid, "Runtime and Handler are mandatory parameters"},
		"arm":          {func(in *lambda.CreateFunctionInput) { in.Architectures = []types.Architecture{types.ArchitectureArm64} }, invalid, "arm64"},
		"role":         {func(in *lambda.CreateFunctionInput) { in.Role = aws.String("r") }, validation, "1 validation error detected: Value 'r' at 'role' failed to satisfy constraint"},
		"memory":       {func(in *lambda.CreateFunctionInput) { in.MemorySize = aws.Int32(64) }, validation, "Value '64' at 'memorySize' failed to satisfy constraint: Member must have value greater than or equal to 128"},
		"two":          {func(in *lambda.CreateFunctionInput) { in.MemorySize, in.Timeout = aws.Int32(1), aws.Int32(901) }, validation, "2 validation errors detected"},
		"env name": {func(in *lambda.CreateFunctionInput) {
			in.Environment = &types.Environment{Variables: map[string]string{"1": "x"}}
		}, validation, "environment.variables"},
		"reserved env": {func(in *lambda.CreateFunctionInput) {
			in.Environment = &types.Environment{Variables: map[string]string{"AWS_REGION": "x"}}
		}, invalid, "Reserved keys used in this request: AWS_REGION"},
		"large env": {func(in *lambda.CreateFunctionInput) {
			in.Environment = &types.Environment{Variables: map[string]string{"AA": strings.Repeat("x", 4096)}}
		}, invalid, "exceeded the 4KB limit"},
		"name":      {func(in *lambda.CreateFunctionInput) { in.FunctionName = aws.String("a b") }, validation, "Value 'a b' at 'functionName' failed to satisfy constraint: Member must satisfy regular expression pattern: (arn:"},
		"long name": {func(in *lambda.CreateFunctionInput) { in.FunctionName = aws.String(strings.Repeat("a", 65)) }, validation, "Member must have length less than or equal to 64"},
		"other region": {func(in *lambda.CreateFunctionInput) {
			in.FunctionName = aws.String("arn:aws:lambda:eu-west-1:000000000000:function:a")
		}, "ResourceNotFoundException", "Functions from 'eu-west-1' are not reachable in this region ('us-east-1')"},
		"snap start": {func(in *lambda.CreateFunctionInput) {
			in.SnapStart = &types.SnapStart{ApplyOn: types.SnapStartApplyOnPublishedVersions}
		}, invalid, "snapshots"},
		"no snap start": {change: func(in *lambda.CreateFunctionInput) {
			in.SnapStart = &types.SnapStart{ApplyOn: types.SnapStartApplyOnNone}
		}},
		"signing": {func(in *lambda.CreateFunctionInput) { in.CodeSigningConfigArn = aws.String("x") }, invalid, "code signing"},
		"tenants": {func(in *lambda.CreateFunctionInput) {
			in.TenancyConfig = &types.TenancyConfig{TenantIsolationMode: types.TenantIsolationModePerTenant}
		}, invalid, "tenants"},
		"durable": {func(in *lambda.CreateFunctionInput) {
			in.DurableConfig = &types.DurableConfig{ExecutionTimeout: aws.Int32(1)}
		}, invalid, "durable"},
		"partial arn": {change: func(in *lambda.CreateFunctionInput) {
			in.FunctionName = aws.String("000000000000:function:partial-arn")
		}},
		"our own runtimes": {change: func(in *lambda.CreateFunctionInput) { in.Runtime = "bootstrap" }},
	} {
		t.Run(name, func(t *testing.T) {
			in := createInput(strings.ReplaceAll(name, " ", "-"))
			x.change(in)
			_, err := c.CreateFunction(ctx, in)
			if x.code == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantCode(t, err, x.code, x.says)
		})
	}
}

func TestStates(t *testing.T) {
	w := newWorld(t, nil)
	if _, err := w.client().CreateFunction(t.Context(), createInput("broken")); err != nil {
		t.Fatal(err)
	}
	w.build("broken", 0, blixard.FunctionFailed)
	out, err := w.client().GetFunction(t.Context(), &lambda.GetFunctionInput{FunctionName: aws.String("broken")})
	if err != nil || out.Configuration.State != types.StateFailed || *out.Configuration.StateReason != "it said no" {
		t.Fatalf("%+v, %v", out, err)
	}
	_, err = w.client().Invoke(t.Context(), &lambda.InvokeInput{FunctionName: aws.String("broken")})
	want[*types.ResourceConflictException](t, err, "currently in the following state: Failed")
}

func TestStream(t *testing.T) {
	w := newWorld(t, nil)
	w.create("f")
	in := &lambda.InvokeWithResponseStreamInput{FunctionName: aws.String("f"), Payload: []byte(`{"a":1}`), LogType: types.LogTypeTail}
	read := func() (chunks []string, complete types.InvokeWithResponseStreamCompleteEvent, version string, err error) {
		out, err := w.client().InvokeWithResponseStream(t.Context(), in)
		if err != nil {
			return nil, complete, "", err
		}
		s := out.GetStream()
		defer s.Close()
		for e := range s.Events() {
			switch e := e.(type) {
			case *types.InvokeWithResponseStreamResponseEventMemberPayloadChunk:
				chunks = append(chunks, string(e.Value.Payload))
			case *types.InvokeWithResponseStreamResponseEventMemberInvokeComplete:
				complete = e.Value
			}
		}
		return chunks, complete, *out.ExecutedVersion, s.Err()
	}
	next := make(chan bool)
	w.answers(func(inv *blixard.Invocation, s blixard.ResponseSink) (blixard.InvocationReport, error) {
		if err := s.Begin(blixard.ResponseHead{Streaming: true}); err != nil {
			return blixard.InvocationReport{}, err
		}
		for _, part := range []string{"one", "two", "three"} {
			if _, err := io.WriteString(s, part); err != nil {
				return blixard.InvocationReport{}, err
			}
		}
		return blixard.InvocationReport{Log: []byte("a log")}, nil
	})
	chunks, complete, version, err := read()
	if err != nil || !slices.Equal(chunks, []string{"one", "two", "three"}) || complete.ErrorCode != nil || *complete.LogResult != "YSBsb2c=" || version != "$LATEST" {
		t.Errorf("%q, %+v, %s, %v", chunks, complete, version, err)
	}
	// Not streamed by the function: the same way, at its end.
	w.answers(echo)
	if chunks, _, _, err := read(); err != nil || !slices.Equal(chunks, []string{`{"a":1}`}) {
		t.Errorf("%q, %v", chunks, err)
	}
	// An error before anything was streamed.
	w.answers(func(_ *blixard.Invocation, s blixard.ResponseSink) (blixard.InvocationReport, error) {
		_, err := io.WriteString(s, `{"errorMessage":"no"}`)
		return blixard.InvocationReport{Error: &blixard.FunctionError{Kind: "Unhandled", Type: "X"}}, err
	})
	if chunks, complete, _, err := read(); err != nil || len(chunks) > 0 || *complete.ErrorCode != "Unhandled" || *complete.ErrorDetails != `{"errorMessage":"no"}` {
		t.Errorf("%q, %+v, %v", chunks, complete, err)
	}
	// A node that is lost in the midst of a stream.
	w.answers(func(_ *blixard.Invocation, s blixard.ResponseSink) (blixard.InvocationReport, error) {
		if err := s.Begin(blixard.ResponseHead{Streaming: true}); err != nil {
			return blixard.InvocationReport{}, err
		}
		if _, err := io.WriteString(s, "one"); err != nil {
			return blixard.InvocationReport{}, err
		}
		return blixard.InvocationReport{}, refusal(http.StatusBadGateway, "NodeLost")
	})
	if chunks, complete, _, err := read(); err != nil || len(chunks) != 1 || *complete.ErrorCode != "ServiceException" {
		t.Errorf("%q, %+v, %v", chunks, complete, err)
	}
	// Refused before it began.
	w.answers(func(*blixard.Invocation, blixard.ResponseSink) (blixard.InvocationReport, error) {
		return blixard.InvocationReport{}, refusal(http.StatusTooManyRequests, "ReservedFunctionConcurrentInvocationLimitExceeded")
	})
	_, _, _, err = read()
	if e := want[*types.TooManyRequestsException](t, err, "Rate Exceeded."); e.Reason != types.ThrottleReasonReservedFunctionConcurrentInvocationLimitExceeded {
		t.Errorf("reason %s", e.Reason)
	}
	// Chunks come as they are written, not at the end.
	w.answers(func(_ *blixard.Invocation, s blixard.ResponseSink) (blixard.InvocationReport, error) {
		if err := s.Begin(blixard.ResponseHead{Streaming: true}); err != nil {
			return blixard.InvocationReport{}, err
		}
		_, err := io.WriteString(s, "first")
		<-next
		return blixard.InvocationReport{}, err
	})
	out, err := w.client().InvokeWithResponseStream(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	if e, ok := (<-out.GetStream().Events()).(*types.InvokeWithResponseStreamResponseEventMemberPayloadChunk); !ok || string(e.Value.Payload) != "first" {
		t.Errorf("%+v", e)
	}
	close(next)
	out.GetStream().Close()
}

func TestInvoke(t *testing.T) {
	w := newWorld(t, nil)
	c, ctx := w.client(), t.Context()
	w.create("f")
	f := aws.String("f")
	var got *blixard.Invocation
	w.answers(func(inv *blixard.Invocation, s blixard.ResponseSink) (blixard.InvocationReport, error) {
		got = inv
		report, err := echo(inv, s)
		report.Log, report.Number = []byte(strings.Repeat("x", 5000)+"REPORT RequestId: "+inv.RequestID), 3
		report.Parts.Handler, report.Start = time.Millisecond, blixard.StartPooled
		return report, err
	})
	client := "eyJjdXN0b20iOnsiYSI6IjEifX0="
	out, err := c.Invoke(ctx, &lambda.InvokeInput{FunctionName: f, Payload: []byte(`{"k": [1, "ü"]}`), LogType: types.LogTypeTail, ClientContext: &client, Qualifier: aws.String("$LATEST")})
	if err != nil {
		t.Fatal(err)
	}
	if string(out.Payload) != `{"k": [1, "ü"]}` || out.StatusCode != 200 || *out.ExecutedVersion != "3" || out.FunctionError != nil {
		t.Errorf("%+v", out)
	}
	if log := decodeBase64(t, *out.LogResult); len(log) != 4096 || !strings.HasSuffix(log, "REPORT RequestId: "+got.RequestID) {
		t.Errorf("the log has %d bytes", len(log))
	}
	if got.ClientContext != client || !got.LogTail || got.Caller != w.key || got.Qualifier != "$LATEST" || !strings.HasPrefix(got.TraceID, "Root=1-") || got.Received.IsZero() {
		t.Errorf("invocation %+v", got)
	}
	if _, err := c.Invoke(ctx, &lambda.InvokeInput{FunctionName: f}); err != nil || string(got.Payload) != "{}" {
		t.Errorf("without payload: %q, %v", got.Payload, err)
	}

	// Errors of the function are answers.
	w.answers(func(_ *blixard.Invocation, s blixard.ResponseSink) (blixard.InvocationReport, error) {
		_, err := io.WriteString(s, `{"errorMessage":"RequestId: x Error: Task timed out after 1.00 seconds","errorType":"Sandbox.Timedout"}`)
		return blixard.InvocationReport{Error: &blixard.FunctionError{Kind: "Unhandled", Type: "Sandbox.Timedout"}}, err
	})
	out, err = c.Invoke(ctx, &lambda.InvokeInput{FunctionName: f})
	if err != nil || out.StatusCode != 200 || *out.FunctionError != "Unhandled" || !strings.Contains(string(out.Payload), "Task timed out") {
		t.Errorf("%+v, %v", out, err)
	}

	// An HTTP server's answer is a payload, too.
	w.answers(func(_ *blixard.Invocation, s blixard.ResponseSink) (blixard.InvocationReport, error) {
		err := s.Begin(blixard.ResponseHead{Status: 201, Headers: [][2]string{{"X-A", "1"}, {"x-a", "2"}, {"Set-Cookie", "c=1"}}, ContentType: "text/plain"})
		if err == nil {
			_, err = io.WriteString(s, "made")
		}
		return blixard.InvocationReport{}, err
	})
	out, err = c.Invoke(ctx, &lambda.InvokeInput{FunctionName: f})
	var answer map[string]any
	if err != nil || json.Unmarshal(out.Payload, &answer) != nil || fmt.Sprint(answer) != "map[body:made cookies:[c=1] headers:map[content-type:text/plain x-a:1,2] isBase64Encoded:false statusCode:201]" {
		t.Errorf("%s, %v", out.Payload, err)
	}

	// The other types.
	out, err = c.Invoke(ctx, &lambda.InvokeInput{FunctionName: f, InvocationType: types.InvocationTypeEvent, Payload: []byte(`"event"`), ClientContext: &client})
	if err != nil || out.StatusCode != 202 || len(out.Payload) != 0 || len(w.invoker.events) != 1 || string(w.invoker.events[0].Payload) != `"event"` || w.invoker.events[0].ClientContext != "" {
		t.Errorf("%+v, %v", out, err)
	}
	out, err = c.Invoke(ctx, &lambda.InvokeInput{FunctionName: f, InvocationType: types.InvocationTypeDryRun})
	if err != nil || out.StatusCode != 204 {
		t.Errorf("%+v, %v", out, err)
	}
	//lint:ignore SA1019 old clients use it
	old, err := c.InvokeAsync(ctx, &lambda.InvokeAsyncInput{FunctionName: f, InvokeArgs: strings.NewReader("{}")})
	if err != nil || old.Status != 202 || len(w.invoker.events) != 2 {
		t.Errorf("%+v, %v", old, err)
	}

	// Bad input.
	for name, x := range map[string]struct {
		in         lambda.InvokeInput
		code, says string
	}{
		"not json":     {lambda.InvokeInput{FunctionName: f, Payload: []byte("{")}, "InvalidRequestContentException", "Could not parse request body into json"},
		"too large":    {lambda.InvokeInput{FunctionName: f, Payload: []byte(strings.Repeat("1", 6<<20+1))}, "RequestTooLargeException", "6291457 byte payload is too large for the RequestResponse invocation type (limit 6291456 bytes)"},
		"large event":  {lambda.InvokeInput{FunctionName: f, Payload: []byte(strings.Repeat("1", 1<<20+1)), InvocationType: types.InvocationTypeEvent}, "RequestTooLargeException", "1048577 byte payload is too large for the Event invocation type (limit 1048576 bytes)"},
		"type":         {lambda.InvokeInput{FunctionName: f, InvocationType: "Sometimes"}, "ValidationException", "Value 'Sometimes' at 'invocationType' failed to satisfy constraint: Member must satisfy enum value set: [Event, RequestResponse, DryRun]"},
		"log type":     {lambda.InvokeInput{FunctionName: f, LogType: "Head"}, "ValidationException", "logType"},
		"context":      {lambda.InvokeInput{FunctionName: f, ClientContext: aws.String("???")}, "InvalidRequestContentException", "Client context must be a valid Base64-encoded JSON object."},
		"long context": {lambda.InvokeInput{FunctionName: f, ClientContext: aws.String(strings.Repeat("a", 3584))}, "InvalidParameterValueException", "3583"},
		"unknown":      {lambda.InvokeInput{FunctionName: aws.String("nobody")}, "ResourceNotFoundException", "Function not found: arn:aws:lambda:us-east-1:000000000000:function:nobody"},
		"version":      {lambda.InvokeInput{FunctionName: f, Qualifier: aws.String("7")}, "ResourceNotFoundException", "Function not found: arn:aws:lambda:us-east-1:000000000000:function:f:7"},
		"alias":        {lambda.InvokeInput{FunctionName: aws.String("f:live")}, "ResourceNotFoundException", "Function not found: arn:aws:lambda:us-east-1:000000000000:function:f:live"},
		"tenant":       {lambda.InvokeInput{FunctionName: f, TenantId: aws.String("a")}, "InvalidParameterValueException", "tenant"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Invoke(ctx, &x.in)
			wantCode(t, err, x.code, x.says)
		})
	}
	for _, x := range []struct {
		status       int
		reason, code string
	}{
		{429, "ConcurrentInvocationLimitExceeded", "TooManyRequestsException"},
		{413, "TooLarge", "RequestTooLargeException"},
		{409, "NotActive", "ResourceConflictException"},
		{502, "NodeLost", "ServiceException"},
		{504, "Timeout", "ServiceException"},
		{503, "Draining", "ServiceException"},
		{404, "NotFound", "ResourceNotFoundException"},
	} {
		w.answers(func(*blixard.Invocation, blixard.ResponseSink) (blixard.InvocationReport, error) {
			return blixard.InvocationReport{}, refusal(x.status, x.reason)
		})
		_, err := c.Invoke(ctx, &lambda.InvokeInput{FunctionName: f})
		wantCode(t, err, x.code, "")
	}
}
