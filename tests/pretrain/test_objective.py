import math

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss, IBOTPatchLoss

from opsin.backbone.vit import Architecture
from opsin.data.crops import CropRecipe
from opsin.data.masks import MaskRecipe
from opsin.data.stream import Batch, BatchRecipe, StreamRecipe
from opsin.pretrain.heads import Head, HeadRecipe
from opsin.pretrain.objective import LossRecipe, Network, Objective, total
from opsin.pretrain.optim import AdamW, OptimRecipe, Scalars
from opsin.pretrain.step import working_copy

CPU = torch.device("cpu")
HEADS = HeadRecipe(dino_prototypes=40, dino_bottleneck=12, ibot_prototypes=30, ibot_bottleneck=8, hidden=16)
ARCH = Architecture(24, 3, 2, patch=7, grid=4, layerscale=0.5, registers=1)


def batch(size=32, micro=0, group=8, drop_path=0.3, local_count=3, probability=0.5) -> Batch:
    recipe = StreamRecipe(
        seed=0,
        batch=BatchRecipe(size=size, micro=micro, group=group),
        crops=CropRecipe(global_size=42, local_size=14, local_count=local_count),
        masks=MaskRecipe(probability=probability),
        patch=7,
        depth=3,
        drop_path=drop_path,
    )
    images = np.random.default_rng(0).integers(0, 256, (size, 3, 50, 60), dtype=np.uint8)
    return Batch(recipe, 3, list(torch.from_numpy(images)), CPU)


def networks(dtype=torch.float64, heads=HEADS) -> tuple[Network, Network]:
    torch.manual_seed(0)
    student = Network(ARCH, heads).to(dtype)
    torch.manual_seed(1)
    teacher = Network(ARCH, heads).to(dtype).requires_grad_(False)
    return student, teacher


def one_step(micro: int, dtype: torch.dtype, loss=None, heads=HEADS) -> tuple[float, dict[str, torch.Tensor], Network]:
    student, teacher = networks(dtype, heads)
    objective = Objective(loss or LossRecipe(), student, teacher, student.backbone.cls_token.dtype)
    optimiser = AdamW(student, teacher, 3, OptimRecipe())
    data = batch(micro=micro)
    targets = objective.targets(data, torch.tensor(0.05, dtype=dtype))
    value = 0.0
    for i in range(data.micro_batches):
        part = total(objective.terms(data, i, targets))
        part.backward()
        value += part.item()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    rate, momentum = torch.tensor(1e-3, dtype=dtype), torch.tensor(0.9, dtype=dtype)
    optimiser.step(Scalars(rate, rate, rate, momentum), optimiser.clip(torch.ones((), dtype=dtype)))
    return value, gradients, teacher


@pytest.mark.parametrize("loss", [LossRecipe(), LossRecipe(centering="average", koleo_crops="first")])
@pytest.mark.parametrize("heads", [HEADS, HeadRecipe(tied=True, dino_prototypes=40, dino_bottleneck=12, hidden=16)])
def test_one_step_of_32_is_one_step_of_4_times_8(loss, heads):
    whole, split = one_step(0, torch.float64, loss, heads), one_step(8, torch.float64, loss, heads)
    assert split[0] == pytest.approx(whole[0], abs=1e-10)
    for name, gradient in whole[1].items():
        assert (split[1][name] - gradient).abs().max() <= 1e-10, name
    for a, b in zip(split[2].parameters(), whole[2].parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-10


def test_in_fp32_losses_and_gradients_agree_to_1e_5():
    whole, split = one_step(0, torch.float32), one_step(8, torch.float32)
    assert split[0] == pytest.approx(whole[0], rel=1e-5)
    flat = [torch.cat([g.flatten() for g in run[1].values()]) for run in (whole, split)]
    assert (flat[0] - flat[1]).norm() <= 1e-5 * flat[0].norm()


def literal_terms(data: Batch, student: Network, teacher: Network, temperature: float) -> dict[str, float]:
    """The reference's formulas, one crop after the other, every score stored (FACTS §2.2 and §11)."""
    size, count = data.recipe.batch.size, data.recipe.crops.local_count
    crops = [c.double() for c in data.crops("global", 0).split(size)]
    local = [c.double() for c in data.crops("local", 0).split(size)] if count else []
    masks = data.masked(0).mask.split(size)

    def scores(head: Head, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(head.mlp(x), dim=-1) @ head.last_layer.weight().T

    seen = [teacher.backbone([c])[0] for c in crops]
    q = naive.sinkhorn(torch.cat([scores(teacher.dino_head, s.cls) for s in seen]), temperature).split(size)
    student_global = [student.backbone([c], [m])[0] for c, m in zip(crops, masks, strict=True)]
    student_local = [student.backbone([c])[0] for c in local]

    def cross_entropy(q, s):
        return -(q * torch.log_softmax(s / 0.1, dim=-1)).sum(-1).mean()

    s = [scores(student.dino_head, f.cls) for f in (*student_global, *student_local)]
    denominator = max(2 * count, 1) + 2
    # The teacher's crops are swapped: student A is compared with teacher B.
    concatenated = cross_entropy(torch.cat([q[1], q[0]]), torch.cat(s[:2]))
    terms = {"dino_global": 2 * concatenated / denominator}
    terms["dino_local"] = sum((cross_entropy(q[t], view) for view in s[2:] for t in range(2)), 0.0) / denominator
    hidden = torch.cat([f.patches.flatten(1, 2)[m] for f, m in zip(seen, masks, strict=True)])
    q_patch = naive.sinkhorn(scores(teacher.ibot_head, hidden), temperature)
    predicted = torch.cat([f.patches.flatten(1, 2)[m] for f, m in zip(student_global, masks, strict=True)])
    per_token = -(q_patch * torch.log_softmax(scores(student.ibot_head, predicted) / 0.1, dim=-1)).sum(-1)
    per_image = torch.cat([m.sum(1) for m in masks])
    weight = torch.cat([torch.full((int(n),), 1 / int(n), dtype=torch.float64) for n in per_image if n])
    terms["ibot"] = (per_token * weight).sum() / (2 * size)
    koleo = 0.0
    group = data.recipe.batch.group
    for features in student_global:
        x = F.normalize(features.cls, dim=-1).split(group)
        for part in x:
            distance = torch.cdist(part, part) + 10 * torch.eye(group)
            koleo = koleo - distance.min(1).values.log().mean() / (size / group)
    terms["koleo"] = 0.1 * koleo
    return {name: float(value) for name, value in terms.items()}


@pytest.mark.parametrize("local_count", [3, 0])
def test_the_terms_are_the_references_formulas(local_count):
    student, teacher = networks()
    data = batch(drop_path=0.0, local_count=local_count)
    objective = Objective(LossRecipe(), student, teacher, student.backbone.cls_token.dtype)
    with torch.no_grad():
        terms = objective.terms(data, 0, objective.targets(data, torch.tensor(0.05, dtype=torch.float64)))
        expected = literal_terms(data, student, teacher, 0.05)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert terms["dino"].item() == pytest.approx(expected["dino_global"] + expected["dino_local"])
    assert total(terms).item() == pytest.approx(sum(expected.values()))


def test_the_scales_for_a_uniform_student():
    # FACTS §11: 16/18 ln K local, 2/18 ln K global, 0.5 ln K iBOT, here with 3 local crops: 6/8 and 2/8
    student, teacher = networks()
    for head in (student.dino_head, student.ibot_head):
        head.last_layer.weight_g.data.zero_()
    objective = Objective(LossRecipe(), student, teacher, student.backbone.cls_token.dtype)
    data = batch()
    terms = objective.terms(data, 0, objective.targets(data, torch.tensor(0.05, dtype=torch.float64)))
    assert terms["dino_local"].item() == pytest.approx(6 / 8 * math.log(40))
    assert terms["dino_global"].item() == pytest.approx(2 / 8 * math.log(40))
    assert terms["ibot"].item() == pytest.approx(0.5 * math.log(30))


def test_centering_is_lightlys_dino_loss():
    """Two global crops only, moving-average centering: lightly's loss on the same scores, for two steps."""
    student, teacher = networks()
    objective = Objective(
        LossRecipe(centering="average", koleo=0.0), student, teacher, student.backbone.cls_token.dtype
    )
    data = batch(drop_path=0.0, local_count=0, probability=0.0)
    lightly = DINOLoss(output_dim=40, teacher_temp=0.05, warmup_teacher_temp=0.05, center_momentum=0.9).double()
    crops = data.crops("global", 0).double()
    with torch.no_grad():
        scores = []
        for network in (teacher, student):
            cls = network.backbone([crops])[0].cls
            scores.append(
                list(
                    (F.normalize(network.dino_head.mlp(cls), dim=-1) @ network.dino_head.last_layer.weight().T).split(
                        32
                    )
                )
            )
        for _ in range(2):  # the second step uses the centre of the first
            targets = objective.targets(data, torch.tensor(0.05, dtype=torch.float64))
            terms = objective.terms(data, 0, targets)
            theirs = lightly(scores[0], scores[1], teacher_temp=0.05)
            # Theirs is the mean over the two pairs; the reference's, with no local crops, is their sum / 3.
            assert terms["dino"].item() == pytest.approx(theirs.item() * 2 / 3, rel=1e-6)


def test_the_patch_loss_is_lightlys():
    student, teacher = networks()
    objective = Objective(
        LossRecipe(centering="average", koleo=0.0), student, teacher, student.backbone.cls_token.dtype
    )
    data = batch(drop_path=0.0)
    masked = data.masked(0)
    crops = data.crops("global", 0).double()
    with torch.no_grad():
        terms = objective.terms(data, 0, objective.targets(data, torch.tensor(0.05, dtype=torch.float64)))
        rows = []
        for network, mask in ((teacher, None), (student, masked.mask)):
            patches = network.backbone([crops], [mask])[0].patches.flatten(0, 2)[masked.hidden[masked.weight > 0]]
            rows.append(F.normalize(network.ibot_head.mlp(patches), dim=-1) @ network.ibot_head.last_layer.weight().T)
        loss = IBOTPatchLoss(output_dim=30, teacher_temp=0.05, student_temp=0.1).double()
        theirs = loss(rows[0], rows[1], masked.mask.view(64, 6, 6))
    assert terms["ibot"].item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    results = []
    for compute in (torch.float32, dtype):
        student, teacher = networks(torch.float32)
        objective = Objective(
            LossRecipe(), *(working_copy(network, compute) for network in (student, teacher)), compute
        )
        data = batch()
        terms = objective.terms(data, 0, objective.targets(data, torch.tensor(0.05)))
        total(terms).backward()  # scaled up it overflows fp16 here, and the loss scale of a run would be halved
        gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
        assert gradient.isfinite().all()
        results.append((total(terms).item(), gradient))
    assert results[1][0] == pytest.approx(results[0][0], rel=2e-2)
    assert F.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.99


def test_nothing_masked_is_no_patch_loss():
    student, teacher = networks()
    objective = Objective(LossRecipe(), student, teacher, student.backbone.cls_token.dtype)
    data = batch(probability=0.0)
    terms = objective.terms(data, 0, objective.targets(data, torch.tensor(0.05, dtype=torch.float64)))
    assert terms["ibot"].item() == 0
    total(terms).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
