"""Sequential recommendation with a language model, multimodal embeddings and semantic IDs."""

import importlib
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    # `as` says to type checkers that the name is public.
    from modeling_mmesid import MMESIDConfig as MMESIDConfig
    from modeling_mmesid import MMESIDForSequentialRecommendation as MMESIDForSequentialRecommendation
    from modeling_mmesid import MMESIDProcessor as MMESIDProcessor
    from modeling_mmesid import MMRQVAEConfig as MMRQVAEConfig
    from modeling_mmesid import MMRQVAEModel as MMRQVAEModel
    from modeling_mmesid import SASRecConfig as SASRecConfig
    from modeling_mmesid import SASRecForSequentialRecommendation as SASRecForSequentialRecommendation

    from .trainer.data.preparation import prepare as prepare
    from .trainer.data.prepared import PreparedDataset as PreparedDataset
    from .trainer.data.tables import EmbeddingTable as EmbeddingTable
    from .trainer.encoders.dual_encoder_training import DualEncoderTrainingArguments as DualEncoderTrainingArguments
    from .trainer.encoders.dual_encoder_training import train_dual_encoder as train_dual_encoder
    from .trainer.encoders.embedding import embed as embed
    from .trainer.publishing.repository import push as push
    from .trainer.quantizer.trainer import MMRQVAETrainingArguments as MMRQVAETrainingArguments
    from .trainer.quantizer.training import quantize as quantize
    from .trainer.recommender.evaluation import evaluate as evaluate
    from .trainer.recommender.mmesid_trainer import MMESIDTrainer as MMESIDTrainer
    from .trainer.recommender.mmesid_trainer import MMESIDTrainingArguments as MMESIDTrainingArguments
    from .trainer.recommender.sasrec_trainer import SASRecTrainer as SASRecTrainer
    from .trainer.recommender.sasrec_trainer import SASRecTrainingArguments as SASRecTrainingArguments
    from .trainer.recommender.training import build_recommender as build_recommender
    from .trainer.recommender.training import finetune as finetune
    from .trainer.recommender.training import train_sasrec as train_sasrec


__version__ = version("mmesid")

# Where it is installed, the first import would tell the lack of a kernel that makes 4-bit products faster.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)

# Imported when a name is asked for: `import mmesid`, and with it the help of every command, does not wait for torch.
_NAMES = {
    "modeling_mmesid": (
        "MMESIDConfig", "MMESIDForSequentialRecommendation", "MMESIDProcessor", "MMRQVAEConfig", "MMRQVAEModel",
        "SASRecConfig", "SASRecForSequentialRecommendation",
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
    ".trainer.recommender.mmesid_trainer": ("MMESIDTrainer", "MMESIDTrainingArguments"),
    ".trainer.recommender.sasrec_trainer": ("SASRecTrainer", "SASRecTrainingArguments"),
    ".trainer.recommender.training": ("build_recommender", "finetune", "train_sasrec"),
}  # fmt: skip
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'mmesid' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
