"""The service's version."""

VERSION = "1.1.0"
