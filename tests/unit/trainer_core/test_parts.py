"""Parts of a multipart upload: small enough to be repeated, few enough for S3, the same size for stores that insist on it."""

from __future__ import annotations

import pytest
from finetune_trainer.storage.s3 import MIB, PART_BYTES, _transfer

MOST = 10_000
"""Parts that S3 takes for one object."""
LARGEST = 5 * 1024 * MIB
"""Bytes that S3 takes for one part."""


@pytest.mark.parametrize(
    ("size", "part"),
    [
        (9 * MIB, 8 * MIB), (10 * 1024 * MIB, 8 * MIB), (70 * 1024 * MIB, 8 * MIB), (100 * 1024 * MIB, 12 * MIB),
        (5 * 1024 * 1024 * MIB, 583 * MIB),
    ],
)  # fmt: skip
def test_parts_suit_the_file(size: int, part: int) -> None:
    config = _transfer(size)
    assert config.multipart_chunksize == part
    assert -(-size // part) <= MOST and PART_BYTES <= part <= LARGEST
    assert config.preferred_transfer_client == "classic", "the other client of boto3 ignores an endpoint"
