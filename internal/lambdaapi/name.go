package lambdaapi

import (
	"regexp"
	"strings"

	"github.com/blixard/blixard"
)

// The patterns are those of the service's model. Clients see them in messages.
const (
	functionPattern  = `(arn:(aws[a-zA-Z-]*)?:lambda:)?([a-z]{2}(-gov)?-[a-z]+-\d{1}:)?(\d{12}:)?(function:)?([a-zA-Z0-9-_]+)(:(\$LATEST|[a-zA-Z0-9-_]+))?`
	qualifierPattern = `(|[a-zA-Z0-9$_-]+)`
	aliasPattern     = `(?!^[0-9]+$)([a-zA-Z0-9-_]+)`
	rolePattern      = `arn:(aws[a-zA-Z-]*)?:iam::\d{12}:role/?[a-zA-Z_0-9+=,.@\-_/]+`
	sidPattern       = `([a-zA-Z0-9-_]+)`
	versionPattern   = `(\$LATEST|[0-9]+)`
)

// Bounds of names.
const (
	maxName      = 64
	maxARN       = 140
	maxQualifier = 128
)

var roleForm = regexp.MustCompile(`^(?:` + rolePattern + `)$`)

// target is the function that a request is about.
type target struct {
	name      blixard.FunctionName
	qualifier string // as given, in the name or beside it; "" for none
}

// parseFunction reads {f} of a path: a name, part of an ARN or a whole one, each
// with or without a qualifier. qualifier is the one given beside it.
func (s *Server) parseFunction(given, qualifier string) (target, error) {
	var v violations
	if given == "" || len(given) > maxARN {
		v.length("functionName", given, 1, maxARN)
	}
	name, q, err := s.splitFunction(given, &v)
	if err != nil {
		return target{}, err
	}
	if len(name) > maxName {
		v.length("functionName", name, 1, maxName)
	}
	if len(qualifier) > maxQualifier {
		v.length("qualifier", qualifier, 1, maxQualifier)
	} else if strings.Trim(qualifier, nameLetters+"$") != "" {
		v.pattern("qualifier", qualifier, qualifierPattern)
	}
	if err := v.err(); err != nil {
		return target{}, err
	}
	if q != "" && qualifier != "" && q != qualifier {
		return target{}, invalidParameter("The derived qualifier from the function name does not match the specified qualifier.")
	}
	if q == "" {
		q = qualifier
	}
	return target{name: blixard.FunctionName(name), qualifier: q}, nil
}

const nameLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"

// splitFunction takes the forms of {f} apart. What belongs to another region or
// account is not here.
func (s *Server) splitFunction(given string, v *violations) (name, qualifier string, err error) {
	parts := strings.Split(given, ":")
	switch {
	case parts[0] == "arn": // arn:aws:lambda:region:account:function:name[:qualifier]
		if len(parts) < 7 || len(parts) > 8 || parts[2] != "lambda" || parts[5] != "function" || !strings.HasPrefix(parts[1], "aws") {
			v.pattern("functionName", given, functionPattern)
			return "", "", nil
		}
		if parts[3] != s.opt.Region {
			return "", "", refuse("ResourceNotFoundException", "Functions from '%s' are not reachable in this region ('%s')", parts[3], s.opt.Region)
		}
		parts = append([]string{parts[4]}, parts[6:]...)
		fallthrough
	case len(parts) > 1 && len(parts[0]) == 12 && strings.Trim(parts[0], "0123456789") == "": // account:function:name[:qualifier], also without function
		if parts[0] != s.opt.AccountID {
			return "", "", refuse("ResourceNotFoundException", "Function not found: %s", s.arnIn(parts[0], parts[len(parts)-1]))
		}
		parts = parts[1:]
	}
	if len(parts) > 1 && parts[0] == "function" {
		parts = parts[1:]
	}
	if len(parts) > 2 || !usable(parts[0], nameLetters) || len(parts) == 2 && parts[1] != blixard.Latest && !usable(parts[1], nameLetters) {
		v.pattern("functionName", given, functionPattern)
		return "", "", nil
	}
	if len(parts) == 2 {
		qualifier = parts[1]
	}
	return parts[0], qualifier, nil
}

// usable tells whether a text is not empty and of some letters only.
func usable(text, letters string) bool { return text != "" && strings.Trim(text, letters) == "" }

// arn is the ARN of a function, with a qualifier unless that is "".
func (s *Server) arn(name blixard.FunctionName, qualifier string) string {
	arn := s.arnIn(s.opt.AccountID, string(name))
	if qualifier != "" {
		arn += ":" + qualifier
	}
	return arn
}

func (s *Server) arnIn(account, name string) string {
	return "arn:aws:lambda:" + s.opt.Region + ":" + account + ":function:" + name
}

// notFound is what is said of a function or version that is not there.
func (s *Server) notFound(t target) error {
	return refuse("ResourceNotFoundException", "Function not found: %s", s.arn(t.name, t.qualifier))
}
