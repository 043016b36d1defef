"""VQA accuracy: answers made comparable, then counted against each annotator's colleagues.

The normalisation follows the description of the VQA challenge (visualqa.org/evaluation.html): lower case, no full
stops but decimal ones, number words as digits, no articles, apostrophes put back into contractions, other marks as
spaces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Those that the challenge lists. An apostrophe and a colon (of a time) mean something, as do % and $.
_MARKS = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")
_DIGIT_COMMA = re.compile(r"(?<=\d),(?=\d)")
_STOP = re.compile(r"\.(?!\d)")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
# Left out where the bare form is a word too: its, well, were, wed, ill, shell, shed, hell, id.
_CONTRACTED = """
ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's here's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've
must've mustn't needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd
somebody'll somebody's someone'd someone'll someone's something'd something'll that'd that's there'd there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}


def normalise(answer: str) -> str:
    """An answer as it is compared.

    >>> normalise("The  U.S. has two dogs, dont they?")
    "us has 2 dogs don't they"
    >>> normalise("1,500.5 m/s"), normalise("10:30")
    ('1500.5 m s', '10:30')
    """
    text = _DIGIT_COMMA.sub("", answer.lower())
    text = _MARKS.sub(" ", _STOP.sub("", text))
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, annotators: Sequence[str]) -> float:
    """VQA accuracy.

    Each annotator is left out in turn: three matches among the others are full marks, and the results are averaged.

    Args:
        answer: The model's.
        annotators: Theirs, at least two.
    """
    if len(annotators) < 2:
        raise ValueError(f"annotators must be two answers or more, got {list(annotators)!r}")
    own = normalise(answer)
    matches = [normalise(other) == own for other in annotators]
    return sum(min((sum(matches) - left_out) / 3, 1.0) for left_out in matches) / len(matches)
