import os
import pty

import pytest

from trainer.backbone import train_tokenizer
from trainer.encoders import dual_encoder


@pytest.fixture
def terminal():
    """Puts a terminal in the place of the standard error, of compiled libraries too; returns what reads it."""
    screen, terminal = pty.openpty()
    stderr = os.dup(2)
    os.dup2(terminal, 2)
    yield lambda: os.read(screen, 2**16).decode()
    os.dup2(stderr, 2)
    for descriptor in (screen, terminal, stderr):
        os.close(descriptor)


@pytest.mark.parametrize(
    ("train", "step"),
    [
        (lambda texts: train_tokenizer(texts, vocab_size=400), "Compute merges"),
        (lambda texts: dual_encoder.train_tokenizer(texts, max_length=8), "Tokenize words"),
    ],
)
def test_a_terminal_shows_how_far_the_training_of_a_tokenizer_is(train, step, terminal):
    tokenizer = train([f"Red shoes of number {number % 7}" for number in range(1000)])
    shown = terminal()
    assert step in shown and "Pre-processing sequences" in shown, shown
    assert tokenizer.decode(tokenizer.encode("Red shoes", add_special_tokens=False)).lower() == "red shoes"
