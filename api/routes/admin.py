"""Accounts, for administrators."""

from __future__ import annotations

from dataclasses import asdict

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from accounts.passwords import generate
from accounts.roles import Permission, Role
from accounts.users import User, UserLimits
from api import accounts
from api.context import services
from api.errors import ErrorBody
from api.middleware import SECURED, Reply, needs, principal
from api.schemas import accounts as schemas

blueprint = APIBlueprint(
    "admin",
    __name__,
    abp_tags=[Tag(name="Accounts")],
    abp_security=SECURED,
    abp_responses={code: ErrorBody for code in (400, 401, 403, 404, 409, 413, 415, 422, 429, 503)},
)


@blueprint.get("/admin/users", responses={200: schemas.UsersOut})
@needs(Permission.MANAGE_USERS)
def list_users(query: schemas.UsersQuery) -> Reply:
    """A page of accounts, by name."""
    page = services().users.page(query.after, query.limit)
    return schemas.UsersOut(users=[_shown(user) for user in page]).model_dump(mode="json")


@blueprint.post("/admin/users", responses={201: schemas.NewUserOut})
@needs(Permission.MANAGE_USERS)
def add_user(body: schemas.UserBody) -> Reply:
    """A new account; without a password in the request, one is made up and shown this once."""
    made = None if body.password else generate()
    limits = UserLimits(**body.limits.model_dump())
    user = accounts.add(principal(), body.username, body.role, body.password or made or "", limits)
    return schemas.NewUserOut(**_shown(user).model_dump(), password=made).model_dump(mode="json"), 201


@blueprint.get("/admin/users/<name>", responses={200: schemas.UserOut})
@needs(Permission.MANAGE_USERS)
def get_user(path: schemas.UserPath) -> Reply:
    """One account."""
    return _shown(services().users.require(path.name)).model_dump(mode="json")


@blueprint.patch("/admin/users/<name>", responses={200: schemas.UserOut})
@needs(Permission.MANAGE_USERS)
def change_user(path: schemas.UserPath, body: schemas.UserChangeBody) -> Reply:
    """Change an account. A new password ends its sessions; a new role or being disabled ends its API keys too."""
    user = accounts.change(principal(), path.name, body.password, **body.columns())
    return _shown(user).model_dump(mode="json")


@blueprint.delete("/admin/users/<name>", responses={204: None})
@needs(Permission.MANAGE_USERS)
def drop_user(path: schemas.UserPath) -> Reply:
    """Delete an account, its sessions and its keys."""
    accounts.remove(principal(), path.name)
    return Response(status=204)


def _shown(user: User) -> schemas.UserOut:
    found = services()
    return schemas.UserOut(
        username=user.name,
        role=Role(user.role),
        disabled=user.disabled,
        own_limits=user.limits,
        limits=found.limits.of(user.role, **asdict(user.limits)),
        tokens_today=found.usage.tokens_today(user.id),
    )
