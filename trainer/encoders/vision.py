"""Vision backbones that `AutoModel` loads (ViT, DINOv2, ConvNeXt, Swin ...): one vector per picture."""

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, BatchFeature, PreTrainedModel

from .encoding import PretrainedEncoder, check_weights, on_device


class VisionEncoder(PretrainedEncoder):
    """
    A vision backbone and its image processor. Its embedding of a picture is what the model itself calls pooled
    (`pooler_output`: the normalised CLS token of DINOv2, the normalised mean over positions of ConvNeXt ...); where
    the model or the checkpoint has no pooler, the CLS token of the last layer; where there is no such token either,
    the mean over positions.

    Args:
        model (`PreTrainedModel`): The backbone.
        processor (`BaseImageProcessor`): Its image processor.
        has_pooler (`bool`, *optional*, defaults to `True`): Whether the model's own pooler, if any, is trained.

    Attributes:
        pooling (`str`): `"pooler_output"`, `"CLS token"` or `"mean over positions"`.
    """

    model_help = "a vision backbone, for example facebook/dinov2-base"
    reads = ("image",)

    def __init__(self, model: PreTrainedModel, processor: BaseImageProcessor, has_pooler: bool = True):
        self.model = on_device(model.eval())
        self.processor = processor
        outputs = self._outputs(self.prepare(images=[Image.new("RGB", (64, 64))]))
        if has_pooler and getattr(outputs, "pooler_output", None) is not None:
            self.pooling = "pooler_output"
        elif any(name.endswith("cls_token") for name, _ in model.named_parameters()):
            self.pooling = "CLS token"
        else:
            self.pooling = "mean over positions"

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> "VisionEncoder":
        """
        Args as in [`PretrainedEncoder`].

        Raises:
            ValueError: If the model does not read pictures alone, or its checkpoint lacks weights.
        """
        source = {"revision": revision, "trust_remote_code": trust_remote_code}
        model, loading = AutoModel.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True, **source)
        if model.main_input_name != "pixel_values":
            raise ValueError(
                f"'{name_or_path}' is a {type(model).__name__}, which is no encoder of pictures alone; name a vision "
                "backbone, or choose the encoder dual_encoder for a CLIP or SigLIP model."
            )
        # A classifier is saved without the pooler that AutoModel puts on top.
        poolers = {key for key in loading["missing_keys"] if key.startswith("pooler.")}
        check_weights(name_or_path, loading["missing_keys"] - poolers)
        return cls(model, AutoImageProcessor.from_pretrained(name_or_path, **source), has_pooler=not poolers)

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
