"""What is settled before a pretrained decoder trains: learning rates, positions, what it will take."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, TrainerCallback, set_seed

from mmesid.trainer.data.prepared import Sequences
from mmesid.trainer.recommender.mmesid_trainer import MMESIDTrainer, MMESIDTrainingArguments
from mmesid.trainer.recommender.training import check_positions, training_plan
from modeling_mmesid import MMESIDForSequentialRecommendation
from modeling_mmesid.packing import pack_histories
from tests.modeling_mmesid.backbones import FAMILIES, PREFIX, model_of
from tests.modeling_mmesid.conftest import NUM_ITEMS


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


class Gradients(TrainerCallback):
    """What has accumulated when the optimizer is about to step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


# transformers has given it another name.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 0.1)])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_all_that_spares_memory_and_time_gives_the_plain_gradient(tmp_path, name, bf16, tolerance):
    """Packing, gradient checkpointing, accumulation and bf16 against one row per prefix of the whole batch."""
    # A decoder on disk, whose adapter has learnt something.
    set_seed(0)
    AutoModel.from_config(FAMILIES[name]).save_pretrained(tmp_path / "base")
    model = MMESIDForSequentialRecommendation.from_backbone_pretrained(
        tmp_path / "base",
        lora={"r": 2, "target_modules": "all-linear"},
        num_items=NUM_ITEMS,
        max_history=20,
        prompt_prefix_ids=PREFIX,
        prompt_suffix_ids=[7, 8],
        token_dropout=0.0,
        output_dropout=0.0,
    )
    model.initialize_items(torch.arange(NUM_ITEMS + 1))
    for parameter in model.model.backbone.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    rows = [[1 + (5 * user + 3 * step * step) % NUM_ITEMS for step in range(6)] for user in range(8)]
    inputs = pack_histories([row[:-1] for row in rows], [7, 8], [row[1:] for row in rows], packed=False)
    loss = model.train()(**inputs).loss
    loss.backward()
    plain = {key: one.grad for key, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()

    offsets = np.arange(0, 41, 5)
    histories = np.array([item for row in rows for item in row[:-1]], dtype=np.int32)
    train = Sequences([str(user) for user in range(8)], histories, offsets, np.array([row[-1] for row in rows]))
    args = MMESIDTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        gradient_checkpointing=True, bf16=bf16, max_grad_norm=0.0, eval_strategy="no", save_strategy="no",
        logging_strategy="steps", logging_steps=1, report_to="none",
    )  # fmt: skip
    gradients = Gradients()
    trainer = MMESIDTrainer(model, args, train_dataset=train)
    trainer.add_callback(gradients)
    trainer.train()
    assert trainer.data_collator.packed and model.model.backbone.is_activation_checkpointing
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=tolerance)
    assert gradients.found.keys() == plain.keys()
    for key, expected in plain.items():
        assert (gradients.found[key] - expected).norm() <= tolerance * expected.norm() + 1e-7, key
