"""Sequential recommendation with a language model, multimodal embeddings and semantic IDs."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from modeling_mmesid import (
        MMESIDConfig,
        MMESIDForSequentialRecommendation,
        MMESIDProcessor,
        MMRQVAEConfig,
        MMRQVAEModel,
        SASRecConfig,
        SASRecForSequentialRecommendation,
    )

    from .trainer.data.preparation import prepare
    from .trainer.data.prepared import PreparedDataset
    from .trainer.data.tables import EmbeddingTable
    from .trainer.encoders.dual_encoder_training import train_dual_encoder
    from .trainer.encoders.embedding import embed
    from .trainer.publishing.repository import push
    from .trainer.quantizer.trainer import MMRQVAETrainingArguments
    from .trainer.quantizer.training import quantize


__version__ = version("mmesid")

# Imported when they are asked for: `import mmesid`, and with it the help of every command, does not wait for torch.
_MODULES = {
    "EmbeddingTable": ".trainer.data.tables",
    "MMESIDConfig": "modeling_mmesid",
    "MMESIDForSequentialRecommendation": "modeling_mmesid",
    "MMESIDProcessor": "modeling_mmesid",
    "MMRQVAEConfig": "modeling_mmesid",
    "MMRQVAEModel": "modeling_mmesid",
    "MMRQVAETrainingArguments": ".trainer.quantizer.trainer",
    "SASRecConfig": "modeling_mmesid",
    "SASRecForSequentialRecommendation": "modeling_mmesid",
    "quantize": ".trainer.quantizer.training",
    "push": ".trainer.publishing.repository",
    "PreparedDataset": ".trainer.data.prepared",
    "embed": ".trainer.encoders.embedding",
    "prepare": ".trainer.data.preparation",
    "train_dual_encoder": ".trainer.encoders.dual_encoder_training",
}

__all__ = [
    "EmbeddingTable",
    "MMESIDConfig",
    "MMESIDForSequentialRecommendation",
    "MMESIDProcessor",
    "MMRQVAEConfig",
    "MMRQVAEModel",
    "MMRQVAETrainingArguments",
    "SASRecConfig",
    "SASRecForSequentialRecommendation",
    "__version__",
    "quantize",
    "push",
    "PreparedDataset",
    "embed",
    "prepare",
    "train_dual_encoder",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'mmesid' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
