"""How one training step and one evaluation are computed. Knows no run and no folder."""
