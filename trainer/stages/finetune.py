"""
Fine-tunes the recommender on all prefixes of every training sequence and saves the checkpoint that ranks best on
validation.

    mmesid finetune --prepared_dir runs/quickstart/prepared --embeddings_dir runs/quickstart/embeddings \
        --quantizer_dir runs/quickstart/quantizer --output_dir runs/quickstart/recommender
    accelerate launch -m mmesid.trainer.stages.finetune --prepared_dir ... \
        --backbone_name_or_path meta-llama/Llama-3.2-1B ...
"""

import dataclasses
import importlib.util
from pathlib import Path

import torch
from accelerate import PartialState
from peft.utils.error import NoMatchingPeftModuleError
from transformers import AutoTokenizer, BitsAndBytesConfig, set_seed

from mmesid.hub_cards import model_licence, save_card
from modeling_mmesid import (
    MMESIDConfig,
    MMESIDForSequentialRecommendation,
    MMESIDProcessor,
    MMRQVAEConfig,
    MMRQVAEModel,
)

from ..data.prepared import PreparedDataset
from ..data.tables import load_table, table_encoders, table_path
from ..data.windows import EvaluationHistories, TrainingWindows
from ..quantizer.evaluation import encode_items
from ..quantizer.items import ItemTables
from ..recommender.description import describe_items
from ..recommender.mmesid_trainer import MMESIDTrainer
from ..recommender.small_llama import new_llama_config, train_tokenizer
from ..running.arguments import FinetuneArguments, parse
from ..running.errors import run_as_script
from ..running.records import StageRun
from ..running.training import early_stopping, fit, trainer_arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(FinetuneArguments, argv)
    modalities = content_modalities(arguments)
    run = StageRun("finetune", arguments, inputs=_inputs(arguments, modalities))
    if run.is_up_to_date():
        return
    data = PreparedDataset.load(arguments.prepared_dir)
    set_seed(arguments.seed)
    settings, tables = load_content(arguments, modalities, data.num_items) if modalities else ({}, {})
    processor, model = build(arguments, data, settings)
    model.initialize_items(data.frequencies, **tables)
    run.details.update(
        data=data.statistics,
        encoders=table_encoders(arguments.embeddings_dir, modalities),
        base_model=base_model(arguments.backbone_name_or_path),
        base_model_licence=model_licence(arguments.backbone_name_or_path, arguments.backbone_revision),
    )
    with run as staging:
        trainer = MMESIDTrainer(
            model,
            trainer_arguments(arguments, run),
            num_candidates=arguments.num_candidates,
            flex_attention=arguments.attn_implementation is None,
            train_dataset=TrainingWindows(data.sequences("train"), arguments.max_history, arguments.max_targets),
            eval_dataset=EvaluationHistories(data.sequences("validation")),
            processing_class=processor,
            callbacks=early_stopping(arguments),
        )
        trainer.draft_record = run.draft_record
        fit(trainer)
        run.metrics["validation"] = trainer.rank()
        if PartialState().is_main_process:
            model.save_pretrained(staging, merge_backbone=arguments.merge_backbone)
            processor.save_pretrained(staging)
            metrics, details = describe_items(model, processor, staging)
            run.metrics.update(metrics)
            run.details.update(
                details,
                parameters=model.num_parameters(),
                trainable_parameters=model.num_parameters(only_trainable=True),
                modalities=model.config.modalities,
            )
            save_card(staging, dataclasses.asdict(run.draft_record()))
    trainer.publish(arguments.output_dir)


def content_modalities(arguments: FinetuneArguments) -> list[str]:
    """The modalities that items carry: the given ones or all of the quantizer's; none for the ID-only baseline."""
    if not arguments.use_content:
        return []
    for name in ("embeddings_dir", "quantizer_dir"):
        if getattr(arguments, name) is None:
            raise ValueError(
                f"--{name} is not set; give the directory, or --use_content false for the ID-only baseline."
            )
    available = MMRQVAEConfig.from_pretrained(arguments.quantizer_dir).modalities
    unknown = sorted(set(arguments.modalities or []) - set(available))
    if unknown:
        raise ValueError(
            f"'{arguments.quantizer_dir}' has no modality '{unknown[0]}', only {', '.join(available)}; "
            "correct --modalities or quantize that table too."
        )
    return arguments.modalities or available


def base_model(name_or_path: str | None) -> str | None:
    """The decoder for the record: one in a folder by its whole path, which cannot be taken for a repository."""
    is_folder = name_or_path is not None and Path(name_or_path).is_dir()
    return str(Path(name_or_path).resolve()) if is_folder else name_or_path


def _inputs(arguments: FinetuneArguments, modalities: list[str]) -> dict[str, str | list[Path]]:
    inputs = {"prepared_dir": arguments.prepared_dir}
    if modalities:
        inputs["quantizer_dir"] = arguments.quantizer_dir
        inputs["embeddings_dir"] = [table_path(arguments.embeddings_dir, modality) for modality in modalities]
    return inputs


def load_content(
    arguments: FinetuneArguments, modalities: list[str], num_items: int
) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """What items are made of: settings of [`MMESIDConfig`], and the tables of `initialize_items` by kind and
    modality."""
    quantizer = MMRQVAEModel.from_pretrained(arguments.quantizer_dir)
    loaded = {
        modality: load_table(table_path(arguments.embeddings_dir, modality), modality, num_items)
        for modality in modalities
    }
    tables = {
        "embeddings": {modality: table.embeddings for modality, table in loaded.items()},
        "present": {modality: table.present for modality, table in loaded.items()},
        "codes": encode_items(quantizer, ItemTables(loaded)),
    }
    if arguments.code_initialization == "trained":
        tables["code_vectors"] = {modality: quantizer.code_vectors(modality) for modality in modalities}
    settings = {
        "modalities": modalities,
        "embedding_dims": [table.embeddings.shape[1] for table in loaded.values()],
        "num_quantizers": quantizer.config.num_quantizers,
        "codebook_size": quantizer.config.codebook_size,
        "codebook_dim": quantizer.config.codebook_dim,
    }
    return settings, tables


def build(
    arguments: FinetuneArguments, data: PreparedDataset, content_settings: dict
) -> tuple[MMESIDProcessor, MMESIDForSequentialRecommendation]:
    """The processor and the untrained recommender around a pretrained decoder, or a new one; its items are still
    empty."""
    if arguments.backbone_name_or_path is None:
        # With the prompt as often as there are items it cuts the prompt into words: a third of the tokens to read.
        prompt = [arguments.system_prompt, arguments.user_prompt]
        tokenizer = train_tokenizer([*data.texts[1:], *prompt * data.num_items], arguments.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(
            arguments.backbone_name_or_path, revision=arguments.backbone_revision
        )
    processor = MMESIDProcessor(
        tokenizer, data.item_ids[1:], data.titles[1:], arguments.system_prompt, arguments.user_prompt
    )
    prefix_ids, suffix_ids = processor.prompt_ids()
    settings = content_settings | {
        "num_items": data.num_items,
        "share_item_table": arguments.share_item_table and not arguments.paper,
        "use_item_ids": arguments.use_item_ids and not arguments.paper,
        "fusion_temperature": arguments.fusion_temperature,
        "token_dropout": arguments.token_dropout,
        "output_dropout": arguments.output_dropout,
        "prompt_prefix_ids": prefix_ids,
        "prompt_suffix_ids": suffix_ids,
        "max_history": arguments.max_history,
    }
    if arguments.backbone_name_or_path is None:
        backbone_config = new_llama_config(
            tokenizer,
            arguments.hidden_size,
            arguments.num_hidden_layers,
            arguments.num_attention_heads,
            arguments.attention_dropout,
            len(prefix_ids) + arguments.max_history + len(suffix_ids),
        )
        model = MMESIDForSequentialRecommendation(
            MMESIDConfig(backbone_config=backbone_config, item_token_scale=arguments.hidden_size**0.5, **settings)
        )
    else:
        try:
            model = MMESIDForSequentialRecommendation.from_backbone_pretrained(
                arguments.backbone_name_or_path,
                lora=lora_settings(arguments),
                freeze_backbone=arguments.freeze_backbone,
                backbone_kwargs=backbone_kwargs(arguments),
                **settings,
            )
        except NoMatchingPeftModuleError as error:
            raise ValueError(
                f"'{arguments.backbone_name_or_path}' has no layer called {', '.join(arguments.lora_target_modules)}; "
                "name some of its own as --lora_target_modules, or give all-linear for every linear layer."
            ) from error
    return processor, model


def lora_settings(arguments: FinetuneArguments) -> dict | None:
    """Arguments of [`peft.LoraConfig`]; `None` for no adapter."""
    if not arguments.lora_r or arguments.freeze_backbone:
        return None
    targets = arguments.lora_target_modules
    return {
        "r": arguments.lora_r,
        "lora_alpha": arguments.lora_alpha,
        "lora_dropout": arguments.lora_dropout,
        # As a word, not in a list, it is no name of a layer to PEFT.
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        "use_rslora": arguments.use_rslora,
        "use_dora": arguments.use_dora,
    }


def backbone_kwargs(arguments: FinetuneArguments) -> dict:
    """
    How `AutoModel.from_pretrained` loads the decoder.

    Raises:
        ValueError: If it is to be quantized, but bitsandbytes is not installed or it would be trained in full.
    """
    kwargs = {} if arguments.backbone_revision is None else {"revision": arguments.backbone_revision}
    if arguments.attn_implementation is not None:
        kwargs["attn_implementation"] = arguments.attn_implementation
    if arguments.quantization is not None:
        if not arguments.lora_r and not arguments.freeze_backbone:
            raise ValueError("--quantization nf4 freezes the decoder, which --lora_r 0 trains in full; drop either.")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "--quantization nf4 needs bitsandbytes, which is not installed; pip install 'mmesid[qlora]'."
            )
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=arguments.quantization,
            bnb_4bit_compute_dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
        )
    return kwargs


if __name__ == "__main__":
    run_as_script("finetune", main)
