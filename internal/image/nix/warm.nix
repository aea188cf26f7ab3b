# Evaluated once before a guest is saved, so that what calls need of the evaluator
# is in memory.
{ event, context }: {
  inherit event;
  text = "${event.text or ""} ${toString (builtins.length (builtins.attrNames context))}";
  list = builtins.map (x: x + 1) [ 1 2 3 ] ++ builtins.filter (x: x > 1) [ 1 2 ];
  number = 1.5;
}
