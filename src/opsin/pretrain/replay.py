"""Run one step of a run again, and look at everything in it: `opsin pretrain ... --replay STEP`.

What a step sees is a function of (seed, step), and a checkpoint holds all else. So the latest one at or before the step
is read, the steps up to it are computed again, and in the step itself the output of every module, the gradient at every
output and every weight is looked at. Nothing is written into the run.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opsin.backbone.graphs import leaves
from opsin.backbone.vit import Block
from opsin.data.decode import shown
from opsin.data.reader import ImageReader
from opsin.data.sources import scan
from opsin.data.stream import Stream
from opsin.errors import OpsinError
from opsin.machine import pick_device
from opsin.output import only_run
from opsin.pretrain import checkpoint
from opsin.pretrain.checkpoint import Checkpoints
from opsin.pretrain.diagnosis import PARTS, culprit
from opsin.pretrain.folder import origin_of
from opsin.pretrain.probe import Sample
from opsin.pretrain.recipe import read
from opsin.pretrain.schedules import scheduled
from opsin.pretrain.start import Start
from opsin.pretrain.step import Outcome, Step
from opsin.pretrain.watch import Watch


@dataclass(frozen=True)
class Replayed:
    """What was seen in a step."""

    step: int
    """Counted from 0: the one after so many finished steps."""
    weights: list[str]
    """Tensors of the run that were not finite before the step."""
    output: str | None
    """The first module whose output was not finite, of `teacher` or `student`."""
    targets: list[str]
    """What the teacher's assignments are made of and was not finite."""
    losses: list[str]
    """Terms of the loss that were not finite."""
    gradient: str | None
    """Where the gradient was not finite first, on its way from the losses back."""
    parts: list[str]
    """Parts of the network whose gradients were not finite."""
    began: str | None
    """The part where it began, see `diagnosis.culprit`; None if all was finite."""
    images: list[str]
    """Paths of the images of the step."""
    suspects: list[str]
    """Of these, the ones whose own features were not finite."""

    def __str__(self) -> str:
        lines = [f"step {self.step}: " + ("all of it is finite" if self.began is None else f"began in {self.began}")]
        seen = {
            "not finite before the step": ", ".join(self.weights),
            "first output that is not finite": self.output,
            "not finite in the teacher's assignments": ", ".join(self.targets),
            "losses that are not finite": ", ".join(self.losses),
            "first gradient that is not finite": self.gradient,
            "parts whose gradients are not finite": ", ".join(self.parts),
        }
        lines += [f"  {what}: {where}" for what, where in seen.items() if where]
        lines += [f"  {len(self.suspects)} image(s) with features that are not finite:"] if self.suspects else []
        lines += [f"    {path}" for path in self.suspects]
        lines += [f"  the {len(self.images)} images of the step:", *(f"    {path}" for path in self.images)]
        return "\n".join(lines)


def replay(
    data: str | Path,
    out: str | Path,
    step: int,
    *,
    device: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Replayed:
    """Run a step of the run in `out` again, in this process alone, and say what in it is not finite.

    Args:
        data: the images of the run.
        out: folder of the run, which must not be running; its own recipe is read.
        step: counted from 0, as the findings and messages of a run give it.
        device: "cuda", "mps" or "cpu"; by default the first of these that is there.
        say: tells the user what goes on.

    Raises:
        OpsinError: there is no run in `out`, it has no such step, or its images are others now.
    """
    out, on = Path(out), pick_device(device)
    if not (out / "recipe.yaml").exists():
        raise OpsinError(f"{out} holds no run: give --replay with the --out of the run whose step it is.")
    recipe = replace(read(out / "recipe.yaml"), graphs=False)  # a recorded step calls no modules
    if not 0 <= step < recipe.steps:
        raise OpsinError(
            f"--replay is {step}, and the run in {out} has steps 0 to {recipe.steps - 1}: give one of them."
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_run(out))
        source = scan(data, cache=out / "cache", progress=False)
        threads = recipe.data.threads()
        channels = recipe.backbone.channels
        reader = stack.enter_context(ImageReader(source, workers=threads, channels=channels, max_bad_fraction=1))
        first = max((done for done in checkpoint.steps(out) if done <= step), default=0)
        start = Start(recipe, *origin_of(out))
        train, watch = Step(recipe, on, initial=None if first else start.networks), Watch(recipe, out, on, say)
        if not first:
            start.rest(train.state())
        state = train.state() | watch.state()
        if first:
            checkpoints = Checkpoints(out, state, recipe.backbone, recipe.checkpoint.keep)
            stack.enter_context(checkpoints).load(first)
        train.loaded()
        say(f"computing steps {first} to {step} again, from " + (f"checkpoint {first}" if first else "the beginning"))
        watch.doctor.before(Sample(source, reader, recipe).images)
        stream = Stream(recipe.stream(), recipe.data, reader, source.order, on, train.dtype)
        batches = stack.enter_context(contextlib.closing(stream.batches(first, step + 1)))
        for number, batch in enumerate(batches, start=first):
            values = watch.treated(scheduled(recipe.schedule, number, recipe.steps, recipe.batch.size))
            if number == step:
                weights = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
                look = stack.enter_context(_Look(train))
            outcome = train(batch, values)
            watch.note(number, outcome)
            if watch.due(number + 1):
                watch.examine(number + 1, outcome, values, {"step_seconds": 0.0, "data_seconds": 0.0})
        images = [shown(source.place(index)) for index in stream.indices(step).tolist()]
        return _report(step, weights, look, outcome, images)


def _report(step: int, weights: list[str], look: "_Look", outcome: Outcome, images: list[str]) -> Replayed:
    losses = [name for name, term in outcome.terms.items() if not bool(term.isfinite())]
    parts = [part for part in PARTS if part in outcome.norms and not bool(outcome.norms[part].isfinite())]
    assert outcome.targets is not None
    targets = [
        f"{what} of the {kind} targets"
        for kind, made in (("image", outcome.targets.image), ("patch", outcome.targets.patch))
        for what in ("features", "prototypes", "bias")
        if not bool(getattr(made, what).isfinite().all())
    ]
    began = culprit([*losses, *parts])[1] if losses or parts else None
    return Replayed(
        step=step,
        weights=weights,
        output=look.output,
        targets=targets,
        losses=losses,
        gradient=None if losses else look.gradient,  # behind a loss that is not finite, none is
        parts=parts,
        began=began,
        images=images,
        suspects=[images[i] for i in sorted(look.images) if len(look.images) < len(images)],
    )


class _Look(contextlib.ExitStack):
    """Looks at every output and every gradient of a step, and remembers the first that is not finite."""

    def __init__(self, train: Step) -> None:
        super().__init__()
        self.output: str | None = None
        self.gradient: str | None = None
        self.images: set[int] = set()
        self._seen = {"teacher": 0, "student": 0}
        for who, network in (("teacher", train.objective.teacher), ("student", train.objective.student)):
            for name, module in network.named_modules():
                self._keep(module.register_forward_hook(partial(self._forward, who, f"{who}.{name}".rstrip("."))))
            for name, parameter in network.named_parameters():
                if parameter.requires_grad:
                    self._keep(parameter.register_hook(partial(self._backward, f"{who}.{name}")))

    def _keep(self, handle: Any) -> None:
        self.callback(handle.remove)

    def _forward(self, who: str, name: str, module: nn.Module, given: Any, output: Any) -> None:
        if name == f"{who}.backbone":
            self._rows(who, output[0].cls)
        for tensor in leaves(output):
            if self.output is None and not _finite(tensor):
                if isinstance(module, Block):  # its training form calls no modules; the plain form calls each
                    with torch.no_grad():
                        Block.forward(module, *given)
                self.output = self.output or name
            if tensor.requires_grad:
                tensor.register_hook(partial(self._backward, f"the output of {name}"))

    def _rows(self, who: str, tokens: Tensor) -> None:
        """Note the images of a micro-batch whose class tokens `[2b, D]` are not finite."""
        b = len(tokens) // 2
        bad = (~tokens.isfinite().all(1)).nonzero().flatten() % b
        self.images |= {self._seen[who] + int(row) for row in bad}
        self._seen[who] += b

    def _backward(self, name: str, gradient: Tensor) -> None:
        if self.gradient is None and not _finite(gradient):
            self.gradient = name


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
