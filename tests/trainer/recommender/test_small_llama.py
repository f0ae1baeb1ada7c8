import os
import pty
import subprocess
import sys

from mmesid.trainer.recommender.small_llama import train_tokenizer


TRAINING = """
from mmesid.trainer.recommender.small_llama import train_tokenizer
from mmesid.trainer.encoders import dual_encoder
texts = [f"Red shoes of number {number % 7}" for number in range(1000)]
for tokenizer in (train_tokenizer(texts, vocab_size=400), dual_encoder.train_word_tokenizer(texts, 8, 5)):
    print(tokenizer.decode(tokenizer.encode("Red shoes", add_special_tokens=False)).lower())
"""


def test_a_terminal_shows_how_far_the_training_of_tokenizers_is():
    screen, terminal = pty.openpty()
    # The library draws nothing on a terminal that has no name.
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(screen, 2**16):
            shown += part
    except OSError:
        # What a terminal says once nobody writes to it any more.
        pass
    os.close(screen)
    shown = shown.decode()
    assert process.wait(timeout=60) == 0, shown
    assert shown.count("red shoes") == 2 and "Compute merges" in shown and "Tokenize words" in shown, shown


def test_a_log_is_not_told_how_far_the_training_of_a_tokenizer_is(capfd):
    """The library would write empty lines to it."""
    train_tokenizer([f"Red shoes of number {number % 7}" for number in range(1000)], vocab_size=400)
    assert capfd.readouterr() == ("", "")
