"""A small decoder and its tokenizer from scratch, for catalogues without a pretrained model at hand."""

import sys

from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast


SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<system>", "</system>", "<user>", "</user>", "<assistant>")

ATTENTION_DROPOUT = 0.2

# The frame of the prompt in the paper: a system turn, a user turn, and the opening of the assistant's.
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template. A terminal shows how far its training is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=PartialState().is_local_main_process and sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def num_attention_heads(hidden_size: int) -> int:
    """One attention head per 64 of the width, and at least one."""
    heads = max(hidden_size // 64, 1)
    # Rotary positions take an even width of each head.
    if hidden_size % (2 * heads):
        raise ValueError(f"hidden_size {hidden_size} is no multiple of {2 * heads}; choose one, such as 64 or 128.")
    return heads


def new_llama_config(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_hidden_layers: int, max_position_embeddings: int
) -> LlamaConfig:
    """The configuration of a Llama that fits `tokenizer`, with one attention head per 64 of its width."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads(hidden_size),
        attention_dropout=ATTENTION_DROPOUT,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
