"""Loading of a recommender by a directory or a name."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ..data.files import on_the_hub


def loading_from(model_dir: str) -> AbstractContextManager:
    """Surrounds the loading of a recommender; raises `FileNotFoundError` if `model_dir` is a directory without one, or
    neither a directory nor a repository that the Hub gives."""
    if not Path(model_dir).is_dir():
        return on_the_hub(model_dir)
    for name in ("config.json", "processor_config.json"):
        if not (Path(model_dir) / name).is_file():
            raise FileNotFoundError(
                f"'{model_dir}' holds no recommender, it lacks '{name}'; name a directory that `mmesid finetune` "
                "wrote."
            )
    return nullcontext()
