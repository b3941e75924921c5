"""`flask --app app users ...` and `flask --app app keys ...`: accounts without HTTP, for operators with a shell."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click
from flask.cli import AppGroup

from accounts.passwords import generate
from accounts.roles import Role
from accounts.users import UserLimits
from api import accounts
from api.context import services
from errors import ServiceError
from quotas.limits import MAX_COUNT, MAX_TOKENS
from settings import Settings, SettingsError
from version import VERSION

_AS_ROLE = "role"  # the value for a limit that is again what the role has


def is_command() -> bool:
    """Whether this process runs a command such as `flask users`, which changes a service and never makes one."""
    context = click.get_current_context(silent=True)
    return context is not None and context.info_name != "run"


def require_service(settings: Settings) -> None:
    """Raise SettingsError unless a service has run with this DATA_DIR."""
    folder = settings.data_dir
    found = (
        settings.jwt_secret_file or (folder / "secret").exists(),
        settings.key_file or (folder / "keys").exists(),
        settings.database_url or any((folder / name).exists() for name in ("service.sqlite3", "state.sqlite3")),
    )
    if not all(found):
        raise SettingsError(f"DATA_DIR: no service has run with {folder.absolute()} (for example /var/lib/flask-llm)")


class _Group(AppGroup):
    """Says in one line what went wrong."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ServiceError as error:
            raise click.ClickException(error.detail or error.message) from None


users = _Group("users", help="List and change accounts. A running service notices a change within a second.")
keys = _Group("keys", help="API keys of an account.")
name_argument = click.argument("name")
role_type = click.Choice([role.value for role in Role])
ask_option = click.option("--ask", is_flag=True, help="Ask for the password (or read a line) instead of making one up.")


@click.command()
def version() -> None:
    """Print the version of the service."""
    click.echo(VERSION)


@users.command("list")
def show() -> None:
    """All accounts, one JSON object a line."""
    after = ""
    while page := services().users.page(after):
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
    password, words = _password(ask)
    accounts.add(None, name, role, password, UserLimits())
    click.echo(f"Added {name} ({role}).{words}")


@users.command("password")
@name_argument
@ask_option
def set_password(name: str, ask: bool) -> None:
    """Give an account another password, which ends its sessions. For a lost one too: no service needs to run."""
    password, words = _password(ask)
    _change(name, words, password=password)


@users.command("role")
@name_argument
@click.argument("role", type=role_type)
def set_role(name: str, role: str) -> None:
    """Give an account another role, which ends its sessions and its API keys."""
    _change(name, role=role)


@users.command()
@name_argument
def disable(name: str) -> None:
    """Disable an account: its streams are cut, its sessions and its API keys end."""
    _change(name, disabled=True)


@users.command()
@name_argument
def enable(name: str) -> None:
    """Enable a disabled account again."""
    _change(name, disabled=False)


@users.command()
@name_argument
def delete(name: str) -> None:
    """Remove an account, its sessions and its API keys."""
    accounts.remove(None, name)
    click.echo(f"Removed {name}.")


class _Limit(click.IntRange):
    """A number, or the word for the role's."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"NUMBER|{_AS_ROLE}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == _AS_ROLE else super().convert(value, param, ctx)


@users.command()
@name_argument
@click.option("--streams", type=_Limit(1, MAX_COUNT), help="Generations open at the same time.")
@click.option("--rpm", type=_Limit(1, MAX_COUNT), help="Requests in any minute.")
@click.option("--tokens-per-day", type=_Limit(0, MAX_TOKENS), help="Prompts and answers together; 0: no limit.")
def limits(name: str, **wanted: int | str | None) -> None:
    """Show an account's limits, or give it limits of its own, or its role's again."""
    columns: dict[str, Any] = {
        limit: None if value == _AS_ROLE else value for limit, value in wanted.items() if value is not None
    }
    if columns:
        _change(name, **columns)
    user = services().users.require(name)
    click.echo(json.dumps(asdict(services().limits.of(user.role, **asdict(user.limits)))))


@keys.command("add")
@click.option("--user", "owner", required=True, help="The account that the key belongs to.")
@click.option("--name", required=True, help="What the key is for.")
@click.option("--days", type=click.IntRange(1, 366), default=90, show_default=True)
def add_key(owner: str, name: str, days: int) -> None:
    """Add an API key and print its token, which is not shown again."""
    click.echo(accounts.add_key(None, services().users.require(owner), name[:64], days)[1])


def _change(name: str, words: str = "", **changes: Any) -> None:
    accounts.change(None, name, **changes)
    click.echo(f"Changed {name}.{words}")


def _password(ask: bool) -> tuple[str, str]:
    """A password, and what to say of it."""
    if not ask:
        made = generate()
        return made, f" The password is {made} (it is not shown again)."
    if sys.stdin.isatty():
        return click.prompt("Password", hide_input=True, confirmation_prompt=True), ""
    return sys.stdin.readline().rstrip("\n"), ""
