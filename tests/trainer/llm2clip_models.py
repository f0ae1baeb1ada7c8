"""Small models with the interfaces of the published LLM2CLIP: a Llama, a CLIP with code of its own, a processor."""

import importlib.util
import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, LlamaConfig, LlamaModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


WORDS = ["a red shirt", "blue", "a tall green lamp of steel and paper", "flag of white and black", "user\n\n"]
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# How Llama 3 divides a text before it looks for pieces of words.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The interface of the published repository: the library's CLIP configuration, a class of its own, no processor.
STAND_IN = """
import torch
from torch import nn
from transformers import CLIPConfig, CLIPVisionModel, PreTrainedModel


class LLM2CLIPModel(PreTrainedModel):
    config_class = CLIPConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_adapter = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.post_init()

    def _init_weights(self, module):
        pass

    def get_text_features(self, inputs):
        return self.text_adapter(inputs)

    def get_image_features(self, pixel_values):
        return self.visual_projection(self.vision_model(pixel_values).pooler_output)
"""


def llama_3_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 2, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def save_llama(directory: Path) -> str:
    tokenizer = llama_3_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def save_clip(directory: Path) -> str:
    (directory / "modeling_clip.py").write_text(STAND_IN)
    spec = importlib.util.spec_from_file_location("stand_in", directory / "modeling_clip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(text_config={"hidden_size": 16}, vision_config=vision, projection_dim=8)
    module.LLM2CLIPModel(config).save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    written["auto_map"] = {"AutoModel": "modeling_clip.LLM2CLIPModel"}
    (directory / "config.json").write_text(json.dumps(written))
    return str(directory)


def save_image_processor(directory: Path) -> str:
    """In a repository of its own, as for the published model."""
    CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(directory)
    return str(directory)
