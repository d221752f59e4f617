"""The programs that take a saved model: PPO in its learned game, and the report of how far that can be trusted."""

import json
import re

import pytest

from benchmarks import dream_ppo, world_model_report
from tests.corridor import learned_model

GAME = ("--env", "tests.corridor:Corridor", "--device", "cpu")


@pytest.fixture
def path(tmp_path) -> str:
    learned_model().save(tmp_path / "model.zip")
    return str(tmp_path / "model.zip")


def test_ppo_learns_the_real_game_in_the_learned_one(path, tmp_path, capsys):
    out = tmp_path / "result.json"
    dream_ppo.main([path, *GAME, "--steps", "4096", "--n-envs", "16", "--episodes", "40", "--out", str(out)])
    result = json.loads(out.read_text())
    assert capsys.readouterr().out.endswith(out.read_text())
    returns = {name: play["mean"] for name, play in result["real_return"].items()}
    assert result["steps"] == 4096
    assert returns["ppo_in_the_dream"] == 1  # it always goes right
    assert abs(returns["random"]) < 0.5 and returns["iris"] < 1


def test_report_is_printed_and_written(path, tmp_path, capsys):
    world_model_report.main([path, *GAME, "--steps", "100", "--horizon", "3", "--out", str(tmp_path / "report")])
    table = (tmp_path / "report.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert [int(line.split("|")[1]) for line in table.splitlines() if re.match(r"\|\s*\d", line)] == [1, 2, 3]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("program", [dream_ppo, world_model_report])
@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": "no_such_model.zip"}, r"error: .*No such file"),
        ({"--env": "no_such_module:make"}, r"error: No module named 'no_such_module'"),
        ({"--env-kwargs": "length=3"}, r"error: .*length"),
        ({"--env-kwargs": "length"}, "--env-kwargs length: write each as NAME=VALUE"),
        ({"--device": "no_device"}, "--device no_device: .*no_device"),
        ({"--out": "no/such/folder/out"}, "--out no/such/folder/out: there is no folder no/such/folder"),
    ],
)
def test_errors_without_a_traceback(program, change, said, path, capsys):
    arguments = {"model": path, "--env": GAME[1], **change}
    model = arguments.pop("model")
    with pytest.raises(SystemExit) as error:
        program.main([model, *(word for pair in arguments.items() for word in pair)])
    assert re.search(said, f"{error.value} {capsys.readouterr().err}")
