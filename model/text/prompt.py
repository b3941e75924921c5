"""Messages -> token ids, by the model's own chat template; text that a user typed never becomes a control token.

Knows no limits: whether the prompt fits the context is the backend's question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from errors import InvalidRequest
from model.types import Message
from model.weights.catalogue import THINK, ModelError, ModelSpec

_ROLES = ("system", "user", "assistant")
_PRIVATE_USE = range(0xF0000, 0x10FFFE)


class Prompt:
    """Renders prompts for one tokenizer. Holds nothing that changes, so that any thread may use it at any time.

    The template sees every message with the letters that control tokens are made of replaced by private ones.
    Control tokens found in its output are therefore its own. What lies between them is put back into plain text
    and encoded by a second tokenizer that knows no control token at all.

    think, think_open: as in ModelSpec; where that names none, what tokenizer and template tell.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, spec: ModelSpec) -> None:
        if not tokenizer.chat_template:
            raise ModelError(f"{spec.name} has no chat template")
        self._tokenizer = tokenizer
        self._decoder: Tokenizer = tokenizer.backend_tokenizer
        self._controls = {token.strip(): id for token, id in tokenizer.get_added_vocab().items() if token.strip()}
        self._scanner = _scanner(tokenizer)
        self._letters = sorted({letter for token in self._controls for letter in token if not letter.isspace()})
        self._plain = _without_added_tokens(self._decoder, self._controls)
        self.think = spec.think or (THINK if all(tag in self._controls for tag in THINK) else None)
        self.think_open = spec.think_open or self._starts_thinking()

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt's ids, up to where the assistant's answer starts. Raises InvalidRequest."""
        text, unmask = self._rendered(messages)
        ids: list[int] = []
        position = 0
        try:
            for control in self._scanner.finditer(text):
                ids += self._encode(text[position : control.start()].translate(unmask))
                ids.append(self._controls[control.group().strip()])
                position = control.end()
            ids += self._encode(text[position:].translate(unmask))
        except (UnicodeError, TypeError):
            raise InvalidRequest("the text is not valid Unicode", param="messages") from None
        if not ids:
            raise InvalidRequest("the prompt is empty", param="messages")
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens: what `TextAssembler` wants."""
        text: str = self._decoder.decode(list(ids), skip_special_tokens=True)
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids if text else []
        return ids

    def _rendered(self, messages: Sequence[Message]) -> tuple[str, dict[int, int]]:
        """The template's text with masked contents, and the table that unmasks them."""
        if not messages or not any(message.content.strip() for message in messages):
            raise InvalidRequest("there is no text to answer", param="messages")
        if any(message.role not in _ROLES for message in messages):  # a template writes roles out as they come
            raise InvalidRequest("a role is system, user or assistant", param="messages")
        mask = self._mask(messages)
        unmask = {private: letter for letter, private in mask.items()}
        masked = [Message(message.role, message.content.translate(mask)) for message in messages]
        text = self._apply(masked)
        return self._without_reasoning(masked, text, mask) or text, unmask

    def _without_reasoning(self, masked: Sequence[Message], text: str, mask: dict[int, int]) -> str | None:
        """R1's and Qwen3's templates cut the reasoning out of earlier answers; for that they must see its tags.

        None when the template leaves a tag in: then it would be a control token that a user typed.
        """
        tags = [(tag.translate(mask), tag) for tag in self.think or ()]
        shown = [_unmasked(message, tags) if message.role == "assistant" else message for message in masked]
        if not tags or shown == masked:
            return None
        cut = self._apply(shown)
        return cut if self._scanner.findall(cut) == self._scanner.findall(text) else None

    def _mask(self, messages: Iterable[Message]) -> dict[int, int]:
        """Control letters -> private characters that no message uses, or a user could type them ready-made."""
        used = set(str(self._tokenizer.chat_template)).union(*(message.content for message in messages))
        free = (private for private in _PRIVATE_USE if chr(private) not in used)
        mask = dict(zip(map(ord, self._letters), free, strict=False))
        if len(mask) < len(self._letters):
            raise InvalidRequest("the text uses too many private characters", param="messages")
        return mask

    def _apply(self, messages: Iterable[Message]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            raise InvalidRequest("the model's chat template refuses these roles", param="messages") from None
        return str(text)

    def _starts_thinking(self) -> bool:
        return self.think is not None and self._apply([Message("user", "x")]).rstrip().endswith(self.think[0])


def _unmasked(message: Message, tags: Iterable[tuple[str, str]]) -> Message:
    content = message.content
    for hidden, tag in tags:
        content = content.replace(hidden, tag)
    return Message(message.role, content)


def _scanner(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Finds added tokens as the tokenizer does: the longest at the leftmost place, with the space it swallows."""
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    tokens.sort(key=lambda token: len(token.content), reverse=True)
    patterns = (r"(?<!\s)\s*+" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in tokens)
    return re.compile("|".join(patterns) or r"(?!)")


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
