"""Checkpoints of a recommender over a base model: the trained parts and the adapter are saved, the frozen backbone is
fetched by name."""

import os
from copy import deepcopy

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash, is_gguf_available

from .checkpoints import (
    HUB_ARGUMENTS,
    require_fit,
    require_public_base_model,
    require_room,
    told_of_damage,
    weight_files,
    weights_digest,
)
from .configuration_mmesid import MMESIDConfig
from .items_mmesid import MMESIDItems
from .pipeline_mmesid import SequentialRecommendationPipeline


# Arguments of `from_pretrained` that say where the checkpoint's own files are; the others of `HUB_ARGUMENTS` hold for
# the base model, too. `adapter_kwargs` is what `AutoModel` derives from them.
OWN_HUB_ARGUMENTS = ("revision", "subfolder", "force_download", "adapter_kwargs")


class BaseModelMixin:
    """For models whose `base_model` has a `backbone` that `config.base_model_name_or_path` may name."""

    @classmethod
    def from_backbone_pretrained(
        cls,
        pretrained_backbone_name_or_path: str | os.PathLike,
        *,
        freeze_backbone: bool = False,
        num_hidden_layers: int | None = None,
        backbone_kwargs: dict | None = None,
        **config_kwargs,
    ):
        """
        A new recommender around a pretrained decoder. Give it the catalogue with
        [`~MMESIDForSequentialRecommendation.initialize_items`].

        Args:
            pretrained_backbone_name_or_path (`str` or `os.PathLike`): Anything that `AutoModel.from_pretrained` loads.
            freeze_backbone (`bool`, *optional*, defaults to `False`): Without `lora`, leave the backbone as it is
                rather than train it in full: only items and fusion learn, and the checkpoint names the base model.
            num_hidden_layers (`int`, *optional*): Take the first so many layers of the decoder; all by default.
            backbone_kwargs (`dict`, *optional*): Further arguments of `AutoModel.from_pretrained`, such as `revision`,
                `dtype`, `gguf_file`, `quantization_config`, `device_map` or `attn_implementation`. What is trained in
                full is loaded in float32 unless `dtype` says otherwise, and an adapter is always of float32.
            **config_kwargs: Settings of [`MMESIDConfig`]. With `lora` the backbone is frozen under an adapter and the
                checkpoint names it; without, it is trained in full and saved with the rest.
        """
        for name in config_kwargs.keys() - MMESIDConfig.__annotations__:
            raise TypeError(f"MMESIDConfig has no setting '{name}'; arguments of the decoder go to backbone_kwargs.")
        # Asked for by name or not run: the library would ask on standard input.
        backbone_kwargs = {"use_safetensors": True, "trust_remote_code": False} | (backbone_kwargs or {})
        is_frozen = freeze_backbone or config_kwargs.get("lora") is not None
        if not is_frozen and "torch_dtype" not in backbone_kwargs:
            # As decoders are published, in bf16, small steps of the optimizer would be rounded away.
            backbone_kwargs.setdefault("dtype", torch.float32)
        hub_kwargs = {name: backbone_kwargs[name] for name in HUB_ARGUMENTS if name in backbone_kwargs}
        gguf_file = backbone_kwargs.get("gguf_file")
        if gguf_file is None:
            config_file = cached_file(pretrained_backbone_name_or_path, CONFIG_NAME, **hub_kwargs)
        else:
            config_file = gguf_path(pretrained_backbone_name_or_path, gguf_file, **hub_kwargs)
        # A branch moves on. Only what came from a Hub has a commit.
        backbone_kwargs["revision"] = extract_commit_hash(config_file, None) or backbone_kwargs.get("revision")
        backbone = _load_backbone(pretrained_backbone_name_or_path, num_hidden_layers, **backbone_kwargs)
        if is_frozen:
            # A folder by its whole path, for the checkpoint will be loaded from elsewhere.
            is_folder = os.path.isdir(pretrained_backbone_name_or_path)
            name_or_path = os.fspath(pretrained_backbone_name_or_path)
            config_kwargs["base_model_name_or_path"] = os.path.abspath(name_or_path) if is_folder else name_or_path
            config_kwargs["base_model_revision"] = backbone_kwargs["revision"]
            config_kwargs["base_model_file"] = gguf_file
            config_kwargs["base_model_digest"] = base_model_digest(name_or_path, gguf_file) if is_folder else None
        # A copy: nested, a live configuration loses its attention implementation, and with it the causal mask.
        backbone_config = deepcopy(backbone.config)
        # Often a path of this machine, which a published checkpoint must not reveal.
        backbone_config._name_or_path = ""
        model = cls(MMESIDConfig(backbone_config=backbone_config, **config_kwargs), backbone=backbone)
        model.to_backbone_device()
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        Loads a checkpoint. If it names a base model, the frozen backbone is loaded by that name, with all keyword
        arguments that are neither settings of [`MMESIDConfig`] nor tell where the checkpoint is: `dtype`,
        `quantization_config`, `device_map`, `attn_implementation`, `trust_remote_code` and the like. Every checkpoint
        means by `dtype` the precision of the decoder; items stay in float32.

        Raises an `OSError` if the checkpoint holds no safetensors or its base model cannot load, a `TypeError` for
        a keyword that nothing knows, and a `ValueError` if a weight is missing or there is one too many.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if config is None:
            config = MMESIDConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        config = deepcopy(config)
        for name in MMESIDConfig.__annotations__.keys() & kwargs:
            setattr(config, name, kwargs.pop(name))
        config.validate()
        if config.base_model_name_or_path is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        with_loading_info = kwargs.pop("output_loading_info", False)
        files = weight_files(pretrained_model_name_or_path, **hub_kwargs)
        backbone_kwargs = {name: value for name, value in kwargs.items() if name not in OWN_HUB_ARGUMENTS}
        if config.base_model_file is not None:
            backbone_kwargs["gguf_file"] = config.base_model_file
        try:
            backbone = _load_backbone(
                config.base_model_name_or_path,
                config.get_text_config().num_hidden_layers,
                **{"use_safetensors": True, "revision": config.base_model_revision, "trust_remote_code": False}
                | backbone_kwargs,
            )
        except OSError as error:
            if os.path.isabs(config.base_model_name_or_path) and not os.path.isdir(config.base_model_name_or_path):
                raise OSError(
                    f"'{pretrained_model_name_or_path}' needs its base model in the folder "
                    f"'{config.base_model_name_or_path}', which is not there; put it back, or give the folder as "
                    "base_model_name_or_path."
                ) from error
            raise OSError(
                f"'{pretrained_model_name_or_path}' needs its base model '{config.base_model_name_or_path}', which "
                f"cannot be loaded; if its owner asks for it, accept the terms there and `hf auth login`. {error}"
            ) from error
        folder, digest = config.base_model_name_or_path, config.base_model_digest
        is_folder = digest is not None and os.path.isdir(folder)
        if is_folder and base_model_digest(folder, config.base_model_file) != digest:
            raise ValueError(
                f"The base model in '{folder}' is another than '{pretrained_model_name_or_path}' was trained on; put "
                "that one back, or give its folder as base_model_name_or_path."
            )
        if any(parameter.is_meta for parameter in backbone.parameters()):
            raise ValueError(f"A part of '{config.base_model_name_or_path}' is offloaded; give a device_map without.")
        require_room(pretrained_model_name_or_path, lambda: MMESIDItems(config), files, part="items.")
        model = cls(config, backbone=backbone)
        with told_of_damage(f"The checkpoint '{pretrained_model_name_or_path}'"):
            weights = {name: weight for path in files for name, weight in load_file(path).items()}
        if model.base_model is model:
            prefix = f"{model.base_model_prefix}."
            weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        keys = model.load_state_dict(weights, strict=False)
        missing = set(keys.missing_keys) - model._keys_to_ignore_on_save
        require_fit(pretrained_model_name_or_path, missing, keys.unexpected_keys)
        model.to_backbone_device()
        model.eval()
        nothing: dict = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, nothing) if with_loading_info else model

    def to_backbone_device(self) -> None:
        """Puts what is new where the backbone was loaded, `device_map` or four bits: not always where models start."""
        backbone = self.base_model.backbone
        for part in (*self.children(), *self.base_model.children()):
            if part not in (self.base_model, backbone):
                part.to(backbone.device)

    def save_pretrained(self, save_directory: str | os.PathLike, *, merge_backbone: bool = False, **kwargs) -> None:
        """
        Saves as [`~transformers.PreTrainedModel.save_pretrained`] does, with the code of the pipeline, and the LoRA
        adapter also to `adapter/` in PEFT's format.

        Args:
            merge_backbone (`bool`, *optional*, defaults to `False`): Write a self-contained checkpoint instead: the
                adapter merged into the backbone, no base model to fetch.

        A quantized backbone cannot be merged, for its weights cannot hold the sum: that raises a `ValueError`.
        """
        if merge_backbone and self.config.base_model_name_or_path is not None:
            return self._merged_for_saving().save_pretrained(save_directory, **kwargs)
        super().save_pretrained(save_directory, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        custom_object_save(SequentialRecommendationPipeline, save_directory)
        if self.config.lora is not None:
            backbone = type(self.base_model.backbone)
            adapter_config = LoraConfig(
                **self.config.lora,
                # It gives hidden states, as PEFT calls a model without a head.
                task_type="FEATURE_EXTRACTION",
                auto_mapping={"base_model_class": backbone.__name__, "parent_library": backbone.__module__},
                base_model_name_or_path=self.config.base_model_name_or_path,
                revision=self.config.base_model_revision,
                inference_mode=True,
            )
            adapter_dir = os.path.join(save_directory, "adapter")
            adapter_config.save_pretrained(adapter_dir)
            weights = get_peft_model_state_dict(self.base_model.backbone)
            weights = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
            save_file(weights, os.path.join(adapter_dir, "adapter_model.safetensors"), metadata={"format": "pt"})

    def load_adapter(self, peft_model_id: str | os.PathLike, **hub_kwargs) -> None:
        """
        Loads an adapter that `save_pretrained` wrote, into the backbone and in place of the weights that its adapter
        has.

        Args:
            peft_model_id (`str` or `os.PathLike`): The folder `adapter` of a checkpoint, or a repository on the Hub,
                then with `subfolder="adapter"`.
            hub_kwargs (`dict`, *optional*): `subfolder`, `revision`, `token` and the like.

        Raises:
            ValueError: If the model has no adapter, or one of other layers or another rank.
        """
        if self.config.lora is None:
            raise ValueError(
                "This recommender has no adapter, so none can be loaded into it; load the whole checkpoint that the "
                "adapter belongs to."
            )
        weights = load_peft_weights(os.fspath(peft_model_id), device="cpu", **hub_kwargs)
        weights = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
        own = get_peft_model_state_dict(self.base_model.backbone)
        require_fit(peft_model_id, own.keys() - weights.keys(), weights.keys() - own.keys())
        for name, weight in weights.items():
            if weight.shape != own[name].shape:
                raise ValueError(
                    f"'{name}' has the shape {tuple(weight.shape)} in '{peft_model_id}' and {tuple(own[name].shape)} "
                    "in this recommender; load an adapter of the same rank and decoder."
                )
        set_peft_model_state_dict(self.base_model.backbone, weights)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As [`~transformers.PreTrainedModel.push_to_hub`]; refuses a base model that is a folder on this machine."""
        require_public_base_model(self.config.base_model_name_or_path)
        return super().push_to_hub(repo_id, **kwargs)

    @torch.no_grad()
    def _merged_for_saving(self):
        """The same weights without base model and adapter, shared with this model where nothing was merged. Fit to be
        saved alone: buffers that no checkpoint holds (`rotary_emb.inv_freq`) have no values."""
        weights = self.state_dict()
        for name, layer in self.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            for key in [key for key in weights if key.startswith(f"{name}.")]:
                del weights[key]
            # A copy: the adapter goes on training in this one.
            merged = deepcopy(layer)
            merged.merge()
            weights |= {f"{name}.{key}": tensor for key, tensor in merged.get_base_layer().state_dict().items()}
        quantized = next(
            (name for name in weights if "quant_state" in name or weights[name].dtype == torch.uint8), None
        )
        if quantized is not None:
            raise ValueError(
                f"The backbone is quantized ('{quantized}'), so nothing can be merged into it; load the checkpoint "
                "without quantization_config and save that with merge_backbone=True."
            )
        config = deepcopy(self.config)
        config.lora = config.base_model_name_or_path = config.base_model_file = None
        config.base_model_revision = config.base_model_digest = None
        with torch.device("meta"):
            model = type(self)(config)
        model.load_state_dict(weights, assign=True)
        return model


def gguf_path(name_or_path: str | os.PathLike, gguf_file: str, **hub_kwargs) -> str:
    """Where a GGUF file of a repository or folder lies on this machine; raises a `ValueError` if the package that
    reads such files is not installed."""
    if not is_gguf_available():
        raise ValueError(
            f"'{gguf_file}' of '{name_or_path}' needs the package gguf to be read, which is not installed; "
            "pip install 'mmesid[gguf]'."
        )
    return cached_file(name_or_path, gguf_file, **hub_kwargs)


def base_model_digest(folder: str, gguf_file: str | None) -> str:
    """SHA-256 of the weights of a base model in a folder."""
    return weights_digest(weight_files(folder) if gguf_file is None else [os.path.join(folder, gguf_file)])


def _load_backbone(
    name_or_path: str | os.PathLike, num_hidden_layers: int | None, *, gguf_file: str | None = None, **kwargs
) -> PreTrainedModel:
    """The decoder of that name, its first `num_hidden_layers` layers if that is given."""
    names = (*HUB_ARGUMENTS, "trust_remote_code", "code_revision")
    where, source = {name: kwargs[name] for name in names if name in kwargs}, name_or_path
    if gguf_file is not None:
        if kwargs.get("quantization_config") is not None:
            raise ValueError(f"'{gguf_file}' has a quantization of its own; leave out quantization_config.")
        path = gguf_path(name_or_path, gguf_file, **{name: where[name] for name in HUB_ARGUMENTS if name in where})
        # By its whole path, for the library prefers a file of that name in the working directory; and as numbers, for
        # neither adapters nor merging know its blocks.
        source, where = os.path.dirname(path), {"gguf_file": path}
        kwargs |= where | {"quantization_config": GgufConfig(dequantize=True)}
        with told_of_damage(f"The GGUF file '{path}'"):
            kwargs["config"] = AutoConfig.from_pretrained(source, **where)
    if num_hidden_layers is not None:
        config = kwargs.get("config") or AutoConfig.from_pretrained(source, **where)
        if config.get_text_config().num_hidden_layers != num_hidden_layers:
            kwargs["config"] = _keep_layers(config, num_hidden_layers, name_or_path)
    backbone = AutoModel.from_pretrained(source, **kwargs)
    for module in backbone.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Such a CPU lets bitsandbytes pack four bits in evaluation; no gradient passes them from then on.
            module.support_avx512bf16_for_cpu = False
    return backbone


def _keep_layers(config: PreTrainedConfig, count: int, name_or_path: str | os.PathLike) -> PreTrainedConfig:
    """Cuts a configuration to the first `count` layers, with its lists that have an entry for each (`layer_types`)."""
    text_config = config.get_text_config()
    available = text_config.num_hidden_layers
    if not 1 <= count <= available:
        raise ValueError(f"num_hidden_layers is {count}, and '{name_or_path}' has {available}; give 1 to {available}.")
    for name, value in list(vars(text_config).items()):
        if isinstance(value, list) and len(value) == available:
            setattr(text_config, name, value[:count])
    text_config.num_hidden_layers = count
    return config
