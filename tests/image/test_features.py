"""The feature tests of the trainer also pass inside the built image, with its Python and its libraries and under the restrictions of a pod."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.trainer_image import TrainerImage

pytestmark = [pytest.mark.image, pytest.mark.slow]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("folder", ["tests/pod/learning", "tests/pod/objectives", "tests/pod/strategies", "tests/unit/trainer", "tests/unit/trainer_data"])
def test_the_feature_tests_pass_in_the_image(folder: str, trainer_image: TrainerImage, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        exit_code = trainer_image.run_pytest([folder, "-m", "not slow and not gpu"], tmp_path, output, timeout=1700)
    assert exit_code == 0, log.read_text(errors="replace")[-6000:]
