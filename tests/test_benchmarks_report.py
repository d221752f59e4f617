"""The report on Atari 100k: known figures come out, and what is missing stays missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rliable")

from benchmarks import report, runs


def write_run(folder: Path, game: str, seed: int, score: float | None, **spec: Any) -> None:
    """A run as ``atari100k.py`` leaves it; without a score it is not finished."""
    data: dict[str, Any] = {
        "format": runs.FORMAT,
        "spec": {"benchmark": "atari100k", "game": game, "seed": seed, "preset": "paper", "steps": 100_000}
        | {"eval_games": 100, "config": {}}
        | spec,
        "status": "training" if score is None else "done",
        "sessions": [],
        "perceptual_loss": False,
        "training_games": [] if score is None else [{"step": 1000 * i, "score": score, "frames": 9} for i in range(1, 5)],
    }
    if score is not None:
        data["score"] = score
    path = folder / game / f"seed_{seed}"
    path.mkdir(parents=True)
    runs.write_json(path / "run.json", data)


def rows(markdown: str) -> dict[str, list[str]]:
    """Lines of the first table by their first cell."""
    lines = [line for line in markdown.split("## Every game")[0].splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in lines}


def test_published_iris(tmp_path: Path) -> None:
    """The paper's own figures come out of the paper's own runs, in the table and with intervals around them."""
    markdown = report.report([report.published_agent("iris"), report.published_agent("muzero")], tmp_path, reps=50)
    n_runs, mean, median, iqm, gap, n_human = rows(markdown)["IRIS (published)"]
    assert n_runs == "26 x 5"
    assert [cell.split()[0] for cell in (mean, median, iqm, gap)] == ["1.046", "0.289", "0.501", "0.512"]
    assert n_human == "10"
    for cell in (mean, median, iqm, gap):
        value, low, high = (float(part.strip("[],")) for part in cell.split())
        assert low <= value <= high and low < high
    # Of some agents only means are published: no interquartile mean over runs can be known
    assert rows(markdown)["MuZero (published)"] == ["26 x means", "0.562", "0.227", "-", "-", "5"]
    for name in ("aggregates", "performance_profiles"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000 and (tmp_path / f"{name}.pdf").stat().st_size > 1000


def test_published_iris_as_runs(tmp_path: Path) -> None:
    """The same figures from run folders, beside which the same published runs are as good as ours."""
    for game, scores in report.PUBLISHED["runs"]["iris"].items():
        for seed, score in enumerate(scores):
            write_run(tmp_path / "runs", game, seed, score)
    ours = report.agent_of_runs("ours", tmp_path / "runs")
    assert report.missing_runs(ours) == []
    markdown = report.report([ours, report.published_agent("iris")], tmp_path / "out", reps=20)
    cells = rows(markdown)
    assert [cell.split()[0] for cell in cells["ours"]] == ["26", "1.046", "0.289", "0.501", "0.512", "10"]
    assert cells["P(ours > IRIS (published))"][0].startswith("0.500 ")
    assert "not the protocol" not in markdown and "LPIPS" not in markdown and "all of these games" not in markdown
    assert (tmp_path / "out" / "sample_efficiency.pdf").is_file()
    assert (tmp_path / "out" / "probability_of_improvement.png").is_file()


def test_aggregates_by_hand() -> None:
    """Four runs of two games."""
    scores = np.array([[0.0, 1.0], [1.0, 2.0], [2.0, 3.0], [3.0, 8.0]])
    mean, median, iqm, gap = report.aggregates(scores)
    assert mean == pytest.approx((1.5 + 3.5) / 2)
    assert median == pytest.approx((1.5 + 3.5) / 2)  # of the two games' means
    assert iqm == pytest.approx((1 + 2 + 2 + 3) / 4)  # sorted 0 1 1 2 2 3 3 8, without a quarter at each end
    assert gap == pytest.approx(1 - 7 / 8)
    assert report.n_human(scores) == 2 and report.n_human(scores - 1) == 1


def test_intervals_are_the_same_each_time() -> None:
    """Whatever is drawn in between, of which they change nothing."""
    scores = {"iris": np.arange(7.0)[:, None]}

    def bounds() -> np.ndarray:
        return report.intervals(scores, report.aggregates, 30)[1]["iris"]

    np.random.seed(1)
    first, drawn, second = bounds(), np.random.rand(), bounds()
    np.random.seed(1)
    assert drawn == np.random.rand()
    np.testing.assert_array_equal(first, second)
    assert (first[0] < first[1]).all()


def test_missing_games_and_seeds(tmp_path: Path) -> None:
    """Aggregates cover what there is, the published ones too, and the table of games has gaps."""
    for seed in (0, 1, 2):
        write_run(tmp_path / "runs", "Pong", seed, 14.6)
    for seed, score in ((0, 30.5), (1, 1.7), (2, None)):
        write_run(tmp_path / "runs", "Breakout", seed, score)
    agent = report.agent_of_runs("ours", tmp_path / "runs")
    lines = report.missing_runs(agent)
    assert lines[0].startswith("24 of 26 games have no finished run: Alien, ") and "Pong" not in lines[0]
    assert lines[1:] == ["seed 2 is missing in Breakout", "1 runs have begun or wait, and are not counted"]
    # Pong has three seeds, Breakout two: the two that both have
    np.testing.assert_allclose(report.matrix(agent, ["Breakout", "Pong"]), [[1, 1], [0, 1]])
    markdown = report.report([agent, report.published_agent("iris")], tmp_path / "out", reps=20)
    assert "- ours: over seeds 0, 1, which are the seeds that all of these games have" in markdown
    assert "over 2 of 26 games (Breakout, Pong)" in markdown
    cells = rows(markdown)
    assert cells["ours"][0] == "2 x 2" and cells["ours"][1].startswith("0.750 ")
    assert cells["IRIS (published)"][0] == "2 x 5"
    table = markdown.split("## Every game")[1]
    assert "| Alien | 227.8 | 7,128 | - | 420.0" in table
    assert "| Breakout | 1.7 | 30.5 | 16.1 ± 20.4 (2) |" in table
    assert "| Pong | -20.7 | 14.6 | 14.6 ± 0.0 (3) |" in table


def test_no_run_is_finished(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "Pong", 0, None)
    agent = report.agent_of_runs("ours", tmp_path / "runs")
    markdown = report.report([agent, report.published_agent("iris")], tmp_path / "out", reps=20)
    assert "over 0 of 26 games (none)" in markdown
    assert "| Pong | -20.7 | 14.6 | - |" in markdown


def test_other_protocol_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "Pong", 0, 1.0, steps=500)
    markdown = report.report([report.agent_of_runs("ours", tmp_path / "runs")], tmp_path / "out", reps=20)
    assert "**This is not the protocol of the published scores.**" in markdown


def test_missing_perceptual_loss_is_said(tmp_path: Path) -> None:
    """A run of the paper's settings on a machine without LPIPS is not the paper's; names of agents may be odd."""
    for seed, config in enumerate(({"perceptual_loss": "auto"}, {"perceptual_loss": None})):
        write_run(tmp_path / str(seed), "Pong", 0, 1.0, config=config)
    agents = [report.agent_of_runs(name, tmp_path / name[0]) for name in ("0, first > second", "1")]
    assert [agent.without_lpips for agent in agents] == [1, 0]
    markdown = report.report(agents, tmp_path / "out", reps=20)
    assert markdown.count("**1 runs did without the perceptual loss (LPIPS was not installed).**") == 1
    assert "P(0, first > second > 1)" in rows(markdown)


def test_commits_are_said(tmp_path: Path) -> None:
    def head(*commits: str | None) -> str:
        folder = tmp_path / f"runs_{len(list(tmp_path.iterdir()))}"
        write_run(folder, "Pong", 0, 1.0)
        file = folder / "Pong" / "seed_0" / "run.json"
        runs.write_json(file, json.loads(file.read_text()) | {"sessions": [{"commit": commit} for commit in commits]})
        return report.report([report.agent_of_runs("ours", folder)], tmp_path / "out", reps=20).partition("## Human")[0]

    assert "Code: aa." in head("aa", "aa") and "one commit" not in head("aa", "aa")
    assert "Code: aa, an unknown commit.\n**Not all of it is one commit.**" in head("aa", None)
    assert "Code: bb-dirty.\n**Not all of it is one commit.**" in head("bb-dirty")


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A folder may have a = in its path, an agent no name of another's."""
    folder = tmp_path / "lr=1e-3" / "runs"
    write_run(folder, "Pong", 0, 14.6)

    def main(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["report.py", "--out", str(tmp_path / "out"), "--reps", "20", *arguments])
        report.main()
        return capsys.readouterr().out

    assert "1 x 1" in rows(main(str(folder)))["IRIS (sb3_iris)"]
    assert "1 x 1" in rows(main(f"ours={folder}"))["ours"]
    with pytest.raises(ValueError, match="two agents have the same name"):
        main(f"IRIS (published)={folder}")
    with pytest.raises(ValueError, match="--reps 0: must be at least 1"):
        main("--reps", "0")


def test_one_run_has_no_interval(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "Pong", 0, 14.6)
    markdown = report.report([report.agent_of_runs("ours", tmp_path / "runs")], tmp_path / "out", reps=20)
    assert rows(markdown)["ours"][:3] == ["1 x 1", "1.000", "1.000"]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no runs in it"):
        report.agent_of_runs("ours", tmp_path)
    write_run(tmp_path / "mixed", "Pong", 0, 1.0)
    write_run(tmp_path / "mixed", "Pong", 1, 1.0, steps=500)
    with pytest.raises(ValueError, match="two protocols"):
        report.agent_of_runs("ours", tmp_path / "mixed")
    write_run(tmp_path / "settings", "Pong", 0, 1.0)
    write_run(tmp_path / "settings", "Pong", 1, 1.0, config={"gamma": 0.9})
    with pytest.raises(ValueError, match="different settings"):
        report.agent_of_runs("ours", tmp_path / "settings")
    write_run(tmp_path / "compare", "Pong", 0, 1.0, benchmark="compare")
    with pytest.raises(ValueError, match="runs of 'compare' in it"):
        report.agent_of_runs("ours", tmp_path / "compare")
    write_run(tmp_path / "broken", "Pong", 0, 1.0)
    file = tmp_path / "broken" / "Pong" / "seed_0" / "run.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(ValueError, match=r"run\.json is not whole"):
        report.agent_of_runs("ours", tmp_path / "broken")


def test_curve_values() -> None:
    """Mean of the last games that had ended by a step, nothing before the first."""
    curve = [(10, 1.0), (20, 3.0), (40, 8.0)]
    np.testing.assert_array_equal(report.curve_values(curve, np.array([9, 10, 25, 40, 99]), last=2), [np.nan, 1, 2, 5.5, 5.5])
    assert np.isnan(report.curve_values([], np.array([1, 2]))).all()


def test_steps_to() -> None:
    """The end of the game that brings the mean there, never before as many games as count."""
    curve = [(10, 9.0), (10, 1.0), (20, 3.0), (30, 5.0), (40, 0.0), (50, 8.0)]
    for score, last, expected in (
        (5.0, 2, 10),
        (4.0, 3, 20),
        (3.6, 5, 40),
        (3.7, 5, None),
        (4.3, 6, 50),
        (5.1, 2, None),
        (0.0, 7, None),
    ):
        assert report.steps_to(curve, score, last) == expected, (score, last)


def test_published_data() -> None:
    """Every published agent has all games and a source."""
    published = json.loads(json.dumps(report.PUBLISHED))
    assert len(report.GAMES) == 26
    sources = {name for names in published["sources"] for name in names.split(",")}
    for key in report.LABELS:
        agent = report.published_agent(key)
        assert set(agent.scores) == set(report.GAMES)
        assert agent.name.endswith("(published)") and key in sources
    assert {"random", "human"} <= sources
