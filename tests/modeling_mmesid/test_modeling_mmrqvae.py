"""MM-RQ-VAE: arithmetic of the codes, masks, saving and refusals."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file

from modeling_mmesid.configuration_mmrqvae import ENCODERS, MMRQVAEConfig
from modeling_mmesid.modeling_mmrqvae import MMRQVAEModel


# Out of alphabetical order: JSON sorts keys, and the first modality is the anchor.
MODALITIES = {"text": 10, "collaborative": 6, "visual": 12}
OBJECTIVES = list(ENCODERS)


def small_model(**settings) -> MMRQVAEModel:
    torch.manual_seed(0)
    shape = {"num_quantizers": 3, "codebook_size": 8, "codebook_dim": 7}
    config = MMRQVAEConfig(modalities=list(MODALITIES), embedding_dims=list(MODALITIES.values()), **shape | settings)
    model = MMRQVAEModel(config).eval()
    with torch.no_grad():
        for branch in model.branches.values():
            branch.input_mean.normal_()
            branch.input_scale.fill_(1.7)
            for layer in branch.quantizer.layers:
                layer.codebook.normal_(std=0.5)
    return model


def batch(items: int = 20, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(items, width, generator=generator) for name, width in MODALITIES.items()}


def losses(output) -> list[float]:
    return [value.item() for name, value in output.items() if name.endswith("loss")]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_codes_are_nearest_at_every_level_and_quantized_is_their_sum(objective):
    model, embeddings = small_model(objective=objective), batch()
    output = model.encode(embeddings)
    for modality in MODALITIES:
        vectors = model.code_vectors(modality).detach().double().numpy()
        assert vectors.shape == (3, 8, 7)
        branch = model.branches[modality]
        residuals = branch.latents(embeddings[modality]).detach().double().numpy()
        for item, residual in enumerate(residuals):
            total = np.zeros(7)
            for level in range(3):
                code = np.linalg.norm(vectors[level] - residual, axis=1).argmin()
                assert output.codes[modality][item, level] == code
                total += vectors[level, code]
                residual = residual - vectors[level, code]
            np.testing.assert_allclose(output.quantized[modality][item].detach(), total, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_forward_and_decode_see_the_codes_that_encode_gives(objective):
    model, embeddings = small_model(objective=objective), batch()
    output, forwarded = model.encode(embeddings), model(embeddings)
    for modality in MODALITIES:
        assert torch.equal(forwarded.codes[modality], output.codes[modality])
        torch.testing.assert_close(forwarded.quantized[modality], output.quantized[modality])
        torch.testing.assert_close(forwarded.reconstructions[modality], model.decode(output.codes)[modality])


def test_any_subset_of_modalities_encodes_to_the_same_codes():
    model, embeddings = small_model(), batch()
    alone = model.encode({"collaborative": embeddings["collaborative"]})
    assert list(alone.codes) == ["collaborative"]
    assert torch.equal(alone.codes["collaborative"], model.encode(embeddings).codes["collaborative"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_items_that_lack_a_modality_influence_nothing(objective):
    model, embeddings = small_model(objective=objective, alignment_loss_weight=1.0), batch()
    present = {name: torch.ones(20, dtype=torch.bool) for name in MODALITIES}
    present["visual"][5:9] = False
    present["text"][0] = False
    expected = losses(model(embeddings, present))
    perturbed = {name: values.clone() for name, values in embeddings.items()}
    perturbed["visual"][5:9] = float("nan")
    perturbed["text"][0] = 1e6
    assert losses(model(perturbed, present)) == expected
    assert losses(model(perturbed | {"visual": embeddings["visual"] + 1}, present)) != expected
    # The losses of one modality alone do not depend on who has another.
    alone = {"collaborative": embeddings["collaborative"]}
    ones = {"collaborative": present["collaborative"]}
    assert losses(model(alone, ones)) == losses(model(alone))


def test_losses_of_items_without_the_modality_equal_those_of_a_smaller_batch():
    model, embeddings = small_model(objective="mse"), batch()
    present = {name: torch.arange(20) < 12 for name in MODALITIES}
    smaller = model({name: values[:12] for name, values in embeddings.items()})
    assert losses(model(embeddings, present)) == pytest.approx(losses(smaller), rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_the_weighted_sum_of_its_parts_and_trains_every_parameter(objective):
    weights = {"commitment_loss_weight": 0.5, "alignment_loss_weight": 0.2}
    model = small_model(objective=objective, encoder_hidden_dims=[9], **weights)
    output = model.train()(batch())
    parts = 3 * output.objective_loss + output.decoding_loss + output.codebook_loss
    torch.testing.assert_close(output.loss, parts + 0.5 * output.commitment_loss + 0.2 * output.alignment_loss)
    output.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_distances_leave_the_scale_open_and_the_codebook_loss_settles_it():
    model, embeddings = small_model(objective="distance", alignment_loss_weight=0.0), batch()
    output = model(embeddings)
    expected = sum(
        (branch.latents(embeddings[name]) - output.quantized[name]).square().mean()
        for name, branch in model.branches.items()
    )
    torch.testing.assert_close(output.codebook_loss, expected)
    with torch.no_grad():
        for branch in model.branches.values():
            for layer in branch.quantizer.layers:
                layer.codebook.mul_(2)
            # The same codes, for latents and code vectors grow alike.
            branch.encoder.projection.mul_(2)
    grown = model(embeddings)
    assert all(torch.equal(grown.codes[name], output.codes[name]) for name in embeddings)
    torch.testing.assert_close(grown.objective_loss, output.objective_loss)
    torch.testing.assert_close(grown.codebook_loss, 4 * output.codebook_loss)


def test_a_batch_without_any_item_of_a_modality_has_a_finite_loss():
    model, embeddings = small_model(objective="paper"), batch()
    present = {name: torch.full((20,), name != "text") for name in MODALITIES}
    output = model(embeddings, present)
    output.loss.backward()
    assert output.loss.isfinite()


@pytest.mark.parametrize("objective", ["distance", "paper"])
def test_saved_and_loaded_is_bit_equal(tmp_path, objective):
    model, embeddings = small_model(objective=objective), batch()
    model.save_pretrained(tmp_path)
    loaded = MMRQVAEModel.from_pretrained(tmp_path)
    assert loaded.config.modalities == list(MODALITIES)
    first, second = model.encode(embeddings), loaded.encode(embeddings)
    for modality in MODALITIES:
        assert torch.equal(first.codes[modality], second.codes[modality])
        assert torch.equal(first.quantized[modality], second.quantized[modality])
        assert torch.equal(model.decode(first.codes)[modality], loaded.decode(first.codes)[modality])
        assert torch.equal(model.code_vectors(modality), loaded.code_vectors(modality))
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert trained == {name: parameter.requires_grad for name, parameter in loaded.named_parameters()}


def test_loaded_in_half_precision_gives_the_same_codes(tmp_path):
    model, embeddings = small_model(), batch()
    model.save_pretrained(tmp_path)
    loaded = MMRQVAEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for modality, codes in model.encode(embeddings).codes.items():
        assert torch.equal(loaded.encode(embeddings).codes[modality], codes)


@pytest.mark.parametrize("lost", ["branches.text.encoder.projection", "branches.visual.quantizer.layers.1.offsets"])
def test_a_checkpoint_without_all_of_its_weights_is_refused(tmp_path, lost):
    small_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing: \['{lost}'\]"):
        MMRQVAEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("objective", ["distance", "paper"])
def test_training_under_autocast_has_float32_losses(objective):
    model, embeddings = small_model(objective=objective), batch(200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(embeddings)
        output.loss.backward()
    assert output.loss.isfinite()
    assert output.loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("embeddings", "present", "named"),
    [
        ({}, None, "one row per item"),
        ({"sound": torch.zeros(3, 4)}, None, "'sound'"),
        ({"text": torch.zeros(3, 11)}, None, r"'text'.*\(batch_size, 10\).*\(3, 11\)"),
        ({"text": torch.zeros(3, 10), "visual": torch.zeros(4, 12)}, None, "'text': 3, 'visual': 4"),
        ({"text": torch.tensor([0.0, float("nan"), 0.0])[:, None].expand(3, 10)}, None, "'text'.*row 1"),
        ({"text": torch.zeros(3, 10)}, {"visual": torch.ones(3)}, r"present\['text'\]"),
        ({"text": torch.zeros(3, 10)}, {"text": torch.ones(2)}, r"present\['text'\].*\(3,\)"),
    ],
)
def test_bad_embeddings_are_refused_by_name(embeddings, present, named):
    model = small_model()
    with pytest.raises(ValueError, match=named):
        model(embeddings, present)
    if present is None:
        with pytest.raises(ValueError, match=named):
            model.encode(embeddings)


@pytest.mark.parametrize(
    ("call", "argument", "named"),
    [
        ("decode", {"sound": torch.zeros(2, 3, dtype=torch.long)}, "'sound'"),
        ("decode", {"text": torch.zeros(2, 4, dtype=torch.long)}, r"'text'.*\(batch_size, 3\).*\(2, 4\)"),
        ("code_vectors", "sound", "'sound'"),
    ],
)
def test_bad_codes_are_refused_by_name(call, argument, named):
    with pytest.raises(ValueError, match=named):
        getattr(small_model(), call)(argument)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"modalities": ["text", "text"]}, "none twice"),
        ({"modalities": ["text", "a.b"]}, "'a.b'"),
        ({"modalities": ["text", "items"]}, "'items'"),
        ({"embedding_dims": [3]}, "`embedding_dims`"),
        ({"embedding_dims": [3, 0]}, "embedding_dims is"),
        ({"codebook_size": 0}, "codebook_size is"),
        ({"num_quantizers": -1}, "num_quantizers is"),
        ({"encoder_hidden_dims": [4, 0]}, "encoder_hidden_dims is"),
        ({"alignment_temperature": 0.0}, "alignment_temperature is"),
        ({"alignment_loss_weight": -1.0}, "alignment_loss_weight is"),
        ({"objective": "best"}, "'objective' expected one of .*'distance'.*, got best"),
        ({"sinkhorn_epsilons": [0.0, 0.003]}, "`sinkhorn_epsilons`.*4 levels"),
        ({"sinkhorn_epsilons": [0.0, 0.0, 0.0, -1.0]}, "`sinkhorn_epsilons`"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, named):
    with pytest.raises(StrictDataclassError, match=named):
        MMRQVAEConfig(**{"modalities": ["text", "visual"], "embedding_dims": [3, 4]} | settings)
