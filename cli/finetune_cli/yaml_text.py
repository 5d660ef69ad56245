"""YAML that every reader understands alike.

kubectl reads YAML 1.1, where an unquoted `no` is false and `010` is eight; others want a dot in a number with an exponent.
Texts that any of them would take for something else are quoted, and such numbers get their dot.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Any

WORDS = re.compile(r"^(y|yes|n|no|true|false|on|off|null|~|)$", re.IGNORECASE)
LOOKS_LIKE_A_VALUE = re.compile(r"^[-+]?(\.?[0-9]|\.(inf|nan)$)[0-9a-fA-FxXoO_:.eE+\-TZ ]*$|^[=<]+$", re.IGNORECASE)


def ambiguous(text: str) -> bool:
    """Whether some reader would take the unquoted text for a truth value, a number, a date or nothing."""
    return bool(WORDS.match(text) or LOOKS_LIKE_A_VALUE.match(text))


def number_text(value: float) -> str:
    """A float with a dot before any exponent."""
    text = repr(value)
    mantissa, exponent, power = text.partition("e")
    return f"{mantissa}.0e{power}" if exponent and "." not in mantissa else text


def writer() -> Any:
    """A YAML writer that keeps comments and follows the rules above."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        """Ours, so that no other user of the library is affected."""

    def represent_text(representer: Any, value: str) -> Any:
        style = '"' if ambiguous(value) else "|" if "\n" in value.strip("\n") else '"' if "\n" in value else None
        return representer.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    def represent_number(representer: Any, value: float) -> Any:
        return representer.represent_scalar("tag:yaml.org,2002:float", number_text(value))

    Representer.add_representer(str, represent_text)
    Representer.add_representer(float, represent_number)
    yaml = YAML()
    yaml.Representer = Representer
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def to_yaml(*documents: Any) -> str:
    """Documents as YAML text, parted by `---`."""
    return join(documents)


def join(documents: Iterable[Any]) -> str:
    """The same, for an iterable."""
    yaml, stream = writer(), io.StringIO()
    for i, document in enumerate(documents):
        if i:
            stream.write("---\n")
        yaml.dump(document, stream)
    return stream.getvalue()
