"""
What an encoder is, and how it encodes a catalogue: in batches of similar length, in shards that survive a kill,
divided among processes.
"""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self

import torch
from accelerate import PartialState
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from modeling_mmesid.checkpoints import SLOW_BYTES, bar_if_slow


KEY = "embeddings"
# Bytes, as torch allocates.
ALIGNMENT = 64


class Encoder(Protocol):
    """
    An encoder of texts, of pictures, or of both.

    Attributes:
        reads (`tuple[str, ...]`): What it can read of an item, of `"text"`, `"title"` and `"image"`; by default the
            first.
        pooling (`str`): How token or patch states become one vector, for the record.
    """

    reads: tuple[str, ...]
    pooling: str

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """One batch of `texts` (`list[str]`) or of `images` (`list[PIL.Image.Image]`) as [`~Encoder.embed`] takes it,
        on the CPU; a data loader's worker may call it."""

    def embed(self, batch: Any) -> torch.Tensor:
        """The embeddings of a prepared batch, `(batch, dimension)` in float32, on the CPU."""


class PretrainedEncoder:
    """
    An encoder that is loaded by name: a class of the registry. Its `from_pretrained` loads the model by its name; the
    further parameters are the encoder's settings.

    Attributes:
        reads, pooling: See [`Encoder`].
        model_help (`str`): What the name of its model may be.
        needs (`dict[str, tuple[str, str]]`): By column, a setting without which it cannot be read, and what that is.
    """

    reads: tuple[str, ...]
    pooling: str
    model_help: str
    needs: dict[str, tuple[str, str]] = {}
    from_pretrained: Callable[..., "PretrainedEncoder"]

    @classmethod
    def details_of(cls, name_or_path: str, revision: str | None = None, **settings) -> dict:
        """Name and revision, for records; takes the parameters of `from_pretrained`."""
        return {"encoder": name_or_path, "revision": resolve_revision(name_or_path, revision)}


class TransformersEncoder(PretrainedEncoder):
    """
    An encoder whose model and processor the auto classes load.

    Args:
        model (`PreTrainedModel`): The model.
        processor (`ProcessorMixin` or `BaseImageProcessor`): What prepares its inputs.
    """

    def __init__(self, model: PreTrainedModel, processor: Any):
        self.model: Any = on_device(model.eval())
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> Self:
        """
        Args:
            name_or_path (`str`): A repository on the Hub or a directory.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Precision of the model.
            trust_remote_code (`bool`, *optional*, defaults to `False`): Whether code of the repository may run.

        Raises:
            ValueError: If the model is of another kind, or its checkpoint lacks weights.
        """
        source = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = load_model(AutoModel, name_or_path, dtype, **source)
        cls.check_model(name_or_path, model)
        return cls(model, cls.load_processor(name_or_path, **source))

    @classmethod
    def check_model(cls, name_or_path: str, model: PreTrainedModel) -> None:
        """Raises `ValueError` if the model is not of the kind that the encoder takes."""
        raise NotImplementedError

    @classmethod
    def load_processor(cls, name_or_path: str, **source) -> Any:
        return AutoProcessor.from_pretrained(name_or_path, **source)


def size_of_weights(name_or_path: str | os.PathLike) -> int:
    """Bytes of the weights in a folder; of a repository, which may have to be downloaded, more than is quick."""
    if not Path(name_or_path).is_dir():
        return SLOW_BYTES
    return sum(file.stat().st_size for file in Path(name_or_path).rglob("*.safetensors"))


def load_model(model_class, name_or_path: str, dtype: torch.dtype, **source) -> Any:
    """
    A model without its pooler where that is not trained: a classifier is saved without the one that `AutoModel` puts
    on top. Raises `ValueError` if the checkpoint lacks other weights: `transformers` makes up random ones and only
    warns, and embeddings of random weights look like any others.
    """
    with bar_if_slow(size_of_weights(name_or_path)):
        model, loading = model_class.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True, **source)
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(
            f"'{name_or_path}' lacks {len(missing)} weights of the model that its config.json names, for example "
            f"'{missing[0]}'; name a complete checkpoint, or one whose code --trust_remote_code true may run."
        )
    if loading["missing_keys"]:
        model.pooler = None
    return model


def resolve_revision(name_or_path: str, revision: str | None) -> str | None:
    """The commit that a model was loaded at where it came from the Hub; the revision as it is where it did not."""
    if os.path.isdir(name_or_path):
        return revision
    config = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else revision


def encode(
    encoder: Encoder,
    shards_dir: str | os.PathLike | None = None,
    *,
    texts: list[str] | None = None,
    images: Sequence[Image.Image] | None = None,
    batch_size: int = 64,
    shard_size: int = 512,
    num_workers: int = 0,
    disable_tqdm: bool = False,
) -> torch.Tensor:
    """
    Embeddings of texts or pictures, `(num_inputs, dimension)` in float32, on the CPU, in the order of the inputs and
    in every process.

    Batches, and the shards that they make up, depend on the inputs alone. Every process encodes its share of the
    shards and writes each in one move; shards that exist are not encoded again. So a run that is started again after
    an interruption gives the same bytes as one that was never interrupted, and so do several processes on equal
    machines with an equal number of threads.

    All processes must see the folder of the shards. The caller uses one for one encoder, one catalogue and one
    `batch_size`, and removes it. Without it nothing is kept, and every process encodes everything. A shard has
    `shard_size` inputs, rounded to whole batches; `num_workers` processes of the data loader prepare batches.
    """
    state = PartialState()
    kind, inputs = ("texts", texts or []) if images is None else ("images", images)
    shards = divide(inputs, batch_size, shard_size, longest_first=images is None)
    with TemporaryDirectory() as own_directory:
        directory, mine = Path(own_directory), range(len(shards))
        if shards_dir is not None:
            directory = Path(shards_dir)
            directory.mkdir(parents=True, exist_ok=True)
            # Neighbours are equally long: dealt out one by one, every process has the same work.
            mine = range(state.process_index, len(shards), state.num_processes)
        files = [directory / f"{number:06d}.safetensors" for number in range(len(shards))]
        pending = [number for number in mine if not files[number].is_file()]
        loader = DataLoader(
            inputs,
            batch_sampler=[batch for number in pending for batch in shards[number]],
            collate_fn=functools.partial(_prepare, encoder, kind),
            num_workers=num_workers,
        )
        prepared = iter(loader)
        total, todo = (sum(len(batch) for number in part for batch in shards[number]) for part in (mine, pending))
        disable_tqdm = disable_tqdm or not state.is_local_main_process
        with tqdm(total=total, initial=total - todo, desc=kind, unit=kind[:-1], disable=disable_tqdm) as progress:
            for number in pending:
                parts = []
                for batch in shards[number]:
                    parts.append(encoder.embed(next(prepared)))
                    progress.update(len(batch))
                partial = files[number].with_name(f".{files[number].name}.partial")
                save_file({KEY: torch.cat(parts).contiguous()}, partial)
                os.replace(partial, files[number])
        state.wait_for_everyone()
        order = [index for shard in shards for batch in shard for index in batch]
        return torch.cat([load_file(file)[KEY] for file in files])[torch.tensor(order).argsort()]


def divide(inputs: Sequence, batch_size: int, shard_size: int, longest_first: bool) -> list[list[list[int]]]:
    """Shards of batches of positions in the inputs. The longest come first where that saves padding; and so does the
    batch that needs most memory."""
    order = list(range(len(inputs)))
    if longest_first:
        order.sort(key=lambda index: len(inputs[index]), reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    per_shard = max(shard_size // batch_size, 1)
    return [batches[start : start + per_shard] for start in range(0, len(batches), per_shard)]


def _prepare(encoder: Encoder, kind: str, batch: list) -> Any:
    """What a worker of the data loader makes of a batch: a function with a name, for workers may get it pickled."""
    return encoder.prepare(**{kind: batch})


def on_device(model: nn.Module) -> nn.Module:
    """
    The model on this process's device, its weights where matrix products give the same bits in every process.

    On the CPU, weights that were read from a checkpoint lie wherever they lie in the file, and `transformers` reads
    them otherwise in a distributed run than in a single process; kernels round differently with the alignment.
    """
    model = model.to(PartialState().device)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model
