"""The tables as the features declare them; what changes them later is a step behind this one."""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing: `Database.upgrade` makes the tables of a new database from their declarations."""
