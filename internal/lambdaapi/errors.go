package lambdaapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/accesskey"
)

// exception is an error as clients of the Lambda API know it: the type decides
// which class their SDK makes of it.
type exception struct {
	Type       string
	Message    string
	Reason     string // of throttling
	RetryAfter int    // seconds; 0: the client's own timetable
	status     int    // 0: the table's
}

func (e *exception) Error() string { return e.Type + ": " + e.Message }

// form is how an exception travels: its status, and how its message's key is
// written, which differs for no reason that a client could guess.
type form struct {
	status int
	upper  bool // "Message", not "message"
}

// forms are those of the service's model, and of what stands in front of it.
var forms = map[string]form{
	"AliasLimitExceededException":                               {400, false},
	"CallbackTimeoutException":                                  {400, true},
	"CapacityProviderLimitExceededException":                    {400, false},
	"CodeArtifactUserDeletedException":                          {409, false},
	"CodeArtifactUserFailedException":                           {409, false},
	"CodeArtifactUserPendingException":                          {409, false},
	"CodeSigningConfigNotFoundException":                        {404, true},
	"CodeStorageExceededException":                              {400, false},
	"CodeVerificationFailedException":                           {400, true},
	"DurableExecutionAlreadyStartedException":                   {409, true},
	"EC2AccessDeniedException":                                  {502, true},
	"EC2ThrottledException":                                     {502, true},
	"EC2UnexpectedException":                                    {502, true},
	"EFSIOException":                                            {410, true},
	"EFSMountConnectivityException":                             {408, true},
	"EFSMountFailureException":                                  {403, true},
	"EFSMountTimeoutException":                                  {408, true},
	"ENILimitReachedException":                                  {502, true},
	"ENINotReadyException":                                      {502, true},
	"FunctionVersionsPerCapacityProviderLimitExceededException": {400, false},
	"InvalidCodeSignatureException":                             {400, true},
	"InvalidParameterValueException":                            {400, false},
	"InvalidRequestContentException":                            {400, false},
	"InvalidRuntimeException":                                   {502, true},
	"InvalidSecurityGroupIDException":                           {502, true},
	"InvalidSubnetIDException":                                  {502, true},
	"InvalidZipFileException":                                   {502, true},
	"KMSAccessDeniedException":                                  {502, true},
	"KMSDisabledException":                                      {502, true},
	"KMSInvalidStateException":                                  {502, true},
	"KMSNotFoundException":                                      {502, true},
	"ModeNotSupportedException":                                 {400, false},
	"NoPublishedVersionException":                               {400, true},
	"PolicyLengthExceededException":                             {400, false},
	"PreconditionFailedException":                               {412, false},
	"ProvisionedConcurrencyConfigNotFoundException":             {404, false},
	"PublicPolicyException":                                     {400, true},
	"RecursiveInvocationException":                              {400, true},
	"RequestTooLargeException":                                  {413, false},
	"ResourceConflictException":                                 {409, false},
	"ResourceInUseException":                                    {400, true},
	"ResourceNotFoundException":                                 {404, true},
	"ResourceNotReadyException":                                 {502, false},
	"S3FilesMountConnectivityException":                         {408, true},
	"S3FilesMountFailureException":                              {403, true},
	"S3FilesMountTimeoutException":                              {408, true},
	"SerializedRequestEntityTooLargeException":                  {413, false},
	"ServiceException":                                          {500, true},
	"ServiceQuotaExceededException":                             {402, true},
	"SnapStartException":                                        {400, true},
	"SnapStartNotReadyException":                                {409, true},
	"SnapStartRegenerationFailureException":                     {409, true},
	"SnapStartTimeoutException":                                 {408, true},
	"SubnetIPAddressLimitReachedException":                      {502, true},
	"TooManyRequestsException":                                  {429, false},
	"UnsupportedMediaTypeException":                             {415, false},
	// In front of the service.
	"AccessDeniedException":               {403, true},
	"ExpiredTokenException":               {403, false},
	"IncompleteSignatureException":        {400, false},
	"InvalidSignatureException":           {403, false},
	"MissingAuthenticationTokenException": {403, false},
	"RequestEntityTooLargeException":      {413, false},
	"SerializationException":              {400, false},
	"UnknownOperationException":           {404, false},
	"UnrecognizedClientException":         {403, false},
	"UnsupportedOperationException":       {501, false},
	"ValidationException":                 {400, false},
}

// refuse makes an exception of the table.
func refuse(kind, message string, args ...any) *exception {
	return &exception{Type: kind, Message: fmt.Sprintf(message, args...)}
}

func invalidParameter(message string, args ...any) *exception {
	return refuse("InvalidParameterValueException", message, args...)
}

// throttled is a refusal for a limit; reason is one of the API's words, or "".
func throttled(reason string) *exception {
	return &exception{Type: "TooManyRequestsException", Message: "Rate Exceeded.", Reason: reason, RetryAfter: 1}
}

// asException finds what a client is told of an error.
func asException(err error) *exception {
	if e, ok := errors.AsType[*exception](err); ok {
		return e
	}
	if d, ok := errors.AsType[*accesskey.Denial](err); ok {
		return &exception{Type: d.Type, Message: d.Message, status: d.Status}
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return refuse("RequestTooLargeException", "The request is larger than this operation takes")
	}
	text := err.Error()
	if e, ok := errors.AsType[*blixard.Error](err); ok {
		text = e.Error()
	}
	switch blixard.CodeOf(err) {
	case blixard.CodeInvalid:
		return invalidParameter("%s", text)
	case blixard.CodeNotFound:
		return refuse("ResourceNotFoundException", "%s", text)
	case blixard.CodeExists, blixard.CodeConflict, blixard.CodeRefused, blixard.CodeGone:
		return refuse("ResourceConflictException", "%s", text)
	case blixard.CodeOverloaded:
		e := throttled("")
		e.Message = text
		return e
	case blixard.CodeDenied:
		return refuse("AccessDeniedException", "%s", text)
	case blixard.CodeUnavailable:
		return &exception{Type: "ServiceException", Message: text, status: http.StatusServiceUnavailable}
	default:
		// What it was stands in the log, under the request's ID.
		return refuse("ServiceException", "An error occurred and the request cannot be processed.")
	}
}

// writeException answers with an error.
func writeException(w http.ResponseWriter, e *exception) {
	f, ok := forms[e.Type]
	if !ok {
		f = form{status: http.StatusInternalServerError, upper: true}
	}
	status := f.status
	if e.status != 0 {
		status = e.status
	}
	blame := "User"
	if status >= 500 {
		blame = "Server"
	}
	body := map[string]string{"Type": blame}
	if key := "message"; f.upper {
		body["Message"] = e.Message
	} else {
		body[key] = e.Message
	}
	if e.Reason != "" {
		body["Reason"] = e.Reason
	}
	h := w.Header()
	if e.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(e.RetryAfter))
	}
	h.Set("X-Amzn-Errortype", e.Type)
	h.Set("Content-Type", "application/json")
	data, err := json.Marshal(body)
	if err != nil {
		data = []byte("{}") // strings always marshal
	}
	h.Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(status)
	//nolint:errcheck // the client has gone; there is nobody to tell
	w.Write(data)
}

// fieldOf is what a refusal is about.
func fieldOf(err error) string {
	if e, ok := errors.AsType[*blixard.Error](err); ok {
		return e.Field
	}
	return ""
}
