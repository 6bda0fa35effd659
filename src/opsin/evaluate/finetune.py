"""Fine-tuning for classification: what is gained when the backbone learns too, beside the linear head alone.

A linear head on frozen features comes first; fine-tuning starts from it. AdamW with rates that fall from the last block
to the first, warm-up and cosine, random-resized crops with a flip, mixup or cutmix in every batch, and smoothed labels.

The paper takes the recipe of DeiT III (Touvron et al., 2204.07118), whose published commands share the mixing, the
smoothing and the 20 epochs, and differ in what options say: one rate of 1e-5 for all layers that stays after 5 epochs
of warm-up, weight decay 0.1, 512 images per step, tests without a border. Its RandAugment, stochastic depth and fresh
head are not here, and its gradients are not clipped.
"""

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opsin.backbone import weights
from opsin.backbone.vit import VisionTransformer
from opsin.data.decode import shown
from opsin.errors import FINITE, SEEDS, OpsinError, within
from opsin.evaluate.classifier import Classifier, save
from opsin.evaluate.datasets.classification import SETS, metric_of
from opsin.evaluate.linear import TITLES, measure
from opsin.evaluate.metrics import Measured
from opsin.evaluate.model import Model, wrap
from opsin.evaluate.pooled import features
from opsin.evaluate.probe import Probe, cosine, fit
from opsin.evaluate.sets import ImageSet, named, train_and_test
from opsin.evaluate.store import place
from opsin.evaluate.task import Result, Run, Table
from opsin.evaluate.training import train as training
from opsin.evaluate.transforms import Centre
from opsin.evaluate.views import Views

LINEAR = Probe(steps=2500, blocks=(1,), crops="centre")
"""The linear head that comes first."""
MIXUP, CUTMIX = 0.8, 1.0
"""Both parameters of the Beta distributions that shares of mixed images are drawn from."""


@dataclass(frozen=True)
class Finetune:
    """How a backbone is fine-tuned and measured."""

    data: str = ""
    """Training images: one folder per class, shards with labels, or NAME:PATH of a published set."""
    test_data: str | None = None
    """Test images, likewise; without it a published set's own test part, or a part of `data` that is held out."""
    test_fraction: float = 0.2
    """Share of every class that is held out for the test without `test_data`."""
    seed: int = 0
    """Of that choice, the crops and the mixing."""
    size: int = 224
    """Side of the crops in pixels, a multiple of the patch."""
    shorter: int | None = None
    """Shorter side of test images, of which the centre is cropped; by default as 256 is to a crop of 224."""
    epochs: int = 20
    """Passes over the training images."""
    train_batch: int = 256
    """Images per step; they go through the backbone in parts of `batch_size` images."""
    rate: float = 5e-4
    """Highest rate of the head, and of LoRA's matrices with `lora`."""
    layer_decay: float = 0.75
    """Each block's rate over the rate of the one after it; after the last comes the head, before the first the patch
    embedding. 1 gives all the same."""
    warmup: float = 0.1
    """Share of the steps in which the rates rise."""
    last_rate: float = 0.0
    """What the cosine ends at, as a share of `rate`."""
    weight_decay: float = 0.05
    """AdamW's decay of matrices."""
    smoothing: float = 0.1
    """Share of every target that is spread over all classes."""
    mix: bool = True
    """Mix the images of every batch in pairs, by mixup or cutmix."""
    freeze_backbone_epochs: int = 0
    """First passes in which the head learns alone."""
    lora: int = 0
    """Rank of low-rank additions to the attention's matrices, which learn in place of the backbone; 0 tunes it all."""
    save: Path | None = None
    """Folder for the tuned backbone, backbone.safetensors as any other, and its head, head.safetensors."""

    def __post_init__(self) -> None:
        within(self, "--", seed=SEEDS, size=(1, FINITE), epochs=(1, FINITE), train_batch=(1, FINITE))
        within(self, "--", rate=(0, 1e3), layer_decay=(0, 1), weight_decay=(0, 1e3), smoothing=(0, 1), lora=(0, 1e4))
        within(self, "--", warmup=(0, 1), last_rate=(0, 1))
        if self.shorter is not None:
            within(self, "--", shorter=(self.size, FINITE))
        within(self, "--", freeze_backbone_epochs=(0, self.epochs))
        if not 0 < self.test_fraction < 1:
            raise OpsinError(f"--test-fraction is {self.test_fraction}: give a share between 0 and 1, such as 0.2.")


class Tuned(nn.Module):
    """A backbone that learns, and a linear head on its class token and mean patch token as the probe chose them."""

    def __init__(self, backbone: nn.Module, head: Classifier) -> None:
        """The backbone is taken as it is; the head is copied."""
        super().__init__()
        self.backbone = backbone
        self.mean = head.mean
        self.head = nn.Linear(head.weight.shape[1], len(head.bias), device=head.weight.device)
        with torch.no_grad():
            self.head.weight.copy_(head.weight)
            self.head.bias.copy_(head.bias)

    def seen(self, images: Tensor) -> Tensor:
        """What the head sees of prepared images `[B, C, H, W]`."""
        found = self.backbone([images])[0]
        cls: Tensor = found.cls
        return torch.cat([cls, found.patches.flatten(1, 2).mean(1)], 1) if self.mean else cls

    def forward(self, images: Tensor) -> Tensor:
        """Scores `[B, K]` of prepared images `[B, C, H, W]`."""
        scores: Tensor = self.head(self.seen(images))
        return scores


def finetune(model: Model, settings: Finetune, run: Run) -> Result:
    """Fine-tune the backbone with a linear head, and say whether that is better than the linear head alone.

    The model itself is not changed. Training is in fp32, on GPUs with bf16 products; a backbone that was opened in half
    precision is tuned from its rounded weights.

    Returns:
        The set's metric (`accuracy` or `per_class`) of the tuned model, and `linear`, that of the head alone. Details:
        `steps`, `trained` (parameters that learn), `n_train`, `n_test`, `classes`, `per_class`.

    Raises:
        OpsinError: see `sets.train_and_test` and `probe.fit`; peft is missing; the folder cannot be written.
    """
    train, test = train_and_test(
        settings.data, settings.test_data, settings.test_fraction, settings.seed, model.arch.channels
    )
    spec = settings.test_data or settings.data
    metric = metric_of(spec)
    if metric not in TITLES:
        raise OpsinError(f"images of {spec} have several classes each, and a linear head gives one: use logreg.")
    first = fit(model, train, test, replace(LINEAR, size=settings.size, probe_seed=settings.seed), run, metric)
    alone = measure(first.classifier, test, first.test, metric)
    tuned = _tuned(model, first.classifier, train, settings, run)
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    backbone = merged(tuned.backbone)
    head = Classifier(tuned.head.weight.detach(), tuned.head.bias.detach(), 1, tuned.mean)
    if settings.save is not None:
        weights.save(backbone, settings.save / "backbone.safetensors")
        save(head, settings.save / "head.safetensors")
    tuned_model = wrap(backbone, f"{model.name}, fine-tuned")
    found = features(tuned_model, test, Centre(settings.size, settings.shorter), run)
    measured = measure(head, test, found, metric)
    name, _ = named(spec, SETS)
    by_class = zip(train.classes, measured.by_class.tolist(), strict=True)
    return Result(
        data=name or test.where,
        metrics={metric: measured.value, "linear": alone.value},
        table=Table(
            ("model", TITLES[metric]),
            [["linear head, frozen backbone", f"{alone.value:.3f}"], [_title(settings), f"{measured.value:.3f}"]],
            _advice(alone, measured),
        ),
        details={
            "steps": steps_of(settings, len(train)),
            "trained": trained,
            "n_train": len(train),
            "n_test": int(found.good.sum()),
            "classes": [shown(one) for one in train.classes],
            "per_class": {shown(one): value for one, value in by_class if value == value},  # NaN: none is tested
        },
        left_out=[*first.left_out, *((test.name(index), reason) for index, reason in sorted(found.bad.items()))],
        outcomes=None if measured.outcomes is None else measured.outcomes.numpy(),
    )


def steps_of(settings: Finetune, images: int) -> int:
    """Steps of the training."""
    return max(1, round(settings.epochs * images / settings.train_batch))


def schedule(step: int, steps: int, settings: Finetune) -> float:
    """Factor of the rates: half a cosine from 1 to `last_rate`, times a rise over the first steps."""
    warm = max(1, round(settings.warmup * steps))
    return min(1.0, (step + 1) / warm) * (settings.last_rate + (1 - settings.last_rate) * cosine(steps)(step))


def depth_of(name: str, depth: int) -> int:
    """How deep a parameter lies, from 0 for the embedding over 1 for the first block to depth + 1 for norm and head."""
    block = re.search(r"\bblocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return depth + 1 if re.search(r"\b(norm|head)\.(weight|bias)$", name) else 0


def groups(module: nn.Module, depth: int, settings: Finetune) -> list[dict[str, Any]]:
    """Parameter groups by depth and decay, of those that learn, for a module whose backbone has `depth` blocks.

    The head and the final norm have the full rate, each block before them `layer_decay` of what comes after; LoRA's
    matrices all have the full rate. Vectors, such as biases, norms and single tokens, and positions do not decay.
    """
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            deep = depth + 1 if settings.lora else depth_of(name, depth)
            decays = parameter.ndim > 1 and not name.endswith(("_token", "_tokens", "pos_embed"))
            found.setdefault((deep, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.rate * settings.layer_decay ** (depth + 1 - deep),
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (deep, decays), parameters in found.items()
    ]


def trainable(model: Model, lora: int) -> nn.Module:
    """A copy of the backbone in fp32 that learns: all of it, or LoRA's additions alone.

    Raises:
        OpsinError: peft is missing.
    """
    backbone = VisionTransformer(model.arch).to(
        model.device
    )  # plain blocks: fused ones would pass over LoRA's matrices
    backbone.load_state_dict(model.backbone.state_dict())
    backbone.mask_token.requires_grad_(False)  # no gradient reaches it
    if not lora:
        return backbone
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise OpsinError("--lora needs peft, which is missing: pip install 'opsin[eval]'.") from None
    config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=["qkv", "attn.proj"])
    wrapped: nn.Module = get_peft_model(backbone, config)
    return wrapped


def merged(backbone: nn.Module) -> VisionTransformer:
    """The backbone that was tuned, with LoRA's additions in its matrices, in eval mode."""
    plain = backbone if isinstance(backbone, VisionTransformer) else backbone.merge_and_unload()  # type: ignore[operator]
    assert isinstance(plain, VisionTransformer)
    return plain.eval()


def mixed(images: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Every image of `[B, C, H, W]` mixed with another of the batch, and so its target `[B, K]`.

    Mixup (Zhang et al., 1710.09412) or cutmix (Yun et al., 1905.04899), by the toss of a coin, with the batch in
    reverse as partner.
    """
    if rng.random() < 0.5:
        share = float(rng.beta(MIXUP, MIXUP))
        images = share * images + (1 - share) * images.flip(0)
    else:
        height, width = images.shape[-2:]
        cut = np.sqrt(1 - rng.beta(CUTMIX, CUTMIX))
        (top, bottom), (left, right) = (
            np.clip(rng.integers(side) + np.array([-1, 1]) * int(side * cut) // 2, 0, side) for side in (height, width)
        )
        partner = images.flip(0)
        images = images.clone()
        images[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
        share = 1 - float((bottom - top) * (right - left)) / (height * width)
    return images, share * targets + (1 - share) * targets.flip(0)


def _tuned(model: Model, head: Classifier, train: ImageSet, settings: Finetune, run: Run) -> Tuned:
    """The module after the training, from the store if it was done before."""
    assert train.labels is not None
    torch.manual_seed(settings.seed)  # LoRA's first matrices
    module = Tuned(trainable(model, settings.lora), head).to(model.device)
    steps = steps_of(settings, len(train))
    facts = {name: value for name, value in asdict(settings).items() if name not in ("save", "shorter")}
    folder = place(
        run.cache,
        "finetuned",
        weights=model.digest,
        images=train.fingerprint,
        labels=hashlib.sha256(train.labels.tobytes()).hexdigest(),
        classes=len(train.classes),
        settings=facts,
        part=run.batch_size,
    )
    optimiser = torch.optim.AdamW(groups(module, model.arch.depth, settings))
    frozen = round(steps * settings.freeze_backbone_epochs / settings.epochs)

    def batches(start: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        views = Views(train, settings.size, settings.train_batch, settings.seed).batches(start, steps, run.workers)
        try:
            for step, (images, labels) in enumerate(views, start):
                targets = F.one_hot(labels, len(train.classes)).float()
                if settings.mix:
                    images, targets = mixed(images, targets, np.random.default_rng([settings.seed, step, 0, 0]))
                yield step, images, targets
        finally:
            views.close()

    def loss(batch: tuple[int, Tensor, Tensor]) -> Tensor:
        step, images, targets = batch
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            scores = _scores(module, images.to(model.device), run.batch_size, step < frozen)
        return F.cross_entropy(scores.float(), targets.to(model.device), label_smoothing=settings.smoothing)

    training(
        module,
        optimiser,
        functools.partial(schedule, steps=steps, settings=settings),
        batches,
        loss,
        steps,
        folder,
        what="fine-tuning",
        show=run.progress,
        clip=1.0,
    )
    return module


def _scores(module: Tuned, images: Tensor, part: int, frozen: bool) -> Tensor:
    """Scores of a batch; with several parts, each is computed again in the backward, so that memory holds one only."""
    if frozen:
        with torch.no_grad():
            seen = torch.cat([module.seen(some) for some in images.split(part)])
        scores: Tensor = module.head(seen)
        return scores
    parts = images.split(part)
    if len(parts) == 1:
        parts_scores = [module(images)]
    else:
        parts_scores = [checkpoint(module, some, use_reentrant=False) for some in parts]
    return torch.cat(parts_scores)


def _title(settings: Finetune) -> str:
    what = f"LoRA of rank {settings.lora}" if settings.lora else "fine-tuned backbone"
    return f"{what}, {settings.epochs} epochs"


def _advice(alone: Measured, measured: Measured) -> str:
    if measured.value > alone.value:
        return f"Fine-tuning gained {100 * (measured.value - alone.value):.1f} points over the linear head alone."
    return (
        "Fine-tuning did not help: keep the frozen backbone and its linear head, or try a lower --rate, other --epochs "
        "or --lora 8."
    )
