"""Writes YAML that has the same meaning in YAML 1.1 and 1.2.

kubectl follows YAML 1.1 and reads an unquoted `no` as false and `010` as eight. Some other readers do not read a number with an exponent as a number
if it has no dot. Therefore strings that a reader could parse as another type are quoted, and numbers with an exponent get a dot.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Any

WORDS_TO_QUOTE = re.compile(r"^(y|yes|n|no|true|false|on|off|null|~|)$", re.IGNORECASE)
PATTERN_TO_QUOTE = re.compile(r"^[-+]?(\.?[0-9]|\.(inf|nan)$)[0-9a-fA-FxXoO_:.eE+\-TZ ]*$|^[=<]+$", re.IGNORECASE)


def needs_quotes(text: str) -> bool:
    """Whether a YAML reader may parse the unquoted text as a boolean, a number, a date or null."""
    return bool(WORDS_TO_QUOTE.match(text) or PATTERN_TO_QUOTE.match(text))


def format_number(number: float) -> str:
    """Format a float. If the number has an exponent, a dot is added to the mantissa."""
    text = repr(number)
    mantissa, separator, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if separator and "." not in mantissa else text


def make_writer() -> Any:
    """Return a YAML writer that keeps comments and follows the rules of this module."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class ManifestRepresenter(RoundTripRepresenter):
        """A subclass that holds the representers of this module. They would otherwise be added to the library's own class, and change it for all callers."""

    def represent_text(representer: Any, value: str) -> Any:
        style = '"' if needs_quotes(value) else "|" if "\n" in value.strip("\n") else '"' if "\n" in value else None
        return representer.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    def represent_number(representer: Any, value: float) -> Any:
        return representer.represent_scalar("tag:yaml.org,2002:float", format_number(value))

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
    yaml, stream = make_writer(), io.StringIO()
    for i, document in enumerate(documents):
        if i:
            stream.write("---\n")
        yaml.dump(document, stream)
    return stream.getvalue()
