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
    from .trainer.encoders.dual_encoder_training import DualEncoderTrainingArguments, train_dual_encoder
    from .trainer.encoders.embedding import embed
    from .trainer.publishing.repository import push
    from .trainer.quantizer.trainer import MMRQVAETrainingArguments
    from .trainer.quantizer.training import quantize
    from .trainer.recommender.evaluation import evaluate
    from .trainer.recommender.mmesid_trainer import MMESIDTrainingArguments
    from .trainer.recommender.sasrec_trainer import SASRecTrainingArguments
    from .trainer.recommender.training import build_recommender, finetune, train_sasrec


__version__ = version("mmesid")

# Imported when a name is asked for: `import mmesid`, and with it the help of every command, does not wait for torch.
_NAMES = {
    "modeling_mmesid": (
        "MMESIDConfig",
        "MMESIDForSequentialRecommendation",
        "MMESIDProcessor",
        "MMRQVAEConfig",
        "MMRQVAEModel",
        "SASRecConfig",
        "SASRecForSequentialRecommendation",
    ),
    ".trainer.data.preparation": ("prepare",),
    ".trainer.data.prepared": ("PreparedDataset",),
    ".trainer.data.tables": ("EmbeddingTable",),
    ".trainer.encoders.dual_encoder_training": ("DualEncoderTrainingArguments", "train_dual_encoder"),
    ".trainer.encoders.embedding": ("embed",),
    ".trainer.publishing.repository": ("push",),
    ".trainer.quantizer.trainer": ("MMRQVAETrainingArguments",),
    ".trainer.quantizer.training": ("quantize",),
    ".trainer.recommender.evaluation": ("evaluate",),
    ".trainer.recommender.mmesid_trainer": ("MMESIDTrainingArguments",),
    ".trainer.recommender.sasrec_trainer": ("SASRecTrainingArguments",),
    ".trainer.recommender.training": ("build_recommender", "finetune", "train_sasrec"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "DualEncoderTrainingArguments",
    "EmbeddingTable",
    "MMESIDConfig",
    "MMESIDForSequentialRecommendation",
    "MMESIDProcessor",
    "MMESIDTrainingArguments",
    "MMRQVAEConfig",
    "MMRQVAEModel",
    "MMRQVAETrainingArguments",
    "PreparedDataset",
    "SASRecConfig",
    "SASRecForSequentialRecommendation",
    "SASRecTrainingArguments",
    "__version__",
    "build_recommender",
    "embed",
    "evaluate",
    "finetune",
    "prepare",
    "push",
    "quantize",
    "train_dual_encoder",
    "train_sasrec",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'mmesid' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
