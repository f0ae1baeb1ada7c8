from mmesid.trainer.quantizer.verdict import summary


def metrics(tau: float, uses: list[float], shared: float) -> dict:
    items = {f"use@{level}_text": use for level, use in enumerate(uses, start=1)}
    items |= {f"perplexity@{level}_text": 60.4 for level in range(1, len(uses) + 1)}
    return {"held_out": {"tau": tau, "tau_text": tau}, "items": items | {"collisions_text": shared, "collisions": 0.0}}


def test_the_table_has_a_column_per_modality_and_the_verdict_says_what_to_do():
    good = metrics(0.61, [1.0, 0.98], 0.02)
    good["held_out"]["tau_visual"] = 0.5
    good["items"] |= {"use@1_visual": 1.0, "use@2_visual": 1.0, "perplexity@1_visual": 3.0, "perplexity@2_visual": 4.0}
    good["items"]["collisions_visual"] = 0.0
    header, tau, use, perplexity, shared, verdict = summary(good, ["text", "visual"]).splitlines()
    assert header.split() == ["text", "visual"]
    assert tau.endswith("0.610     0.500") and use.split()[-4:] == ["100%", "98%", "100%", "100%"]
    assert perplexity.split()[-4:] == ["60", "60", "3", "4"] and shared.split()[-2:] == ["2.0%", "0.0%"]
    assert verdict == "All codes are put to use, IDs tell items apart, and distances are kept."


def test_what_stands_out_is_named_with_its_remedy():
    *_, use, shared, tau = summary(metrics(0.1, [1.0, 0.2], 0.4), ["text"]).splitlines()
    assert use == "Level 2 of text uses 20% of its codes: a smaller codebook_size would do."
    assert shared.startswith("40% of the items share their ID in text: more codebook_size or num_quantizers")
    assert tau.startswith("The codes keep little of the distances in text: more codebook_size")
