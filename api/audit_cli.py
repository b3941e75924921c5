"""`flask --app app audit verify`: whether the audit log is whole, for anyone with the database and the key file."""

from __future__ import annotations

from pathlib import Path

import click
from flask.cli import AppGroup

from api.context import services
from audit.records import HeadFile
from audit.verify import verify
from db import Database
from errors import StoreUnavailable

audit = AppGroup("audit", help="Check the audit log.")


@audit.command("verify")
@click.option("--database", type=click.Path(exists=True, dir_okay=False), help="A copy of an SQLite database to check.")
@click.option("--head", type=click.Path(path_type=Path), help="The head file that belongs to the copy.")
@click.option("--at-least", type=(str, int), metavar="LOG NUMBER", help="What another machine remembers of the log.")
def check(database: str | None, head: Path | None, at_least: tuple[str, int] | None) -> None:
    """Read every record: whether each is as it was written, in its place, and the last one the last. Exit 1 if not."""
    log = services().audit
    source = log.database if database is None else Database(f"sqlite:///{database}")
    try:
        report = verify(source, log.keys, HeadFile(head or log.head_path, log.keys), at_least)
    except (StoreUnavailable, OSError) as error:
        raise click.ClickException(f"the audit log cannot be read: {error}") from None
    click.echo(f"log {report.log}: {report.records} records, {report.first} to {report.last}")
    for line in (*report.remarks, *report.problems):
        click.echo(f"  {line}", err=True)
    if report.count:
        raise click.ClickException(f"{report.count} problems: this is not the log that was written")
    click.echo("whole: nothing was changed, left out or cut off")
