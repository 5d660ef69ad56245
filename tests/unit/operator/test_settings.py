"""The operator's configuration file: which files are refused, and with which message."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_operator.settings import SettingsError, load


def test_file_that_is_not_utf8_is_reported_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(b"log: \xff\xfe")
    with pytest.raises(SettingsError, match=r"config.yaml is not UTF-8: invalid start byte at byte 5"):
        load(file)
