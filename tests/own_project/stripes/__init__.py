"""A project of a user's own, outside fmexp: a dataset, a model and two stages that YAML in ../conf names."""
