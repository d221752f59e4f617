"""The benchmark of speed: every part is there, its figures fit together, and bad arguments are refused."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import speed


def test_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["speed.py", "--batch", "2", "--repeats", "1", "--device", "cpu", "--out", str(out)])
    speed.main()
    result = json.loads(out.read_text())
    parts = result["parts"]
    steps = ("tokenizer step", "world-model step", "actor-critic step")
    assert {"env step", "collection", "predict", "encode", "decode", "imagined Transformer steps", *steps} <= parts.keys()
    for row in parts.values():
        assert row["seconds"] >= row["least_seconds"] > 0
        share = row["gflop_per_second"] / result["matrix_gflop_per_second"]
        assert row["share_of_matrix_rate"] == pytest.approx(share)
    # 600 epochs of 200 steps of each network, and 100,000 env steps
    seconds = 600 * 200 * sum(parts[step]["seconds"] for step in steps) + 2_000 * parts["collection"]["seconds"]
    assert result["hours"] == pytest.approx(seconds / 3600)
    assert f"{result['hours']:,.1f} hours" in capsys.readouterr().out


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", "--batch", "0"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "--batch 0" in capsys.readouterr().err
