"""The audit log: its events, where it ends, and which generations are open."""

from secrets import token_hex

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
        sa.Column("time", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("request", sa.Text),
        sa.Column("user", sa.Text),
        sa.Column("outcome", sa.Text),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("mac", sa.Text, nullable=False),
    )
    op.create_index("audit_by_time", "audit", ["time", "seq"])
    op.create_index("audit_by_user", "audit", ["user", "time", "seq"])
    op.create_index("audit_by_kind", "audit", ["kind", "time", "seq"])
    op.create_index("audit_by_request", "audit", ["request"])
    head = op.create_table(
        "audit_head", sa.Column("log", sa.Text, primary_key=True), sa.Column("state", sa.LargeBinary)
    )
    op.bulk_insert(head, [{"log": token_hex(8), "state": None}])
    op.create_table(
        "audit_open",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("writer", sa.Text, nullable=False),
    )
