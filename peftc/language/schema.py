"""The JSON Schema of the spec language, so that editors complete and check specs."""

from __future__ import annotations

from peftc.language.field import keys
from peftc.language.fields import TOP
from peftc.language.source import Json


def json_schema() -> Json:
    """A schema for YAML specs; names, shapes and counts are checked by peftc itself."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "peftc spec",
        **keys(TOP),
    }
