"""Small random models with the architectures of SigLIP and SigLIP2, and their processors."""

from pathlib import Path

import torch
from transformers import (
    Siglip2Config,
    Siglip2Model,
    Siglip2Processor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from mmesid.trainer.encoders.dual_encoder import train_word_tokenizer


def save_siglip(directory: Path, version: int, captions: list[str]) -> str:
    """`version` 1: square pictures; 2: pictures of any shape, as sequences of patches."""
    tokenizer = train_word_tokenizer(captions, max_length=16, min_word_frequency=1)
    transformer = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformer | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    torch.manual_seed(0)
    if version == 1:
        vision = transformer | {"image_size": 32, "patch_size": 16}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor = SiglipProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    else:
        vision = transformer | {"num_patches": 16}
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
        processor = Siglip2Processor(Siglip2ImageProcessorPil(max_num_patches=16), tokenizer)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return str(directory)
