"""The least that Flask and flask-jwt-extended can do: one route that checks a token and says nothing.

What a cache hit is compared with. No part of the service.
"""

from __future__ import annotations

import secrets

from flask import Flask
from flask_jwt_extended import JWTManager, create_access_token, jwt_required


def create() -> Flask:
    """An app with `/login`, which gives a token to any client, and `/empty`, which wants it."""
    app = Flask(__name__, static_folder=None)
    app.config["JWT_SECRET_KEY"] = secrets.token_hex(32)
    JWTManager(app)

    @app.get("/login")
    def login() -> dict[str, str]:
        return {"access_token": create_access_token("bench")}

    @app.post("/empty")
    @jwt_required()  # type: ignore[untyped-decorator]
    def empty() -> dict[str, str]:
        return {}

    return app
