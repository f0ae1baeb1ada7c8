"""Vision backbones of several families: what is taken for the vector of a picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    IJepaModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from mmesid.trainer.encoders.encoding import encode
from mmesid.trainer.encoders.vision import VisionEncoder


PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), dtype=np.uint8))
    for seed in range(3)
]
TRANSFORMER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
CONVOLUTION = {"hidden_sizes": [8, 12], "depths": [1, 1]}
SIZE = {"size": {"height": 32, "width": 32}}
CROP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}

# Model as it is published, image processor, pooling, and that pooling on the model's last state.
BACKBONES = {
    "ViT": (
        lambda: ViTModel(ViTConfig(**TRANSFORMER)),
        ViTImageProcessorPil(**SIZE),
        "pooler_output",
        lambda model, state: torch.tanh(model.pooler.dense(state[:, 0])),
    ),
    "ViT classifier": (
        lambda: ViTForImageClassification(ViTConfig(**TRANSFORMER)),
        ViTImageProcessorPil(**SIZE),
        "CLS token",
        lambda model, state: state[:, 0],
    ),
    "DINOv2": (
        lambda: Dinov2Model(Dinov2Config(**TRANSFORMER)),
        BitImageProcessorPil(**CROP),
        "pooler_output",
        lambda model, state: state[:, 0],
    ),
    "ConvNeXt": (
        lambda: ConvNextModel(ConvNextConfig(num_stages=2, **CONVOLUTION)),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
        "pooler_output",
        lambda model, state: model.layernorm(state.mean(dim=(2, 3))),
    ),
    "ResNet": (
        lambda: ResNetModel(ResNetConfig(embedding_size=8, layer_type="basic", **CONVOLUTION)),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
        "pooler_output",
        lambda model, state: state.mean(dim=(2, 3)),
    ),
    "I-JEPA": (
        lambda: IJepaModel(IJepaConfig(**TRANSFORMER), add_pooling_layer=False),
        ViTImageProcessorPil(**SIZE),
        "mean over positions",
        lambda model, state: state.mean(dim=1),
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_pooling_is_the_models_own_or_the_class_token_or_the_mean(tmp_path, name):
    make, processor, pooling, pool = BACKBONES[name]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    encoder = VisionEncoder.from_pretrained(str(tmp_path / "model"))
    assert encoder.pooling == pooling
    embeddings = encode(encoder, tmp_path / "shards", images=PICTURES, batch_size=2, disable_tqdm=True)

    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    read = AutoImageProcessor.from_pretrained(tmp_path / "model")
    for picture, embedding in zip(PICTURES, embeddings):
        with torch.inference_mode():
            state = model(**read(images=picture, return_tensors="pt")).last_hidden_state
            expected = pool(model, state)[0]
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Bert", "CLIP"])
def test_what_is_no_encoder_of_pictures_alone_is_refused(sentence_model, tmp_path, kind):
    model = sentence_model / "bert"
    if kind == "CLIP":
        model, config = tmp_path, CLIPConfig(text_config=TRANSFORMER | {"vocab_size": 9}, vision_config=TRANSFORMER)
        CLIPModel(config).save_pretrained(model)
    with pytest.raises(ValueError, match=f"is a {kind}Model, which is no encoder of pictures alone") as error:
        VisionEncoder.from_pretrained(str(model))
    assert "\n" not in str(error.value)
