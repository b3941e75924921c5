"""Makes MODEL ready to load, with its progress in the log: `make model`, and what `make run` does first."""

from __future__ import annotations

import argparse
import sys

from crypto import key_ring, signing_secret
from model.weights.catalogue import ModelError, find
from settings import Settings, SettingsError, check
from telemetry import configure_logging

options = argparse.ArgumentParser(prog="python -m model", description=__doc__)
options.add_argument("--verify", action="store_true", help="hash every file, instead of those that seem changed")
options.add_argument("--serving", action="store_true", help="also check that HOST and PORT can be listened on")
arguments = options.parse_args()
try:
    settings = Settings.from_environment()
    configure_logging(settings.log_level)
    check(settings, listening=arguments.serving)
    for given, load in ((settings.key_file, key_ring), (settings.jwt_secret_file, signing_secret)):
        if given:
            load(settings)
    find(settings)
    from model.weights.loader import fetch  # after the checks, which need no second for its libraries

    fetch(settings, arguments.verify)
except (SettingsError, ModelError, OSError) as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    sys.exit("Interrupted; run it again to go on.")
