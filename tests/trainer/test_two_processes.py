"""Trainings in two processes are those of one, at an equal batch of all processes together; so they are where FSDP
parts the model, whose checkpoints become ordinary ones."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModel

from mmesid.trainer.running import sharding
from mmesid.trainer.running.launch import packaged_configs
from mmesid.trainer.running.sharding import convert_checkpoint
from modeling_mmesid import SASRecConfig, SASRecForSequentialRecommendation

from ..processes import run_in_two, run_python


PROGRAM = (Path(__file__).parents[1] / "parallel_trainings.py").read_text(encoding="utf-8")
KINDS = ("sasrec", "finetune", "quantize", "encoder")


@pytest.fixture(scope="module")
def losses_of_one(tmp_path_factory) -> dict[str, list[float]]:
    output = tmp_path_factory.mktemp("one") / "losses.json"
    finished = run_python("-c", PROGRAM, output, "16", *KINDS)
    assert finished.returncode == 0, finished.stderr
    losses = json.loads(output.read_text())
    assert losses.pop("processes") == 1
    return losses


def require_equal(output: Path, expected: dict[str, list[float]], kinds: tuple[str, ...]) -> None:
    found = json.loads(output.read_text())
    assert found.pop("processes") == 2 and sorted(found) == sorted(kinds)
    for kind, losses in found.items():
        assert len(losses) >= 3 and losses == pytest.approx(expected[kind], abs=1e-5), kind


def test_two_processes_have_the_losses_of_one(losses_of_one, tmp_path):
    """Step by step: a target, an item or a pair that counted twice, or was compared with half of the others, would
    show in the first loss, and a gradient of another mean in the second."""
    finished = run_in_two("-c", PROGRAM, tmp_path / "losses.json", "8", *KINDS)
    assert finished.returncode == 0, finished.stderr
    require_equal(tmp_path / "losses.json", losses_of_one, KINDS)


# Accelerate has FSDP for accelerators alone: these processes call themselves such, and compute on the CPU.
PRETEND = """
import torch
from accelerate import DistributedType, PartialState
torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *arguments: ("gloo", DistributedType.MULTI_GPU)
"""

SAVE_AND_RESUME = """
from mmesid.trainer.running.sharding import whole_model
from torch.distributed.tensor import DTensor

def weights_after(seed, **kwargs):
    set_seed(seed)
    trainer = finetune(save_strategy="steps", save_steps=2)
    trainer.train(**kwargs)
    assert any(isinstance(weight, DTensor) for weight in trainer.model.parameters())
    return whole_model(trainer.model)

whole = weights_after(0)
again = weights_after(1, resume_from_checkpoint=str(output.with_suffix("") / "checkpoint-2"))
for name, weight in again.state_dict().items():
    torch.testing.assert_close(weight, whole.state_dict()[name])
if PartialState().is_main_process:
    again.save_pretrained(output.parent / "whole")
try:
    quantize()
except ValueError as error:
    assert "--accelerate_config ddp" in str(error)
else:
    raise AssertionError("a quantizer was parted")
"""


def test_fsdp_trains_saves_and_resumes_and_leaves_ordinary_checkpoints(losses_of_one, tmp_path):
    settings = yaml.safe_load(packaged_configs()["fsdp2"].read_text())["fsdp_config"]
    environment = {name.upper(): str(value) for name, value in settings.items()}
    environment |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
    program = PRETEND + PROGRAM + SAVE_AND_RESUME
    kinds = ("sasrec", "finetune")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        finished = run_in_two("-c", program, tmp_path / "losses.json", "8", *kinds)
    assert finished.returncode == 0, finished.stderr
    require_equal(tmp_path / "losses.json", losses_of_one, kinds)

    convert_checkpoint(tmp_path / "losses" / "checkpoint-4", tmp_path / "converted")
    whole, converted = (AutoModel.from_pretrained(tmp_path / name) for name in ("whole", "converted"))
    assert whole.recommend([[1, 2, 3]]).items.shape == (1, 10)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, converted.state_dict()[name]), name
    assert not list(tmp_path.glob(".converted*"))


def test_weights_that_zero3_has_parted_are_gathered_where_they_are_read(monkeypatch):
    """By a stand-in for DeepSpeed, whose own parts are no whole numbers of rows: it was not run."""
    model = SASRecForSequentialRecommendation(SASRecConfig(num_items=9, hidden_size=8, max_history=4)).eval()
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}

    @contextmanager
    def gathered(parameters):
        for parameter in parameters:
            parameter.data = whole[parameter]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    whole = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in whole:
        parameter.data = torch.empty(0)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered)))
    monkeypatch.setattr(sharding, "is_deepspeed_zero3_enabled", lambda: True)
    with sharding.unsharded(model):
        assert model.item_table().shape == (10, 8)
    assert not len(model.item_table())
    again = sharding.whole_model(model)
    assert type(again) is SASRecForSequentialRecommendation
    assert all(torch.equal(weight, expected[name]) for name, weight in again.state_dict().items())


def test_what_cannot_be_converted_is_named(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there' exists already"):
        convert_checkpoint(tmp_path, tmp_path / "there")
    with pytest.raises(ValueError, match="holds neither a directory pytorch_model_fsdp_0 nor a file latest"):
        convert_checkpoint(tmp_path, tmp_path / "new")
    (tmp_path / "latest").write_text("global_step1")
    with pytest.raises(ValueError, match="of DeepSpeed, which is not installed here; pip install deepspeed, or"):
        convert_checkpoint(tmp_path, tmp_path / "new")
