package lambdaapi

import (
	"errors"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/state"
)

// codeSource is where the code of a version comes from. The zip itself was
// taken out of the body.
type codeSource struct {
	ZipFile      *string
	S3Bucket     string
	S3Key        string
	ImageUri     string
	SourceKMSKey string `json:"SourceKMSKeyArn"`
}

func (in *codeSource) check(c *call) error {
	switch {
	case in.ImageUri != "":
		return invalidParameter("Blixard does not know container images: send a zip in ZipFile")
	case in.S3Bucket != "" || in.S3Key != "":
		return invalidParameter("Blixard does not fetch code from S3: send a zip in ZipFile")
	case in.SourceKMSKey != "":
		return invalidParameter("Blixard does not know KMS keys: leave SourceKMSKeyArn empty")
	case c.zip == nil:
		return invalidParameter("Please provide a source for function code.")
	case c.zip.bytes == 0:
		return invalidParameter("Uploaded file must be a non-empty zip")
	}
	return nil
}

// store puts the uploaded zip into the code store.
func (c *call) store() (code.Package, error) {
	if _, err := c.zip.file.Seek(0, io.SeekStart); err != nil {
		return code.Package{}, err
	}
	p, err := c.s.opt.Code.Put(c.r.Context(), c.zip.file)
	if e, ok := errors.AsType[*blixard.Error](err); ok && e.Code == blixard.CodeInvalid {
		return p, invalidParameter("Could not unzip uploaded file. Please check your file, then try to upload again. (%s)", e.Error())
	}
	return p, err
}

// inspect refuses code that cannot run as the spec says. Code that came through
// another node and is not here yet is judged by who builds it.
func (c *call) inspect(digest string, spec *blixard.FunctionSpec) error {
	err := c.s.opt.Code.Inspect(c.r.Context(), digest, *spec)
	if err != nil && blixard.CodeOf(err) == blixard.CodeNotFound {
		return nil
	}
	return err
}

// architectures checks the member of that name.
func checkArchitectures(v *violations, list []string) error {
	if len(list) > 1 {
		v.add("architectures", quoted("["+strings.Join(list, ", ")+"]"), "Member must have length less than or equal to 1")
	}
	for _, a := range list {
		switch a {
		case "x86_64":
		case "arm64":
			return invalidParameter("The nodes of this cluster have the architecture x86_64; arm64 cannot run")
		default:
			v.enum("architectures", "["+a+"]", "x86_64", "arm64")
		}
	}
	return nil
}

type createFunctionInput struct {
	settings
	FunctionName  string
	Code          *codeSource
	Publish       bool
	PublishTo     string
	PackageType   string
	Architectures []string
	Tags          map[string]string
	TenancyConfig any
	CodeSigning   string `json:"CodeSigningConfigArn"`
}

func (c *call) createFunction() error {
	var in createFunctionInput
	if err := c.decode(&in); err != nil {
		return err
	}
	t, err := c.s.parseFunction(in.FunctionName, "")
	if err != nil {
		return err
	}
	var v violations
	if in.Code == nil {
		v.missing("code")
	}
	if in.Role == nil {
		v.missing("role")
	}
	v.oneOf("packageType", in.PackageType, "Zip", "Image")
	in.check(&v)
	if err := checkArchitectures(&v, in.Architectures); err != nil {
		return err
	}
	if err := v.err(); err != nil {
		return err
	}
	if t.qualifier != "" {
		return invalidParameter("A function is created without a qualifier")
	}
	if err := in.refusedHere(t.name, c); err != nil {
		return err
	}
	spec := blixard.FunctionSpec{TimeoutMS: 3000}
	if err := in.apply(&spec); err != nil {
		return err
	}
	tags, err := labels(in.Tags)
	if err != nil {
		return err
	}
	p, err := c.store()
	if err != nil {
		return err
	}
	if err := c.inspect(p.Digest, &spec); err != nil {
		return err
	}
	out, err := c.propose("create", &state.CreateFunction{Name: t.name, Spec: spec, CodeDigest: p.Digest, CodeBytes: p.Bytes, Tags: tags, Publish: in.Publish})
	if err != nil {
		return c.functionError(err, t)
	}
	return c.answerVersion(http.StatusCreated, t.name, int(out.Value), in.Publish)
}

// refusedHere tells of what only CreateFunction has.
func (in *createFunctionInput) refusedHere(name blixard.FunctionName, c *call) error {
	switch {
	case in.PackageType == "Image":
		return invalidParameter("Blixard does not know container images: use the package type Zip")
	case in.Runtime == nil || *in.Runtime == "" || in.Handler == nil && blixard.RuntimeKind(*in.Runtime) == "bootstrap":
		return invalidParameter("Runtime and Handler are mandatory parameters for functions created with deployment packages.")
	case given(in.TenancyConfig):
		return invalidParameter("Blixard does not know tenants: leave TenancyConfig empty")
	case in.PublishTo != "":
		return invalidParameter("Blixard does not know PublishTo: use Publish")
	case in.CodeSigning != "":
		return invalidParameter("Blixard does not know code signing: %s", signingHint)
	}
	if err := in.refused(name); err != nil {
		return err
	}
	return in.Code.check(c)
}

// functionError puts a refusal of the state into the API's words.
func (c *call) functionError(err error, t target) error {
	e, ok := errors.AsType[*blixard.Error](err)
	if !ok {
		return err
	}
	switch {
	case e.Code == blixard.CodeConflict && e.Field == "revision":
		return refuse("PreconditionFailedException", "%s", e.Message)
	case e.Code == blixard.CodeConflict && (e.Field == "state" || e.Field == "deleting"):
		return refuse("ResourceConflictException", "The operation cannot be performed at this time. An update is in progress for resource: %s", c.s.arn(t.name, ""))
	case e.Code == blixard.CodeNotFound && (e.Field == "" || e.Field == "version"):
		return c.s.notFound(t)
	case e.Code == blixard.CodeNotFound && e.Field == "alias":
		return refuse("ResourceNotFoundException", "Cannot find alias arn: %s", c.s.arn(t.name, t.qualifier))
	case e.Code == blixard.CodeExists && e.Field == "":
		return refuse("ResourceConflictException", "Function already exist: %s", t.name)
	}
	return err
}

// answerVersion shows a version after a change; qualified says whether its ARN
// ends with its number.
func (c *call) answerVersion(status int, name blixard.FunctionName, number int, qualified bool) error {
	view, err := c.view()
	if err != nil {
		return err
	}
	fv := view.FunctionVersion(name, number)
	if fv == nil {
		return c.s.notFound(target{name: name})
	}
	qualifier := ""
	if qualified {
		qualifier = blixard.VersionName(number)
	}
	return c.answer(status, c.s.configuration(fv, qualifier))
}

// functionTarget is the function of the path with the qualifier of the query.
func (c *call) functionTarget() (target, error) {
	return c.s.parseFunction(c.args["f"], c.query.Get("Qualifier"))
}

// bareTarget is the function of the path, where a qualifier has no sense.
func (c *call) bareTarget() (target, error) { return c.s.parseFunction(c.args["f"], "") }

// found is functionTarget with what the view has of it.
func (c *call) found() (target, *blixard.Function, *blixard.FunctionVersion, error) {
	t, err := c.functionTarget()
	if err != nil {
		return t, nil, nil, err
	}
	view, err := c.view()
	if err != nil {
		return t, nil, nil, err
	}
	f, fv, err := c.s.find(view, t)
	return t, f, fv, err
}

type concurrency struct{ ReservedConcurrentExecutions int }

func (c *call) getFunction() error {
	t, f, fv, err := c.found()
	if err != nil {
		return err
	}
	out := struct {
		Configuration *functionConfiguration
		Code          struct{ RepositoryType, Location string }
		Tags          map[string]string `json:",omitempty"`
		Concurrency   *concurrency      `json:",omitempty"`
	}{Configuration: c.s.configuration(fv, t.qualifier), Tags: tagMap(f.Tags)}
	out.Code.RepositoryType, out.Code.Location = "S3", c.codeLink(fv.CodeDigest)
	if f.Reserved {
		out.Concurrency = &concurrency{ReservedConcurrentExecutions: f.MaxConcurrent}
	}
	return c.answer(http.StatusOK, out)
}

func (c *call) getFunctionConfiguration() error {
	t, _, fv, err := c.found()
	if err != nil {
		return err
	}
	return c.answer(http.StatusOK, c.s.configuration(fv, t.qualifier))
}

func (c *call) deleteFunction() error {
	t, f, _, err := c.found()
	if err != nil {
		return err
	}
	number, ok := blixard.ParseVersion(t.qualifier)
	switch {
	case !ok:
		return invalidParameter("Deletion of aliases is not currently supported.")
	case t.qualifier == blixard.Latest:
		return invalidParameter("$LATEST version cannot be deleted without deleting the function.")
	}
	if _, err := c.propose("delete", &state.DeleteFunction{Name: f.Name, Number: number}); err != nil {
		return c.functionError(err, t)
	}
	return c.answer(http.StatusNoContent, nil)
}

type configurationInput struct {
	settings
	RevisionId string
}

func (c *call) updateFunctionConfiguration() error {
	t, err := c.bareTarget()
	if err != nil {
		return err
	}
	var in configurationInput
	if err := c.decode(&in); err != nil {
		return err
	}
	var v violations
	in.check(&v)
	if err := v.err(); err != nil {
		return err
	}
	if err := in.refused(t.name); err != nil {
		return err
	}
	view, err := c.view()
	if err != nil {
		return err
	}
	_, latest, err := c.s.find(view, target{name: t.name})
	if err != nil {
		return err
	}
	spec := latest.Spec
	if err := in.apply(&spec); err != nil {
		return err
	}
	if err := c.inspect(latest.CodeDigest, &spec); err != nil {
		return err
	}
	// The change is made of what was read: of nothing else.
	revision := in.RevisionId
	if revision == "" {
		if reflect.DeepEqual(spec, latest.Spec) { // all is as wanted, perhaps since this request came before
			return c.answer(http.StatusOK, c.s.configuration(latest, ""))
		}
		revision = latest.RevisionID
	}
	if _, err := c.propose("configure@"+revision, &state.UpdateFunction{Name: t.name, Spec: &spec, Revision: revision}); err != nil {
		return c.functionError(err, t)
	}
	return c.answerVersion(http.StatusOK, t.name, 0, false)
}

type codeInput struct {
	codeSource
	Publish       bool
	PublishTo     string
	DryRun        bool
	RevisionId    string
	Architectures []string
}

func (c *call) updateFunctionCode() error {
	t, err := c.bareTarget()
	if err != nil {
		return err
	}
	var in codeInput
	if err := c.decode(&in); err != nil {
		return err
	}
	var v violations
	if err := checkArchitectures(&v, in.Architectures); err != nil {
		return err
	}
	if err := v.err(); err != nil {
		return err
	}
	if in.PublishTo != "" {
		return invalidParameter("Blixard does not know PublishTo: use Publish")
	}
	view, err := c.view()
	if err != nil {
		return err
	}
	_, latest, err := c.s.find(view, target{name: t.name})
	if err != nil {
		return err
	}
	if err := in.check(c); err != nil {
		return err
	}
	p, err := c.store()
	if err != nil {
		return err
	}
	if err := c.inspect(p.Digest, &latest.Spec); err != nil {
		return err
	}
	command := &state.UpdateFunction{Name: t.name, CodeDigest: p.Digest, CodeBytes: p.Bytes, Revision: in.RevisionId, Publish: in.Publish}
	if in.DryRun {
		if r := view.Try(state.Envelope{NowMS: c.now.UnixMilli(), Command: command}); r.Err != nil {
			return c.functionError(r.Err, t)
		}
		would := *latest
		would.CodeDigest, would.CodeBytes = p.Digest, p.Bytes
		return c.answer(http.StatusOK, c.s.configuration(&would, ""))
	}
	out, err := c.propose("code", command)
	if err != nil {
		return c.functionError(err, t)
	}
	return c.answerVersion(http.StatusOK, t.name, int(out.Value), in.Publish)
}

func (c *call) listFunctions() error {
	page, err := c.page(10_000)
	if err != nil {
		return err
	}
	all := c.query.Get("FunctionVersion")
	var v violations
	v.oneOf("functionVersion", all, "ALL")
	if err := v.err(); err != nil {
		return err
	}
	view, err := c.view()
	if err != nil {
		return err
	}
	var out struct {
		Functions  []*functionConfiguration
		NextMarker string `json:",omitempty"`
	}
	out.Functions = []*functionConfiguration{}
	view.FunctionsFrom(blixard.FunctionName(page.firstPart()), func(f *blixard.Function) bool {
		if f.Deleting {
			return true
		}
		if all == "" {
			return page.add(string(f.Name), func() {
				out.Functions = append(out.Functions, c.s.configuration(view.FunctionVersion(f.Name, 0), "").listed())
			})
		}
		more := true
		view.FunctionVersions(f.Name, func(fv *blixard.FunctionVersion) bool {
			more = page.add(string(f.Name)+":"+sortable(fv.Number), func() {
				out.Functions = append(out.Functions, c.s.configuration(fv, blixard.VersionName(fv.Number)).listed())
			})
			return more
		})
		return more
	})
	out.NextMarker = page.next()
	return c.answer(http.StatusOK, out)
}

// labels puts a map of tags into the form of the state.
func labels(tags map[string]string) ([]blixard.Label, error) {
	out := make([]blixard.Label, 0, len(tags))
	for key, value := range tags {
		if key == "" || len(key) > 128 || len(value) > 256 || strings.HasPrefix(key, "aws:") {
			return nil, invalidParameter("The tag key %.130q or its value is not usable", key)
		}
		out = append(out, blixard.Label{Key: key, Value: value})
	}
	slices.SortFunc(out, func(a, b blixard.Label) int { return strings.Compare(a.Key, b.Key) })
	return out, nil
}

func tagMap(tags []blixard.Label) map[string]string {
	out := make(map[string]string, len(tags))
	for _, t := range tags {
		out[t.Key] = t.Value
	}
	return out
}
