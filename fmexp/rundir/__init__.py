"""All that is on disk of a run. Knows no model."""
