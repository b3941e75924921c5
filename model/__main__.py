"""Makes MODEL ready to load, with its progress in the log: `make model`, and what `make run` does first.

Loads nothing into memory and serves nothing.
"""

from __future__ import annotations

import sys

from model.weights.catalogue import ModelError
from model.weights.loader import fetch
from settings import Settings, SettingsError
from telemetry import configure_logging

try:
    settings = Settings.from_environment()
    configure_logging(settings.log_level, settings.log_file)
    fetch(settings)
except (SettingsError, ModelError, OSError) as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    sys.exit("Interrupted; run it again to go on.")
