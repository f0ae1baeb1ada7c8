"""MME-SID models for sequential recommendation; importing this package registers them with the Auto classes of
transformers."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_mmesid import MMESIDConfig
from .configuration_mmrqvae import MMRQVAEConfig
from .configuration_sasrec import SASRecConfig
from .modeling_mmesid import MMESIDForSequentialRecommendation
from .modeling_mmrqvae import MMRQVAEModel
from .modeling_sasrec import SASRecForSequentialRecommendation, SASRecModel
from .processing_mmesid import MMESIDProcessor


AutoConfig.register(SASRecConfig.model_type, SASRecConfig)
AutoConfig.register(MMRQVAEConfig.model_type, MMRQVAEConfig)
AutoConfig.register(MMESIDConfig.model_type, MMESIDConfig)
AutoModel.register(SASRecConfig, SASRecForSequentialRecommendation)
AutoModel.register(MMRQVAEConfig, MMRQVAEModel)
AutoModel.register(MMESIDConfig, MMESIDForSequentialRecommendation)
AutoProcessor.register(MMESIDConfig, MMESIDProcessor)

__all__ = [
    "MMESIDConfig",
    "MMESIDForSequentialRecommendation",
    "MMESIDProcessor",
    "MMRQVAEConfig",
    "MMRQVAEModel",
    "SASRecConfig",
    "SASRecForSequentialRecommendation",
    "SASRecModel",
]
