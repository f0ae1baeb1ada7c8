"""
Models whose weights several processes share: whole for a while, whole again, and the checkpoints of such a training.

    python -m mmesid.trainer.running.sharding runs/mine/recommender/checkpoints/<run>/checkpoint-500 runs/mine/whole
"""

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME

# Registers the models.
import modeling_mmesid  # noqa: F401

from .errors import UsageError, one_sentence


# What the Trainer calls the weights in a checkpoint of FSDP, and the file by which DeepSpeed names its latest.
FSDP_PREFIX = "model."
DEEPSPEED_LATEST = "latest"


@contextmanager
def unsharded(model: torch.nn.Module) -> Iterator[None]:
    """Has the model's own weights, of FSDP not those of its layers, whole on every process, where FSDP or ZeRO-3 have
    parted them: what is no forward pass, such as [`~MMESIDForSequentialRecommendation.item_table`], needs that. All
    processes enter."""
    if isinstance(model, FSDPModule):
        model.unshard()
        try:
            yield
        finally:
            model.reshard()
    elif is_deepspeed_zero3_enabled():
        with importlib.import_module("deepspeed").zero.GatheredParameters(list(model.parameters())):
            yield
    else:
        yield


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model that FSDP or ZeRO-3 have sharded, as it was before: a new one with the same weights, whole on every
    process. All processes call it; of any other model it is the model itself."""
    is_fsdp = isinstance(model, FSDPModule)
    if not is_fsdp and not is_deepspeed_zero3_enabled():
        return model
    unsharded_class = next(one for one in type(model).__mro__ if not issubclass(one, FSDPModule))
    with nullcontext() if is_fsdp else unsharded(model):
        weights = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
            for name, tensor in model.state_dict().items()
        }
    return _assemble(lambda: unsharded_class(model.config), weights).to(model.device)


def _assemble(build: Callable[[], PreTrainedModel], weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A model that takes these weights as they are, without a copy; raises `ValueError` unless they are its own."""
    # Buffers that no state has, as those of rotary embeddings, get their values.
    with init_empty_weights(include_buffers=False):
        model = build()
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"These weights are none of a {type(model).__name__}: {' '.join(str(error).split())}"
        ) from error
    return model.eval()


def convert_checkpoint(checkpoint: str | os.PathLike, output_dir: str | os.PathLike) -> None:
    """
    Writes an ordinary checkpoint with the weights of one that a training left in the format of FSDP or DeepSpeed, and
    with the processor beside them. These formats are pickles, which can run any code: give those of your own runs.

    Args:
        checkpoint (`str` or `os.PathLike`): Directory `checkpoint-<step>` of a training.
        output_dir (`str` or `os.PathLike`): Directory to write, which must not exist.

    Raises:
        ValueError: If the checkpoint has neither format, its weights are those of another model, the output is there
            already, or DeepSpeed is needed and not installed.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if output_dir.exists():
        raise ValueError(f"'{output_dir}' exists already; name a directory that does not.")
    shards = sorted(checkpoint.glob(f"{FSDP_MODEL_NAME}_*"))
    if shards:
        weights = _weights_of_fsdp(shards[0])
    elif (checkpoint / DEEPSPEED_LATEST).is_file():
        weights = _weights_of_deepspeed(checkpoint)
    else:
        raise ValueError(
            f"'{checkpoint}' holds neither a directory {FSDP_MODEL_NAME}_0 nor a file {DEEPSPEED_LATEST}, which "
            "checkpoints of FSDP and DeepSpeed have; name a directory checkpoint-<step> of such a training."
        )
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    model = _assemble(lambda: AutoModel.from_config(config, trust_remote_code=False), weights)
    output_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.absolute().parent, prefix=f".{output_dir.name}-") as directory:
        staging = Path(directory) / output_dir.name
        model.save_pretrained(staging)
        for path in checkpoint.iterdir():
            if path.suffix in (".json", ".jinja") and path.name != TRAINER_STATE_NAME:
                if not (staging / path.name).exists():
                    shutil.copyfile(path, staging / path.name)
        os.replace(staging, output_dir)


def _weights_of_fsdp(directory: Path) -> dict[str, torch.Tensor]:
    reader = distributed_checkpoint.FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    distributed_checkpoint.load(weights, storage_reader=reader, no_dist=True)
    return {name.removeprefix(FSDP_PREFIX): weight for name, weight in weights.items()}


def _weights_of_deepspeed(directory: Path) -> dict[str, torch.Tensor]:
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"'{directory}' is a checkpoint of DeepSpeed, which is not installed here; pip install deepspeed, or run "
            "the zero_to_fp32.py that lies in it where DeepSpeed is."
        )
    converter = importlib.import_module("deepspeed.utils.zero_to_fp32")
    return converter.get_fp32_state_dict_from_zero_checkpoint(str(directory))


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UsageError("Two words are expected: the checkpoint of a training, and the directory to write.")
    convert_checkpoint(*argv)
    print(f"wrote '{argv[1]}'")


if __name__ == "__main__":
    with one_sentence("sharding", sys.argv):
        main(sys.argv[1:])
