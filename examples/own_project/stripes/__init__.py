"""A project of one's own, outside of fmexp: the functions that the YAML files in ../conf name."""
