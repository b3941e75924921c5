"""Chat templates: compiled, rendered, and tried in a child process with bounds first, for one is a stranger's program.

    python -m model.text.template

As a program it is that child, with the template on standard input.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
from jinja2 import Template, TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

compile_template = _compile_jinja_template  # sandboxed, with transformers' filters and functions
# What a template may raise: its own refusal of some roles, and what its expressions run into.
ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

_CPU_SECONDS, _MEMORY = 3, 1 << 30  # beside what importing takes; a plain template needs milliseconds
_MAX_CHARACTERS = 100_000  # of output beside the messages' own text; system prompts for tools take 10,000


def render(template: Template, turns: Iterable[tuple[str, str]], constants: Mapping[str, str]) -> str:
    """The prompt of these roles and contents, up to where the answer starts. Raises ERRORS."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **constants)


def is_harmless(source: str, constants: Mapping[str, str]) -> bool:
    """Whether the template ends soon and in a text of sensible length for a few ordinary conversations."""
    command, job = [sys.executable, "-m", "model.text.template"], json.dumps([source, dict(constants)])
    try:
        child = subprocess.run(
            command, input=job, text=True, capture_output=True, timeout=60, cwd=Path(__file__).parents[2], check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return child.returncode == 0


def _try_out(source: str, constants: Mapping[str, str]) -> None:
    template = compile_template(source)
    for contents in (["x"], ["x", "y", "z"], ["word " * 4000], ["word " * 20] * 101):
        roles = ["system"] * (len(contents) == 3) + ["user", "assistant"] * len(contents)
        try:
            text = render(template, zip(roles, contents, strict=False), constants)
        except ERRORS:
            continue  # it refuses such a conversation, and the request will be told
        if len(text) > _MAX_CHARACTERS + 2 * len("".join(contents)):
            sys.exit("too much text")


if __name__ == "__main__":
    seconds = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + _CPU_SECONDS
    memory = psutil.Process().memory_info().vms + _MEMORY
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    _try_out(*json.load(sys.stdin))
