package lambdaapi

import (
	"io"
	"net/http"
)

// For the tests of the corpus.

type Exception = exception

func WriteException(w http.ResponseWriter, e *Exception) { writeException(w, e) }

// Route is the name of the operation that a request asks for, with the arguments
// in its path and whether it is served.
func Route(r *http.Request) (name string, args map[string]string, served bool, err error) {
	op, args, err := route(r, r.URL.Query())
	if err != nil {
		return "", nil, false, err
	}
	return op.name, args, op.serve != nil, nil
}

// Operations are the names of all, with whether each is served.
func Operations() map[string]bool {
	out := map[string]bool{}
	for i := range operations {
		out[operations[i].name] = operations[i].serve != nil
	}
	return out
}

// Inputs makes the bodies that operations read.
func Inputs() map[string]any {
	return map[string]any{
		"AddPermission": &permissionInput{}, "CreateAlias": &aliasInput{}, "UpdateAlias": &aliasInput{}, "CreateFunction": &createFunctionInput{},
		"UpdateFunctionConfiguration": &configurationInput{}, "UpdateFunctionCode": &codeInput{}, "PublishVersion": &publishInput{},
		"PutFunctionConcurrency": &concurrencyInput{}, "PutFunctionEventInvokeConfig": &eventInvokeInput{}, "UpdateFunctionEventInvokeConfig": &eventInvokeInput{},
		"CreateFunctionUrlConfig": &urlInput{}, "UpdateFunctionUrlConfig": &urlInput{}, "TagResource": &tagsInput{},
	}
}

func TakeZip(r io.Reader, path []string, zip io.Writer) ([]byte, bool, error) {
	return takeZip(r, path, zip)
}
