"""The quickstart with several seeds: all four accuracies, the margin over the best baseline, speed and time of each.

python benchmarks/quickstart.py [--seeds 0 1 2]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import finish


def main() -> None:
    """Run the real command once per seed, each into a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    a = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        for seed in a.seeds:
            out = Path(name) / str(seed)
            command = [sys.executable, "-m", "opsin.cli", "quickstart", "--out", str(out), "--seed", str(seed)]
            subprocess.run(command, check=True)
            results[f"seed {seed}"] = json.loads((out / "results.json").read_text())
    finish("quickstart", results)


if __name__ == "__main__":
    main()
