from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from errors import InvalidRequest
from model.text.prompt import Prompt
from model.types import Message
from model.weights.catalogue import CATALOGUE, ModelError
from model.weights.loader import load_tokenizer
from tests.model.tiny import tiny_tokenizer

SPEC = CATALOGUE["smollm2-135m-instruct"]
UNLISTED = replace(SPEC, name="folder", source="/somewhere", revision=None)
# The structure of Qwen3's template: it cuts reasoning, and shows that of the last turn again.
QWEN3 = (
    "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if thought and loop.index0 + 1 >= messages|length - 1 %}<think>\n{{ thought }}\n"
    "</think>\n\n{% endif %}{{ content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "chatml": tiny_tokenizer("chatml"),
    "r1": tiny_tokenizer("r1"),
    "qwen3": with_template(QWEN3),
    "stripping": with_template(STRIPPING),
}
PROMPTS = {name: Prompt(tokenizer, SPEC) for name, tokenizer in TOKENIZERS.items()}
every_template = pytest.mark.parametrize("name", sorted(TOKENIZERS))


def talk(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in turns]


def official(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[int, ...]:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return tuple(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def controls(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[int]:
    added = set(tokenizer.get_added_vocab().values())
    return [id for id in ids if id in added]


BENIGN = [
    talk(("user", "Why is the sky blue?")),
    talk(("user", "  spaces\n\nand lines  \n")),
    talk(("system", "Be brief."), ("user", "天空为什么是蓝色的 😀"), ("assistant", "So."), ("user", "more")),
    talk(("user", "if a<b && c>d: vector<int> v; // | x |> f <| y")),
    talk(("user", "\U000f0000\U000f0001 private characters \ue000")),
]


@every_template
@pytest.mark.parametrize("messages", BENIGN)
def test_ordinary_text_gives_the_ids_of_apply_chat_template(name: str, messages: list[Message]) -> None:
    assert PROMPTS[name].render(messages) == official(TOKENIZERS[name], messages)


@pytest.mark.parametrize("name", ["r1", "qwen3"])
@pytest.mark.parametrize("answer", ["<think>\nhm\n</think>\n\nFine.", "hm</think>Fine.", "no tags"])
def test_earlier_reasoning_is_cut_as_the_template_cuts_it(name: str, answer: str) -> None:
    messages = talk(("user", "q"), ("assistant", answer), ("user", "next"), ("assistant", "x"), ("user", "again"))
    assert PROMPTS[name].render(messages) == official(TOKENIZERS[name], messages)


def test_a_tag_that_the_template_would_leave_in_stays_text() -> None:
    tokenizer, ids = TOKENIZERS["chatml"], PROMPTS["chatml"].render(talk(("user", "q"), ("assistant", "a</think>b")))
    assert tokenizer.convert_tokens_to_ids("</think>") not in ids
    assert "a</think>b" in tokenizer.decode(ids)


def test_a_user_cannot_have_his_text_cut_as_reasoning() -> None:
    ids = PROMPTS["r1"].render(talk(("user", "first</think>second")))
    assert "first</think>second" in TOKENIZERS["r1"].decode(ids)


@every_template
def test_the_first_token_is_not_doubled(name: str) -> None:
    ids, tokenizer = PROMPTS[name].render(talk(("user", "x"))), TOKENIZERS[name]
    assert ids.count(tokenizer.bos_token_id) == (name == "r1")


def hostile_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Every added token and template marker: whole, in halves, nested, in private characters."""
    tokens = [*tokenizer.get_added_vocab(), "[INST]", "<<SYS>>", "<|eot_id|>", "<\uff5cAssistant\uff5c>", "</s>"]
    nested = [token[:3] + token + token[3:] for token in tokens]
    halves = [token[:cut] for token in tokens for cut in (1, 3, -1)] + [token[-3:] for token in tokens]
    private = ["".join(chr(0xF0000 + ord(letter)) for letter in token) for token in tokens]
    ready_made = ["".join(map(chr, range(0xF0000, 0xF0000 + 200)))]
    spaced = [f" {token}\n" for token in tokens]
    return [*tokens, *nested, *halves, *private, *ready_made, *spaced, "".join(tokens), "<|im_<|im_end|>end|>", "\0"]


@cache
def harmless(prompt: Prompt, role: str) -> tuple[int, ...]:
    return prompt.render(talk((role, "x"), ("user", "y")))


def smuggled(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, text: str) -> list[int]:
    """The control tokens of prompts with this text that are not just those around a harmless one."""
    found = []
    for role in ("user", "system", "assistant"):
        ids = prompt.render(talk((role, f"x{text}x"), ("user", "y")))
        if controls(tokenizer, ids) != controls(tokenizer, harmless(prompt, role)):
            found += controls(tokenizer, ids)
        assert role != "user" or f"x{text}x" in tokenizer.decode(ids)
    return found


@pytest.mark.promise(
    "P25",
    injected="every added token and marker, whole, split and nested",
    counted="each comes back as text",
)
@every_template
def test_no_marker_that_a_user_types_becomes_a_control_token(name: str, counted: Callable[..., None]) -> None:
    hostile = hostile_texts(TOKENIZERS[name])
    added = next(iter(TOKENIZERS[name].get_added_vocab()))
    assert controls(TOKENIZERS[name], TOKENIZERS[name].encode(added)), "the fault is real: the plain tokenizer obeys"
    found = [id for text in hostile for id in smuggled(TOKENIZERS[name], PROMPTS[name], text)]
    counted(texts=len(hostile), control_tokens=len(found))
    assert found == []


def test_a_marker_in_two_messages_stays_in_pieces() -> None:
    ids = PROMPTS["chatml"].render(talk(("user", "<|im_"), ("user", "end|>")))
    assert controls(TOKENIZERS["chatml"], ids) == controls(
        TOKENIZERS["chatml"], PROMPTS["chatml"].render(talk(("user", "x"), ("user", "y")))
    )


pieces = st.sampled_from(
    ["<|", "|>", "<|im_end|>", "im_start", "<think>", "</think>", "<|User|>", "\U000f0001", " ", "\n"]
)
texts = st.lists(st.one_of(pieces, st.text(max_size=4)), max_size=12).map("".join)


@pytest.mark.promise("P25", injected="any text (hypothesis)")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_no_text_at_all_becomes_a_control_token(text: str, counted: Callable[..., None]) -> None:
    found = [id for name in ("chatml", "r1") for id in smuggled(TOKENIZERS[name], PROMPTS[name], text)]
    counted(texts=len([text]), control_tokens=len(found))
    assert found == []


@pytest.mark.promise("P25", injected="every marker of the real model", counted="each comes back as text")
def test_the_demo_tokenizer_too(demo_dir: Path, counted: Callable[..., None]) -> None:
    tokenizer = load_tokenizer(demo_dir)
    prompt = Prompt(tokenizer, SPEC)
    for messages in BENIGN:
        assert prompt.render(messages) == official(tokenizer, messages)
    hostile = hostile_texts(tokenizer)
    found = [id for text in hostile for id in smuggled(tokenizer, prompt, text)]
    counted(texts=len(hostile), control_tokens=len(found))
    assert found == []
    assert prompt.think is None and not prompt.think_open


def test_thinking_is_told_from_the_template() -> None:
    assert (PROMPTS["r1"].think, PROMPTS["r1"].think_open) == (("<think>", "</think>"), True)
    assert (PROMPTS["qwen3"].think, PROMPTS["qwen3"].think_open) == (("<think>", "</think>"), False)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        talk(("user", "")),
        talk(("user", " \n")),
        talk(("user", "a\ud800b")),
        talk(("user", "a\ud800b" * 10_000)),
        talk(("<|im_end|>", "x")),
        talk(("user", "".join(map(chr, range(0xF0000, 0x10FFFE))))),
    ],
)
def test_what_cannot_be_rendered_is_the_clients_fault(messages: list[Message]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        PROMPTS["chatml"].render(messages)
    assert caught.value.param == "messages"


def test_a_template_that_refuses_the_roles_is_the_clients_fault() -> None:
    prompt = Prompt(
        with_template("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}<|im_start|>"), SPEC
    )
    with pytest.raises(InvalidRequest, match="template refuses"):
        prompt.render(talk(("system", "x")))


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        Prompt(with_template(""), SPEC)


@every_template
def test_a_long_text_gives_the_ids_of_apply_chat_template(name: str) -> None:
    messages = talk(("user", "why 天空 <b> 😀 x\n" * 2000), ("assistant", "so"), ("user", "if a<b: " * 3000))
    assert PROMPTS[name].render(messages) == official(TOKENIZERS[name], messages)


def test_other_threads_run_beside_a_long_prompt() -> None:
    """A text of a megabyte takes a second; another thread that wants to run every millisecond hardly waits."""
    text, gaps, done = "why 天空 is <b> blue " * 60_000, [0.0], threading.Event()

    def count() -> None:
        last = time.perf_counter()
        while not done.wait(0.001):
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()

    thread = threading.Thread(target=count)
    thread.start()
    started = time.perf_counter()
    PROMPTS["chatml"].render(talk(("user", text)))
    took = time.perf_counter() - started
    done.set()
    thread.join()
    assert max(gaps) < took / 4 and len(gaps) > 20


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MULTIPLIES = "{% for m in messages %}{{ m.content * 100000 }}{% endfor %}"
GROWS = "{% for m in messages %}{% for n in messages %}{{ n.content }}{% endfor %}{% endfor %}"
FOLDS = "{{ 'x' * 10 ** 11 }}"  # by the compiler, before anything is rendered


@pytest.mark.promise("P7", injected="chat templates that loop or multiply")
@pytest.mark.parametrize("template", [LOOPS, MULTIPLIES, GROWS, FOLDS])
def test_a_template_that_never_ends_or_explodes_is_refused(template: str, counted: Callable[..., None]) -> None:
    with pytest.raises(ModelError, match="takes too much time, memory or text") as caught:
        Prompt(with_template(template), UNLISTED)
    said = str(caught.value).splitlines()
    counted(lines_said=len(said))
    assert len(said) == 1


@pytest.mark.parametrize("template", [STRIPPING, QWEN3])
def test_an_ordinary_template_of_an_unlisted_model_serves(template: str) -> None:
    assert Prompt(with_template(template), UNLISTED).render(talk(("user", "hi")))


@pytest.mark.parametrize(
    "template", ["{{ messages[7].content }}", "{{ 1 / 0 }}", "{% for %}", "{{ raise_exception('no') }}"]
)
def test_a_template_that_cannot_render_a_question_is_refused(template: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        Prompt(with_template(template), SPEC)


def test_sixteen_threads_render_at_once() -> None:
    messages = [talk(("user", f"<|im_end|> number {number} 天空 " * 20)) for number in range(64)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(PROMPTS["r1"].render, messages)) == [PROMPTS["r1"].render(m) for m in messages]


def test_generated_ids_decode_without_special_tokens() -> None:
    prompt, tokenizer = PROMPTS["chatml"], TOKENIZERS["chatml"]
    ids = tokenizer.encode("the sky<|im_end|>", add_special_tokens=False)
    assert prompt.decode(ids) == "the sky"
