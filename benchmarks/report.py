"""
What papers print about Atari 100k, from runs and from published scores, with ``rliable``::

    python benchmarks/report.py runs/atari100k --out report                  # our runs beside the published ones
    python benchmarks/report.py ours=runs/a ablation=runs/b --published iris spr --out report
    python benchmarks/report.py --out report                                 # the published scores alone

Writes ``report.md`` (aggregates with 95 % stratified bootstrap intervals, and every game) and figures as PNG and PDF. A game
or seed that is not there is shown as missing: aggregates then cover what all of an agent's games have, and say so.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rliable import library, metrics, plot_utils

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import runs

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).resolve().parent / "data" / "atari100k_published.json").read_text())
GAMES = tuple(PUBLISHED["random"])
LABELS = {
    "iris": "IRIS (published)",
    "simple": "SimPLe (published)",
    "spr": "SPR (published)",
    "drq_eps": "DrQ(eps) (published)",
    "muzero": "MuZero (published)",
    "efficientzero": "EfficientZero (published)",
}
MISSING = "-"


class Agent(NamedTuple):
    """Scores of an agent: for each game those of its runs, by seed. Of some published agents only means are known."""

    name: str
    scores: dict[str, dict[int, float]]
    curves: dict[str, dict[int, list[tuple[int, float]]]]  # game -> seed -> (step, score of a training game)
    protocol: dict[str, Any] | None = None
    only_means: bool = False
    unfinished: int = 0
    code: tuple[str, ...] = ()  # commits of all sessions of the finished runs, with -dirty where files had been changed
    without_lpips: int = 0  # runs that were to have the perceptual loss where it is installed, and it was not


def normalise(scores: np.ndarray | float, game: str) -> Any:
    """
    :param scores: Scores in a game.
    :param game: The game.
    :return: The same, 0 for random play and 1 for a human.
    """
    random, human = PUBLISHED["random"][game], PUBLISHED["human"][game]
    return (np.asarray(scores) - random) / (human - random)


def published_agent(key: str) -> Agent:
    """
    :param key: Name in the data file.
    :return: Its published scores.
    """
    if key in PUBLISHED["runs"]:
        scores = {game: dict(enumerate(values)) for game, values in PUBLISHED["runs"][key].items()}
        return Agent(LABELS[key], scores, {})
    return Agent(LABELS[key], {game: {0: value} for game, value in PUBLISHED["means"][key].items()}, {}, only_means=True)


def agent_of_runs(name: str, folder: Path) -> Agent:
    """
    :param name: What to call the agent.
    :param folder: Folder with runs of ``atari100k.py``.
    :return: The scores of the runs that are done.
    :raises ValueError: If the folder has no runs, broken ones, or runs of different protocols.
    """
    protocol: dict[str, Any] | None = None
    configs: dict[str, Any] = {}
    agent = Agent(name, {}, {})
    unfinished = without_lpips = 0
    code: set[str] = set()
    for data in runs.find(folder):
        spec = data["spec"]
        if spec.get("benchmark") != "atari100k":
            raise ValueError(f"{folder} has runs of {spec.get('benchmark')!r} in it, not of atari100k")
        here = {key: spec[key] for key in ("preset", "steps", "eval_games")}
        if protocol is not None and here != protocol:
            raise ValueError(f"{folder} has runs of two protocols in it, {protocol} and {here}: report each by itself")
        protocol = here
        if configs.setdefault(spec["game"], spec["config"]) != spec["config"]:
            raise ValueError(f"{folder} has runs of {spec['game']} with different settings in it: report each by itself")
        if data["status"] != "done":
            unfinished += 1
            continue
        game, seed = spec["game"], spec["seed"]
        if seed in agent.scores.get(game, {}):
            raise ValueError(f"{folder} has {game} with seed {seed} twice")
        without_lpips += spec["config"].get("perceptual_loss") == "auto" and not data.get("perceptual_loss", True)
        code.update(session.get("commit") or "an unknown commit" for session in data["sessions"])
        agent.scores.setdefault(game, {})[seed] = data["score"]
        agent.curves.setdefault(game, {})[seed] = [(g["step"], g["score"]) for g in data["training_games"]]
    return agent._replace(protocol=protocol, unfinished=unfinished, without_lpips=without_lpips, code=tuple(sorted(code)))


def common_seeds(agent: Agent, games: list[str]) -> list[int]:
    """Seeds that all of the games have."""
    return sorted(set.intersection(*(set(agent.scores.get(game, {})) for game in games))) if games else []


def matrix(agent: Agent, games: list[str]) -> np.ndarray:
    """
    :param agent: An agent.
    :param games: Games that it has scores of.
    :return: Human-normalised scores, (runs, games), of the seeds that all the games have.
    """
    seeds = common_seeds(agent, games)
    return np.array([[normalise(agent.scores[game][seed], game) for game in games] for seed in seeds]).reshape(-1, len(games))


def n_human(scores: np.ndarray) -> int:
    """Games in which the mean over runs is at or above human."""
    return int((scores.mean(axis=0) >= 1).sum())


def aggregates(scores: np.ndarray) -> np.ndarray:
    """
    :param scores: Human-normalised scores, (runs, games).
    :return: Mean, median, interquartile mean and optimality gap.
    """
    functions: list[Callable[[np.ndarray], float]] = [
        metrics.aggregate_mean,
        metrics.aggregate_median,
        metrics.aggregate_iqm,
        metrics.aggregate_optimality_gap,
    ]
    return np.array([function(scores) for function in functions])


def intervals(
    scores: dict[str, Any], function: Callable[..., np.ndarray], reps: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Point estimates and 95 % stratified bootstrap intervals (over runs within games), the same each time."""
    state = np.random.get_state()
    np.random.seed(0)  # rliable draws from NumPy's global stream, whatever its random_state
    try:
        return library.get_interval_estimates(scores, function, reps=reps)
    finally:
        np.random.set_state(state)


def estimate(point: float, bounds: np.ndarray, n_runs: int, digits: int) -> str:
    """A number and its interval, which a single run has none of."""
    low, high = bounds
    return f"{point:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if n_runs > 1 else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows]) + "\n"


def number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def per_game_table(agents: list[Agent]) -> str:
    """Mean score of every agent in every game, with the number of its runs where that varies, and their standard deviation."""
    rows = []
    for game in GAMES:
        row = [game, number(PUBLISHED["random"][game]), number(PUBLISHED["human"][game])]
        for agent in agents:
            values = list(agent.scores.get(game, {}).values())
            if not values:
                row.append(MISSING)
            elif len(values) == 1:
                row.append(number(values[0]) + ("" if agent.only_means else " (1 run)"))
            else:
                row.append(f"{number(float(np.mean(values)))} ± {number(float(np.std(values, ddof=1)))} ({len(values)})")
        rows.append(row)
    return table(["Game", "Random", "Human", *(agent.name for agent in agents)], rows)


def missing_runs(agent: Agent) -> list[str]:
    """What an agent lacks, in words."""
    lines = []
    lacking = [game for game in GAMES if not agent.scores.get(game)]
    if lacking:
        lines.append(f"{len(lacking)} of {len(GAMES)} games have no finished run: {', '.join(lacking)}")
    seeds = sorted({seed for by_seed in agent.scores.values() for seed in by_seed})
    for seed in seeds:
        games = [game for game in GAMES if agent.scores.get(game) and seed not in agent.scores[game]]
        if games:
            lines.append(f"seed {seed} is missing in {', '.join(games)}")
    if agent.unfinished:
        lines.append(f"{agent.unfinished} runs have begun or wait, and are not counted")
    return lines


def aggregate_table(agents: list[Agent], games: list[str], reps: int, out: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Aggregates of all agents over the same games, and the score matrices of those agents whose runs are known."""
    scores = {agent.name: matrix(agent, games) for agent in agents if not agent.only_means}
    scores = {name: values for name, values in scores.items() if len(values)}
    points, bounds = intervals(scores, aggregates, reps) if scores else ({}, {})
    rows = []
    for agent in agents:
        if agent.only_means and all(game in agent.scores for game in games):
            means = matrix(agent, games)
            row = [f"{aggregates(means)[0]:.3f}", f"{aggregates(means)[1]:.3f}", MISSING, MISSING]
            rows.append([agent.name, f"{len(games)} x means", *row, str(n_human(means))])
        elif agent.name in scores:
            n_runs = len(scores[agent.name])
            row = [estimate(points[agent.name][i], bounds[agent.name][:, i], n_runs, 3) for i in range(4)]
            rows.append([agent.name, f"{len(games)} x {n_runs}", *row, str(n_human(scores[agent.name]))])
        else:
            rows.append([agent.name, MISSING, *[MISSING] * 5])
    if scores:
        names = ["Mean", "Median", "IQM", "Optimality gap"]
        below = 0.1 - 1.6 / len(scores)  # under the numbers at the axes, whose share of the height is less with more agents
        label = {"xlabel": "human-normalised score", "xlabel_y_coordinate": below, "wspace": 0.2}
        figure, _ = plot_utils.plot_interval_estimates(points, bounds, names, **label)
        save(figure, out / "aggregates")
    header = ["Agent", "Games x runs", "Mean", "Median", "IQM", "Optimality gap", "Games at or above human"]
    return table(header, rows), scores


def save(figure: Any, path: Path) -> None:
    """As PNG and PDF."""
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), bbox_inches="tight", dpi=150)
    plt.close(figure)


def improvement(agents: list[Agent], games: list[str], reps: int, out: Path) -> str:
    """Probability that the first agent beats each of the others, as a table and a figure."""
    first, *others = (agent for agent in agents if not agent.only_means and common_seeds(agent, games))
    if not others:
        return ""
    pairs: dict[str, Any] = {f"{first.name}\n{other.name}": (matrix(first, games), matrix(other, games)) for other in others}
    points, bounds = intervals(pairs, metrics.probability_of_improvement, reps)
    look = {"pair_separator": "\n", "figsize": (5, 1 + 0.5 * len(pairs)), "xticks": [0, 0.25, 0.5, 0.75, 1]}
    axes = plot_utils.plot_probability_of_improvement(points, bounds, **look)
    axes.axvline(0.5, color="black", linewidth=1, linestyle="--")  # no better and no worse
    save(axes.figure, out / "probability_of_improvement")
    rows = []
    for pair, other in zip(pairs, others, strict=True):
        low, high = np.ravel(bounds[pair])
        rows.append([f"P({first.name} > {other.name})", f"{float(np.ravel(points[pair])[0]):.3f} [{low:.3f}, {high:.3f}]"])
    return "## Probability of improvement\n\n" + table(["", "Estimate [95 % interval]"], rows) + "\n"


def curve_values(curve: list[tuple[int, float]], steps: np.ndarray, last: int = 10) -> np.ndarray:
    """
    :param curve: Steps at which games ended and their scores.
    :param steps: Where to look.
    :param last: Games to average over.
    :return: Mean score of the last games that had ended by each step; NaN before the first.
    """
    ends = np.array([step for step, _ in curve])
    scores = np.array([score for _, score in curve])
    counts = np.searchsorted(ends, steps, side="right") if len(ends) else np.zeros(len(steps), dtype=int)
    return np.array([scores[max(n - last, 0) : n].mean() if n else np.nan for n in counts])


def steps_to(curve: list[tuple[int, float]], score: float, last: int) -> int | None:
    """
    :param curve: Steps at which games ended, in order, and their scores.
    :param score: Score to reach.
    :param last: Games to average over: of few, some have luck long before the policy has the score.
    :return: The first step at which the last games have that mean; None without.
    """
    ends = np.array([step for step, _ in curve[last - 1 :]])
    reached = curve_values(curve, ends, last) >= score
    return int(ends[reached.argmax()]) if reached.any() else None


def sample_efficiency(agents: list[Agent], games: list[str], reps: int, out: Path) -> bool:
    """IQM of the scores of training games over env steps; only from where every run has finished a game."""
    frames: dict[str, np.ndarray] = {}
    points, bounds = {}, {}
    for agent in agents:
        seeds = common_seeds(agent, games)
        if not agent.curves or not seeds or agent.protocol is None:
            continue
        steps = np.linspace(0, agent.protocol["steps"], 26)[1:]
        curves = [[normalise(curve_values(agent.curves[g][s], steps), g) for g in games] for s in seeds]
        cube = np.array(curves)  # (runs, games, steps)
        known = ~np.isnan(cube).any(axis=(0, 1))
        if not known.any():
            continue
        cube, frames[agent.name] = cube[..., known], steps[known]

        def iqm(scores: np.ndarray) -> np.ndarray:
            return np.array([metrics.aggregate_iqm(scores[..., i]) for i in range(scores.shape[-1])])

        point, bound = intervals({agent.name: cube}, iqm, min(reps, 500))
        points.update(point)
        bounds.update(bound)
    if not points:
        return False
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, values in points.items():
        axes.plot(frames[name], values, label=name, marker="o", markersize=3)
        axes.fill_between(frames[name], *bounds[name], alpha=0.2)
    axes.set_xlabel("env steps")
    axes.set_ylabel("IQM of human-normalised training scores")
    axes.legend()
    save(figure, out / "sample_efficiency")
    return True


def performance_profiles(scores: dict[str, np.ndarray], reps: int, out: Path) -> None:
    """Share of runs above each score."""
    thresholds = np.linspace(0, 4, 81)
    profiles, profile_bounds = library.create_performance_profile(scores, thresholds, reps=min(reps, 500))
    figure, axes = plt.subplots(figsize=(6, 4))
    plot_utils.plot_performance_profiles(
        profiles, thresholds, profile_bounds, xlabel="human-normalised score τ", ax=axes, legend=True
    )
    save(figure, out / "performance_profiles")


def report(agents: list[Agent], out: Path, reps: int = 2_000) -> str:
    """
    Write the report and its figures.

    :param agents: Agents, ours first.
    :param out: Folder of the report.
    :param reps: Bootstrap samples.
    :return: The report in Markdown.
    """
    text = ["# Atari 100k\n"]
    ours = [agent for agent in agents if agent.protocol is not None]
    for agent in ours:
        protocol = agent.protocol or {}
        text.append(
            f"{agent.name}: {protocol['steps']:,} steps, {protocol['eval_games']} evaluation games, "
            f"preset {protocol['preset']}."
        )
        paper = {"preset": "paper", "steps": 100_000, "eval_games": 100}
        if protocol != paper:
            text.append("**This is not the protocol of the published scores.**")
        if agent.code:
            text.append(f"Code: {', '.join(agent.code)}.")
        if len(agent.code) > 1 or any(commit.endswith("-dirty") for commit in agent.code):
            text.append("**Not all of it is one commit.**")
        if agent.without_lpips:
            text.append(f"**{agent.without_lpips} runs did without the perceptual loss (LPIPS was not installed).**")
        text += [f"- Missing: {line}" for line in missing_runs(agent)] + [""]
    games = [game for game in GAMES if all(agent.scores.get(game) for agent in ours)]
    title = "all 26 games" if len(games) == len(GAMES) else f"{len(games)} of 26 games ({', '.join(games) or 'none'})"
    text.append(f"## Human-normalised scores, over {title}\n")
    text.append("Square brackets: 95 % stratified bootstrap interval over runs.\n")
    for agent in ours if games else []:
        seeds = common_seeds(agent, games)
        if any(set(agent.scores[game]) != set(seeds) for game in games):
            those = f"seeds {', '.join(map(str, seeds))}, which are the" if seeds else "no seeds, since there are no"
            text.append(f"- {agent.name}: over {those} seeds that all of these games have\n")
    out.mkdir(parents=True, exist_ok=True)
    if games:
        aggregate, scores = aggregate_table(agents, games, reps, out)
        text.append(aggregate)
        if scores:
            performance_profiles(scores, reps, out)
            text.append("![Aggregates](aggregates.png)\n\n![Performance profiles](performance_profiles.png)\n")
            text.append(improvement(agents, games, reps, out))
        if sample_efficiency(agents, games, reps, out):
            text.append("## Sample efficiency\n\nMean of each run's last 10 training games (not evaluations).\n")
            text.append("![Sample efficiency](sample_efficiency.png)\n")
    text.append("## Every game\n\nMean ± standard deviation over runs (number of runs).\n")
    text.append(per_game_table(agents))
    text.append("Sources of published scores: " + "; ".join(f"{k}: {v}" for k, v in PUBLISHED["sources"].items()) + ".")
    markdown = "\n".join(text) + "\n"
    (out / "report.md").write_text(markdown, encoding="utf-8")
    return markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="FOLDER or NAME=FOLDER with runs of atari100k.py")
    parser.add_argument("--published", nargs="*", default=list(LABELS), choices=list(LABELS), help="default: all")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--reps", type=int, default=2_000, help="bootstrap samples (default: 2000)")
    args = parser.parse_args()
    if args.reps < 1:
        raise ValueError(f"--reps {args.reps}: must be at least 1")
    agents = []
    for given in args.runs:
        named = "=" in given and not Path(given).is_dir()
        name, _, folder = given.partition("=") if named else ("", "", given)
        agents.append(agent_of_runs(name or "IRIS (sb3_iris)", Path(folder)))
    agents += [published_agent(key) for key in args.published]
    if len({agent.name for agent in agents}) < len(agents):
        raise ValueError("two agents have the same name: give folders as NAME=FOLDER, with names of their own")
    if not agents:
        raise ValueError("nothing to report: give a folder with runs, or --published")
    print(report(agents, args.out, args.reps))


if __name__ == "__main__":
    runs.main(main)
