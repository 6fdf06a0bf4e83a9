"""The model's graph."""

import contextlib
import copy
import io
import logging
import warnings

import torch

from fmexp.errors import first_line
from fmexp.run import Run

log = logging.getLogger(__name__)


def model_graph(run: Run) -> None:
    """Trace a copy of the model on the current batch and write its graph; one that cannot be traced is a warning."""
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")  # torch speaks of its tracer's future
            # add_graph takes what is traced as it is; by itself it would trace twice, to compare: most of a second.
            traced = torch.jit.trace(copy.deepcopy(run.model), run.batch[0], check_trace=False)
            run.writer.add_graph(traced, run.batch[0])
    except Exception as error:  # whatever a tracer raises on a model that it does not understand
        log.warning("the model's graph is not written, for it cannot be traced: %s", first_line(error))
