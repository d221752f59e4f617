"""The benchmark of speed: every part is there, its figures fit together, and bad arguments are refused."""

import json
import math
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
    # 600 epochs of 200 steps of each network, and 100,000 env steps. Of 50,000 frames those are encoded that 2 segments of 8
    # steps and 2 of 4 come across in 200 draws, and those of the latter are decoded
    encoded, decoded = (50_000 * (1 - math.exp(-draws / 50_000)) for draws in (200 * 2 * 12, 200 * 2 * 4))
    prepared = (encoded * parts["encode"]["seconds"] + decoded * parts["decode"]["seconds"]) / 2
    trained = 200 * sum(parts[step]["seconds"] for step in steps)
    seconds = 600 * (trained + prepared) + 2_000 * parts["collection"]["seconds"]
    assert result["hours"] == pytest.approx(seconds / 3600)
    assert f"{result['hours']:,.1f} hours" in capsys.readouterr().out


def test_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "speed.json"
    command = [
        "speed.py",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--parts",
        "encode",
        "decode",
    ]
    monkeypatch.setattr(sys, "argv", command)
    speed.main()
    result = json.loads(out.read_text())
    assert list(result["parts"]) == ["encode", "decode"] and result["hours"] is None
    monkeypatch.setattr(sys, "argv", [*command[:-2], "encoder"])
    with pytest.raises(SystemExit):
        speed.main()


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", "--batch", "0"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "--batch 0" in capsys.readouterr().err
