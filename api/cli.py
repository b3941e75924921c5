"""`flask --app app users ...`: accounts without HTTP, for whoever has a shell on the machine.

Asks for no login: who may write DATA_DIR can do all of this anyway.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click
from flask.cli import AppGroup

from accounts.passwords import generate
from accounts.roles import Role
from accounts.users import LastOfRole, OwnLimits, UnknownUser, UserExists
from api import accounts
from api.context import services
from errors import StoreUnavailable
from quotas.limits import MAX_COUNT, MAX_TOKENS
from settings import PASSWORD_LONGEST, PASSWORD_SHORTEST

_BY = "command line"
_PAGE = 1000
_AS_ROLE = "role"  # the word for a limit that is again what the role has


class _Users(AppGroup):
    """Says in one line what went wrong."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (UserExists, UnknownUser, LastOfRole, StoreUnavailable, ValueError) as error:
            raise click.ClickException(str(error)) from None


users = _Users("users", help="List and change accounts. A service that runs heeds a change within a second.")
name_argument = click.argument("name")
role_type = click.Choice([role.value for role in Role])
ask_option = click.option("--ask", is_flag=True, help="Ask for the password (or read a line) instead of making one up.")


@users.command("list")
def show() -> None:
    """All accounts, one JSON object a line."""
    after = ""
    while page := services().users.page(after, _PAGE):
        for user in page:
            own = {limit: number for limit, number in asdict(user.limits).items() if number is not None}
            click.echo(json.dumps({"username": user.name, "role": user.role, "disabled": user.disabled, **own}))
        after = page[-1].name


@users.command()
@name_argument
@click.option("--role", type=role_type, default=Role.USER.value, show_default=True)
@ask_option
def add(name: str, role: str, ask: bool) -> None:
    """Add an account."""
    password = _password(ask)
    accounts.add(_BY, name, role, password, OwnLimits())
    click.echo(f"Added {name} ({role})." + _shown(password, ask))


@users.command("password")
@name_argument
@ask_option
def set_password(name: str, ask: bool) -> None:
    """Give an account another password, which ends its sessions."""
    password = _password(ask)
    accounts.change(_BY, name, password)
    click.echo(f"Changed {name}." + _shown(password, ask))


@users.command("role")
@name_argument
@click.argument("role", type=role_type)
def set_role(name: str, role: str) -> None:
    """Give an account another role, which ends its sessions and its API keys."""
    _change(name, role=role)


@users.command()
@name_argument
def disable(name: str) -> None:
    """Shut an account out: its streams are cut, its sessions and its API keys end."""
    _change(name, disabled=True)


@users.command()
@name_argument
def enable(name: str) -> None:
    """Let a disabled account in again."""
    _change(name, disabled=False)


@users.command()
@name_argument
def delete(name: str) -> None:
    """Remove an account, its sessions and its API keys."""
    accounts.remove(_BY, name)
    click.echo(f"Removed {name}.")


class _Limit(click.ParamType[int | str, Any]):
    """A number, or the word for the role's."""

    name = f"NUMBER|{_AS_ROLE}"

    def __init__(self, least: int, most: int) -> None:
        self._range = click.IntRange(least, most)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return _AS_ROLE if value == _AS_ROLE else self._range.convert(value, parameter, context)


@users.command()
@name_argument
@click.option("--streams", type=_Limit(1, MAX_COUNT), help="Generations open at the same time.")
@click.option("--rpm", type=_Limit(1, MAX_COUNT), help="Requests in any minute.")
@click.option("--tokens-per-day", type=_Limit(0, MAX_TOKENS), help="Prompts and answers together; 0: no limit.")
def limits(name: str, **wanted: int | str | None) -> None:
    """Give an account limits of its own, or its role's again."""
    columns = {limit: None if value == _AS_ROLE else value for limit, value in wanted.items() if value is not None}
    _change(name, **columns)


def _change(name: str, **columns: Any) -> None:
    accounts.change(_BY, name, None, **columns)
    click.echo(f"Changed {name}.")


def _password(ask: bool) -> str:
    if not ask:
        return generate()
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    else:
        password = sys.stdin.readline().rstrip("\n")
    if not PASSWORD_SHORTEST <= len(password) <= PASSWORD_LONGEST:
        raise click.ClickException(f"a password has {PASSWORD_SHORTEST} to {PASSWORD_LONGEST} characters")
    return str(password)


def _shown(password: str, asked: bool) -> str:
    return "" if asked else f" The password is {password} (it is not shown again)."
