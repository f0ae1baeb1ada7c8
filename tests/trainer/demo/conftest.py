import pytest
import torch
from PIL import Image

from mmesid.trainer.demo.showcase import Showcase
from mmesid.trainer.recommender.small_llama import train_tokenizer
from modeling_mmesid import MMESIDProcessor

from ...modeling_mmesid.conftest import NUM_ITEMS, new_model


# Titles as strangers may write them: each would set `window.harm` if it were taken for HTML or code.
HARM = [
    "<img src=x onerror=\"window.harm='img'\">",
    "<script>window.harm='script'</script>",
    '" onmouseover="window.harm=\'attribute\'" autofocus onfocus="window.harm=\'focus\'" x="',
    "${window.harm='template'} {{window.harm='braces'}} `${window.harm='backticks'}`",
]


@pytest.fixture(scope="session")
def showcase() -> Showcase:
    """40 items, of which the last is removed, odd ones have a picture, and four have harmful titles and an id."""
    ids = [f"i{row}" for row in range(1, NUM_ITEMS)] + ["<b>id</b>"]
    titles = [*HARM, *(f"Lamp number {row}" for row in range(len(HARM) + 1, NUM_ITEMS + 1))]
    model = new_model()
    torch.nn.init.normal_(model.model.items.id_embeddings.weight, std=0.5)
    model.remove_items([NUM_ITEMS])
    processor = MMESIDProcessor(train_tokenizer(["lamp"], vocab_size=300), ids, titles)
    return Showcase(model.eval(), processor, lambda row: Image.new("RGBA", (300, 200), "red") if row % 2 else None)
