import copy

import pytest
import torch
from torch import nn

from cross_compile import compiles
from opsin.backbone.vit import Architecture
from opsin.errors import OpsinError
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.objective import Network
from opsin.pretrain.optim import AdamW, Clipped, LossScale, OptimRecipe, Scalars, group_of
from opsin.pretrain.step import working_copy

TRUE = torch.tensor(True)
TINY = Network(
    Architecture(8, 3, 2, patch=4, grid=2, registers=1), HeadRecipe(dino_prototypes=8, ibot_prototypes=8, hidden=8)
)


ONE = torch.ones((), dtype=torch.float64)


def scalars(*values: float) -> Scalars:
    return Scalars(*(torch.tensor(v, dtype=torch.float64) for v in values))


def unclipped(optimiser: AdamW) -> Clipped:
    return Clipped({}, {slot.part: ONE for slot in optimiser.slots.values()}, TRUE)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 3)
        self.dino_head = nn.ModuleDict({"last_layer": nn.Linear(3, 2, bias=False)})

    def forward(self, x):
        return self.dino_head["last_layer"](self.backbone(x)).square().mean()


def pair() -> tuple[Model, Model]:
    torch.manual_seed(0)
    ours, theirs = Model().double(), Model().double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_steps_are_torchs_adamw():
    ours, theirs = pair()
    teacher, average = copy.deepcopy(ours), [p.detach().clone() for p in ours.parameters()]
    mine = AdamW(ours, teacher, 1, OptimRecipe(layer_decay=1.0, clip=0.0))
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in theirs.named_parameters() if not n.endswith("bias")], "weight_decay": 0.05},
            {"params": [p for n, p in theirs.named_parameters() if n.endswith("bias")], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    for step in range(5):
        x = torch.randn(7, 4, dtype=torch.float64)
        reference.zero_grad()
        for model in (ours, theirs):
            model(x).backward()
        rate = 0.01 * (step + 1)
        mine.step(scalars(rate, rate, 0.05, 0.9), mine.clip(ONE))
        assert not any(p.grad.any() for p in ours.parameters())
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        average = [0.9 * a + 0.1 * p.detach() for a, p in zip(average, theirs.parameters(), strict=True)]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    for a, b in zip(teacher.parameters(), average, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_a_frozen_last_layer_stays_but_its_moments_advance():
    ours, teacher = pair()
    mine = AdamW(ours, teacher, 1, OptimRecipe(layer_decay=1.0))
    before = ours.dino_head["last_layer"].weight.clone()
    ours(torch.randn(7, 4, dtype=torch.float64)).backward()
    mine.step(scalars(0.1, 0.0, 0.1, 0.9), unclipped(mine))
    assert torch.equal(before, ours.dino_head["last_layer"].weight)
    assert mine.slots["dino_head.last_layer.weight"].square.abs().sum() > 0


@pytest.mark.parametrize("when", [0, 3])
def test_a_step_with_a_nan_changes_nothing(when):
    ours, teacher = pair()
    mine = AdamW(ours, teacher, 1, OptimRecipe())
    for _ in range(when):
        ours(torch.randn(7, 4, dtype=torch.float64)).backward()
        mine.step(scalars(0.1, 0.1, 0.1, 0.5), mine.clip(ONE))
    ours(torch.full((1, 4), torch.nan, dtype=torch.float64)).backward()
    everything = {**ours.state_dict(), **mine.state(), **{f"teacher.{n}": t for n, t in teacher.state_dict().items()}}
    before = {name: value.clone() for name, value in everything.items()}
    clipped = mine.clip(ONE)
    assert not clipped.finite
    assert not clipped.norms["backbone"].isfinite()
    mine.step(scalars(0.1, 0.1, 0.1, 0.5), clipped)
    for name, value in everything.items():
        assert torch.equal(value, before[name]), name
    assert not any(p.grad.any() for p in ours.parameters())


def test_every_part_is_clipped_by_itself():
    ours, teacher = pair()
    mine = AdamW(ours, teacher, 1, OptimRecipe(clip=0.5))
    (1000 * ours(torch.randn(7, 4, dtype=torch.float64))).backward()
    for p in ours.dino_head.parameters():
        p.grad.mul_(0.2 / p.grad.norm())
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
    clipped = mine.clip(2 * ONE)  # as if the loss had been halved
    assert clipped.finite
    norm = torch.cat([g.flatten() for n, g in gradients.items() if n.startswith("backbone")]).norm()
    assert clipped.norms["backbone"].item() == pytest.approx(2 * norm.item())
    assert clipped.norms["dino_head"].item() == pytest.approx(0.4)
    mine.step(scalars(0.1, 0.1, 0.0, 0.9), clipped)
    for name, gradient in gradients.items():  # the first moment tells what the update saw
        factor = 0.5 / norm if name.startswith("backbone") else 2.0
        assert torch.allclose(mine.slots[name].mean, 0.1 * factor * gradient, rtol=1e-5)


def test_groups_of_the_reference():
    # FACTS §2.6 and §11: vitl16_short's layer decay 0.9 and patch-embedding multiplier 0.2
    recipe = OptimRecipe(layer_decay=0.9, patch_embed_rate=0.2)
    groups = {name: group_of(name, 3, recipe) for name, _ in TINY.named_parameters()}
    rates = {
        "backbone.cls_token": 0.9**4,
        "backbone.pos_embed": 0.9**4,
        "backbone.mask_token": 0.9**4,
        "backbone.register_tokens": 0.9**4,
        "backbone.patch_embed.proj.weight": 0.2 * 0.9**4,
        "backbone.blocks.0.attn.qkv.weight": 0.9**3,
        "backbone.blocks.2.mlp.fc1.bias": 0.9,
        "backbone.norm.weight": 1.0,
        "dino_head.mlp.0.weight": 1.0,
        "ibot_head.last_layer.weight_v": 1.0,
    }
    for name, rate in rates.items():
        assert groups[name].rate == pytest.approx(rate), name
    undecayed = {n for n, g in groups.items() if not g.decays}
    assert undecayed == {n for n in groups if n.endswith(".bias") or "norm" in n or "gamma" in n}
    for name in ("backbone.cls_token", "backbone.pos_embed", "dino_head.last_layer.weight_g"):
        assert groups[name].decays
    assert {n for n, g in groups.items() if g.last_layer} == {
        f"{head}.last_layer.{w}" for head in ("dino_head", "ibot_head") for w in ("weight_g", "weight_v")
    }


def test_loss_scale_halves_on_overflow_and_grows_after_2000_good_steps():
    scale = LossScale(torch.device("cpu"), enabled=True)
    start = scale.scale.item()
    scale.update(torch.tensor(False))
    assert scale.scale.item() == start / 2
    for _ in range(1999):
        scale.update(TRUE)
    assert scale.scale.item() == start / 2
    scale.update(TRUE)
    assert scale.scale.item() == start
    assert scale.good.item() == 0
    off = LossScale(torch.device("cpu"), enabled=False)
    off.update(torch.tensor(False))
    assert off.scale.item() == 1


def low_precision():
    """A student and a teacher in fp32 with their copies in bf16, and gradients."""
    torch.manual_seed(0)
    student, teacher = (copy.deepcopy(TINY).float() for _ in range(2))
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(torch.randn_like(p))
    working = working_copy(student, torch.bfloat16), working_copy(teacher, torch.bfloat16)
    optimiser = AdamW(student, teacher, 3, OptimRecipe(clip=1.0), working)
    for p in student.parameters():
        p.grad.copy_(torch.randn_like(p))
    return student, teacher, working, optimiser


def test_copies_follow_and_prototypes_are_shared():
    student, teacher, working, optimiser = low_precision()
    optimiser.step(scalars(0.1, 0.1, 0.1, 0.5), optimiser.clip(ONE))
    for master, low in zip((student, teacher), working, strict=True):
        for (name, p), q in zip(master.named_parameters(), low.parameters(), strict=True):
            assert (q is p) == ("last_layer" in name)
            assert torch.equal(q, p if q is p else p.to(torch.bfloat16)), name


def test_gradients_of_copies_are_summed_in_full_precision():
    student, _, (low, _), _ = low_precision()
    for p in student.parameters():
        p.grad.zero_()
    parameter = low.backbone.mask_token
    for _ in range(300):  # bf16 would stop counting at 256
        parameter.sum().backward()
    assert parameter.grad is None
    assert (student.backbone.mask_token.grad == 300).all()


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize(
    "name", ["backbone.blocks.0.attn.qkv.weight", "dino_head.last_layer.weight_v", "backbone.norm.bias"]
)
def test_the_kernel_is_the_update(name, copies, finite):
    kernels = pytest.importorskip("opsin.pretrain.kernels", reason="Triton is not on this platform")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    *_, optimiser = low_precision()
    for _ in range(2):  # moments that are not zero
        optimiser.step(scalars(0.01, 0.02, 0.1, 0.5), optimiser.clip(ONE))
        for slot in optimiser.slots.values():
            slot.grad.copy_(torch.randn_like(slot.weight))
    slot = optimiser.slots[name]
    low = torch.float16 if device.type == "cpu" else torch.bfloat16  # bf16 errs in the interpreter
    mine = slot._replace(
        **{part: getattr(slot, part).to(device, copy=True) for part in ("weight", "grad", "mean", "square", "teacher")},
        copies=tuple(torch.zeros_like(slot.weight, dtype=low, device=device) for _ in range(2)) if copies else None,
    )
    before = [t.clone() for t in (mine.weight, mine.mean, mine.square, mine.teacher)]
    clipped = optimiser.clip(ONE)._replace(finite=torch.tensor(finite))
    now = scalars(0.03, 0.04, 0.1, 0.7)
    optimiser.step(now, clipped)
    count = optimiser.count
    numbers = [
        *now[:3],
        1 - now.momentum,
        1 - 0.9**count,
        (1 - 0.999**count).sqrt(),
        clipped.finite,
        *clipped.factors.values(),
    ]
    parts = list(clipped.factors)
    kernels.update(mine, torch.stack(numbers).float().to(device), parts.index(slot.part), optimiser.recipe)
    found = (mine.weight, mine.mean, mine.square, mine.teacher)
    for f, old, e in zip(found, before, (slot.weight, slot.mean, slot.square, slot.teacher), strict=True):
        torch.testing.assert_close(f.cpu(), e.detach(), rtol=2e-5, atol=1e-6)
        assert torch.equal(f, old) != finite
    assert not mine.grad.any()
    for f, e in zip(mine.copies or (), (mine.weight, mine.teacher), strict=False):
        assert torch.equal(f, e.to(low))


def test_the_kernel_compiles_for_a_gpu():
    arrays = dict.fromkeys(("weight", "grad", "mean", "square", "teacher"), "*fp32")
    numbers = {"numbers": "*fp32", "count": "i32"} | dict.fromkeys(("rate_share", "beta1", "beta2", "epsilon"), "fp32")
    choices = {"LAST_LAYER": False, "DECAYS": True, "PART": 1, "BLOCK": 1024}
    compiles(
        [
            (
                "opsin.pretrain.kernels",
                "update_kernel",
                arrays | dict.fromkeys(("weight_copy", "teacher_copy"), low) | numbers | choices | {"COPIES": copies},
            )
            for copies, low in ((True, "*bf16"), (False, "*fp32"))
        ]
    )


def test_bad_settings():
    with pytest.raises(OpsinError, match=r"optim.clip is -1"):
        OptimRecipe(clip=-1)
    with pytest.raises(OpsinError, match=r"optim.betas"):
        OptimRecipe(betas=(0.9, 1.0))
