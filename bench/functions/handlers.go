package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/internal/code"
)

// sources are the functions that are measured.
type sources struct {
	lean, leanWeb, lambda, web, wasm []byte // zips
	nix                              []byte
}

const nixHandler = "{ event, context }: { statusCode = 200; body = \"hello\"; }\n"

// compile builds them.
func compile(ctx context.Context, s settings) (out sources, err error) {
	for _, b := range []struct {
		zip       *[]byte
		dir, name string
		env       []string
	}{
		{&out.lean, "bench/functions/handlers/lean", "bootstrap", []string{"CGO_ENABLED=0"}},
		{&out.leanWeb, "bench/functions/handlers/lean", "server", []string{"CGO_ENABLED=0"}},
		{&out.lambda, "bench/functions/handlers/lambda", "bootstrap", []string{"CGO_ENABLED=0"}},
		{&out.web, "examples/functions/http-server", "server", []string{"CGO_ENABLED=0"}},
		{&out.wasm, "examples/functions/wasm-hello", "hello.wasm", []string{"GOOS=wasip1", "GOARCH=wasm"}},
	} {
		file := filepath.Join(s.dir, filepath.Base(b.dir)+"-"+b.name)
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", file, ".")
		cmd.Dir, cmd.Env, cmd.Stderr = filepath.Join(s.root, b.dir), append(os.Environ(), b.env...), os.Stderr
		if err := cmd.Run(); err != nil {
			return out, fmt.Errorf("building %s: %w", b.dir, err)
		}
		content, err := os.ReadFile(file)
		if err != nil {
			return out, fmt.Errorf("reading what was built: %w", err)
		}
		if *b.zip, err = code.Zip(b.name, 0o755, content); err != nil {
			return out, fmt.Errorf("packing %s: %w", b.name, err)
		}
		if err := errors.Join(os.Remove(file), ctx.Err()); err != nil {
			return out, fmt.Errorf("removing what was built: %w", err)
		}
	}
	out.nix, err = code.Zip("hello.nix", 0o644, []byte(nixHandler))
	return out, err
}

// once is a spec whose instances end after one call.
func once(spec *blixardv1.FunctionSpec) *blixardv1.FunctionSpec {
	spec.Scaling = &blixardv1.FunctionScaling{RecycleCalls: 1}
	return spec
}

func bootstrap() *blixardv1.FunctionSpec {
	return &blixardv1.FunctionSpec{Runtime: "bootstrap", MemoryMib: 128}
}

func web() *blixardv1.FunctionSpec { return &blixardv1.FunctionSpec{Runtime: "http", MemoryMib: 128} }
