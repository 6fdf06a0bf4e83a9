"""A run's row in TensorBoard's HPARAMS: its settings, and how it ended."""

import time
import zlib
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams import summary_v2 as hp
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from torch.utils.tensorboard import SummaryWriter

from fmexp.config import hparams
from fmexp.rundir.tensorboard import add_summary


def write_hparams(writer: SummaryWriter, output_dir: Path, tree: dict[str, Any], processes: int = 1) -> None:
    """Give the run its row in HPARAMS. Rows of equal settings stay apart, for each is a trial of its own."""
    trial = f"{output_dir.name} ({zlib.crc32(str(output_dir).encode()):08x})"  # a whole path is cut in its column
    row = {**hparams(tree), **({"processes": processes} if processes > 1 else {})}
    add_summary(writer, hp.hparams_pb(row, trial_id=trial, start_time_secs=time.time()))


def set_epochs(value: Any, epochs: int) -> None:
    """Change train.epochs where a value (tensorboard's Summary.Value) is the beginning of a run's row in HPARAMS."""
    if value.tag == metadata.SESSION_START_INFO_TAG:
        begun = HParamsPluginData.FromString(value.metadata.plugin_data.content)
        begun.session_start_info.hparams["train.epochs"].number_value = epochs
        value.metadata.plugin_data.content = begun.SerializeToString(deterministic=True)


def write_status(writer: SummaryWriter, complete: bool) -> None:
    """End the run's row in HPARAMS. The first status of a file wins, so this is written once, at the end."""
    status = Status.STATUS_SUCCESS if complete else Status.STATUS_FAILURE
    ended = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, session_end_info=SessionEndInfo(status=status))
    ended.session_end_info.end_time_secs = time.time()
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(ended))
    add_summary(writer, Summary(value=[value]))
