"""Writes YAML that has the same meaning in YAML 1.1 and 1.2.

kubectl reads an unquoted `no` as false and `010` as eight (YAML 1.1). Other readers require a dot in a number with an exponent.
Strings that some reader would parse as another type are quoted, and numbers with an exponent get a dot.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Any

WORDS = re.compile(r"^(y|yes|n|no|true|false|on|off|null|~|)$", re.IGNORECASE)
LOOKS_LIKE_A_VALUE = re.compile(r"^[-+]?(\.?[0-9]|\.(inf|nan)$)[0-9a-fA-FxXoO_:.eE+\-TZ ]*$|^[=<]+$", re.IGNORECASE)


def needs_quotes(text: str) -> bool:
    """Return whether some YAML reader would parse the unquoted text as a boolean, a number, a date or null."""
    return bool(WORDS.match(text) or LOOKS_LIKE_A_VALUE.match(text))


def number_text(value: float) -> str:
    """Format a float with a dot before the exponent."""
    text = repr(value)
    mantissa, exponent, power = text.partition("e")
    return f"{mantissa}.0e{power}" if exponent and "." not in mantissa else text


def writer() -> Any:
    """Return a YAML writer that keeps comments and follows the rules of this module."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class ManifestRepresenter(RoundTripRepresenter):
        """A subclass, so that the representers below do not change the library's own class."""

    def represent_text(representer: Any, value: str) -> Any:
        style = '"' if needs_quotes(value) else "|" if "\n" in value.strip("\n") else '"' if "\n" in value else None
        return representer.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    def represent_number(representer: Any, value: float) -> Any:
        return representer.represent_scalar("tag:yaml.org,2002:float", number_text(value))

    ManifestRepresenter.add_representer(str, represent_text)
    ManifestRepresenter.add_representer(float, represent_number)
    yaml = YAML()
    yaml.Representer = ManifestRepresenter
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def to_yaml(*documents: Any) -> str:
    """Return documents as YAML text, separated by `---`."""
    return to_yaml_stream(documents)


def to_yaml_stream(documents: Iterable[Any]) -> str:
    """Return the documents of an iterable as YAML text, separated by `---`."""
    yaml, stream = writer(), io.StringIO()
    for i, document in enumerate(documents):
        if i:
            stream.write("---\n")
        yaml.dump(document, stream)
    return stream.getvalue()
