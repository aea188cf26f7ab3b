package lambdaapi

import (
	"net/http"
	"net/url"
	"strings"
)

// operation is one row of the API.
type operation struct {
	name   string
	method string
	path   string // segments in braces are arguments
	query  string // "name=value" that must be there, to tell it from its neighbour
	// serve does it; nil when refusal says why not.
	serve   func(*call) error
	refusal string

	invokes bool     // its body is a payload, and keys for invoking allow it
	zip     []string // where in its body a zip may stand
}

// The dates of the API's parts.
const (
	fn = "/2015-03-31/functions"
	fv = fn + "/{f}"
)

// operations are all of the service's, in the order of its subjects.
var operations = []operation{
	{name: "CreateFunction", method: "POST", path: fn, serve: (*call).createFunction, zip: []string{"Code", "ZipFile"}},
	{name: "ListFunctions", method: "GET", path: fn, serve: (*call).listFunctions},
	{name: "GetFunction", method: "GET", path: fv, serve: (*call).getFunction},
	{name: "DeleteFunction", method: "DELETE", path: fv, serve: (*call).deleteFunction},
	{name: "GetFunctionConfiguration", method: "GET", path: fv + "/configuration", serve: (*call).getFunctionConfiguration},
	{name: "UpdateFunctionConfiguration", method: "PUT", path: fv + "/configuration", serve: (*call).updateFunctionConfiguration},
	{name: "UpdateFunctionCode", method: "PUT", path: fv + "/code", serve: (*call).updateFunctionCode, zip: []string{"ZipFile"}},

	{name: "PublishVersion", method: "POST", path: fv + "/versions", serve: (*call).publishVersion},
	{name: "ListVersionsByFunction", method: "GET", path: fv + "/versions", serve: (*call).listVersions},
	{name: "CreateAlias", method: "POST", path: fv + "/aliases", serve: (*call).createAlias},
	{name: "ListAliases", method: "GET", path: fv + "/aliases", serve: (*call).listAliases},
	{name: "GetAlias", method: "GET", path: fv + "/aliases/{a}", serve: (*call).getAlias},
	{name: "UpdateAlias", method: "PUT", path: fv + "/aliases/{a}", serve: (*call).updateAlias},
	{name: "DeleteAlias", method: "DELETE", path: fv + "/aliases/{a}", serve: (*call).deleteAlias},

	{name: "AddPermission", method: "POST", path: fv + "/policy", serve: (*call).addPermission},
	{name: "GetPolicy", method: "GET", path: fv + "/policy", serve: (*call).getPolicy},
	{name: "RemovePermission", method: "DELETE", path: fv + "/policy/{s}", serve: (*call).removePermission},

	{name: "Invoke", method: "POST", path: fv + "/invocations", serve: (*call).invoke, invokes: true},
	{name: "InvokeWithResponseStream", method: "POST", path: "/2021-11-15/functions/{f}/response-streaming-invocations", serve: (*call).invokeStream, invokes: true},
	{name: "InvokeAsync", method: "POST", path: "/2014-11-13/functions/{f}/invoke-async", serve: (*call).invokeAsync, invokes: true},

	{name: "PutFunctionConcurrency", method: "PUT", path: "/2017-10-31/functions/{f}/concurrency", serve: (*call).putConcurrency},
	{name: "GetFunctionConcurrency", method: "GET", path: "/2019-09-30/functions/{f}/concurrency", serve: (*call).getConcurrency},
	{name: "DeleteFunctionConcurrency", method: "DELETE", path: "/2017-10-31/functions/{f}/concurrency", serve: (*call).deleteConcurrency},
	{name: "ListProvisionedConcurrencyConfigs", method: "GET", path: "/2019-09-30/functions/{f}/provisioned-concurrency", query: "List=ALL", serve: (*call).listProvisioned},
	{name: "GetProvisionedConcurrencyConfig", method: "GET", path: "/2019-09-30/functions/{f}/provisioned-concurrency", serve: (*call).getProvisioned},
	{name: "PutProvisionedConcurrencyConfig", method: "PUT", path: "/2019-09-30/functions/{f}/provisioned-concurrency", refusal: provisionedHint},
	{name: "DeleteProvisionedConcurrencyConfig", method: "DELETE", path: "/2019-09-30/functions/{f}/provisioned-concurrency", serve: (*call).deleteProvisioned},

	{name: "PutFunctionEventInvokeConfig", method: "PUT", path: "/2019-09-25/functions/{f}/event-invoke-config", serve: (*call).putEventInvokeConfig},
	{name: "UpdateFunctionEventInvokeConfig", method: "POST", path: "/2019-09-25/functions/{f}/event-invoke-config", serve: (*call).updateEventInvokeConfig},
	{name: "GetFunctionEventInvokeConfig", method: "GET", path: "/2019-09-25/functions/{f}/event-invoke-config", serve: (*call).getEventInvokeConfig},
	{name: "DeleteFunctionEventInvokeConfig", method: "DELETE", path: "/2019-09-25/functions/{f}/event-invoke-config", serve: (*call).deleteEventInvokeConfig},
	{name: "ListFunctionEventInvokeConfigs", method: "GET", path: "/2019-09-25/functions/{f}/event-invoke-config/list", serve: (*call).listEventInvokeConfigs},

	{name: "CreateFunctionUrlConfig", method: "POST", path: "/2021-10-31/functions/{f}/url", serve: (*call).createURL},
	{name: "GetFunctionUrlConfig", method: "GET", path: "/2021-10-31/functions/{f}/url", serve: (*call).getURL},
	{name: "UpdateFunctionUrlConfig", method: "PUT", path: "/2021-10-31/functions/{f}/url", serve: (*call).updateURL},
	{name: "DeleteFunctionUrlConfig", method: "DELETE", path: "/2021-10-31/functions/{f}/url", serve: (*call).deleteURL},
	{name: "ListFunctionUrlConfigs", method: "GET", path: "/2021-10-31/functions/{f}/urls", serve: (*call).listURLs},

	{name: "TagResource", method: "POST", path: "/2017-03-31/tags/{arn}", serve: (*call).tagResource},
	{name: "ListTags", method: "GET", path: "/2017-03-31/tags/{arn}", serve: (*call).listTags},
	{name: "UntagResource", method: "DELETE", path: "/2017-03-31/tags/{arn}", serve: (*call).untagResource},
	{name: "GetAccountSettings", method: "GET", path: "/2016-08-19/account-settings", serve: (*call).getAccountSettings},

	// What tools ask for on their way, and what is true of every function here.
	{name: "GetFunctionCodeSigningConfig", method: "GET", path: "/2020-06-30/functions/{f}/code-signing-config", serve: (*call).getCodeSigning},
	{name: "GetFunctionRecursionConfig", method: "GET", path: "/2024-08-31/functions/{f}/recursion-config", serve: (*call).getRecursion},
	{name: "GetRuntimeManagementConfig", method: "GET", path: "/2021-07-20/functions/{f}/runtime-management-config", serve: (*call).getRuntimeManagement},
	{name: "ListEventSourceMappings", method: "GET", path: "/2015-03-31/event-source-mappings", serve: listNothing("EventSourceMappings")},
	{name: "GetEventSourceMapping", method: "GET", path: "/2015-03-31/event-source-mappings/{uuid}", serve: (*call).noMapping},
	{name: "ListLayers", method: "GET", path: "/2018-10-31/layers", serve: listNothing("Layers")},
	{name: "ListLayerVersions", method: "GET", path: "/2018-10-31/layers/{l}/versions", serve: listNothing("LayerVersions")},
	{name: "ListCodeSigningConfigs", method: "GET", path: "/2020-04-22/code-signing-configs", serve: listNothing("CodeSigningConfigs")},

	// Refused.
	{name: "CreateEventSourceMapping", method: "POST", path: "/2015-03-31/event-source-mappings", refusal: mappingsHint},
	{name: "UpdateEventSourceMapping", method: "PUT", path: "/2015-03-31/event-source-mappings/{uuid}", serve: (*call).noMapping},
	{name: "DeleteEventSourceMapping", method: "DELETE", path: "/2015-03-31/event-source-mappings/{uuid}", serve: (*call).noMapping},
	{name: "GetLayerVersionByArn", method: "GET", path: "/2018-10-31/layers", query: "find=LayerVersion", refusal: layersHint},
	{name: "PublishLayerVersion", method: "POST", path: "/2018-10-31/layers/{l}/versions", refusal: layersHint},
	{name: "GetLayerVersion", method: "GET", path: "/2018-10-31/layers/{l}/versions/{n}", refusal: layersHint},
	{name: "DeleteLayerVersion", method: "DELETE", path: "/2018-10-31/layers/{l}/versions/{n}", refusal: layersHint},
	{name: "AddLayerVersionPermission", method: "POST", path: "/2018-10-31/layers/{l}/versions/{n}/policy", refusal: layersHint},
	{name: "GetLayerVersionPolicy", method: "GET", path: "/2018-10-31/layers/{l}/versions/{n}/policy", refusal: layersHint},
	{name: "RemoveLayerVersionPermission", method: "DELETE", path: "/2018-10-31/layers/{l}/versions/{n}/policy/{s}", refusal: layersHint},
	{name: "CreateCodeSigningConfig", method: "POST", path: "/2020-04-22/code-signing-configs", refusal: signingHint},
	{name: "GetCodeSigningConfig", method: "GET", path: "/2020-04-22/code-signing-configs/{c}", refusal: signingHint},
	{name: "UpdateCodeSigningConfig", method: "PUT", path: "/2020-04-22/code-signing-configs/{c}", refusal: signingHint},
	{name: "DeleteCodeSigningConfig", method: "DELETE", path: "/2020-04-22/code-signing-configs/{c}", refusal: signingHint},
	{name: "ListFunctionsByCodeSigningConfig", method: "GET", path: "/2020-04-22/code-signing-configs/{c}/functions", refusal: signingHint},
	{name: "PutFunctionCodeSigningConfig", method: "PUT", path: "/2020-06-30/functions/{f}/code-signing-config", refusal: signingHint},
	{name: "DeleteFunctionCodeSigningConfig", method: "DELETE", path: "/2020-06-30/functions/{f}/code-signing-config", refusal: signingHint},
	{name: "PutRuntimeManagementConfig", method: "PUT", path: "/2021-07-20/functions/{f}/runtime-management-config", refusal: "runtimes come with the release of Blixard"},
	{name: "PutFunctionRecursionConfig", method: "PUT", path: "/2024-08-31/functions/{f}/recursion-config", refusal: "chains of functions end after 16 calls, always"},
	{name: "GetFunctionScalingConfig", method: "GET", path: "/2025-11-30/functions/{f}/function-scaling-config", refusal: providersHint},
	{name: "PutFunctionScalingConfig", method: "PUT", path: "/2025-11-30/functions/{f}/function-scaling-config", refusal: providersHint},
	{name: "CreateCapacityProvider", method: "POST", path: "/2025-11-30/capacity-providers", refusal: providersHint},
	{name: "ListCapacityProviders", method: "GET", path: "/2025-11-30/capacity-providers", refusal: providersHint},
	{name: "GetCapacityProvider", method: "GET", path: "/2025-11-30/capacity-providers/{p}", refusal: providersHint},
	{name: "UpdateCapacityProvider", method: "PUT", path: "/2025-11-30/capacity-providers/{p}", refusal: providersHint},
	{name: "DeleteCapacityProvider", method: "DELETE", path: "/2025-11-30/capacity-providers/{p}", refusal: providersHint},
	{name: "ListFunctionVersionsByCapacityProvider", method: "GET", path: "/2025-11-30/capacity-providers/{p}/function-versions", refusal: providersHint},
	{name: "GetResourcePolicy", method: "GET", path: "/2026-07-09/resource-policy/{arn}", refusal: policyHint},
	{name: "PutResourcePolicy", method: "PUT", path: "/2026-07-09/resource-policy/{arn}", refusal: policyHint},
	{name: "DeleteResourcePolicy", method: "DELETE", path: "/2026-07-09/resource-policy/{arn}", refusal: policyHint},
	{name: "ListDurableExecutionsByFunction", method: "GET", path: "/2025-12-01/functions/{f}/durable-executions", refusal: durableHint},
	{name: "GetDurableExecution", method: "GET", path: "/2025-12-01/durable-executions/{d}", refusal: durableHint},
	{name: "GetDurableExecutionHistory", method: "GET", path: "/2025-12-01/durable-executions/{d}/history", refusal: durableHint},
	{name: "GetDurableExecutionState", method: "GET", path: "/2025-12-01/durable-executions/{d}/state", refusal: durableHint},
	{name: "CheckpointDurableExecution", method: "POST", path: "/2025-12-01/durable-executions/{d}/checkpoint", refusal: durableHint},
	{name: "StopDurableExecution", method: "POST", path: "/2025-12-01/durable-executions/{d}/stop", refusal: durableHint},
	{name: "SendDurableExecutionCallbackSuccess", method: "POST", path: "/2025-12-01/durable-execution-callbacks/{d}/succeed", refusal: durableHint},
	{name: "SendDurableExecutionCallbackFailure", method: "POST", path: "/2025-12-01/durable-execution-callbacks/{d}/fail", refusal: durableHint},
	{name: "SendDurableExecutionCallbackHeartbeat", method: "POST", path: "/2025-12-01/durable-execution-callbacks/{d}/heartbeat", refusal: durableHint},
}

// What to do instead.
const (
	mappingsHint    = "there are no event source mappings; call the function from the source's side, by Invoke with the type Event or by an HTTP trigger"
	layersHint      = "there are no layers; put what the code needs into its zip"
	signingHint     = "code is not signed; it is addressed by its SHA-256"
	providersHint   = "there are no capacity providers; where functions run is said by `blixard function update --constraint`"
	policyHint      = "use AddPermission, GetPolicy and RemovePermission"
	durableHint     = "there are no durable executions"
	provisionedHint = "instances are kept warm with `blixard function update --min-instances`"
)

// route finds the operation that a request asks for, and the arguments in its
// path.
func route(r *http.Request, query url.Values) (*operation, map[string]string, error) {
	segments := strings.Split(strings.TrimSuffix(r.URL.EscapedPath(), "/"), "/")
	for i := range segments {
		plain, err := url.PathUnescape(segments[i])
		if err != nil {
			return nil, nil, refuse("SerializationException", "The path is malformed.")
		}
		segments[i] = plain
	}
	var found *operation
	var args map[string]string
	for i := range operations {
		op := &operations[i]
		if op.method != r.Method || found != nil && op.query == "" {
			continue
		}
		if op.query != "" {
			if name, value, _ := strings.Cut(op.query, "="); query.Get(name) != value {
				continue
			}
		}
		if a, ok := match(op.path, segments); ok {
			found, args = op, a
		}
	}
	if found == nil {
		return nil, nil, refuse("UnknownOperationException", "There is no operation %s %.200s", r.Method, r.URL.EscapedPath())
	}
	return found, args, nil
}

// match compares a path with the segments of a request's.
func match(path string, segments []string) (map[string]string, bool) {
	var args map[string]string
	at := 0
	for part := range strings.SplitSeq(path, "/") {
		if at == len(segments) {
			return nil, false
		}
		have := segments[at]
		at++
		if !strings.HasPrefix(part, "{") {
			if part != have {
				return nil, false
			}
			continue
		}
		if have == "" {
			return nil, false
		}
		if args == nil {
			args = make(map[string]string, 2)
		}
		args[strings.Trim(part, "{}")] = have
	}
	return args, at == len(segments)
}
