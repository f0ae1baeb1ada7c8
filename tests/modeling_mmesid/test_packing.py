import numpy as np
import pytest
import torch

from modeling_mmesid.packing import pack_histories, packed_attention_mask


def test_inference_form_is_items_and_suffix():
    batch = pack_histories([[7, 8, 9], [5]], suffix_ids=[3])
    assert batch["input_ids"].tolist() == [[0, 0, 0, 3], [0, 3, 0, 0]]
    assert batch["items"].tolist() == [[7, 8, 9, 0], [5, 0, 0, 0]]
    assert batch["lengths"].tolist() == [4, 2]
    assert "labels" not in batch


def test_without_closing_tokens_every_item_answers():
    batch = pack_histories([[7, 8], [5]], [], targets=[[8, 9], [6]])
    assert batch["items"].tolist() == [[7, 8], [5, 0]]
    assert batch["labels"].tolist() == [[8, 9], [6, -100]]
    assert set(batch) == {"input_ids", "items", "labels"}


def test_each_target_has_a_copy_of_the_closing_tokens():
    batch = pack_histories([[7, 8, 9]], suffix_ids=[3, 4], targets=[[8, -100, 6]])
    assert batch["items"].tolist() == [[7, 8, 9, 0, 0, 0, 0]]
    assert batch["input_ids"].tolist() == [[0, 0, 0, 3, 4, 3, 4]]
    assert batch["labels"].tolist() == [[-100] * 3 + [-100, 8, -100, 6]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    # Each copy stands where it would stand behind its own prefix alone.
    assert batch["position_ids"].tolist() == [[0, 1, 2, 1, 2, 3, 4]]


@pytest.mark.parametrize("seed", range(5))
def test_mask_lets_a_copy_see_its_own_prefix_and_nothing_else(seed):
    random = np.random.default_rng(seed)
    suffix = list(range(9, 10 + random.integers(0, 3)))
    histories = [random.integers(1, 50, size=random.integers(1, 8)) for _ in range(4)]
    targets = [random.integers(1, 50, size=len(history)) for history in histories]
    batch = pack_histories(histories, suffix, targets)
    mask = packed_attention_mask(batch["shared_length"], batch["segment_ids"])[:, 0]
    for user, history in enumerate(histories):
        head = len(history)
        for copy_number in range(len(history)):
            for token in range(len(suffix)):
                query = head + copy_number * len(suffix) + token
                own = range(head + copy_number * len(suffix), query + 1)
                expected = {*range(copy_number + 1), *own}
                assert set(mask[user, query].nonzero()[:, 0].tolist()) == expected
        for query in range(head):
            assert set(mask[user, query].nonzero()[:, 0].tolist()) == set(range(query + 1))
    assert mask.any(-1).all(), "a row that sees nothing would make attention undefined"


def test_tensors_are_long():
    batch = pack_histories([np.array([3], dtype=np.int32)], [1], [np.array([2], dtype=np.int32)])
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_padding_to_a_multiple_adds_nothing_but_padding():
    exact, padded = (pack_histories([[4, 5]], [2, 3], [[5, 6]], pad_to_multiple_of=n) for n in (1, 16))
    length = exact["items"].shape[1]
    for name, tensor in padded.items():
        assert tensor.shape == (1, 16)
        assert torch.equal(tensor[:, :length], exact[name])
    assert (padded["labels"][:, length:] == -100).all()
