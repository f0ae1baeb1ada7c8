"""Sequential recommendation with a language model, multimodal embeddings and semantic IDs."""

from importlib.metadata import version


__version__ = version("mmesid")
