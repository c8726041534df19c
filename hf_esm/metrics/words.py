"""Answers in words compared with right ones, as SQuAD's evaluation does (arXiv 1606.05250)."""

import re
import string
from collections import Counter
from collections.abc import Sequence


def is_accepted(answer: str, accepted: Sequence[str]) -> float:
    """Return 1 if an answer has the words of a right text, else 0."""
    return float(any(_words(answer) == _words(text) for text in accepted))


def word_overlap(answer: str, accepted: Sequence[str]) -> float:
    """Return the F1 of an answer's words and those of the right text that is nearest."""
    return max(_f1(_words(answer), _words(text)) for text in accepted)


def _words(text: str) -> list[str]:
    """Words that count in SQuAD's evaluation: in lower case, without punctuation and English articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(answer: list[str], right: list[str]) -> float:
    common = sum((Counter(answer) & Counter(right)).values())
    return 2 * common / (len(answer) + len(right)) if answer and right else float(answer == right)
