"""From scratch against distilled by each method: the same images, steps and student, three seeds.

    python benchmarks/distill.py --teacher FILE [--folder DIR] [--out runs/distill]
    python benchmarks/distill.py --teacher FILE --time   # two students in one run against two; when idle

FILE is a ViT-S/14, such as `benchmarks/focus.py` writes. Steps, batch and crops are the same in all, so the student's
own FLOPs are; what the teacher costs is printed beside. The recipe is that of evidence.py; nothing was tried for
distillation before it was run.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from common import OPSIN, finish, run, threads
from evidence import DENSE, FOLDER, LOW, SEEDS, STEPS, Measured, dense, knn, paired, prepare, recipe, spread, table

from opsin.backbone.registry import architecture
from opsin.backbone.vit import Architecture
from opsin.backbone.weights import restore
from opsin.data.masks import MaskRecipe
from opsin.pretrain.recipe import Recipe, to_yaml

METHODS = ("prototypes", "features")
TEACHER_SIZE = 56
"""Pixels at which the teacher sees a crop of 48: 4 × 4 patches of 14, resampled to the students' 6 × 6. With 84 it
would have as many, at more than twice the cost."""
HEADS = 100
"""Steps in which the teacher's heads are trained, for prototypes."""
TIMED = 20
"""Steps of the timed runs."""


def student(seed: int, steps: int, name: str = "vit_nano8") -> Recipe:
    """The recipe of evidence.py without masks, as in the paper."""
    own = recipe(seed, steps)
    return replace(
        own,
        backbone=replace(architecture(name), grid=LOW // 8, layerscale=1.0, position_offset=0.0),
        masks=MaskRecipe(probability=0.0, predicted="all"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="a ViT-S/14, as benchmarks/focus.py writes it")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="images of evidence.py")
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    parser.add_argument("--time", action="store_true", help="time two students in one run against two runs, no more")
    a = parser.parse_args()
    data = prepare(a.folder)
    a.out.mkdir(parents=True, exist_ok=True)

    def distilled(name: str, method: str, steps: int, students: dict[str, Recipe]) -> Path:
        folder: Path = a.out / name
        files = [write(folder.parent / f"{name}-students" / f"{each}.yaml", of) for each, of in students.items()]
        command = [*OPSIN, "distill", "--teacher", a.teacher, "--students", *files, "--method", method]
        command += ["--data", data.train, "--out", folder, "--recipe", files[0], "--teacher-size", TEACHER_SIZE]
        command += ["--heads-steps", steps, "--no-report"]
        run([str(part) for part in command], threads(1))
        return folder

    if a.time:
        timed(distilled)
        return
    measured: dict[str, dict[str, list[Measured]]] = {way: {"knn": [], "dense": []} for way in ("scratch", *METHODS)}
    for seed in SEEDS:
        file = write(a.out / f"scratch-{seed}.yaml", recipe(seed))
        command = [*OPSIN, "pretrain", "--recipe", file, "--data", data.train, "--out", a.out / f"scratch-{seed}"]
        run([str(part) for part in (*command, "--no-report")], threads(1))
        found = {"scratch": a.out / f"scratch-{seed}"}
        for method in METHODS:
            found[method] = distilled(f"{method}-{seed}", method, HEADS, {"student": student(seed, STEPS)}) / "student"
        for way, folder in found.items():
            backbone = folder / "backbone.safetensors"
            measured[way]["knn"].append(knn(backbone, LOW))
            measured[way]["dense"].append(dense(backbone, DENSE, data))
    teacher = {**knn(a.teacher, TEACHER_SIZE).figures, **dense(a.teacher, 2 * TEACHER_SIZE, data).figures}
    tokens = {
        "teacher": 2 * (1 + (TEACHER_SIZE // 14) ** 2),
        "student": 2 * (1 + (LOW // 8) ** 2) + 4 * (1 + (LOW // 16) ** 2),
    }
    share = products(restore(a.teacher)[0].arch) * tokens["teacher"]
    share /= 3 * products(recipe(0).backbone) * tokens["student"]
    names = ("knn", "dense", "miou")
    figures = {
        way: {name: [one.figures[name] for one in by["knn" if name == "knn" else "dense"]] for name in names}
        for way, by in measured.items()
    }
    differences = {
        f"{ours} − {theirs}, {measure}": paired(measured[ours][measure], measured[theirs][measure])
        for ours, theirs in (("prototypes", "scratch"), ("features", "scratch"), ("features", "prototypes"))
        for measure in ("knn", "dense")
    }
    finish(
        "distill",
        {
            "steps": STEPS,
            "heads_steps": HEADS,
            "teacher": teacher,
            "teacher_cost": share,
            "figures": figures,
            "differences": {name: asdict(difference) for name, difference in differences.items()},
        },
    )
    rows = [(way, *map(spread, by.values())) for way, by in figures.items()]
    rows.append(("the teacher itself", *(f"{teacher[name]:.3f}" for name in names)))
    print("", table(("student", "kNN", "right pixels", "mIoU"), rows), sep="\n")
    print("", table(("difference", "mean, 95 % intervals"), list(differences.items())), sep="\n")
    print(
        f"\nThe teacher's look costs {share:.1f} times the student's forward and backward in linear layers; "
        f"prototypes have {HEADS} steps of heads before, with one more look each."
    )


def products(arch: Architecture) -> float:
    """Multiplications of a token in the linear layers of all blocks."""
    feed_forward = 2 if arch.ffn == "mlp" else 3
    return float(arch.depth * (4 * arch.width**2 + feed_forward * arch.width * arch.hidden))


def timed(distilled: Callable[[str, str, int, dict[str, Recipe]], Path]) -> None:
    """Seconds of whole commands, start included, in alternation."""
    both = {name: student(0, TIMED, name) for name in ("vit_nano8", "vit_micro8")}
    seconds: dict[str, list[float]] = {"one run": [], "two runs": []}
    for seed in SEEDS:
        began = time.perf_counter()
        distilled(f"time-both-{seed}", "features", 0, both)
        between = time.perf_counter()
        for name, of in both.items():
            distilled(f"time-{name}-{seed}", "features", 0, {name: of})
        seconds["one run"].append(between - began)
        seconds["two runs"].append(time.perf_counter() - between)
    finish("distill-time", {"steps": TIMED, "seconds": seconds})
    print("", table(("two students", "seconds"), [(way, spread(found)) for way, found in seconds.items()]), sep="\n")


def write(file: Path, settings: Recipe) -> Path:
    """A recipe as a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_yaml(settings))
    return file


if __name__ == "__main__":
    main()
