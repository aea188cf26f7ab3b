# Calls a function of the nix runtime. The runtime starts this expression ahead of
# the calls: what does not need the event is evaluated, then it says that it is
# ready and waits for `pipe`, takes the event from `input` and traces the answer
# behind the word by which the runtime knows it.
#
#   task         where the code is
#   file         the file of the function, relative to it
#   attribute    the handler in the file: "" (handler), "process", "api.process"
#   environment  the function's environment variables, as JSON
#   pipe, input  a pipe that opens when there is an event, and the file that has it
#   ready, answer  the words
{ task, file, attribute, environment, pipe, input, ready, answer }:
let
  inherit (builtins) foldl' fromJSON functionArgs hasAttr intersectAttrs isAttrs isFunction isString pathExists readFile seq split toJSON trace;

  config = { env = fromJSON environment; };
  lib = import ./lib.nix;
  # There is no nixpkgs in a guest. A function's code may bring what it needs.
  own = task + "/pkgs.nix";
  pkgs = { inherit lib; } // (if pathExists own then give (import own) { inherit lib config; } else { });

  callable = f: isFunction f || isAttrs f && f ? __functor;
  arguments = f: if isFunction f then functionArgs f else f.__functionArgs or { };
  # What a function names is what it gets; one that names nothing gets all.
  give = f: have:
    if !callable f then f
    else let wanted = arguments f; in if wanted == { } then f have else f (intersectAttrs wanted have);

  value = import (task + "/" + file);
  takesEvent = callable value && (let a = arguments value; in a == { } || a ? event || a ? context);
  module =
    if takesEvent then { handler = value; }
    else give value { inherit pkgs lib config; };

  name = if attribute == "" then "handler" else attribute;
  select = set: part:
    if isAttrs set && hasAttr part set then set.${part}
    else throw "${file} has no `${name}'";
  selected = foldl' select module (builtins.filter isString (split "\\." name));
  handler = if callable selected then selected else throw "`${name}' in ${file} is not a function";

  respond = { event, context }: trace (answer + toJSON (give handler { inherit event; context = context // config; })) null;
in
seq (arguments handler) (trace ready (seq (readFile pipe) (respond (fromJSON (readFile input)))))
