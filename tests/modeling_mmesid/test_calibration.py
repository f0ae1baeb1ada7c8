"""A recommender starts alike around every decoder: item tokens as long as its words, and a loss of about ln N."""

import math

import pytest
import torch
from transformers import AutoModel, set_seed

from modeling_mmesid import MMESIDForSequentialRecommendation
from modeling_mmesid.packing import pack_histories

from .backbones import FAMILIES
from .conftest import NUM_ITEMS, item_tables, settings


# Items 6 to 25, which lack nothing, in an order that nothing learns.
SEQUENCES = [[6 + (7 * step * step + 3 * user) % 20 for step in range(9)] for user in range(30)]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory) -> dict[str, str]:
    """Decoders on disk that are as pretrained ones are: words and states of lengths that nobody expects."""
    paths = {}
    for name in ("llama", "qwen3", "gemma3", "smollm3", "gpt2"):
        set_seed(1)
        backbone = AutoModel.from_config(FAMILIES[name])
        with torch.no_grad():
            backbone.get_input_embeddings().weight.mul_(40.0)
            # Not the last of the modules in every family.
            norm = backbone.ln_f if name == "gpt2" else backbone.norm
            norm.weight.add_(30.0)
        paths[name] = str(tmp_path_factory.mktemp("decoders") / name)
        backbone.save_pretrained(paths[name])
    return paths


def recommender(path: str, **kwargs) -> MMESIDForSequentialRecommendation:
    set_seed(2)
    lora = {"r": 2, "target_modules": "all-linear"}
    model = MMESIDForSequentialRecommendation.from_backbone_pretrained(path, lora=lora, **settings(**kwargs))
    model.initialize_items(**item_tables())
    return model.eval()


@pytest.mark.parametrize("share_item_table", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "smollm3", "gpt2"])
def test_items_start_as_long_as_words_and_the_loss_at_ln_n(decoders, name, share_item_table):
    model = recommender(decoders[name], share_item_table=share_item_table)
    read = []
    # What enters the decoder, prompt and closing tokens and an item each, seen from inside.
    model.model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model.encode_histories([[row] for row in range(1, NUM_ITEMS + 1)])
    items = read[-1][:, 0].norm(dim=-1).mean()
    words = model.model.backbone.get_input_embeddings()(torch.arange(64)).norm(dim=-1).mean()
    torch.testing.assert_close(items, words, rtol=1e-4, atol=0)
    histories, targets = [s[:-1] for s in SEQUENCES], [s[1:] for s in SEQUENCES]
    loss = model(**pack_histories(histories, [7, 8], targets)).loss.item()
    assert loss == pytest.approx(math.log(NUM_ITEMS), abs=0.1)
    with torch.no_grad():
        model.model.user_head.log_scale.zero_()
        assert model(**pack_histories(histories, [7, 8], targets)).loss.item() > math.log(NUM_ITEMS) + 1


def test_the_learnt_scale_is_part_of_checkpoints_contributions_and_table(decoders, tmp_path):
    model = recommender(decoders["gemma3"])
    with torch.no_grad():
        model.model.user_head.log_scale.add_(0.7)
    expected = model.recommend(SEQUENCES, top_k=5, return_contributions=True)
    users = model.encode_histories(SEQUENCES)
    every = users @ model.item_table().T
    torch.testing.assert_close(every.gather(1, expected.items), expected.scores)
    torch.testing.assert_close(sum(expected.contributions.values()), expected.scores)
    model.save_pretrained(tmp_path / "tuned")
    model.save_pretrained(tmp_path / "merged", merge_backbone=True)
    tuned = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "tuned")
    merged = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "merged")
    for loaded in (tuned, merged):
        assert loaded.config.item_token_scale == model.config.item_token_scale
        assert torch.equal(loaded.model.user_head.log_scale, model.model.user_head.log_scale)
    assert torch.equal(tuned.recommend(SEQUENCES, top_k=5).scores, expected.scores)
    torch.testing.assert_close(merged.recommend(SEQUENCES, top_k=5).scores, expected.scores)


def test_a_scale_of_tokens_that_is_asked_for_stays(decoders):
    assert recommender(decoders["llama"], item_token_scale=3.0).config.item_token_scale == 3.0


def test_other_items_start_anew(decoders):
    model = recommender(decoders["llama"])
    first = model.config.item_token_scale
    with torch.no_grad():
        model.model.items.id_embeddings.weight.mul_(1000.0)
    model.initialize_items(**item_tables())
    assert model.config.item_token_scale < 0.5 * first
    given = recommender(decoders["llama"], item_token_scale=3.0)
    given.initialize_items(**item_tables())
    assert given.config.item_token_scale == 3.0


def test_the_start_leaves_the_generator_alone(decoders):
    model = recommender(decoders["llama"])
    torch.manual_seed(5)
    model.initialize_items(**item_tables())
    drawn = torch.rand(3)
    torch.manual_seed(5)
    model.model.items.initialize(*item_tables().values())
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("name", ["gemma3", "smollm3", "gpt2"])
def test_the_first_layers_alone_load_and_load_again(decoders, name, tmp_path):
    model = recommender(decoders[name], num_hidden_layers=1)
    whole = recommender(decoders[name])
    layers = "h" if name == "gpt2" else "layers"
    assert len(getattr(model.model.backbone, layers)) == 1
    del getattr(whole.model.backbone, layers)[1:]
    whole.model.backbone.config.num_hidden_layers = 1
    # Drawn after the adapters, of which there are more.
    whole.model.items.load_state_dict(model.model.items.state_dict())
    whole.config.item_token_scale = model.config.item_token_scale
    one, other = model.encode_histories(SEQUENCES[:3]), whole.encode_histories(SEQUENCES[:3])
    # The scales of the scores differ, for they were measured on other layers.
    torch.testing.assert_close(*(torch.nn.functional.normalize(users, dim=-1) for users in (one, other)))
    model.save_pretrained(tmp_path)
    loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode_histories(SEQUENCES[:3]), one)
    with pytest.raises(ValueError, match="num_hidden_layers is 3, and '.*' has 2; give 1 to 2"):
        recommender(decoders[name], num_hidden_layers=3)


@pytest.mark.parametrize("lora", [{"r": 2, "target_modules": "all-linear"}, None])
def test_what_is_trained_is_of_float32_around_a_decoder_that_is_published_in_bf16(decoders, lora, tmp_path):
    AutoModel.from_pretrained(decoders["gemma3"], dtype=torch.bfloat16).save_pretrained(tmp_path / "published")
    model = MMESIDForSequentialRecommendation.from_backbone_pretrained(tmp_path / "published", lora=lora, **settings())
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    assert {one.dtype for one in model.parameters() if not one.requires_grad} <= {torch.bfloat16}
    model.initialize_items(**item_tables())
    model.train()(**pack_histories([s[:-1] for s in SEQUENCES], [7, 8], [s[1:] for s in SEQUENCES])).loss.backward()
    model.save_pretrained(tmp_path / "tuned")
    loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "tuned")
    assert torch.equal(loaded.recommend(SEQUENCES).scores, model.eval().recommend(SEQUENCES).scores)
