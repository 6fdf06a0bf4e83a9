"""The stages that YAML can name: a function of the run and its settings, in a module of the same name."""
