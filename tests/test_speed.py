"""`training/evaluate/speed.py` at a size of seconds, and the promise that memory does not grow with the images."""

import json
from pathlib import Path

import pytest

from training.evaluate.speed import Options, main, measure_memory


def test_everything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    main(Options(rows=600, width=16, epochs=1, images=8, batch_size=4, rounds=1, memory=(4, 8), threads=1, out=out))
    measured = json.loads(out.read_text())
    assert measured["protocols"]["knn"]["seconds"] > 0
    assert measured["protocols"]["linear"]["seconds"] > 0
    assert measured["extraction"]["extract_images_per_second"] > 0
    assert measured["memory"].keys() == {"4", "8"}
    assert "extract / bare model" in capsys.readouterr().out


def test_memory_of_extraction_is_flat_in_the_number_of_images() -> None:
    found = measure_memory(Options(memory=(64, 544), batch_size=32, threads=1))
    # the images themselves, decoded, are 24 MB more, their tensors 23 MB; the features less than 1
    assert found["544"] - found["64"] < 10
