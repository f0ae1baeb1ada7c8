"""What is settled before a pretrained decoder trains: learning rates, positions, what it will take."""

import numpy as np
import pytest

from mmesid.trainer.data.prepared import Sequences
from mmesid.trainer.recommender.mmesid_trainer import MMESIDTrainer, MMESIDTrainingArguments
from mmesid.trainer.recommender.training import check_positions, training_plan
from tests.modeling_mmesid.backbones import FAMILIES, model_of


LORA = {"r": 2, "target_modules": ["up_proj"]}


def sequences() -> Sequences:
    """Users with three items and one before the target."""
    return Sequences(["u", "v"], np.array([4, 5, 6, 4], dtype=np.int32), np.array([0, 3, 4]), np.array([7, 5]))


def trainer_of(model, tmp_path, **kwargs) -> MMESIDTrainer:
    args = MMESIDTrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-3, per_device_train_batch_size=1, eval_strategy="no"
    )
    return MMESIDTrainer(model, args, train_dataset=sequences(), **kwargs)


@pytest.mark.parametrize(
    ("lora", "given", "expected"), [(LORA, None, 3e-4), (LORA, 2e-5, 2e-5), (None, None, 1e-3), (None, 2e-5, 2e-5)]
)
def test_the_decoder_learns_at_a_rate_of_its_own(tmp_path, lora, given, expected):
    model = model_of(FAMILIES["llama"], lora=lora)
    optimizer = trainer_of(model, tmp_path, backbone_learning_rate=given).create_optimizer()
    rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates.pop(id(parameter)) == (expected if name.startswith("model.backbone.") else 1e-3), name
    assert not rates


def test_too_few_learnt_positions_are_refused_and_rotary_ones_warned_of(caplog):
    check_positions(model_of(FAMILIES["gpt2"], max_history=123), "a-gpt2")
    with pytest.raises(ValueError, match="'a-gpt2' has 128 positions, and prompt and history take 129; .* to 123"):
        check_positions(model_of(FAMILIES["gpt2"], max_history=124), "a-gpt2")
    check_positions(model_of(FAMILIES["llama"], max_history=123), "a-llama")
    assert "positions" not in caplog.text
    with caplog.at_level("WARNING", logger="mmesid"):
        check_positions(model_of(FAMILIES["llama"], max_history=124), "a-llama")


def test_what_a_training_takes_is_told(tmp_path):
    model = model_of(FAMILIES["llama"], lora=LORA)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    plan = training_plan(trainer_of(model, tmp_path))
    # Four items, four copies of two closing tokens, two batches with a prompt of three.
    assert "An epoch has 18 positions in 2 steps" in plan
    assert f"({trained / model.num_parameters():.1%})" in plan
