"""The JSON of logins, tokens, API keys and accounts, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from accounts.roles import Role
from accounts.users import NAME, UserLimits
from api.schemas.native import WHOLE, Strict
from quotas.limits import MAX_COUNT, MAX_TOKENS, Limits
from settings import PASSWORD_LONGEST, PASSWORD_SHORTEST

NewPassword = Annotated[str, Field(min_length=PASSWORD_SHORTEST, max_length=PASSWORD_LONGEST)]
Wanted = Annotated[Role, Field(strict=False)]  # JSON knows no enum, only its word
Count = Annotated[int, Field(ge=1, le=MAX_COUNT), WHOLE]
Tokens = Annotated[int, Field(ge=0, le=MAX_TOKENS), WHOLE]


class LoginBody(Strict):
    username: str = Field(min_length=1, max_length=256)
    password: str = Field(min_length=1, max_length=1024)


class TokensOut(BaseModel):
    access_token: str
    refresh_token: str
    token_type: Literal["Bearer"] = "Bearer"
    expires_in: int


class PasswordBody(Strict):
    current_password: str = Field(min_length=1, max_length=PASSWORD_LONGEST)
    new_password: NewPassword


class KeyBody(Strict):
    name: str = Field(min_length=1, max_length=64)
    expires_in_days: Annotated[int, Field(ge=1, le=366), WHOLE] = 90


class KeyOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    name: str
    created_at: float = Field(validation_alias="created")
    expires_at: float = Field(validation_alias="expires")


class NewKeyOut(KeyOut):
    key: str = Field(description="Shown this once.")


class KeysOut(BaseModel):
    keys: list[KeyOut]


class LimitsBody(Strict):
    """A user's own limits; null is what the role has."""

    streams: Count | None = Field(None, description="Generations open at the same time.")
    rpm: Count | None = Field(None, description="Requests in any minute.")
    tokens_per_day: Tokens | None = Field(None, description="Prompt and answer together; 0 is no limit.")


class UserBody(Strict):
    username: str = Field(pattern=f"^{NAME}$", examples=["ann"])
    role: Wanted = Role.USER
    password: NewPassword | None = Field(None, description="Made up, and shown once, where there is none.")
    limits: LimitsBody = LimitsBody()


class UserChangeBody(Strict):
    """What is to change; the rest stays."""

    role: Wanted | None = None
    password: NewPassword | None = None
    disabled: bool | None = None
    limits: LimitsBody = LimitsBody()

    def columns(self) -> dict[str, Any]:
        """Of the limits those that were named, also with null: what is null elsewhere stays."""
        named = self.model_dump(include={"role", "disabled"}, exclude_none=True)
        return {**named, **self.limits.model_dump(exclude_unset=True)}


class UserPath(BaseModel):
    name: str = Field(min_length=1, max_length=64)


class UsersQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: str = Field("", max_length=64, description="The last name of the page before.")
    limit: int = Field(100, ge=1, le=1000)


class UserOut(BaseModel):
    username: str
    role: Role
    disabled: bool
    own_limits: UserLimits
    limits: Limits = Field(description="What holds: the user's own, else the role's, else everybody's.")
    tokens_today: int = Field(description="Prompts and answers of the generations that ended today (UTC).")


class NewUserOut(UserOut):
    password: str | None = Field(description="The one that was made up; shown this once.")


class UsersOut(BaseModel):
    users: list[UserOut]
