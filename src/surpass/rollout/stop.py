"""Stop strings: which freshly drawn tokens complete one in the decoded text of their response."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Finds the tokens that complete one of `stop`; text is decoded with special tokens in it.

    A table over the vocabulary says which tokens can end a stop string at all, so that hardly any text is
    decoded while sampling.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], vocabulary: int) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        # A token holds at least a byte of the text; the margin covers those that are dropped by the decoder.
        self.reach = max(len(text.encode()) for text in stop) + 8
        self.may_end = torch.tensor([self._may_end(i) for i in range(vocabulary)])

    def candidates(self, token: Tensor) -> list[int]:
        """Rows whose `token` `[B]` can end a stop string."""
        return self.may_end.to(token.device)[token].nonzero().squeeze(1).tolist()

    def ends(self, response: Sequence[int]) -> bool:
        """Whether the last token of `response` completes a stop string."""
        tail = list(response[-self.reach :])
        # An unfinished character at the end (U+FFFD) belongs to what the last token completes.
        text, before = self._decode(tail), len(self._decode(tail[:-1]).rstrip("\ufffd"))
        return any(text.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in self.stop)

    def _may_end(self, token: int) -> bool:
        # After another token, for decoders strip the space in front of a first one. Pieces of a character show
        # as U+FFFD, and only the last of them makes the character appear; white space may be stripped anywhere.
        text = self._decode([token]) + self._decode([token, token])
        lasts = {stop[-1] for stop in self.stop}
        return "\ufffd" in text or any(last in text or last.isspace() for last in lasts)

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
