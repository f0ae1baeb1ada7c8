from functools import partial

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaModel

from modeling_mmesid import MMESIDConfig, MMESIDForSequentialRecommendation, MMESIDModel
from modeling_mmesid.packing import pack_histories

from .conftest import HISTORIES, NUM_ITEMS, item_tables, llama_config, new_model, settings


LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]}


def lora_model(base_model: str, **kwargs) -> MMESIDForSequentialRecommendation:
    model = MMESIDForSequentialRecommendation.from_backbone_pretrained(base_model, lora=LORA | kwargs, **settings())
    model.initialize_items(**item_tables())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def test_only_the_latest_items_are_read_but_all_are_masked():
    model = new_model(max_history=3)
    long = [11, 12, 13, 1, 2, 3]
    torch.testing.assert_close(model.encode_histories([long]), model.encode_histories([[1, 2, 3]]))
    everything = model.recommend([long], top_k=NUM_ITEMS - len(long)).items
    assert not set(everything[0].tolist()) & set(long)


@pytest.mark.parametrize(
    ("share_item_table", "use_item_ids", "use_embeddings"),
    [(True, True, True), (True, False, True), (False, True, True), (False, False, True), (True, True, False)],
)
def test_item_table_is_the_fusion_of_method_md(share_item_table, use_item_ids, use_embeddings):
    """
    t_i = S (g_{i,0} w_i + sum_m g_{i,m} (W_m x_m + b_m [+ q_m])) over S sources, item by item from the parameters.
    """
    settings = {"share_item_table": share_item_table, "use_item_ids": use_item_ids, "use_embeddings": use_embeddings}
    model = new_model(**settings)
    table, items, fusion = model.item_table(), model.model.items, model.model.items.fusion
    logs = torch.log1p(torch.arange(NUM_ITEMS + 1).float())
    num_sources = 2 + (use_item_ids or not share_item_table)
    for item in range(1, NUM_ITEMS + 1):
        norm = (logs[item] - logs[1]) / (logs[-1] - logs[1])
        logits = fusion.output(torch.nn.functional.gelu(fusion.hidden(norm[None]))).tolist()
        vectors, weights = [], []
        if use_item_ids or not share_item_table:
            vectors.append(items.id_embeddings.weight[item])
            weights.append(np.exp(logits[0]))
            logits = logits[1:]
        for logit, modality in zip(logits, items.modalities.values(), strict=True):
            if not modality.present[item]:
                continue
            vector = torch.zeros(16)
            if use_embeddings:
                x = (modality.embeddings[item] - modality.center) * modality.scale
                vector = modality.projection.weight @ x + modality.projection.bias
            if share_item_table:
                vector = vector + sum(
                    modality.code_vectors[level, code] for level, code in enumerate(modality.codes[item])
                )
            vectors.append(vector)
            weights.append(np.exp(logit))
        expected = torch.zeros(16)
        if weights:
            shares = num_sources * np.array(weights) / sum(weights)
            expected = sum(share * vector for share, vector in zip(shares.tolist(), vectors, strict=True))
        torch.testing.assert_close(table[item], expected, rtol=1e-4, atol=1e-5)
    assert table[0].abs().max() == 0


def test_paper_token_is_an_mlp_over_projections_and_codes():
    model = new_model(share_item_table=False, use_item_ids=False)
    parts = []
    for modality in model.model.items.modalities.values():
        x = (modality.embeddings[10] - modality.center) * modality.scale
        parts += [
            modality.projection(x),
            sum(modality.code_vectors[level, code] for level, code in enumerate(modality.codes[10])),
        ]
    expected = torch.nn.functional.gelu(model.model.items.token_mlp(torch.cat(parts)))
    torch.testing.assert_close(model.model.items.tokens(torch.tensor([10]))[0], expected)


def test_sources_have_one_weight_for_all_items_where_frequency_does_not_count():
    rows, present = torch.arange(1, NUM_ITEMS + 1), torch.ones(NUM_ITEMS, 3, dtype=torch.bool)
    for counts in (True, False):
        fusion = new_model(fuse_by_frequency=counts).model.items.fusion
        torch.nn.init.normal_(fusion.output.weight)
        weights = fusion(rows, present)
        assert torch.equal(weights, weights[:1].expand_as(weights)) != counts


@pytest.mark.parametrize("share_item_table", [True, False])
def test_a_missing_embedding_is_a_mask_not_a_value(share_item_table):
    model = new_model(share_item_table=share_item_table)
    before = model.item_table(), model.model.items.tokens(torch.arange(1, NUM_ITEMS + 1))
    text = model.model.items.modalities["text"]
    text.embeddings[3] = 100.0
    text.codes[3] = 1
    after = model.item_table(), model.model.items.tokens(torch.arange(1, NUM_ITEMS + 1))
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("codebook_dim", [16, 10, 24])
def test_codes_start_at_the_distances_that_the_quantizer_kept(codebook_dim):
    """The backbone is 16 wide, and sums of three of six vectors each vary in 15 directions at most."""
    model = new_model(codebook_dim=codebook_dim)
    text, tables = model.model.items.modalities["text"], item_tables(codebook_dim=codebook_dim)
    items = text.present.nonzero()[:, 0]
    levels = range(3)
    summed = sum(tables["code_vectors"]["text"][level][tables["codes"]["text"][items, level]] for level in levels)
    embedded = text.embed_codes(items).detach()
    before, after = torch.cdist(summed, summed), torch.cdist(embedded, embedded)
    # Items may share all their codes.
    factors = after[before > 1e-2] / before[before > 1e-2]
    torch.testing.assert_close(factors, factors.mean().expand_as(factors), rtol=1e-3, atol=0)


@pytest.mark.parametrize("codebook_dim", [16, 8])
def test_codes_of_items_that_are_all_alike_are_zero(codebook_dim):
    model = new_model(codebook_dim=codebook_dim)
    text = model.model.items.modalities["text"]
    with torch.no_grad():
        text.initialize_codes(torch.zeros_like(text.code_vectors), 1.0)
    assert not text.code_vectors.any() and model.item_table().isfinite().all()


def test_code_vectors_start_trained_and_stay_trainable():
    """Trained up to one factor per modality, which makes the sums of code vectors as long as ID vectors."""
    model = new_model()
    text, start = model.model.items.modalities["text"], item_tables()["code_vectors"]["text"]
    factor = (text.code_vectors / start).detach()
    assert factor.min() > 0
    torch.testing.assert_close(factor, factor.flatten()[0].expand_as(factor))
    lengths = text.embed_codes(text.present.nonzero()[:, 0]).norm(dim=-1)
    assert lengths.mean().item() == pytest.approx(0.02 * 16**0.5, rel=1e-5)
    model(**pack_histories([[1, 2]], [7], [[2, 3]])).loss.backward()
    assert text.code_vectors.grad.abs().sum() > 0


def test_id_only_model_needs_no_content():
    model = new_model(modalities=[], embedding_dims=[])
    torch.testing.assert_close(model.item_table(), model.model.items.id_embeddings.weight)
    assert model.recommend([[1, 2]], top_k=3).items.shape == (1, 3)


def test_recommend_agrees_with_scores_by_hand():
    model = new_model()
    output = model.recommend(HISTORIES, top_k=7)
    scores = model.encode_histories(HISTORIES) @ model.item_table().T
    scores[:, 0] = -torch.inf
    for user, history in enumerate(HISTORIES):
        scores[user, history] = -torch.inf
    expected = scores.topk(7)
    assert output.items.tolist() == expected.indices.tolist()
    torch.testing.assert_close(output.scores, expected.values)
    seen = model.recommend(HISTORIES, top_k=NUM_ITEMS, exclude_history=False).items
    assert all(sorted(row) == list(range(1, NUM_ITEMS + 1)) for row in seen.tolist())


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"share_item_table": False}, {"use_item_ids": False}, {"use_embeddings": False}, {"num_quantizers": 0}],
)
def test_contributions_are_the_score_in_parts(kwargs):
    model = new_model(**kwargs)
    output = model.recommend(HISTORIES, top_k=6, return_contributions=True)
    has_id = kwargs.get("use_item_ids", True)
    assert list(output.contributions) == ["id"] * has_id + ["collaborative", "text"]
    torch.testing.assert_close(sum(output.contributions.values()), output.scores, rtol=1e-5, atol=1e-6)
    # Without a source the score changes by just that source's part.
    users = model.encode_histories(HISTORIES)
    weights = model.model.items.weights(output.items.flatten())[:, -1].view_as(output.items)
    modality = model.model.items.modalities["text"]
    vectors = modality.project(output.items.flatten()) if model.config.use_embeddings else 0
    if model.config.share_item_table and model.config.num_quantizers:
        vectors = vectors + modality.embed_codes(output.items.flatten())
    by_hand = (vectors.view(*output.items.shape, -1) * users[:, None]).sum(-1) * weights
    torch.testing.assert_close(output.contributions["text"], by_hand, rtol=1e-5, atol=1e-6)


def test_an_item_without_text_gets_nothing_from_text():
    output = new_model().recommend([[1]], top_k=NUM_ITEMS, exclude_history=False, return_contributions=True)
    lacking = torch.isin(output.items, torch.tensor([3, 4, 5]))
    assert (output.contributions["text"][lacking] == 0).all()
    assert (output.contributions["text"][~lacking] != 0).all()


def test_candidates_can_be_listed():
    model = new_model()
    everything = model.recommend(HISTORIES, top_k=NUM_ITEMS, exclude_history=False).items
    allowed = model.recommend(HISTORIES, top_k=4, exclude_history=False, allowed_items=[8, 2, 30, 31])
    denied = model.recommend(HISTORIES, top_k=NUM_ITEMS - 3, exclude_history=False, denied_items=[8, 2, 30])
    for user in range(len(HISTORIES)):
        order = everything[user].tolist()
        assert allowed.items[user].tolist() == [item for item in order if item in (8, 2, 30, 31)]
        assert denied.items[user].tolist() == [item for item in order if item not in (8, 2, 30)]
    with pytest.raises(ValueError, match="but 1 items can be recommended to history 2"):
        model.recommend(HISTORIES, top_k=2, allowed_items=[7, 8, 9])
    with pytest.raises(ValueError, match="denied_items holds row 41"):
        model.recommend(HISTORIES, denied_items=[41])
    with pytest.raises(
        ValueError, match="allowed_items holds row sku-7, .* use the processor to turn item ids into rows"
    ):
        model.recommend(HISTORIES, allowed_items=["sku-7"])
    best = model.recommend(HISTORIES[:1]).items[0]
    again = model.recommend(HISTORIES[:1], top_k=3, allowed_items=best[:4], denied_items=best[:1])
    assert again.items[0].tolist() == best[1:4].tolist()


def test_item_table_is_built_again_after_any_change():
    model = new_model()
    with torch.no_grad():
        table = model.item_table()
        assert model.item_table() is table
        for tensor in (model.model.items.modalities["text"].code_vectors, model.model.items.id_embeddings.weight):
            tensor[1] += 1
            assert not torch.equal(model.item_table(), table)
            table = model.item_table()
    loss = model(**pack_histories([[3, 9]], [7, 8], [[9, 1]])).loss
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        assert not torch.equal(model.item_table(), table)
    model.train()
    assert model._kept is None


def test_a_large_catalogue_in_blocks_has_the_same_table_and_gradients(monkeypatch):
    whole, blocks = new_model(), new_model()
    batch = pack_histories([[3, 9, 1], [8, 40]], [7, 8], [[9, 1, 5], [40, 2]])
    whole(**batch).loss.backward()
    monkeypatch.setattr("modeling_mmesid.items_mmesid.ITEMS_PER_BLOCK", 16)
    blocks(**batch).loss.backward()
    torch.testing.assert_close(blocks.item_table(), whole.item_table(), rtol=0, atol=1e-7)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(blocks.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_recommend_is_deterministic_in_training_mode_and_leaves_it(monkeypatch):
    model = new_model(token_dropout=0.5, output_dropout=0.5).train()
    first, second = model.recommend(HISTORIES), model.recommend(HISTORIES, batch_size=1)
    assert torch.equal(first.items, second.items)
    assert model.training
    monkeypatch.setattr(model, "encode_histories", lambda histories: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.recommend(HISTORIES)
    assert model.training


def test_the_base_model_gives_the_states_that_are_scored(tmp_path, base_model):
    for name, model in (("own", new_model()), ("lora", lora_model(base_model))):
        model.save_pretrained(tmp_path / name)
        states = MMESIDModel.from_pretrained(tmp_path / name)
        inputs = pack_histories(HISTORIES, [7, 8])
        lengths = inputs.pop("lengths")
        with torch.no_grad():
            hidden = states(**inputs).last_hidden_state
        users = hidden[torch.arange(3), lengths - 1]
        torch.testing.assert_close(states.user_head(users).detach(), model.encode_histories(HISTORIES).detach())


def test_keywords_reach_settings_or_backbone_or_are_refused(tmp_path, base_model):
    lora_model(base_model).save_pretrained(tmp_path / "lora")
    new_model().save_pretrained(tmp_path / "own")
    for directory in (tmp_path / "lora", tmp_path / "own"):
        load = partial(MMESIDForSequentialRecommendation.from_pretrained, directory)
        assert load(torch_dtype=torch.bfloat16).model.backbone.dtype == torch.bfloat16
        assert load(attn_implementation="eager").model.backbone.config._attn_implementation == "eager"
        with pytest.raises(TypeError, match="surprise"):
            load(surprise=1)
        changed = load(output_dropout=0.3)
        assert changed.output_dropout.p == changed.config.output_dropout == 0.3
        with pytest.raises(Exception, match="max_history is 0"):
            load(max_history=0)
    with pytest.raises(TypeError, match="no setting 'token_droput'"):
        MMESIDForSequentialRecommendation.from_backbone_pretrained(base_model, token_droput=0.1)


def test_fusion_weights_and_recommendations_survive_half_precision_and_inference_mode(tmp_path):
    tables = item_tables()
    model = new_model()
    # So close that half precision cannot tell them apart.
    model.initialize_items(**tables | {"frequencies": 1000 + torch.arange(NUM_ITEMS + 1) % 10})
    rows = torch.arange(1, NUM_ITEMS + 1)
    expected = model.model.items.weights(rows)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        half = MMESIDForSequentialRecommendation.from_pretrained(tmp_path, dtype=torch.bfloat16)
        torch.testing.assert_close(half.model.items.weights(rows).float(), expected, rtol=0, atol=0.03)
        assert half.recommend(HISTORIES).items.shape == (3, 10)


@pytest.mark.parametrize(
    ("histories", "top_k", "words"),
    [
        ([[1], []], 5, "History 1 is empty"),
        ([], 5, "There is no history to recommend for; give a list of rows"),
        ([[1, 41]], 5, "row 41, outside 1..40"),
        # Between the least and the largest, and where a list of integers would take it for one.
        ([[1, 2.5, 3]], 5, "row 2.5, outside 1..40"),
        ([[2, True, 3]], 5, "row True, outside 1..40"),
        ([np.array([1.0, 2.0])], 5, "row 1.0, outside 1..40"),
        ([1, 4], 5, "History 0 is the row 1; give a list of rows for each user"),
        ([[0, 4]], 5, "row 0, outside 1..40"),
        ([[1, 2]], 39, "38 items"),
        ([[1, 2]], 0, "top_k is 0"),
    ],
)
def test_recommend_names_what_is_wrong(histories, top_k, words):
    with pytest.raises(ValueError, match=words):
        new_model().recommend(histories, top_k=top_k)


def narrow(kind):
    return lambda tables: tables[kind].update(text=tables[kind]["text"][..., :1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tables: tables["embeddings"].pop("text"), "embeddings are given for"),
        (lambda tables: tables["embeddings"]["text"][17].fill_(torch.nan), "'text' hold NaN or infinity in row 17"),
        (
            lambda tables: tables.update(frequencies=torch.ones(7).long()),
            r"frequencies are torch.int64 of shape \(7,\)",
        ),
        (lambda tables: tables.update(frequencies=torch.full((41,), 0.7)), "frequencies are torch.float32"),
        (lambda tables: tables["frequencies"][3].fill_(-1), "give one count, 0 or more, per row"),
        (lambda tables: tables["present"].update(txet=tables["present"]["text"]), "present is given for 'txet'"),
        # Nothing is accepted by broadcasting, or because an index can be made of it.
        (narrow("embeddings"), r"embeddings of 'text' are torch.float32 of shape \(41, 1\), where .* \(41, 12\)"),
        (narrow("codes"), r"codes of 'text' are torch.int64 of shape \(41, 1\), where integers of shape \(41, 3\)"),
        (narrow("code_vectors"), r"code_vectors of 'text' are torch.float32 of shape \(3, 6, 1\)"),
        (lambda tables: tables["codes"].update(text=tables["codes"]["text"][:-1]), r"of shape \(40, 3\)"),
        (lambda tables: tables["codes"]["text"][9].fill_(6), r"'text' in row 9 are \[6, 6, 6\], outside 0..5"),
        (lambda tables: tables["codes"]["text"][9].fill_(-1), r"'text' in row 9 are \[-1, -1, -1\], outside 0..5"),
        (lambda tables: tables["present"].update(text=torch.ones(41).long()), "present of 'text' is torch.int64"),
        (lambda tables: tables["present"].update(text=torch.ones(1).bool()), r"'text' is torch.bool of shape \(1,\)"),
        (lambda tables: tables["present"]["text"].fill_(False), "No item has the modality 'text'"),
    ],
)
def test_initialize_items_names_what_is_wrong(change, words):
    model, tables = new_model(), item_tables()
    change(tables)
    with pytest.raises(ValueError, match=words):
        model.initialize_items(**tables)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"num_items": 0}, "num_items is 0"),
        ({"modalities": [], "embedding_dims": [], "use_item_ids": False}, "nothing to tell items apart"),
        (
            {"modalities": ["text"], "embedding_dims": [3], "use_embeddings": False, "num_quantizers": 0},
            "codes are all that content gives",
        ),
        (
            {"modalities": ["text"], "embedding_dims": [3], "use_embeddings": False, "share_item_table": False},
            "share_item_table true",
        ),
        ({"modalities": ["text"], "embedding_dims": [3, 4]}, "one width each"),
        ({"modalities": ["text", "text"], "embedding_dims": [3, 4]}, "name none twice"),
        ({"modalities": ["sasrec"], "embedding_dims": [3]}, "called 'sasrec', as another part of a score"),
        ({"modalities": ["text"], "embedding_dims": [0]}, "embedding_dims is \\[0\\]"),
        ({"fusion_temperature": 0.0}, "fusion_temperature is 0.0"),
        ({"item_token_scale": float("nan")}, "item_token_scale is nan"),
        ({"max_history": 0}, "max_history is 0"),
        ({"output_dropout": 1.0}, "output_dropout is 1.0"),
        ({"num_quantizers": -1}, "num_quantizers is -1"),
    ],
)
def test_configuration_validates_itself(kwargs, words):
    with pytest.raises(Exception, match=words):
        MMESIDConfig(**kwargs)


def test_self_contained_checkpoint_reloads_bit_equal(tmp_path):
    model = new_model()
    model.save_pretrained(tmp_path)
    expected = model.recommend(HISTORIES)
    for loaded in (MMESIDForSequentialRecommendation.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        output = loaded.recommend(HISTORIES)
        assert torch.equal(output.items, expected.items)
        assert torch.equal(output.scores, expected.scores)
        for (name, old), (_, new) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
            assert torch.equal(old, new), name


def test_lora_checkpoint_holds_what_was_trained_and_reloads_bit_equal(tmp_path, base_model):
    model = lora_model(base_model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    backbone = [name for name in saved if name.startswith("model.backbone.")]
    assert backbone and all("lora_" in name for name in backbone)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable <= set(saved)
    assert not (tmp_path / "adapter_config.json").exists(), "AutoModel would follow it instead of config.json"
    found, expected = AutoModel.from_pretrained(tmp_path).recommend(HISTORIES), model.recommend(HISTORIES)
    assert torch.equal(found.items, expected.items) and torch.equal(found.scores, expected.scores)


def test_lora_checkpoint_stays_with_the_commit_of_its_base_model(tmp_path):
    """As a Hub's cache keeps them: two commits of a base model, and the branch that moves from one to the other."""
    first, second = "a" * 40, "b" * 40
    repository = tmp_path / "cache" / "models--tester--base"
    (repository / "refs").mkdir(parents=True)
    for commit in (first, second):
        LlamaModel(llama_config()).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs" / "main").write_text(first)
    cached = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    model = MMESIDForSequentialRecommendation.from_backbone_pretrained(
        "tester/base", lora=LORA, backbone_kwargs=cached, **settings()
    )
    model.initialize_items(**item_tables())
    assert model.config.base_model_revision == first
    model.eval().save_pretrained(tmp_path / "tuned")
    (repository / "refs" / "main").write_text(second)
    loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "tuned", **cached)
    assert torch.equal(loaded.recommend(HISTORIES).scores, model.recommend(HISTORIES).scores)


# peft reads a property that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kwargs", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_adapter_folder_is_peft_s_own_format(tmp_path, base_model, kwargs):
    model = lora_model(base_model, **kwargs)
    model.save_pretrained(tmp_path)
    peft_model = PeftModel.from_pretrained(LlamaModel.from_pretrained(base_model), tmp_path / "adapter").eval()
    inputs = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            peft_model(inputs_embeds=inputs).last_hidden_state,
            model.model.backbone(inputs_embeds=inputs).last_hidden_state,
        )


@pytest.mark.parametrize("change", ["model.items.id_embeddings.weight", "model.items.removed", "model.items.surprise"])
@pytest.mark.parametrize("self_contained", [True, False])
def test_checkpoint_that_does_not_fit_is_refused(tmp_path, base_model, self_contained, change):
    lora_model(base_model).save_pretrained(tmp_path, merge_backbone=self_contained)
    weights = load_file(tmp_path / "model.safetensors")
    if change in weights:
        del weights[change]
    else:
        weights[change] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=change):
        MMESIDForSequentialRecommendation.from_pretrained(tmp_path)


@pytest.mark.parametrize("self_contained", [True, False])
def test_checkpoint_in_shards_loads_and_tells_what_was_loaded(tmp_path, base_model, self_contained):
    model = lora_model(base_model).eval()
    model.save_pretrained(tmp_path, merge_backbone=self_contained, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded, loading = MMESIDForSequentialRecommendation.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    torch.testing.assert_close(loaded.recommend(HISTORIES).scores, model.recommend(HISTORIES).scores)


def test_lora_freezes_the_backbone_and_starts_as_the_base(base_model):
    model = MMESIDForSequentialRecommendation.from_backbone_pretrained(base_model, lora=LORA, **settings()).eval()
    trainable = [name for name, parameter in model.model.backbone.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    inputs = torch.randn(1, 4, 16)
    with torch.no_grad():
        expected = LlamaModel.from_pretrained(base_model)(inputs_embeds=inputs).last_hidden_state
        torch.testing.assert_close(model.model.backbone(inputs_embeds=inputs).last_hidden_state, expected)


def test_wrapped_backbone_stays_causal(base_model):
    """Nesting a live configuration silently drops the causal mask: a later item must not change an earlier state."""
    for model in (lora_model(base_model), new_model()):
        states = [
            model(**pack_histories([[1, 2, last]], [], [[9, 9, 9]])).user_embeddings[:2].detach() for last in (3, 30)
        ]
        torch.testing.assert_close(*states)


@pytest.mark.parametrize("suffix", [[7], []])
def test_activation_checkpointing_changes_no_gradient(suffix):
    inputs = pack_histories([[1, 2, 3], [9, 8]], suffix, [[2, 3, 4], [8, 7]])
    gradients = []
    for checkpointing in (False, True):
        model = new_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        assert model.is_activation_checkpointing == checkpointing
        model(**inputs).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kwargs", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": "all-linear"}])
def test_merged_checkpoint_needs_no_base_model(tmp_path, base_model, kwargs):
    model = lora_model(base_model, **kwargs)
    before = model.recommend(HISTORIES)
    model.save_pretrained(tmp_path, merge_backbone=True)
    assert not (tmp_path / "adapter").exists()
    loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path)
    assert loaded.config.base_model_name_or_path is None
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    after = loaded.recommend(HISTORIES)
    assert torch.equal(before.items, after.items)
    torch.testing.assert_close(before.scores, after.scores, rtol=0, atol=1e-5)
    # The model that was saved goes on as it was.
    assert torch.equal(model.recommend(HISTORIES).scores, before.scores)


def test_frozen_backbone_stays_out_of_training_and_checkpoint(tmp_path, base_model):
    model = MMESIDForSequentialRecommendation.from_backbone_pretrained(base_model, freeze_backbone=True, **settings())
    model.initialize_items(**item_tables())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("model.items.", "model.user_head.")) for name in trained)
    model.save_pretrained(tmp_path)
    assert not any(name.startswith("model.backbone.") for name in load_file(tmp_path / "model.safetensors"))
    loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.model.backbone.parameters())
    assert torch.equal(loaded.recommend(HISTORIES).scores, model.eval().recommend(HISTORIES).scores)


def test_a_loss_from_all_items_as_candidates_is_the_whole_catalogue_s():
    for kwargs in ({}, {"share_item_table": False}, {"modalities": [], "embedding_dims": []}):
        model = new_model(**kwargs)
        batch = pack_histories([[3, 9, 1], [8, 40]], [7, 8], [[9, 1, 5], [40, 2]])
        whole = model(**batch).loss
        sampled = model(
            **batch, candidates=torch.arange(1, NUM_ITEMS + 1), candidate_log_counts=torch.zeros(NUM_ITEMS)
        ).loss
        assert sampled.item() == pytest.approx(whole.item(), abs=1e-5)
