"""Stop strings in text whose tokens do not end where its characters or words do."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from surpass.rollout.stop import StopStrings


def byte_tokenizer(*merged: str) -> PreTrainedTokenizerFast:
    """Every byte is a token, and so is every string of `merged` (after the bytes)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letter = bytes_to_unicode()
    words = [letter[b] for b in range(256)] + ["".join(letter[b] for b in text.encode()) for text in merged]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize(
    ("response", "stop", "ends"),
    [
        ("answer: 4\n", "\n", True),
        ("answer: 4\n5", "\n", False),
        ("x</done>", "</done>", True),
        ("x</done", "</done>", False),
        ("wait.停", "停", True),
        ("停 wait", "停", False),
        ("aab", "aab", True),
    ],
)
def test_only_the_last_token_can_complete_a_stop_string(response: str, stop: str, ends: bool) -> None:
    tokenizer = byte_tokenizer()
    strings = StopStrings(tokenizer, (stop, "never"), 256)
    tokens = list(response.encode())
    assert strings.ends(tokens) is ends
    if ends:
        assert bool(strings.may_end[tokens[-1]])
        assert not strings.ends(tokens[:-1])


def test_a_stop_string_inside_a_token_ends() -> None:
    strings = StopStrings(byte_tokenizer("one\n\ntwo"), ("\n\n",), 257)
    assert strings.may_end[256]
    assert strings.ends([65, 256])
    assert not strings.ends([65, 256, 66]), "it was completed by an earlier token"
    assert not strings.ends([65, 10])


def test_few_tokens_can_end_a_stop_string() -> None:
    strings = StopStrings(byte_tokenizer(), ("</done>",), 256)
    ascii_only = strings.may_end[:128]
    assert ascii_only.nonzero().squeeze(1).tolist() == [ord(">")]
