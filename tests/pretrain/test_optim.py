import pytest
import torch
from torch import nn

from opsin.backbone.vit import Architecture
from opsin.errors import OpsinError
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.objective import Network
from opsin.pretrain.optim import AdamW, LossScale, OptimRecipe, group_of, update_teacher

TRUE = torch.tensor(True)
TINY = Network(
    Architecture(8, 3, 2, patch=4, grid=2, registers=1), HeadRecipe(dino_prototypes=8, ibot_prototypes=8, hidden=8)
)


def scalars(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(v, dtype=torch.float64) for v in values]


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
    mine = AdamW(ours, 1, OptimRecipe(layer_decay=1.0, clip=0.0))
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in theirs.named_parameters() if not n.endswith("bias")], "weight_decay": 0.05},
            {"params": [p for n, p in theirs.named_parameters() if n.endswith("bias")], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    for step in range(5):
        x = torch.randn(7, 4, dtype=torch.float64)
        for model, optimiser in ((ours, mine), (theirs, reference)):
            optimiser.zero_grad()
            model(x).backward()
        rate = 0.01 * (step + 1)
        mine.step(*scalars(rate, rate, 0.05), TRUE)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_a_frozen_last_layer_stays_but_its_moments_advance():
    ours, _ = pair()
    mine = AdamW(ours, 1, OptimRecipe(layer_decay=1.0))
    before = ours.dino_head["last_layer"].weight.clone()
    ours(torch.randn(7, 4, dtype=torch.float64)).backward()
    mine.step(*scalars(0.1, 0.0, 0.1), TRUE)
    assert torch.equal(before, ours.dino_head["last_layer"].weight)
    assert mine.square["dino_head.last_layer.weight"].abs().sum() > 0


@pytest.mark.parametrize("when", [0, 3])
def test_a_step_with_a_nan_changes_nothing(when):
    ours, _ = pair()
    mine = AdamW(ours, 1, OptimRecipe())
    for _ in range(when):
        mine.zero_grad()
        ours(torch.randn(7, 4, dtype=torch.float64)).backward()
        mine.step(*scalars(0.1, 0.1, 0.1), TRUE)
    mine.zero_grad()
    ours(torch.full((1, 4), torch.nan, dtype=torch.float64)).backward()
    state = {k: v.clone() for k, v in {**ours.state_dict(), **mine.state()}.items()}
    norms, finite = mine.clip(torch.ones(()))
    assert not finite
    assert not norms["backbone"].isfinite()
    mine.step(*scalars(0.1, 0.1, 0.1), finite)
    teacher = [torch.zeros(3)]
    update_teacher(teacher, [torch.ones(3)], torch.tensor(0.5), finite)
    assert teacher[0].sum() == 0
    for name, value in {**ours.state_dict(), **mine.state()}.items():
        assert torch.equal(value, state[name]), name


def test_every_part_is_clipped_by_itself():
    ours, _ = pair()
    mine = AdamW(ours, 1, OptimRecipe(clip=0.5))
    (1000 * ours(torch.randn(7, 4, dtype=torch.float64))).backward()
    for p in ours.dino_head.parameters():
        p.grad.mul_(0.2 / p.grad.norm())
    direction = ours.backbone.weight.grad.clone()
    norms, finite = mine.clip(torch.ones(()))
    assert finite
    total = torch.stack([p.grad.norm() for p in ours.backbone.parameters()]).norm()
    assert total.item() == pytest.approx(0.5, rel=1e-5)
    assert norms["dino_head"].item() == pytest.approx(0.2)
    assert ours.dino_head["last_layer"].weight.grad.norm().item() == pytest.approx(0.2, rel=1e-5)
    assert (
        torch.nn.functional.cosine_similarity(direction.flatten(), ours.backbone.weight.grad.flatten(), dim=0) > 0.999
    )


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


def test_the_teacher_is_the_moving_average():
    teacher, student = [torch.zeros(2)], [torch.ones(2)]
    for _ in range(2):
        update_teacher(teacher, student, torch.tensor(0.9), TRUE)
    assert teacher[0].tolist() == pytest.approx([0.19, 0.19])


def test_bad_settings():
    with pytest.raises(OpsinError, match=r"optim.clip is -1"):
        OptimRecipe(clip=-1)
    with pytest.raises(OpsinError, match=r"optim.betas"):
        OptimRecipe(betas=(0.9, 1.0))
