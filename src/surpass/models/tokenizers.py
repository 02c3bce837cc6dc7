"""Do two models speak the same tokens?"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def check_same_tokens(
    student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, shared: int, name: str
) -> None:
    """Raise ValueError unless both give the first `shared` ids to the same tokens.

    Embedding tables may be padded to different sizes (151,936 against 152,064); what counts are the tokenizers.
    """
    mine = {token: i for token, i in student.get_vocab().items() if i < shared}
    theirs = {token: i for token, i in other.get_vocab().items() if i < shared}
    if mine == theirs:
        return
    differing = sorted({token for token, i in mine.items() ^ theirs.items()})
    shown = ", ".join(
        f"{token!r} (student {mine.get(token, 'absent')}, {name} {theirs.get(token, 'absent')})"
        for token in differing[:4]
    )
    raise ValueError(
        f"the student and {name} have different vocabularies: {len(differing)} tokens differ, for example {shown}. "
        "Token-level distillation compares the same tokens: use a teacher of the student's family, or a text-only method "
        "such as sequence_kd"
    )
