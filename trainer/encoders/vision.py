"""Vision backbones that `AutoModel` loads (ViT, DINOv2, ConvNeXt, Swin ...): one vector per picture."""

import torch
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor, BatchFeature, PreTrainedModel

from .encoding import TransformersEncoder


class VisionEncoder(TransformersEncoder):
    """
    A vision backbone and its image processor. Its embedding of a picture is what the model itself calls pooled
    (`pooler_output`: the normalised CLS token of DINOv2, the normalised mean over positions of ConvNeXt ...); where
    the model or the checkpoint has no pooler, the CLS token of the last layer; where there is no such token either,
    the mean over positions.

    Args:
        model (`PreTrainedModel`): The backbone.
        processor (`BaseImageProcessor`): Its image processor.

    Attributes:
        pooling (`str`): `"pooler_output"`, `"CLS token"` or `"mean over positions"`.
    """

    model_help = "a vision backbone, for example facebook/dinov2-base"
    reads = ("image",)

    def __init__(self, model: PreTrainedModel, processor: BaseImageProcessor):
        super().__init__(model, processor)
        outputs = self._outputs(self.prepare(images=[Image.new("RGB", (64, 64))]))
        if getattr(outputs, "pooler_output", None) is not None:
            self.pooling = "pooler_output"
        elif any(name.endswith("cls_token") for name, _ in model.named_parameters()):
            self.pooling = "CLS token"
        else:
            self.pooling = "mean over positions"

    @classmethod
    def check_model(cls, name_or_path: str, model: PreTrainedModel) -> None:
        if model.main_input_name != "pixel_values":
            raise ValueError(
                f"'{name_or_path}' is a {type(model).__name__}, which is no encoder of pictures alone; name a vision "
                "backbone, or choose the encoder dual_encoder for a CLIP or SigLIP model."
            )

    @classmethod
    def load_processor(cls, name_or_path: str, **source) -> BaseImageProcessor:
        return AutoImageProcessor.from_pretrained(name_or_path, **source)

    def prepare(self, images: list[Image.Image]) -> BatchFeature:
        return self.processor(images=images, return_tensors="pt")

    def embed(self, batch: BatchFeature) -> torch.Tensor:
        outputs = self._outputs(batch)
        if self.pooling == "pooler_output":
            # `(batch, width, 1, 1)` of a convolutional network.
            embeddings = outputs.pooler_output.flatten(start_dim=1)
        elif self.pooling == "CLS token":
            embeddings = outputs.last_hidden_state[:, 0]
        elif outputs.last_hidden_state.dim() == 4:
            embeddings = outputs.last_hidden_state.mean(dim=(2, 3))
        else:
            embeddings = outputs.last_hidden_state.mean(dim=1)
        return embeddings.float().cpu()

    @torch.inference_mode()
    def _outputs(self, batch: BatchFeature):
        return self.model(**batch.to(self.model.device, self.model.dtype))
