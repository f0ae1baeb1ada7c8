"""
Shows a recommender on a page in a browser: a history is chosen, recommendations and what they are made of are seen.

    mmesid demo --model runs/quickstart/recommender
    mmesid demo --model me/mine --prepared_dir me/mine-data
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import snapshot_download
from PIL import Image

from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor

from ..data.files import on_the_hub
from ..data.prepared import PreparedDataset
from ..demo.showcase import Showcase
from ..recommender.loading import loading_from
from ..running.arguments import CommandArguments, DeviceArguments, check_ranges, parse
from ..running.errors import run_as_script


@dataclass(kw_only=True)
class DemoArguments(CommandArguments, DeviceArguments):
    """
    Show a recommender on a page in a browser, on this machine alone unless told otherwise.

    Args:
        > Recommender

        model (`str`): Recommender: a directory written by `mmesid finetune`, or a repository on the Hub.
        prepared_dir (`str`, *optional*): Where its items' pictures are: a directory written by `mmesid prepare`, or a
            dataset repository on the Hub that was made from one. By default the directory `prepared` beside the
            recommender's, if there is one.
        top_k (`int`, *optional*, defaults to `10`): Items to recommend.

        > Server

        host (`str`, *optional*, defaults to `"127.0.0.1"`): Address to listen on; 0.0.0.0 lets other machines in.
        port (`int`, *optional*): Port to listen on; by default the first that is free from 7860 on.
    """

    model: str
    prepared_dir: str | None = None
    top_k: int = 10
    host: str = "127.0.0.1"
    port: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive=("top_k", "port"))


def main(argv: list[str] | None = None) -> None:
    arguments = parse(DemoArguments, argv)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("mmesid demo needs Gradio, which is not installed; pip install 'mmesid[demo]'.")
    device = PartialState(cpu=arguments.use_cpu).device
    data = items_of(arguments.model, arguments.prepared_dir)
    with loading_from(arguments.model):
        processor = MMESIDProcessor.from_pretrained(arguments.model)
        model = MMESIDForSequentialRecommendation.from_pretrained(arguments.model).to(device)
    showcase = Showcase(model, processor, pictures(data, processor))

    from ..demo.page import build_page, launch

    is_synthetic = data is not None and bool(data.statistics.get("synthetic"))
    page = build_page(showcase, arguments.model, is_synthetic, arguments.top_k)
    launch(page, server_name=arguments.host, server_port=arguments.port)


def items_of(model: str, prepared_dir: str | None) -> PreparedDataset | None:
    """The dataset whose pictures the page shows, if there is one."""
    if prepared_dir is None:
        beside = Path(model).absolute().parent / "prepared"
        return PreparedDataset.load(beside) if Path(model).is_dir() and beside.is_dir() else None
    if not Path(prepared_dir).is_dir():
        with on_the_hub(prepared_dir):
            prepared_dir = snapshot_download(prepared_dir, repo_type="dataset")
    return PreparedDataset.load(prepared_dir)


def pictures(data: PreparedDataset | None, processor: MMESIDProcessor) -> Callable[[int], Image.Image | None]:
    """Gives the picture of a row, `None` where the item has none; raises `ValueError` if the items are others than the
    recommender's, which may have got further ones since."""
    if data is None or "image" not in data.features:
        return lambda row: None
    if data.item_ids[1:] != processor.item_ids[: data.num_items]:
        raise ValueError(
            f"'{data.path}' holds other items than the recommender; give the --prepared_dir that it was trained on."
        )
    items = data.items().select_columns("image")
    return lambda row: items[row - 1]["image"] if row <= data.num_items else None


if __name__ == "__main__":
    run_as_script("demo", main)
