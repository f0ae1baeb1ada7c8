"""MME-SID models for sequential recommendation; importing this package registers them with the Auto classes and the
pipelines of transformers."""

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_mmesid import MMESIDConfig
from .configuration_mmrqvae import MMRQVAEConfig
from .configuration_sasrec import SASRecConfig
from .modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDModel
from .modeling_mmrqvae import MMRQVAEModel
from .modeling_sasrec import SASRecForSequentialRecommendation, SASRecModel
from .pipeline_mmesid import TASK, SequentialRecommendationPipeline
from .processing_mmesid import MMESIDProcessor


for config_class, model_class in (
    (SASRecConfig, SASRecForSequentialRecommendation),
    (MMRQVAEConfig, MMRQVAEModel),
    (MMESIDConfig, MMESIDForSequentialRecommendation),
):
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, model_class)
    # Saving writes the code beside the weights, for `trust_remote_code=True` where this package is not installed.
    config_class.register_for_auto_class("AutoConfig")
    model_class.register_for_auto_class("AutoModel")
AutoProcessor.register(MMESIDConfig, MMESIDProcessor)
MMESIDProcessor.register_for_auto_class("AutoProcessor")
PIPELINE_REGISTRY.register_pipeline(TASK, SequentialRecommendationPipeline, pt_model=AutoModel)

__all__ = [
    "MMESIDConfig",
    "MMESIDForSequentialRecommendation",
    "MMESIDModel",
    "MMESIDProcessor",
    "MMRQVAEConfig",
    "MMRQVAEModel",
    "SASRecConfig",
    "SASRecForSequentialRecommendation",
    "SASRecModel",
    "SequentialRecommendationPipeline",
]
