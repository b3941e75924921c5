"""`flask --app app audit verify`: whether the audit log is whole, without the service.

Needs the key file, and changes nothing.
"""

from __future__ import annotations

from pathlib import Path

import click
from flask.cli import AppGroup

from api.context import services
from audit.verify import verify

_SHOWN = 20  # problems; where there are more, the first ones tell what happened

audit = AppGroup("audit", help="Check the audit log.")


@audit.command("verify")
@click.option("--folder", type=click.Path(path_type=Path), help="A copy of the log, instead of this service's own.")
@click.option("--head", type=click.Path(path_type=Path), help="The head that belongs to the copy.")
def check(folder: Path | None, head: Path | None) -> None:
    """Read every record: whether it is as it was written, in its place, and the last one the last. Exit 1 if not."""
    place = services().audit.place
    try:
        report = verify(folder or place.folder, head or place.head, place.signer)
    except OSError as error:
        raise click.ClickException(f"the audit log cannot be read: {error}") from None
    click.echo(f"{report.records} records in {report.segments} files, {report.first} to {report.last}")
    for problem in report.problems[:_SHOWN]:
        click.echo(f"  {problem}", err=True)
    if report.problems:
        raise click.ClickException(f"{len(report.problems)} problems: this is not the log that was written")
    click.echo("whole: nothing was changed, left out or cut off")
