"""
Watch a trained agent with the RL Zoo's own commands, to which this script adds one algorithm, ``iris``::

    python benchmarks/enjoy.py --algo iris --env PongNoFrameskip-v4 -f logs
    python benchmarks/enjoy.py --record-video --algo iris --env PongNoFrameskip-v4 -f logs -n 1000 --no-render

All flags are those of ``python -m rl_zoo3.enjoy``, or after ``--record-video`` those of ``python -m rl_zoo3.record_video``.
Both sample actions in Atari games only, unless ``--stochastic`` is given.
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rl_zoo3.enjoy import enjoy

from benchmarks.train import plug_in

if __name__ == "__main__":
    plug_in()
    if "--record-video" in sys.argv:
        sys.argv.remove("--record-video")
        runpy.run_module("rl_zoo3.record_video", run_name="__main__")
    else:
        enjoy()
