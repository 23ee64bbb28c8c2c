"""The YAML files of `dino-value train`; a package so that an installed copy finds them."""
