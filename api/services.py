"""What the routes work with: built once by app.py, found on the app.

Builds nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flask import current_app

from api.answers import Answers
from api.places import Places
from api.running import Running
from model.types import Backend
from security.allowances import Allowances
from security.crypto import Box
from security.limits import LoginGuard, RequestRate, StreamLimit, TokenQuota
from security.passwords import Passwords
from security.tokens import TokenPolicy
from settings import Settings
from store.audit import Audit
from store.state import State
from store.users import Users

NAME = "flask-llm"


@dataclass(frozen=True, slots=True)
class Services:
    """One of each. `model` is its public name; `jwt_key` signs tokens; `box` seals what tickets hold, and
    `contents` what the audit log keeps of prompts and answers.

    `calls` and `guesses` are the places for generations, running or waiting, and for passwords being checked.
    """

    settings: Settings
    model: str
    backend: Backend
    answers: Answers
    running: Running
    users: Users
    state: State
    audit: Audit
    contents: Box
    passwords: Passwords
    policy: TokenPolicy
    jwt_key: bytes
    box: Box
    allowances: Allowances
    rate: RequestRate
    streams: StreamLimit
    tokens: TokenQuota
    logins: LoginGuard
    calls: Places
    guesses: Places
    sanitise: Callable[[str], str]


def services() -> Services:
    """The services of the app that answers this request."""
    found: Services = current_app.extensions[NAME]
    return found
