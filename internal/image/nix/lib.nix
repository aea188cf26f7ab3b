# The part of nixpkgs' lib that functions reach for most, written anew for guests,
# which have no nixpkgs. Names and arguments are those of nixpkgs.
let
  inherit (builtins) attrNames concatLists elemAt filter foldl' genList head isList isString length listToAttrs match replaceStrings split stringLength substring tail;

  trivial = rec {
    id = x: x;
    const = x: _: x;
    flip = f: a: b: f b a;
    pipe = foldl' (x: f: f x);
    min = a: b: if a < b then a else b;
    max = a: b: if a > b then a else b;
    mod = a: b: a - b * (a / b);
    boolToString = b: if b then "true" else "false";
    toInt = s:
      let n = match "[[:space:]]*(-?[[:digit:]]+)[[:space:]]*" s;
      in if n == null then throw "toInt: ${builtins.toJSON s} is not an integer" else builtins.fromJSON (toDecimal (head n));
    # JSON has no leading zeros.
    toDecimal = s: let n = match "(-?)0*([[:digit:]]+)" s; in elemAt n 0 + elemAt n 1;
  };

  lists = rec {
    inherit (builtins) all any concatLists elem elemAt filter foldl' genList head isList length map sort tail;
    concatMap = f: xs: concatLists (map f xs);
    optional = condition: x: if condition then [ x ] else [ ];
    optionals = condition: xs: if condition then xs else [ ];
    toList = x: if isList x then x else [ x ];
    singleton = x: [ x ];
    range = first: end: if first > end then [ ] else genList (i: first + i) (end - first + 1);
    sublist = start: count: xs:
      let n = length xs; left = trivial.max 0 (trivial.min count (n - start));
      in if start >= n then [ ] else genList (i: elemAt xs (start + i)) left;
    take = sublist 0;
    drop = count: xs: sublist count (length xs) xs;
    last = xs: elemAt xs (length xs - 1);
    init = xs: take (length xs - 1) xs;
    reverseList = xs: let n = length xs; in genList (i: elemAt xs (n - 1 - i)) n;
    foldr = op: nul: xs: foldl' (acc: x: op x acc) nul (reverseList xs);
    imap0 = f: xs: genList (i: f i (elemAt xs i)) (length xs);
    imap1 = f: imap0 (i: f (i + 1));
    flatten = x: if isList x then concatMap flatten x else [ x ];
    unique = foldl' (acc: x: if builtins.elem x acc then acc else acc ++ [ x ]) [ ];
    zipListsWith = f: a: b: genList (i: f (elemAt a i) (elemAt b i)) (trivial.min (length a) (length b));
    partition = builtins.partition;
    groupBy = builtins.groupBy or (f: foldl' (acc: x: let k = f x; in acc // { ${k} = (acc.${k} or [ ]) ++ [ x ]; }) { });
    count = f: foldl' (n: x: if f x then n + 1 else n) 0;
    findFirst = f: default: xs: let found = filter f xs; in if found == [ ] then default else head found;
    remove = x: filter (y: y != x);
    subtractLists = a: filter (x: !(builtins.elem x a));
  };

  attrsets = rec {
    inherit (builtins) attrNames attrValues catAttrs hasAttr intersectAttrs isAttrs listToAttrs mapAttrs removeAttrs;
    nameValuePair = name: value: { inherit name value; };
    genAttrs = names: f: listToAttrs (map (name: nameValuePair name (f name)) names);
    filterAttrs = f: set: listToAttrs (concatLists (map (name: lists.optional (f name set.${name}) (nameValuePair name set.${name})) (attrNames set)));
    mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
    mapAttrs' = f: set: listToAttrs (mapAttrsToList f set);
    optionalAttrs = condition: set: if condition then set else { };
    attrByPath = path: default: set:
      if path == [ ] then set
      else if isAttrs set && set ? ${head path} then attrByPath (tail path) default set.${head path}
      else default;
    hasAttrByPath = path: set: path == [ ] || isAttrs set && set ? ${head path} && hasAttrByPath (tail path) set.${head path};
    getAttrFromPath = path: attrByPath path (throw "there is no attribute ${strings.concatStringsSep "." path}");
    setAttrByPath = path: value: if path == [ ] then value else { ${head path} = setAttrByPath (tail path) value; };
    recursiveUpdate = a: b:
      if isAttrs a && isAttrs b then a // mapAttrs (name: value: if a ? ${name} then recursiveUpdate a.${name} value else value) b
      else b;
  };

  strings = rec {
    inherit (builtins) concatStringsSep isString match replaceStrings split stringLength substring toJSON;
    concatStrings = concatStringsSep "";
    concatMapStrings = f: xs: concatStrings (map f xs);
    concatMapStringsSep = separator: f: xs: concatStringsSep separator (map f xs);
    optionalString = condition: s: if condition then s else "";
    hasPrefix = prefix: s: substring 0 (stringLength prefix) s == prefix;
    hasSuffix = suffix: s: let n = stringLength s; m = stringLength suffix; in n >= m && substring (n - m) n s == suffix;
    hasInfix = infix: s: replaceStrings [ infix ] [ "" ] s != s;
    removePrefix = prefix: s: if hasPrefix prefix s then substring (stringLength prefix) (stringLength s) s else s;
    removeSuffix = suffix: s: if hasSuffix suffix s then substring 0 (stringLength s - stringLength suffix) s else s;
    stringToCharacters = s: genList (i: substring i 1 s) (stringLength s);
    escapeRegex = replaceStrings (stringToCharacters "\\[{()^$?*+|.") (map (c: "\\" + c) (stringToCharacters "\\[{()^$?*+|."));
    splitString = separator: s: filter isString (split (escapeRegex separator) s);
    lowerChars = stringToCharacters "abcdefghijklmnopqrstuvwxyz";
    upperChars = stringToCharacters "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
    toLower = replaceStrings upperChars lowerChars;
    toUpper = replaceStrings lowerChars upperChars;
    trim = s: let m = match "[[:space:]]*(.*[^[:space:]])[[:space:]]*" s; in if m == null then "" else head m;
    fixedWidthString = width: filler: s: if stringLength s >= width then s else filler + fixedWidthString (width - stringLength filler) filler s;
  };
in
trivial // lists // attrsets // strings // { inherit trivial lists attrsets strings; }
