"""
How far the learned game can be trusted, measured on new episodes of the real one, as a table and a plot::

    python benchmarks/world_model_report.py model.zip --env benchmarks.minatar_env:make_minatar --env-kwargs game=Breakout
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env

sys.path.insert(0, str(Path(__file__).parents[1]))

from sb3_iris import IRIS
from sb3_iris.play import errors_in_words, make_env, model_parser, parse_model_args
from sb3_iris.world_model_report import world_model_report


def main(argv: Sequence[str] | None = None) -> None:
    parser = model_parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(seed=0)
    parser.add_argument("--n-envs", type=int, default=8, help="real games at a time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1_000, help="real steps to play (default: %(default)s)")
    parser.add_argument("--horizon", type=int, default=20, help="most steps to imagine (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the world model (default: %(default)s)")
    parser.add_argument("--kept-frames", type=int, help="frames that stay in a full context (default: those of half of it)")
    parser.add_argument("--out", type=Path, default=Path("world_model_report"), help="files to write, without suffix")
    args = parse_model_args(parser, argv)
    if not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")

    with errors_in_words():
        model = IRIS.load(args.model, device=args.device)
        env = make_vec_env(lambda: make_env(args.env, args.env_kwargs, model.observation_space), args.n_envs)
        report = world_model_report(
            model, env, args.steps, args.horizon, args.temperature, kept_frames=args.kept_frames, seed=args.seed
        )
    print(report.table())
    args.out.with_name(f"{args.out.name}.md").write_text(report.table() + "\n")
    report.plot(args.out.with_name(f"{args.out.name}.png"))


if __name__ == "__main__":
    main()
