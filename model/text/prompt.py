"""Messages -> token ids by the model's own chat template, and ids -> text; typed text never becomes a control token."""

from __future__ import annotations

import codecs
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from errors import InvalidRequest
from model.text.template import ERRORS, compile_template, is_harmless, render
from model.types import Message
from model.weights.catalogue import CATALOGUE, THINK, ModelError, ModelSpec

_ROLES = ("system", "user", "assistant")
_PRIVATE_USE = range(0xF0000, 0x10FFFE)
_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")
_SLICE = 8192  # characters that one call may work on under the interpreter's lock: 0.8 ms
_BYTES = {ord(letter): byte for byte, letter in bytes_to_unicode().items()}  # how GPT-2's vocabularies spell bytes
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # and how SentencePiece's do, with a mark for each in broken text


class TemplateUnusable(ModelError):
    """The model's chat template cannot serve. The message holds no path: clients may see it."""


class Prompt:
    """Renders prompts for one tokenizer, from any thread.

    The template sees every message with the letters that control tokens are made of replaced by private ones.
    Control tokens found in its output are therefore its own. What lies between them is put back into plain text
    and encoded by a second tokenizer that knows no control token at all.

    think, think_open: as in ModelSpec, or what tokenizer and template say. longest: characters of the longest token.
    dated: the template may write the date.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, spec: ModelSpec) -> None:
        if not tokenizer.chat_template:
            raise TemplateUnusable(f"{spec.name} has no chat template: use an instruct or chat model")
        source, self._constants = tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map)
        if spec not in CATALOGUE.values() and not is_harmless(source, self._constants):
            raise TemplateUnusable(f"the chat template of {spec.name} takes too much time, memory or text")
        self._decoder: Tokenizer = tokenizer.backend_tokenizer
        self._controls = {token.strip(): id for token, id in tokenizer.get_added_vocab().items() if token.strip()}
        self._scanner = _scanner(tokenizer)
        self._plain = _without_added_tokens(self._decoder, self._controls)
        self.longest = max(map(len, self._plain.get_vocab()))
        self._letters = sorted({ord(letter) for token in self._controls for letter in token if not letter.isspace()})
        self._reserved = set(_PRIVATE.findall(source))
        self.dated = "strftime_now" in source  # Llama's templates tell the model what day it is
        try:
            self._template = compile_template(source)
            sample = render(self._template, [("user", "x")], self._constants)
        except ERRORS as error:
            raise TemplateUnusable(f"the chat template of {spec.name} cannot render a question") from error
        self.think = spec.think or (THINK if all(tag in self._controls for tag in THINK) else None)
        self.think_open = spec.think_open or (self.think is not None and sample.rstrip().endswith(self.think[0]))

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt's ids, up to where the assistant's answer starts. Raises InvalidRequest."""
        if not any(message.content.strip() for message in messages):
            raise InvalidRequest("there is no text to answer", param="messages")
        if any(message.role not in _ROLES for message in messages):  # a template writes roles out as they come
            raise InvalidRequest("a role is system, user or assistant", param="messages")
        mask = self._mask(messages)
        try:
            text = self._masked_text([(m.role, _translated(m.content, mask)) for m in messages], mask)
        except ERRORS:
            raise InvalidRequest("the model's chat template refuses these roles", param="messages") from None
        unmask = {private: letter for letter, private in mask.items()}
        ids: list[int] = []
        try:
            for place, part in enumerate(self._scanner.split(text)):
                ids += [self._controls[part.strip()]] if place % 2 else self._encode(_translated(part, unmask))
        except (UnicodeError, TypeError):
            raise InvalidRequest("the text is not valid Unicode", param="messages") from None
        if not ids:
            raise InvalidRequest("the prompt is empty", param="messages")
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return str(self._decoder.decode(list(ids), skip_special_tokens=True))

    def unfinished(self, ids: Sequence[int]) -> int:
        """How many replacement marks at the end of `decode(ids)` stand for a character whose last bytes are missing."""
        tokens = [self._decoder.id_to_token(id) or "" for id in ids[-4:]]  # a character is 4 bytes at most
        spelled = "".join(chr(int(b[1], 16)) if (b := _BYTE.fullmatch(t)) else t.translate(_BYTES) for t in tokens)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(spelled.encode("latin-1", "replace"))
        missing = len(decoder.getstate()[0])
        return missing if any(map(_BYTE.fullmatch, tokens)) else min(missing, 1)

    def _encode(self, text: str) -> list[int]:
        """By a batch, for which the library gives the interpreter's lock up: 1 MB takes 0.5 to 1 s."""
        return list(self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _masked_text(self, masked: list[tuple[str, str]], mask: Mapping[int, int]) -> str:
        """The template's text. R1's and Qwen3's cut the reasoning out of earlier answers, and must see its tags for it.

        Where the template leaves a tag in, it would be a control token that a user typed: there the tags stay masked.
        """
        text, shown = render(self._template, masked, self._constants), masked
        for tag in self.think or ():
            hidden = tag.translate(mask)
            shown = [(role, c.replace(hidden, tag) if role == "assistant" else c) for role, c in shown]
        if shown == masked:
            return text
        cut = render(self._template, shown, self._constants)
        return cut if self._scanner.findall(cut) == self._scanner.findall(text) else text

    def _mask(self, messages: Iterable[Message]) -> dict[int, int]:
        """Control letters -> private characters that no message uses, or a user could type them ready-made."""
        texts = (message.content for message in messages if not message.content.isascii())
        used = self._reserved.union(*map(_PRIVATE.findall, texts))
        free = (private for private in _PRIVATE_USE if chr(private) not in used)
        mask = dict(zip(self._letters, free, strict=False))
        if len(mask) < len(self._letters):
            raise InvalidRequest("the text uses too many private characters", param="messages")
        return mask


def _translated(text: str, table: Mapping[int, int]) -> str:
    """`text.translate(table)`; the interpreter's lock is given up between slices of a long text."""
    parts = []
    for start in range(0, len(text), _SLICE):
        if start:
            time.sleep(0)
        parts.append(text[start : start + _SLICE].translate(table))
    return "".join(parts)


def _scanner(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Finds added tokens as the tokenizer does: the longest at the leftmost place, with the space it swallows."""
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    tokens.sort(key=lambda token: len(token.content), reverse=True)
    patterns = (r"(?<!\s)\s*+" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in tokens)
    return re.compile(f"({'|'.join(patterns) or '(?!)'})")


def _without_added_tokens(tokenizer: Tokenizer, controls: dict[str, int]) -> Tokenizer:
    """The same tokenizer, for which the text of a control token is text like any other. Raises ModelError."""
    state = json.loads(tokenizer.to_str())
    state |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    # Some vocabularies list the control tokens too, and may then spell them without any merge.
    if isinstance(vocabulary := state["model"].get("vocab"), dict):
        for token in controls:
            vocabulary.pop(token, None)
    plain = Tokenizer.from_str(json.dumps(state))
    for token in controls:
        if set(plain.encode(token, add_special_tokens=False).ids) & set(controls.values()):
            raise ModelError(f"this tokenizer cannot spell {token} without making it a control token")
    return plain
