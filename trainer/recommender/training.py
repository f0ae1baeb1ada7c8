"""Training SASRec, building a recommender around a decoder and fine-tuning it: what the stages do, as Python calls."""

import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Literal

import torch
from peft.utils.error import NoMatchingPeftModuleError
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from modeling_mmesid import (
    MMESIDConfig,
    MMESIDForSequentialRecommendation,
    MMESIDProcessor,
    MMRQVAEModel,
    SASRecConfig,
    SASRecForSequentialRecommendation,
)
from modeling_mmesid.checkpointing_mmesid import gguf_path
from modeling_mmesid.processing_mmesid import SYSTEM_PROMPT, USER_PROMPT

from ..data.prepared import PreparedDataset
from ..data.tables import EmbeddingTable, check_table
from ..data.windows import EvaluationHistories, TrainingWindows
from ..running.training import MADE_BY_CALL, early_stopping, fit, refuse_arguments, temporary_arguments
from .collators import HistoryCollator
from .mmesid_trainer import MMESIDTrainer, MMESIDTrainingArguments
from .sasrec_trainer import SASRecTrainer, SASRecTrainingArguments
from .score_weights import fit_score_weights
from .small_llama import new_llama_config, train_tokenizer


LORA_TARGET_MODULES = ("gate_proj", "up_proj", "down_proj")
LORA_DROPOUT = 0.05
VOCAB_SIZE = 4096
NUM_HIDDEN_LAYERS = 2

logger = logging.get_logger(__name__)
# Until `fit_score_weights` has chosen; the collaborative embeddings were trained on the very histories that they would
# be compared with.
SIMILARITY_WEIGHT = 2.0


def train_sasrec(
    data: PreparedDataset, config: SASRecConfig | None = None, args: SASRecTrainingArguments | None = None, **kwargs
) -> SASRecForSequentialRecommendation:
    """
    Trains SASRec, whose item embeddings are the collaborative modality, and keeps the epoch that ranks best on
    validation.

    Args:
        data ([`PreparedDataset`]): Users and items.
        config ([`SASRecConfig`], *optional*): Sizes and dropouts; `num_items` is taken from the data.
        args ([`SASRecTrainingArguments`], *optional*): Settings of the training. Without them checkpoints go to a
            temporary directory.
        **kwargs: Further arguments of [`SASRecTrainer`], such as `callbacks`, `compute_metrics` and `data_collator`.

    Returns:
        [`SASRecForSequentialRecommendation`] in evaluation mode.

    Raises:
        ValueError: If an argument of a `Trainer` has no meaning here.
    """
    with temporary_arguments(args, SASRecTrainingArguments) as args:
        trainer = sasrec_trainer(data, config or SASRecConfig(), args, **kwargs)
        fit(trainer)
    return trainer.model.eval()


def sasrec_trainer(
    data: PreparedDataset, config: SASRecConfig, args: SASRecTrainingArguments, **kwargs
) -> SASRecTrainer:
    """The trainer of [`train_sasrec`], for users who need more than the model."""
    refuse_arguments(kwargs, MADE_BY_CALL)
    callbacks = [*early_stopping(args), *(kwargs.pop("callbacks", None) or ())]
    set_seed(args.seed)
    config = deepcopy(config)
    config.num_items = data.num_items
    return SASRecTrainer(
        SASRecForSequentialRecommendation(config),
        args,
        train_dataset=TrainingWindows(data.sequences("train"), config.max_history),
        eval_dataset=EvaluationHistories(data.sequences("validation")),
        callbacks=callbacks,
        **kwargs,
    )


def build_recommender(
    data: PreparedDataset,
    tables: Mapping[str, EmbeddingTable] | None = None,
    quantizer: MMRQVAEModel | None = None,
    codes: Mapping[str, torch.Tensor] | None = None,
    sasrec: SASRecForSequentialRecommendation | None = None,
    *,
    backbone: str | os.PathLike | None = None,
    backbone_kwargs: dict | None = None,
    freeze_backbone: bool = False,
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_target_modules: Sequence[str] = LORA_TARGET_MODULES,
    hidden_size: int = 128,
    num_hidden_layers: int | None = None,
    user_prompt: str = USER_PROMPT,
    code_initialization: Literal["trained", "random"] = "trained",
    seed: int = 42,
    **config_kwargs,
) -> tuple[MMESIDForSequentialRecommendation, MMESIDProcessor]:
    """
    A recommender with its catalogue, ready to be fine-tuned, and its processor.

    Args:
        data ([`PreparedDataset`]): Users and items.
        tables (`Mapping[str, EmbeddingTable]`, *optional*): Embeddings of the modalities that items carry. Without any
            a free ID vector is all that an item has.
        quantizer ([`MMRQVAEModel`], *optional*): The quantizer that gave the codes; needed with `codes`.
        codes (`Mapping[str, torch.Tensor]`, *optional*): Semantic IDs of these modalities, `(items + 1, levels)`, -1
            where missing. Without them items have no semantic IDs.
        sasrec ([`SASRecForSequentialRecommendation`], *optional*): A trained one, whose scores are added to the
            decoder's; the recommender holds a copy.
        backbone (`str` or `os.PathLike`, *optional*): Pretrained decoder on the Hub or on disk. By default a new small
            Llama, trained in full.
        backbone_kwargs (`dict`, *optional*): Further arguments of `AutoModel.from_pretrained` for the backbone, such
            as `revision`, or `gguf_file` for a GGUF file in that repository or folder.
        freeze_backbone (`bool`, *optional*, defaults to `False`): Pretrained decoder: train the items alone.
        lora_r (`int`, *optional*, defaults to 8): Pretrained decoder: rank of LoRA; 0 trains the decoder in full.
        lora_alpha (`int`, *optional*, defaults to 16): Pretrained decoder: scale of LoRA.
        lora_target_modules (`Sequence[str]`, *optional*): Pretrained decoder: names of the linear layers that get an
            adapter; `["all-linear"]` stands for all of them. By default the feed-forward layers of a Llama.
        hidden_size (`int`, *optional*, defaults to 128): New Llama: width; one attention head per 64.
        num_hidden_layers (`int`, *optional*): Layers of the new Llama, 2 by default; of a pretrained decoder its first
            so many, all by default.
        user_prompt (`str`, *optional*): What the user turn says around `{items}`; the paper's sentence by default.
        code_initialization (`str`, *optional*, defaults to `"trained"`): Start code embeddings from the quantizer's
            code vectors, or at `"random"`.
        seed (`int`, *optional*, defaults to 42): Seed of the new weights.
        **config_kwargs: Further settings of [`MMESIDConfig`], such as `token_dropout` or `max_history`.

    Returns:
        `tuple[MMESIDForSequentialRecommendation, MMESIDProcessor]`.

    Raises:
        ValueError: If tables, codes, quantizer and SASRec do not fit each other or the data, or the backbone has none
            of the layers that are to get an adapter, or too few layers or positions.
    """
    for name in config_kwargs.keys() - MMESIDConfig.__annotations__:
        raise TypeError(f"MMESIDConfig has no setting '{name}'; correct its name.")
    tables = {modality: check_table(table, modality, data.num_items) for modality, table in (tables or {}).items()}
    codes = codes or {}
    if codes and (quantizer is None or sorted(codes) != sorted(tables)):
        raise ValueError(
            f"codes are given for {sorted(codes)} and tables for {sorted(tables)}; give both for the same modalities, "
            "and the quantizer that made the codes."
        )
    if sasrec is not None and sasrec.config.num_items != data.num_items:
        raise ValueError(
            f"The SASRec knows {sasrec.config.num_items} items, but the data have {data.num_items}; train it on these "
            "data."
        )
    if backbone is None:
        # With the prompt as often as there are items it cuts the prompt into words: a third of the tokens to read.
        tokenizer = train_tokenizer([*data.texts[1:], *[SYSTEM_PROMPT, user_prompt] * data.num_items], VOCAB_SIZE)
    else:
        where = {name: (backbone_kwargs or {}).get(name) for name in ("revision", "gguf_file")}
        if where["gguf_file"] is not None:
            gguf_path(backbone, where["gguf_file"], revision=where["revision"])
        tokenizer = AutoTokenizer.from_pretrained(backbone, **where, trust_remote_code=False)
    max_history = config_kwargs.get("max_history", MMESIDConfig.max_history)
    processor = MMESIDProcessor(
        tokenizer, data.item_ids[1:], data.titles[1:], user_prompt=user_prompt, max_history=max_history
    )
    prefix_ids, suffix_ids = processor.prompt_ids()
    settings = {
        "num_items": data.num_items,
        "modalities": list(tables),
        "embedding_dims": [table.embeddings.shape[1] for table in tables.values()],
        "num_quantizers": quantizer.config.num_quantizers if codes else 0,
        "prompt_prefix_ids": prefix_ids,
        "prompt_suffix_ids": suffix_ids,
        "similarity_weights": {name: SIMILARITY_WEIGHT for name in tables if name != "collaborative"},
        "sasrec_config": None if sasrec is None else deepcopy(sasrec.config),
    } | config_kwargs
    if codes:
        settings |= {name: getattr(quantizer.config, name) for name in ("codebook_size", "codebook_dim")}
    set_seed(seed)
    if backbone is None:
        longest = len(prefix_ids) + MMESIDConfig(**settings).max_history + len(suffix_ids)
        backbone_config = new_llama_config(tokenizer, hidden_size, num_hidden_layers or NUM_HIDDEN_LAYERS, longest)
        config = MMESIDConfig(backbone_config=backbone_config, **{"item_token_scale": hidden_size**0.5} | settings)
        model = MMESIDForSequentialRecommendation(config)
    else:
        try:
            model = MMESIDForSequentialRecommendation.from_backbone_pretrained(
                backbone,
                lora=None if freeze_backbone else lora_settings(lora_r, lora_alpha, lora_target_modules),
                freeze_backbone=freeze_backbone,
                num_hidden_layers=num_hidden_layers,
                backbone_kwargs=backbone_kwargs,
                **settings,
            )
        except NoMatchingPeftModuleError as error:
            raise ValueError(
                f"'{backbone}' has no layer called {', '.join(lora_target_modules)}; name some of its own as "
                "lora_target_modules, or give all-linear for every linear layer."
            ) from error
        check_positions(model, backbone)
    if sasrec is not None:
        model.scorers.sasrec.load_state_dict(sasrec.model.state_dict())
    model.initialize_items(
        data.frequencies,
        embeddings={name: table.embeddings for name, table in tables.items()},
        present={name: table.present for name, table in tables.items()},
        codes=dict(codes),
        code_vectors={name: quantizer.code_vectors(name) for name in tables}
        if codes and code_initialization == "trained"
        else None,
    )
    if backbone is None:
        # Its states have length one in each dimension from the start, and its settings were chosen with such scores.
        torch.nn.init.zeros_(model.model.user_head.log_scale)
    if codes:
        model.model.items.check_quantizer(quantizer, tables)
    return model, processor


def check_positions(model: MMESIDForSequentialRecommendation, name: str | os.PathLike) -> None:
    """Raises a `ValueError` if prompt and history are longer than a decoder has learnt positions (GPT-2, OPT), and
    warns where they are longer than one with rotary positions was trained on."""
    config = model.config
    around = len(config.prompt_prefix_ids) + len(config.prompt_suffix_ids)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None or around + config.max_history <= limit:
        return
    words = model.model.backbone.get_input_embeddings()
    tables = [module for module in model.model.backbone.modules() if isinstance(module, torch.nn.Embedding)]
    if any(table is not words and table.num_embeddings >= limit for table in tables):
        raise ValueError(
            f"'{name}' has {limit} positions, and prompt and history take {around + config.max_history}; set "
            f"max_history to {limit - around} at most, or shorten user_prompt."
        )
    logger.warning(
        f"'{name}' was trained on {limit} positions, and prompt and history take up to {around + config.max_history}; "
        "a shorter max_history or user_prompt may rank better."
    )


def training_plan(trainer: MMESIDTrainer) -> str:
    """What a training is going to take, for people: parameters, positions and steps of an epoch, memory."""
    model, args = trainer.model, trainer.args
    every, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    lengths, collator = trainer.train_dataset.lengths, trainer.data_collator
    packed = isinstance(collator, HistoryCollator) and collator.packed
    batches = math.ceil(len(lengths) / (args.train_batch_size * args.world_size))
    steps = math.ceil(batches / args.gradient_accumulation_steps)
    around = len(model.config.prompt_prefix_ids), len(model.config.prompt_suffix_ids)
    positions = epoch_positions(lengths, *around, batches * args.world_size, packed)
    weights = sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))
    return (
        f"{every / 1e6:,.1f} million parameters, {trained / 1e6:,.1f} million trained ({trained / every:.1%}). An "
        f"epoch has {positions:,} positions in {steps:,} steps. Weights, gradients and optimizer take "
        f"{training_memory(weights, trained) / 2**30:.2f} GiB; activations come on top."
    )


def epoch_positions(lengths: Sequence[int], prompt: int, closing: int, batches: int, packed: bool = True) -> int:
    """How many positions a decoder reads in an epoch over histories of these `lengths`: the items, `closing` tokens
    after each prefix, and the `prompt` before them, once per batch."""
    items = torch.tensor(lengths)
    # Packed, each item is read once; otherwise once for every prefix that holds it.
    read = items if packed or not closing else items * (items + 1) // 2
    return int((read + closing * items).sum()) + prompt * batches


def training_memory(weights: int, trained: int) -> int:
    """Bytes that a training holds all the time: the weights', and for each trained one a gradient in float32 and two
    moments of Adam."""
    return weights + 12 * trained


def lora_settings(r: int, alpha: int, target_modules: Sequence[str]) -> dict | None:
    """Arguments of [`peft.LoraConfig`]; `None` for no adapter."""
    if r == 0:
        return None
    # As a word, not in a list, it is no name of a layer to PEFT.
    targets = "all-linear" if list(target_modules) == ["all-linear"] else list(target_modules)
    return {"r": r, "lora_alpha": alpha, "lora_dropout": LORA_DROPOUT, "target_modules": targets}


def finetune(
    model: MMESIDForSequentialRecommendation,
    processor: MMESIDProcessor,
    data: PreparedDataset,
    args: MMESIDTrainingArguments | None = None,
    **kwargs,
) -> MMESIDForSequentialRecommendation:
    """
    Fine-tunes a recommender on all prefixes of the training sequences, keeps the epoch that ranks best on validation,
    and weighs the scores beside the decoder's by what ranks best there.

    Args:
        model ([`MMESIDForSequentialRecommendation`]): From [`build_recommender`]; trained in place, unless FSDP shards
            it.
        processor ([`MMESIDProcessor`]): Its processor, which checkpoints bring along.
        data ([`PreparedDataset`]): Users and items.
        args ([`MMESIDTrainingArguments`], *optional*): Settings of the training. Without them checkpoints go to a
            temporary directory.
        **kwargs: Further arguments of [`MMESIDTrainer`], such as `callbacks`, `compute_metrics` and `data_collator`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If an argument of a `Trainer` has no meaning here.
    """
    with temporary_arguments(args, MMESIDTrainingArguments) as args:
        trainer = finetune_trainer(model, processor, data, args, **kwargs)
        fit(trainer)
        model = trainer.model
    if data.has_targets:
        fit_score_weights(model, EvaluationHistories(data.sequences("validation")))
    return model.eval()


def finetune_trainer(
    model: MMESIDForSequentialRecommendation,
    processor: MMESIDProcessor,
    data: PreparedDataset,
    args: MMESIDTrainingArguments,
    flex_attention: bool = True,
    **kwargs,
) -> MMESIDTrainer:
    """The trainer of [`finetune`], for users who need more than the model; `flex_attention` as in
    [`MMESIDTrainer`]."""
    refuse_arguments(kwargs, MADE_BY_CALL)
    callbacks = [*early_stopping(args), *(kwargs.pop("callbacks", None) or ())]
    return MMESIDTrainer(
        model,
        args,
        train_dataset=TrainingWindows(data.sequences("train"), model.config.max_history),
        eval_dataset=EvaluationHistories(data.sequences("validation")),
        processing_class=processor,
        callbacks=callbacks,
        num_candidates=args.num_candidates,
        backbone_learning_rate=args.backbone_learning_rate,
        flex_attention=flex_attention,
        **kwargs,
    )
