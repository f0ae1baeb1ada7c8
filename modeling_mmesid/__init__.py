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


AutoConfig.register(SASRecConfig.model_type, SASRecConfig)
AutoConfig.register(MMRQVAEConfig.model_type, MMRQVAEConfig)
AutoConfig.register(MMESIDConfig.model_type, MMESIDConfig)
AutoModel.register(SASRecConfig, SASRecForSequentialRecommendation)
AutoModel.register(MMRQVAEConfig, MMRQVAEModel)
AutoModel.register(MMESIDConfig, MMESIDForSequentialRecommendation)
AutoProcessor.register(MMESIDConfig, MMESIDProcessor)
PIPELINE_REGISTRY.register_pipeline(TASK, SequentialRecommendationPipeline, pt_model=AutoModel)

# Saving writes the code beside the weights, for `trust_remote_code=True` where this package is not installed.
for config_class in (SASRecConfig, MMRQVAEConfig, MMESIDConfig):
    config_class.register_for_auto_class("AutoConfig")
for model_class in (SASRecForSequentialRecommendation, MMRQVAEModel, MMESIDForSequentialRecommendation):
    model_class.register_for_auto_class("AutoModel")
MMESIDProcessor.register_for_auto_class("AutoProcessor")

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
