"""A name for what goes wrong in a run, and what is done about it.

`Doctor` reads what a run knows of itself and finds:

    batch-too-small   before the first step, from the recipe: fewer than 32 images, or more than 64 prototypes per crop
    constant-images   before the first step: most images of the probe set have one colour
    duplicates        before the first step: most images of the probe set have a copy among the others
    not-finite        a loss or a gradient is NaN or infinite, and where that began; at the next record. The step is
                      left out, and after more than max_skipped in a row the run stops
    diverged          the loss is twice that of knowing nothing for 20 steps; or the gradients are not finite while all
                      features are the same; or these stay the same for 50 steps and the student cannot even follow
    collapse          all features stay the same for 50 steps, and the student agrees; or the teacher gives every
                      image the same prototype for 50 steps
    worse-than-start  the kNN of the probe set has fallen below that of the weights it began with, see `guard`
    data-starved      a GPU waits for images in more than a fifth of the time, over 50 steps

A condition is seen at records only, so what takes n steps is named within n + 2 · log_every steps. "The same" counts
once features have differed, or once the rate has warmed up: a fresh network with LayerScale 1e-5 is as good as
constant, and needs much of the warm-up to wake. The limits were found with small networks on a processor: healthy runs
with both kinds of centering and with LayerScale 1e-5, copies of one image, constant images, noise, no centering, rates
from 0.01 to 10. tests/pretrain/test_diagnosis.py makes most of these runs again.

What depends on timings is only ever said; what else the doctor remembers is in the run's checkpoint, so a resumed run
does what an uninterrupted one would.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from opsin.pretrain.measures import pairs
from opsin.pretrain.recipe import Recipe
from opsin.pretrain.schedules import Scheduled
from opsin.pretrain.step import Outcome

SMALLEST_BATCH = 32
"""Images. Users of the reference report collapse with 4 to 16 and a flat loss with 32 and its 65,536 prototypes; the
quickstart learns with 32 and 1,024."""
PROTOTYPES_PER_CROP = 64
"""Prototypes for each global crop of a batch, over which they are balanced. Released models had 16 and 21; a batch of
256 with 65,536 prototypes, 128 per crop, is reported not to converge, and one of 80 to go backwards."""
SAME = 0.005
"""Spread below which all features count as the same."""
AWAKE = 0.05
"""Spread above which they count as different."""
ONE_PROTOTYPE = 1.5
"""Prototypes in use below which all images count as assigned to one."""
FOLLOWS = 0.3
"""Divergence in nats below which the student agrees with a teacher that says the same of all images."""
IGNORANT = 2.0
"""Times log K, the loss of a student that finds all prototypes equally likely."""
COLLAPSED_STEPS, DIVERGED_STEPS, STARVED_STEPS = 50, 20, 50
"""How long a condition holds before it is named."""
STARVED = 0.2
"""Share of the time that a GPU waits for images."""
MOST = 0.5
"""Share of the probe set."""
TWINS = 2 / 255
"""Largest difference of the 8 × 8 thumbnails of copies, of values in 0 … 1."""
FLAT = 2 / 255
"""Standard deviation of the values of an empty image."""

COMPARED = 2048
"""Images of the probe set that are compared with one another."""

NEVER = -1.0


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run."""

    name: str
    """One of those above."""
    step: int
    """Finished steps; for not-finite the step itself, counted from 0, as `--replay` takes it."""
    sentence: str
    """What, the evidence, and what to do."""
    action: Literal["warn", "skip", "lower", "stop"]
    """What was done: nothing, the step was left out, the rate was lowered, or the run is to stop."""

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}"


@dataclass(frozen=True)
class Skipped:
    """What `Skips` has counted."""

    total: int
    """Steps that were left out."""
    row: int
    """Of these, the last ones in a row."""
    last: int
    """The last one."""
    first: dict[str, int]
    """The step at which a term of the loss, or the gradients of a part, first were not finite since the last call."""


class Skips:
    """Counts on the device the steps without finite gradients; the host asks when it reads the losses anyway."""

    def __init__(self, device: torch.device) -> None:
        self.total, self.row = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.last = torch.full((), -1, dtype=torch.int64, device=device)
        self._first: dict[str, Tensor] = {}

    def note(self, step: int, outcome: Outcome) -> None:
        """Look at the outcome of a step, counted from 0, without waiting for it."""
        self.total += ~outcome.finite
        self.row.copy_(torch.where(outcome.finite, 0, self.row + 1))
        self.last.copy_(torch.where(outcome.finite, self.last, step))
        for name, value in [*outcome.terms.items(), *outcome.norms.items()]:
            if name not in self._first:
                self._first[name] = torch.full_like(self.last, -1)
            first = self._first[name]
            first.copy_(torch.where((first < 0) & ~value.isfinite(), step, first))

    def check(self) -> Skipped:
        """What was counted; waits for the device."""
        total, row, last, *first = torch.stack([self.total, self.row, self.last, *self._first.values()]).tolist()
        found = {name: step for name, step in zip(self._first, first, strict=True) if step >= 0}
        for counter in self._first.values():
            counter.fill_(-1)
        return Skipped(total, row, last, found)

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps."""
        return {"total": self.total, "row": self.row, "last": self.last}


class Doctor:
    """Names what is wrong with a run, and holds the factor of its rate."""

    def __init__(self, recipe: Recipe, device: torch.device, *, replay: bool = True) -> None:
        self.recipe, self.policy, self.device, self._replay = recipe, recipe.monitor, device, replay
        self.lowered = torch.zeros((), dtype=torch.float64)
        """How many times the rate was lowered."""
        self._awake = torch.zeros((), dtype=torch.float64)
        self._since = {name: torch.full((), NEVER, dtype=torch.float64) for name in ("collapse", "diverged")}
        self._told = {name: torch.zeros((), dtype=torch.float64) for name in self._since}
        self._began: int | None = None
        self._waits: list[tuple[int, float, float]] = []
        self._starved = False
        self._spoilt = False
        views = 2 + recipe.crops.local_count
        dino, ibot = recipe.heads.dino_prototypes, recipe.heads.ibot_prototypes
        ibot = dino if recipe.heads.tied else ibot
        predicted = 1.0 if recipe.masks.predicted == "all" else recipe.masks.probability
        self._ignorant = {
            "dino": IGNORANT * math.log(max(dino, 2)) * recipe.loss.dino * pairs(views),
            "ibot": IGNORANT * math.log(max(ibot, 2)) * recipe.loss.ibot * predicted,
        }

    def state(self) -> dict[str, Tensor]:
        """Tensors on the CPU that a checkpoint keeps, the same in all processes."""
        return {
            "lowered": self.lowered,
            "awake": self._awake,
            **{f"since.{name}": since for name, since in self._since.items()},
            **{f"told.{name}": told for name, told in self._told.items()},
        }

    def treated(self, values: Scheduled) -> Scheduled:
        """The values of a step, with the rates as low as the doctor has made them."""
        factor = self.policy.lower_by ** float(self.lowered)
        return replace(values, rate=values.rate * factor, last_layer_rate=values.last_layer_rate * factor)

    def before(self, images: Tensor | None) -> list[Finding]:
        """What is wrong before the first step.

        Args:
            images: `[n, 3, H, W]` of the training data with values in 0 … 1, if some were read.
        """
        found = []
        batch, prototypes = self.recipe.batch.size, self.recipe.heads.dino_prototypes
        ratio = prototypes / (2 * batch)
        if batch < SMALLEST_BATCH:
            found.append(
                f"batch.size is {batch}: with fewer than {SMALLEST_BATCH} images, assignments cannot be balanced and "
                "features collapse or stay as they are. Raise --batch.size, with --batch.micro if memory is short"
            )
        elif ratio > PROTOTYPES_PER_CROP:
            enough = 2 * batch * PROTOTYPES_PER_CROP
            found.append(
                f"{prototypes} prototypes are balanced over the {2 * batch} crops of a batch, {ratio:.0f} per crop, "
                f"and more than {PROTOTYPES_PER_CROP} are known not to train. Raise --batch.size, or lower "
                f"--heads.dino-prototypes and --heads.ibot-prototypes to {enough} or less"
            )
        findings = [Finding("batch-too-small", 0, sentence + ".", "warn") for sentence in found]
        findings += [] if images is None else data_findings(images)
        self._spoilt = any(finding.name in ("duplicates", "constant-images") for finding in findings)
        return findings

    def examine(self, record: Mapping[str, float], skipped: Skipped) -> list[Finding]:
        """What a record shows; may lower the rate of the steps to come. All processes call it with the same record."""
        step = int(record["step"])
        spread = record.get("teacher.spread", math.nan)
        if spread > AWAKE or step >= self.recipe.schedule.warmup_steps:
            self._awake.fill_(1)
        awake = bool(self._awake)
        same = awake and spread < SAME
        one = awake and record.get("teacher.prototypes", math.nan) < ONE_PROTOTYPE
        follows = record.get("student.divergence", math.nan) < FOLLOWS
        limits = {name: limit for name, limit in self._ignorant.items() if f"loss.{name}" in record}
        worse = [name for name, limit in limits.items() if limit and record[f"loss.{name}"] > limit]
        # In fp16, gradients overflow in healthy runs too: so the scale of the loss is found.
        overflow = bool(skipped.first) and self.recipe.precision != "fp16"
        burst = overflow and (same or bool(worse)) and all(math.isfinite(record[f"loss.{n}"]) for n in limits)

        lost = self._holds("diverged", bool(worse) or burst or (same and not follows), step)
        collapsed = self._holds("collapse", (same or one) and follows and not worse, step)
        findings = []
        if (burst and not self._told["diverged"]) or lost >= (DIVERGED_STEPS if worse else COLLAPSED_STEPS):
            findings = self._trouble("diverged", step, self._divergence(record, worse))
        elif collapsed >= COLLAPSED_STEPS and not self._spoilt:
            findings = self._trouble("collapse", step, self._collapse(record, same))
        elif skipped.first and not burst:
            findings = self._not_finite(skipped)
        if skipped.row > self.recipe.max_skipped:
            findings.append(self._give_up(skipped, "diverged" if self._told["diverged"] else "not-finite"))
        return findings + self._starvation(record)

    def _holds(self, name: str, condition: bool, step: int) -> int:
        """For how many steps a condition has held."""
        since = self._since[name]
        if not condition:
            since.fill_(NEVER)
            self._told[name].fill_(0)
            return -1
        if float(since) == NEVER:
            since.fill_(step)
        return step - int(since)

    def _trouble(self, name: str, step: int, sentence: str) -> list[Finding]:
        """A finding with what the policy does about it; said once while it lasts, unless the rate is lowered again."""
        action, lowered = self.policy.policy, int(self.lowered)
        if action == "lower" and lowered >= self.policy.lower_most:
            action = "stop"
        if action == "warn" and bool(self._told[name]):
            return []
        self._told[name].fill_(1)
        self._since[name].fill_(step)  # a lowered rate gets its time to help
        if action == "lower":
            self.lowered += 1
            sentence += (
                f" The rate is multiplied by {self.policy.lower_by:g} from here on, time {lowered + 1} of at most "
                f"{self.policy.lower_most}."
            )
        elif action == "stop":
            reason = f"after lowering the rate {lowered} times " if self.policy.policy == "lower" else ""
            sentence += (
                f" The run stops {reason}(monitor.policy is {self.policy.policy}): go on from the last checkpoint with "
                "--accept-changes and a lower --schedule.rate, or begin again in another --out."
            )
        return [Finding(name, step, sentence, action)]

    def _divergence(self, record: Mapping[str, float], worse: Sequence[str]) -> str:
        if worse:
            shown = " and ".join(
                f"loss.{name} is {record[f'loss.{name}']:.3g} where knowing nothing costs "
                f"{self._ignorant[name] / IGNORANT:.3g}"
                for name in worse
            )
        else:
            shown = (
                f"the teacher gives all images the same features (spread {record['teacher.spread']:.2g}), and the "
                f"student cannot follow it (divergence {record.get('student.divergence', math.nan):.2g})"
            )
        return (
            f"{shown}: the steps are too long. AdamW moves every weight by about the rate, {record['rate']:.2g}, and "
            "weights begin at 0.02. Lower --schedule.rate, or warm up longer."
        )

    def _collapse(self, record: Mapping[str, float], same: bool) -> str:
        shown = (
            f"the teacher gives all images the same features (spread {record['teacher.spread']:.2g}, rank "
            f"{record['teacher.rank']:.2g})"
            if same
            else "the teacher assigns all images to one prototype"
        )
        return (
            f"{shown} for {COLLAPSED_STEPS} steps and more. Usual reasons: a rate too high (now {record['rate']:.2g}), "
            f"too small a batch ({self.recipe.batch.size}), crops of an image that share nothing, no KoLeo or no "
            "centering."
        )

    def _not_finite(self, skipped: Skipped) -> list[Finding]:
        step = min(skipped.first.values())
        names = [name for name, first in skipped.first.items() if first == step]
        where, began = culprit(names)
        if self.recipe.precision == "fp16" and where == "gradient":
            return []  # how the scale of the loss is found
        losses = [f"loss.{name}" for name in names if name not in PARTS]
        gradients = [name for name in names if name in PARTS]
        seen = [
            *([", ".join(losses)] if losses else []),
            *([f"the gradients of {', '.join(gradients)}"] if gradients else []),
        ]
        sentence = (
            f"in step {step} {' and '.join(seen)} were NaN or infinite, which began in {began}; the step was left out."
        )
        if self._replay:
            sentence += f" The same command with --replay {step} says in which module, and on which images."
        return [Finding("not-finite", step, sentence, "skip")]

    def _give_up(self, skipped: Skipped, name: str) -> Finding:
        sentence = (
            f"the gradients were NaN or infinite in {skipped.row} steps in a row, the last is step {skipped.last}, and "
            f"max_skipped is {self.recipe.max_skipped}: the run stops, and the weights are those from before. Lower "
            "--schedule.rate, or train with --precision bf16 or fp32."
        )
        if self._replay:
            sentence += f" The same command with --replay {skipped.last} says where it begins."
        return Finding(name, skipped.last, sentence, "stop")

    def _starvation(self, record: Mapping[str, float]) -> list[Finding]:
        """A processor that trains also decodes, so only a GPU can be kept waiting."""
        if self.device.type == "cpu" or self._starved:
            return []
        step = int(record["step"])
        if self._began is None:
            self._began = step  # the first record has the wait for the first images, and does not count
            return []
        self._waits.append((step, record["data_seconds"], record["step_seconds"]))
        self._waits = [wait for wait in self._waits if wait[0] > step - STARVED_STEPS]
        if step - self._began < STARVED_STEPS:
            return []
        share = sum(wait[1] for wait in self._waits) / max(sum(wait[2] for wait in self._waits), 1e-9)
        if share <= STARVED:
            return []
        self._starved = True
        threads = self.recipe.data.threads()
        sentence = (
            f"in the last {STARVED_STEPS} steps the GPU waited for images in {share:.0%} of the time. Raise "
            f"--data.workers (now {threads} threads), put the images on a faster disk, or shrink them once to about "
            f"{2 * self.recipe.crops.global_size} pixels; opsin bench input measures what this machine can read."
        )
        return [Finding("data-starved", step, sentence, "warn")]


PARTS = ("backbone", "dino_head", "ibot_head", "projection")
"""Of the network, whose gradients have norms."""


def culprit(names: Sequence[str]) -> tuple[Literal["loss", "gradient"], str]:
    """Whether a loss or a gradient was the first that is not finite, and the part in which that began.

    Args:
        names: terms of the loss and parts with gradients that were not finite in a step.
    """
    koleo, dino, ibot = "koleo" in names, "dino" in names, "ibot" in names
    if koleo:  # it is of the backbone's class tokens, which the other losses need too
        return "loss", "the student's backbone" if dino or ibot else "the koleo loss"
    if dino and ibot:
        return "loss", "the teacher's backbone, or a head that both losses share"
    if dino or ibot:
        return "loss", "dino_head" if dino else "ibot_head"
    heads = [name for name in names if name != "backbone"]  # the backbone's gradients come through the heads
    return "gradient", " or ".join(f"the gradient of {name}" for name in heads or names)


def data_findings(images: Tensor) -> list[Finding]:
    """Whether most of the images `[n, 3, H, W]`, values in 0 … 1, are empty, or copies of one another."""
    n = len(images)
    empty = int((images.flatten(2).std(-1).amax(1) < FLAT).sum())
    if empty > MOST * n:
        sentence = (
            f"{empty} of {n} images of the probe set have one colour, so their crops show nothing to learn from: look "
            "at what the files hold, and at how they were converted."
        )
        return [Finding("constant-images", 0, sentence, "warn")]
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), 8).flatten(1)[:COMPARED]
    distance = torch.cdist(small, small, p=torch.inf)
    distance.fill_diagonal_(torch.inf)
    copies = int((distance.amin(1) < TWINS).sum())
    if copies > MOST * len(small):
        sentence = (
            f"{copies} of {len(small)} images of the probe set have a copy among the others, so a batch has few images "
            "to tell apart: remove the copies."
        )
        return [Finding("duplicates", 0, sentence, "warn")]
    return []
