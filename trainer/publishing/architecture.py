"""What a model is, in the rows that a card shows."""

from transformers import PreTrainedModel


def architecture(model: PreTrainedModel) -> dict:
    """Kind, sizes and parameters of a model that a stage makes, by what they are called in prose."""
    describe = {"mmesid": _recommender, "mmesid_sasrec": _sasrec, "mmrqvae": _quantizer}.get(
        model.config.model_type, _encoder
    )
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    return describe(model) | {"parameters": total} | ({"trained parameters": trained} if trained != total else {})


def _sasrec(model: PreTrainedModel) -> dict:
    return _reader(model.config, model.config)


def _reader(config, decoder) -> dict:
    return _transformer(decoder) | {"items read of a history": config.max_history}


def _transformer(config) -> dict:
    return {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "attention heads": config.num_attention_heads,
    }


def _recommender(model: PreTrainedModel) -> dict:
    config, backbone = model.config, model.model.backbone
    if config.lora is not None:
        targets = config.lora["target_modules"]
        where = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        training = f"frozen, with LoRA of rank {config.lora['r']} in {where}"
    else:
        is_trained = any(parameter.requires_grad for parameter in backbone.parameters())
        training = "trained in full" if is_trained else "frozen"
    rows = {"decoder": type(backbone).__name__.removesuffix("Model"), "training of the decoder": training}
    rows |= _reader(config, config.get_text_config())
    sources = ["ID vector"] * model.model.items.has_id_source + list(config.modalities)
    rows["an item's vector"] = "fusion of " + ", ".join(sources) if len(sources) > 1 else sources[0]
    if not config.share_item_table:
        rows["an item's token"] = "MLP over projections and codes, apart from its scoring vector"
    if config.modalities and config.num_quantizers:
        rows["semantic ID"] = f"{config.num_quantizers} codes of {config.codebook_size} for each modality"
    beside = {f"similarity of {name}": weight for name, weight in config.similarity_weights.items()}
    beside |= {} if config.sasrec_config is None else {"SASRec": config.sasrec_weight}
    if beside:
        rows["scores beside the decoder's"] = ", ".join(
            f"{name} (weight {value:.3g})" for name, value in beside.items()
        )
    return rows


def _quantizer(model: PreTrainedModel) -> dict:
    config = model.config
    widths = {name: str(width) for name, width in zip(config.modalities, config.embedding_dims)}
    return {
        "modalities (width of their embeddings)": ", ".join(f"{name} ({width})" for name, width in widths.items()),
        "levels": config.num_quantizers,
        "codes of each level": config.codebook_size,
        "width of a code vector": config.codebook_dim,
        "hidden layers of encoder and decoder": ", ".join(map(str, config.encoder_hidden_dims)) or "none",
        "objective": config.objective,
    }


def _encoder(model: PreTrainedModel) -> dict:
    config = model.config
    rows = {"kind": type(model).__name__.removesuffix("Model")}
    for part, name in (("text_config", "text"), ("vision_config", "picture")):
        sizes = _transformer(getattr(config, part))
        rows[f"{name} encoder"] = ", ".join(f"{value} {what}" for what, value in sizes.items() if what != "width")
        rows[f"width of the {name} encoder"] = sizes["width"]
    return rows
