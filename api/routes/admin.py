"""Accounts, for administrators."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flask import Response

from accounts.passwords import generate
from accounts.roles import Permission
from accounts.users import User, UserLimits
from api import accounts
from api.context import services
from api.middleware import Reply, api_blueprint, needs, principal
from api.schemas import accounts as schemas

blueprint = api_blueprint("admin", "Accounts", 400, 401, 403, 404, 409, 413, 415, 422, 429, 503)


@blueprint.get("/admin/users", responses={200: schemas.UsersOut})
@needs(Permission.MANAGE_USERS)
def list_users(query: schemas.UsersQuery) -> Reply:
    """A page of accounts, by name."""
    page = services().users.page(query.after, query.limit)
    return {"users": [_shown(user) for user in page]}


@blueprint.post("/admin/users", responses={201: schemas.NewUserOut})
@needs(Permission.MANAGE_USERS)
def add_user(body: schemas.UserBody) -> Reply:
    """A new account; without a password in the request, one is made up and shown this once."""
    password, limits = body.password or generate(), UserLimits(**body.limits.model_dump())
    user = accounts.add(principal(), body.username, body.role, password, limits)
    return {**_shown(user), "password": None if body.password else password}, 201


@blueprint.get("/admin/users/<name>", responses={200: schemas.UserOut})
@needs(Permission.MANAGE_USERS)
def get_user(path: schemas.UserPath) -> Reply:
    """One account."""
    return _shown(services().users.require(path.name))


@blueprint.patch("/admin/users/<name>", responses={200: schemas.UserOut})
@needs(Permission.MANAGE_USERS)
def change_user(path: schemas.UserPath, body: schemas.UserChangeBody) -> Reply:
    """Change an account. A new password ends its sessions; a new role or being disabled ends its API keys too."""
    return _shown(accounts.change(principal(), path.name, body.password, **body.columns()))


@blueprint.delete("/admin/users/<name>", responses={204: None})
@needs(Permission.MANAGE_USERS)
def drop_user(path: schemas.UserPath) -> Reply:
    """Delete an account, its sessions and its keys."""
    accounts.remove(principal(), path.name)
    return Response(status=204)


def _shown(user: User) -> dict[str, Any]:
    return {
        "username": user.name,
        "role": user.role,
        "disabled": user.disabled,
        "own_limits": asdict(user.limits),
        "limits": asdict(services().limits.of(user.role, **asdict(user.limits))),
        "tokens_today": services().usage.tokens_today(user.id),
    }
