"""A streamed text is that of the whole answer, however its tokens are cut, and costs no more than its length."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.rollout.answer_text import AnswerText


def byte_tokenizer() -> Tokenizer:
    """One token a byte: each character beyond ASCII is cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


TOKENIZER = byte_tokenizer()
END = TOKENIZER.token_to_id("<|end|>")


def cut(text: str, stops: list[str]) -> str:
    for end in range(len(text) + 1):
        if complete := [len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(complete)]
    return text


def streamed(parts: list[list[int]], stops: list[str]) -> list[str]:
    text = AnswerText(TOKENIZER.decode, stops)
    return [text.add(part, last=number == len(parts)) for number, part in enumerate(parts, 1)]


@example(text=">ab", stops=["a", ">ab"], sizes=[1], specials=[])
@given(
    text=st.text("ab</x>é€😀", max_size=30),
    stops=st.lists(st.text("ab</x>é€", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=10),
    specials=st.lists(st.integers(0, 30), max_size=3),
)
def test_the_parts_make_the_whole(text: str, stops: list[str], sizes: list[int], specials: list[int]) -> None:
    tokens = TOKENIZER.encode(text).ids
    expected = cut(text, stops)
    if not set(text) - set("ab</x>"):  # one in the middle of a character would damage it
        for place in specials:
            tokens.insert(place, END)
    parts, rest = [], tokens
    for size in itertools.cycle(sizes):
        parts.append(rest[:size])
        rest = rest[size:]
        if not rest:
            break
    assert "".join(streamed(parts, stops)) == expected == "".join(streamed([tokens], stops))


@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_are_told_as_the_decoder_tells_them(tokens: list[int]) -> None:
    parts = [[token] for token in tokens] or [[]]
    assert "".join(streamed(parts, [])) == TOKENIZER.decode(tokens)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    parts = [TOKENIZER.encode(letter).ids for letter in "a</b></x>c"]
    assert streamed(parts, ["</x>"]) == ["a", "", "", "</b", ">", "", "", "", "", ""]


@pytest.mark.parametrize("letter", ["a", "é", "\ufffd"], ids=["text", "cut", "replacement"])
def test_the_work_grows_with_the_length_not_with_its_square(letter: str) -> None:
    work = 0

    def decode(tokens: list[int]) -> str:
        nonlocal work
        work += len(tokens)
        return str(TOKENIZER.decode(tokens))

    tokens = TOKENIZER.encode(letter * 400).ids
    text = AnswerText(decode, ["</x>"])
    assert "".join(text.add([token], last=False) for token in tokens) + text.add([], last=True) == letter * 400
    assert work < 40 * len(tokens)
