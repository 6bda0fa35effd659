"""What the frozen teacher says of a batch, and what a student makes of it, against formulas."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lessons import HEADS, TEACHER, network, recipe

from opsin.backbone.vit import Architecture
from opsin.data.stream import Batch, BatchRecipe
from opsin.distill.methods import ByFeatures, ByPrototypes
from opsin.distill.students import with_heads_of
from opsin.distill.teacher import Teacher, check_grids, fingerprint
from opsin.errors import OpsinError
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.schedules import Scheduled
from opsin.pretrain.step import Step

CPU = torch.device("cpu")
NOW = Scheduled(rate=1e-2, last_layer_rate=1e-2, decay=0.05, momentum=0.9, teacher_temperature=0.05)
TIED = HeadRecipe(tied=True, dino_prototypes=40, dino_bottleneck=12, hidden=20)
METHODS = pytest.mark.parametrize("way", [ByPrototypes, ByFeatures])


def settings(micro=0, heads=HEADS, **changes):
    return with_heads_of(recipe(batch=BatchRecipe(size=8, micro=micro, group=4), **changes), heads)


def batch(made, number=0) -> Batch:
    random = torch.Generator().manual_seed(number)
    images = [torch.randint(0, 256, (3, 40, 44), dtype=torch.uint8, generator=random) for _ in range(8)]
    return Batch(made.stream(), number, images, CPU, torch.float64)


def sinkhorn(scores, temperature: float):
    """Three times columns to equal sums, then rows, of all rows at once."""
    q = torch.exp(scores / temperature)
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def literal(data: Batch, student, teacher, temperature: float) -> dict[str, float]:
    """DINO and iBOT crop by crop, with every score stored; the patch loss is over all patches of both global crops."""
    size, count = data.recipe.batch.size, data.recipe.crops.local_count
    crops, local = data.crops("global", 0).split(size), data.crops("local", 0).split(size)

    def scores(head, x):
        return F.normalize(head.mlp(x), dim=-1) @ head.last_layer.weight().T

    def cross_entropy(q, s):
        return -(q * torch.log_softmax(s / 0.1, dim=-1)).sum(-1).mean()

    seen = [teacher.backbone([c])[0] for c in crops]
    mine = [student.backbone([c])[0] for c in (*crops, *local)]
    q = sinkhorn(torch.cat([scores(teacher.dino_head, f.cls) for f in seen]), temperature).split(size)
    s = [scores(student.dino_head, f.cls) for f in mine]
    pairs = [(0, 1), (1, 0), *((view, t) for view in range(2, 2 + count) for t in range(2))]
    dino = sum(cross_entropy(q[t], s[view]) for view, t in pairs) / len(pairs)
    q = sinkhorn(torch.cat([scores(teacher.patch_head, f.patches.flatten(0, 2)) for f in seen]), temperature)
    s = torch.cat([scores(student.patch_head, f.patches.flatten(0, 2)) for f in mine[:2]])
    return {"dino": float(dino), "ibot": float(cross_entropy(q, s))}  # equally many patches in all crops: a plain mean


@pytest.mark.parametrize("heads", [HEADS, TIED])
def test_the_terms_of_a_step_are_the_textbooks(heads):
    teacher, whole = network(heads=heads).double(), settings(heads=heads)
    for micro in (0, 4):
        made = settings(micro, heads)
        step = Step(made, CPU, method=ByPrototypes(Teacher(network(heads=heads), torch.float64)))
        with torch.no_grad():
            for weight in step.student.parameters():  # far from the first weights, which nearly agree with anything
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
            expected = literal(batch(whole), step.student, teacher, NOW.teacher_temperature)
        terms = step(batch(made), NOW).terms
        for name, value in expected.items():
            assert terms[name].item() == pytest.approx(value, rel=1e-12), name


@METHODS
def test_the_average_follows_the_student_and_nothing_follows_the_average(way):
    made, teacher = settings(), Teacher(network(), torch.float64)
    before = {name: tensor.clone() for name, tensor in teacher.network.state_dict().items()}
    steps = {momentum: Step(made, CPU, method=way(teacher)) for momentum in (0.5, 0.99)}
    for momentum, step in steps.items():
        expected = {name: tensor.clone() for name, tensor in step.average.state_dict().items()}
        for number in range(3):
            step(batch(made, number), replace(NOW, momentum=momentum))
            for name, tensor in step.student.state_dict().items():
                expected[name].lerp_(tensor, 1 - momentum)
        for name, tensor in step.average.state_dict().items():
            assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-14), name
    one, other = (step.student.state_dict() for step in steps.values())
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert not all(
        torch.equal(t, steps[0.99].average.state_dict()[n]) for n, t in steps[0.5].average.state_dict().items()
    )
    after = teacher.network.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(not p.requires_grad and p.grad is None for p in teacher.network.parameters())


@METHODS
def test_a_batch_is_looked_at_once_however_many_ask(way):
    made, teacher = settings(4), Teacher(network(), torch.float64)
    steps = [Step(made, CPU, method=way(teacher)) for _ in range(2)]
    for number in range(2):
        data = batch(made, number)
        for step in steps:
            step.begin(data, NOW)
        for micro in range(2):
            for step in steps:
                step.visit(micro)
    assert teacher.looked == 4


# ---- what it sees

HALF = torch.tensor([[0.5, 0.59375, -0.09375, 0], [0, -0.09375, 0.59375, 0.5]], dtype=torch.float64)
"""Cubic convolution (a = -3/4) of four points to two, the outermost repeated beyond the edge."""


@pytest.mark.parametrize(
    ("architecture", "size", "grid"),
    [
        (TEACHER, 0, 2),
        (TEACHER, 32, 4),
        (Architecture(24, 3, 2, patch=14, grid=3, registers=4), 28, 2),
        (Architecture(36, 1, 3, patch=14, grid=3), 56, 4),
        (Architecture(24, 2, 2, patch=4, grid=8, ffn="swiglu", registers=2), 0, 4),
    ],
)
def test_its_tokens_lie_on_the_students_grid(architecture, size, grid):
    plain = network(architecture).backbone.double()
    made = settings()
    teacher, data = Teacher(network(architecture).backbone, torch.float64, size), batch(made)
    assert (teacher.network, teacher.width) == (None, architecture.width)
    view = teacher.view(data, 0)
    crops = data.crops("global", 0)
    if size:
        crops = F.interpolate(crops, size=(size, size), mode="bicubic", antialias=True)
    with torch.no_grad():
        seen = plain([crops])[0]
    patches = seen.patches
    assert patches.shape[1:3] == (grid, grid)
    if grid == 4:
        patches = torch.einsum("ih,jw,bhwd->bijd", HALF, HALF, patches)
    assert view.cls.shape == (16, architecture.width)
    assert torch.allclose(view.cls, seen.cls, rtol=0, atol=1e-12)
    assert torch.allclose(view.patches, patches.flatten(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_computes_in_the_students_precision_and_its_prototypes_are_not_rounded(dtype):
    whole, made = network(), settings()
    teacher = Teacher(network(), dtype)
    for mine, theirs in ((teacher.network.dino_head, whole.dino_head), (teacher.network.ibot_head, whole.ibot_head)):
        for name, tensor in mine.last_layer.state_dict().items():
            assert torch.equal(tensor, theirs.last_layer.state_dict()[name].to(tensor.dtype)), name
            assert tensor.dtype == torch.promote_types(dtype, torch.float32)
    view, exact = teacher.view(batch(made), 0), Teacher(whole, torch.float64).view(batch(made), 0)
    close = {torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 0}[dtype]
    for mine, theirs in zip(view, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs).norm() <= close * theirs.norm()


# ---- what it cannot see


def test_grids_that_do_not_fit_and_other_channels_are_refused():
    check_grids(network().backbone, 0, 16, 8, 3)
    check_grids(network(Architecture(24, 1, 2, patch=14, grid=2)).backbone, 28, 16, 8, 3)
    with pytest.raises(OpsinError) as error:
        check_grids(network(Architecture(24, 1, 2, patch=14, grid=2)).backbone, 0, 64, 8, 3)
    assert str(error.value) == (
        "the teacher's patches of 14 pixels do not divide the 64 pixels at which it is to see a crop: give "
        "--teacher-size 112, which gives it the students' 8×8 patches, or a --crops.global-size that is a multiple of "
        "14."
    )
    with pytest.raises(OpsinError) as error:
        check_grids(network().backbone, 0, 16, 8, 1)
    assert str(error.value) == (
        "the teacher takes images of 3 channels and the students of 1: give --backbone.channels 3."
    )


def test_a_fingerprint_is_of_names_and_values():
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.zeros(())}
    one = fingerprint(tensors)
    assert len(one) == 16
    assert one == fingerprint(dict(reversed({k: v.clone() for k, v in tensors.items()}.items())))
    assert one != fingerprint(tensors | {"a": torch.arange(4.0) + 1})
    assert one != fingerprint({("d" if name == "b" else name): tensor for name, tensor in tensors.items()})
