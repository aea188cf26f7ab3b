# What the function beside this file gets for pkgs: guests have no nixpkgs, and the
# real one has no processImage. This one says where the result would be.
{ lib, ... }: {
  imagemagick.processImage = imagePath:
    let
      parts = lib.splitString "/" imagePath;
      name = lib.removeSuffix ".jpg" (lib.last parts);
    in { path = lib.concatStringsSep "/" (lib.init parts ++ [ "${name}.processed.jpg" ]); };
}
