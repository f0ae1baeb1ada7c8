"""Weights of encoders that others published as `.bin`, a pickle, are read; code in them does not run."""

import pickle
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from mmesid.trainer.encoders.vision import VisionEncoder


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_in_a_pickle_are_read_and_code_in_it_does_not_run(tmp_path):
    torch.manual_seed(0)
    model = ViTModel(
        ViTConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
    )
    model.config.architectures = ["ViTModel"]
    model.config.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    weights = model.state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    loaded = VisionEncoder.from_pretrained(str(tmp_path)).model.state_dict()
    assert all(torch.equal(loaded[name].cpu(), weight) for name, weight in weights.items())

    torch.save(weights | {"pooler.dense.bias": Touch(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        VisionEncoder.from_pretrained(str(tmp_path))
    assert not (tmp_path / "ran").exists()
    # What the library, and nothing else, kept it from.
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()
