from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model.text.detokenizer import TextAssembler
from model.text.prompt import Prompt
from model.weights.catalogue import CATALOGUE
from tests.model.tiny import tiny_tokenizer

THINK = ("<think>", "</think>")
TOKENIZER: PreTrainedTokenizerFast = tiny_tokenizer("r1")
PROMPT = Prompt(TOKENIZER, CATALOGUE["smollm2-135m-instruct"])
BYTES = bytes_to_unicode()


def decode(ids: Sequence[int]) -> str:
    return str(TOKENIZER.backend_tokenizer.decode(list(ids), skip_special_tokens=True))


def letters(ids: Sequence[int]) -> str:
    """A tokenizer whose token is one character."""
    return "".join(map(chr, ids))


class Pieces:
    """A tokenizer whose tokens are the given pieces of a text's UTF-8 bytes."""

    def __init__(self, data: bytes, cuts: list[int]) -> None:
        edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
        self.pieces = [data[start:end] for start, end in pairwise(edges)]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[id] for id in ids).decode("utf-8", "replace")


def run(assembler: TextAssembler, ids: Sequence[int]) -> dict[str, str]:
    """The joined text of each channel."""
    texts = {"answer": "", "reasoning": ""}
    for chunks in [*map(assembler.push, ids), assembler.finish()]:
        for chunk in chunks:
            assert chunk.text
            texts[chunk.channel] += chunk.text
    return texts


def split(text: str, stop: tuple[str, ...] = (), opened: bool = False) -> tuple[dict[str, str], bool]:
    assembler = TextAssembler(letters, stop, THINK, opened)
    return run(assembler, list(map(ord, text))), assembler.stopped


@given(st.text(), st.lists(st.integers(0, 400)))
def test_joined_chunks_are_the_decoding_wherever_the_tokens_cut(text: str, cuts: list[int]) -> None:
    pieces = Pieces(text.encode(), cuts)
    assembler = TextAssembler(pieces.decode, (), None, False)
    assert run(assembler, range(len(pieces.pieces)))["answer"] == text


@given(st.binary(max_size=80), st.lists(st.integers(0, 80), max_size=40))
def test_bytes_that_are_no_text_decode_as_a_whole_would(data: bytes, cuts: list[int]) -> None:
    pieces = Pieces(data, cuts)
    assembler = TextAssembler(pieces.decode, (), None, False)
    assert run(assembler, range(len(pieces.pieces)))["answer"] == data.decode("utf-8", "replace")


@given(st.lists(st.integers(0, 299), max_size=60))
def test_any_ids_join_to_what_the_real_tokenizer_decodes(ids: list[int]) -> None:
    assembler = TextAssembler(decode, (), None, False)
    assert run(assembler, ids)["answer"] == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_character_split_over_tokens_never_shows_a_replacement_mark() -> None:
    ids = [id for byte in "天😀é" for id in TOKENIZER.encode(byte, add_special_tokens=False)]
    assembler = TextAssembler(decode, (), None, False)
    chunks = [chunk.text for id in ids for chunk in assembler.push(id)]
    assert len(ids) > 3 and chunks == ["天", "😀", "é"]


@pytest.mark.parametrize("text", ["", "abc", "天", "\ufffd"])
@pytest.mark.parametrize("character", ["é", "天", "😀"])
def test_an_answer_that_is_cut_inside_a_character_ends_before_it(text: str, character: str) -> None:
    """By its bytes: a replacement character that the model did write stays."""
    for count in range(1, len(character.encode())):
        cut = text.encode() + character.encode()[:count]
        ids = [TOKENIZER.convert_tokens_to_ids(BYTES[byte]) for byte in cut]
        assert decode(ids) == text + "\ufffd"
        assembler = TextAssembler(decode, (), None, False, PROMPT.unfinished)
        assert run(assembler, ids)["answer"] == text


def test_bytes_that_no_character_begins_with_are_no_cut_character() -> None:
    ids = [TOKENIZER.convert_tokens_to_ids(BYTES[byte]) for byte in b"a\xff"]
    assert run(TextAssembler(decode, (), None, False, PROMPT.unfinished), ids)["answer"] == "a\ufffd"


def test_the_answer_comes_token_by_token() -> None:
    assembler = TextAssembler(letters, ("STOP",), THINK, False)
    assert [bool(assembler.push(ord(letter))) for letter in "Hello"] == [True] * 5


def test_a_stop_string_over_token_borders_never_leaks() -> None:
    assembler = TextAssembler(letters, ("\nUser:",), None, False)
    chunks = [chunk.text for letter in "Yes.\nUse it.\nUser: no" for chunk in assembler.push(ord(letter))]
    assert "".join(chunks) == "Yes.\nUse it." and assembler.stopped
    assert assembler.finish() == []


def test_a_stop_string_that_never_completes_is_given_out_at_the_end() -> None:
    assert split("abc\nUse", stop=("\nUser:",)) == ({"answer": "abc\nUse", "reasoning": ""}, False)


@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 4]])
def test_the_stop_string_that_is_complete_first_wins(cuts: list[int]) -> None:
    pieces = Pieces(b"xabcd", cuts)
    assembler = TextAssembler(pieces.decode, ("abcd", "bc"), None, False)
    assert run(assembler, range(len(pieces.pieces)))["answer"] == "xa"


def test_stop_strings_do_not_end_the_reasoning() -> None:
    texts, stopped = split("<think>a STOP b</think>c STOP d", stop=("STOP",))
    assert texts == {"reasoning": "a STOP b", "answer": "c "} and stopped


def test_the_blank_line_after_the_reasoning_is_no_stop_string() -> None:
    assert split("hm\n</think>\n\nYes.\n\nMore", stop=("\n\n",), opened=True)[0]["answer"] == "Yes."


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer"),
    [
        ("<think>\nhm\n</think>\n\nYes", False, "hm\n", "Yes"),
        ("\n<think>hm</think>Yes", False, "hm", "Yes"),
        ("hm</think>\n\nYes", True, "hm", "Yes"),
        ("<think>\nhm</think>Yes", True, "hm", "Yes"),
        ("never closed </thin", True, "never closed </thin", ""),
        ("<thin", False, "", "<thin"),
        ("  Yes", False, "", "  Yes"),
        ("The tag <think> is text here </think>.", False, "", "The tag <think> is text here </think>."),
        ("<think></think>Yes </think> no", False, "", "Yes </think> no"),
    ],
)
def test_reasoning_is_told_from_the_answer(text: str, opened: bool, reasoning: str, answer: str) -> None:
    assert split(text, opened=opened)[0] == {"reasoning": reasoning, "answer": answer}


def test_without_tags_everything_is_the_answer() -> None:
    assembler = TextAssembler(letters, (), None, False)
    assert run(assembler, list(map(ord, "<think>a</think>b")))["answer"] == "<think>a</think>b"


def test_reasoning_tokens_are_counted_with_their_tags() -> None:
    assembler = TextAssembler(
        lambda ids: "".join(["<think>", "a", "b", "</think>", "c"][id] for id in ids), (), THINK, False
    )
    run(assembler, range(5))
    assert assembler.reasoning_tokens == 4


marked = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "</", "STOP", "ST", "TOP", "\n", "a", "天", " "]), max_size=20
).map("".join)


@settings(max_examples=300)
@given(marked, st.lists(st.integers(0, 200), max_size=40), st.booleans())
def test_the_result_does_not_depend_on_where_tokens_cut(text: str, cuts: list[int], opened: bool) -> None:
    pieces = Pieces(text.encode(), cuts)
    assembler = TextAssembler(pieces.decode, ("STOP", "TOPa"), THINK, opened)
    assert (run(assembler, range(len(pieces.pieces))), assembler.stopped) == split(text, ("STOP", "TOPa"), opened)


def test_ten_thousand_tokens_take_linear_time() -> None:
    decoded = 0

    def counted(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return letters(ids)

    started = time.process_time()
    text = "a</think" * 1250
    assembler = TextAssembler(counted, ("STOP",), THINK, True)
    assert run(assembler, list(map(ord, text)))["reasoning"] == text
    assert decoded <= 20 * len(text)  # never the whole text again
    assert time.process_time() - started < 2


def test_nonsense_without_end_is_bounded_too() -> None:
    pieces = Pieces(b"\xff" * 3000, list(range(3000)))
    decoded: list[int] = []
    assembler = TextAssembler(lambda ids: decoded.append(len(ids)) or pieces.decode(ids), (), None, False)
    assert run(assembler, range(3000))["answer"] == "\ufffd" * 3000
    assert max(decoded) <= 16
