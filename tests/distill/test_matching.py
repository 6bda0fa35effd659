import math
from dataclasses import replace

import pytest
import torch

from opsin.backbone.vit import Architecture
from opsin.distill.matching import MatchedNetwork, Matching
from opsin.errors import OpsinError

ARCH = Architecture(24, 2, 2, patch=7, grid=4, layerscale=0.5, registers=1)
WIDTH, IMAGES, LOCALS = 20, 8, 3


def student(dtype=torch.float64, architecture=ARCH) -> MatchedNetwork:
    torch.manual_seed(0)
    return MatchedNetwork(architecture, WIDTH).to(dtype)


def inputs(dtype=torch.float64, images=IMAGES, local=LOCALS, generator=0):
    random = torch.Generator().manual_seed(generator)
    cls = torch.randn(images, 2, WIDTH, generator=random, dtype=torch.float64)
    patches = torch.randn(2 * images, 16, WIDTH, generator=random, dtype=torch.float64)
    crops = [torch.randn(2 * images, 3, 28, 28, generator=random, dtype=torch.float64)]
    if local:
        crops.append(torch.randn(local * images, 3, 14, 14, generator=random, dtype=torch.float64))
    return cls.to(dtype), patches.to(dtype), [crop.to(dtype) for crop in crops]


def part(tensor, start, stop, images=IMAGES):
    """Of a tensor whose rows are crop by crop, those of some images."""
    return tensor.unflatten(0, (-1, images))[:, start:stop].flatten(0, 1)


def distance(s, t) -> float:
    s, t = s.tolist(), t.tolist()
    dot = sum(a * b for a, b in zip(s, t, strict=True))
    return 1 - dot / math.sqrt(sum(a * a for a in s) * sum(b * b for b in t))


def textbook(network, cls, patches, crops, size) -> dict[str, float]:
    """Image by image, view by view, token by token."""
    with torch.no_grad():
        features = [network.backbone([crop])[0] for crop in crops]
        class_tokens = [network.projection["cls"](f.cls) for f in features]
        patch_tokens = network.projection["patch"](features[0].patches.flatten(1, 2))
    b = len(cls)
    image_sum = patch_sum = 0.0
    for i in range(b):
        views = [distance(class_tokens[0][c * b + i], cls[i, c]) for c in range(2)]
        for c in range(len(crops[1]) // b if len(crops) == 2 else 0):
            local = class_tokens[1][c * b + i]
            views.append((distance(local, cls[i, 0]) + distance(local, cls[i, 1])) / 2)
        image_sum += sum(views) / len(views)
        tokens = [
            distance(patch_tokens[c * b + i, n], patches[c * b + i, n])
            for c in range(2)
            for n in range(patches.shape[1])
        ]
        patch_sum += sum(tokens) / len(tokens)
    return {"cls": image_sum / size, "patch": patch_sum / size}


@pytest.mark.parametrize("local", [0, 1, LOCALS])
def test_the_loss_is_the_textbooks(local):
    network, (cls, patches, crops) = student(), inputs(local=local)
    with torch.no_grad():  # projections that are not near 0
        network.projection["cls"].bias.normal_()
        network.projection["patch"].weight.mul_(10)
    found = Matching(network, torch.float64).losses(cls, patches, crops, None, 2 * IMAGES)
    expected = textbook(network, cls, patches, crops, 2 * IMAGES)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, abs=1e-12)


def test_a_student_that_gives_the_teachers_tokens_has_no_loss_whatever_their_length():
    network, (_, _, crops) = student(), inputs(local=0)
    with torch.no_grad():
        features = network.backbone(crops)[0]
        cls = network.projection["cls"](features.cls).unflatten(0, (2, -1)).transpose(0, 1)
        patches = network.projection["patch"](features.patches.flatten(1, 2))
    terms = Matching(network, torch.float64).losses(3 * cls, 0.1 * patches, crops, None, IMAGES)
    assert max(abs(term.item()) for term in terms.values()) < 1e-12
    opposite = Matching(network, torch.float64).losses(-cls, -patches, crops, None, IMAGES)
    assert [term.item() for term in opposite.values()] == pytest.approx([2, 2], abs=1e-12)


def gradients(network, micro: int, kept=None) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    cls, patches, crops = inputs()
    matching, sums = Matching(network, torch.float64), {"cls": 0.0, "patch": 0.0}
    for start in range(0, IMAGES, micro):
        rows = start, start + micro
        one = [part(crop, *rows) for crop in crops]
        terms = matching.losses(cls[slice(*rows)], part(patches, *rows), one, kept, IMAGES)
        sum(terms.values()).backward()
        sums = {name: sums[name] + term.item() for name, term in terms.items()}
    return sums, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_give_the_whole_batch(micro):
    whole, split = gradients(student(), IMAGES), gradients(student(), micro)
    for name, value in whole[0].items():
        assert split[0][name] == pytest.approx(value, abs=1e-12)
    assert whole[1].keys() == split[1].keys()
    for name, gradient in whole[1].items():
        assert (split[1][name] - gradient).abs().max() <= 1e-12, name


def test_gradients_are_those_of_finite_differences():
    network, (cls, patches, crops) = student(), inputs(images=2, local=1)
    matching = Matching(network, torch.float64)
    names = ["projection.cls.weight", "projection.patch.bias", "backbone.patch_embed.proj.bias"]
    parameters = dict(network.named_parameters())

    def loss() -> torch.Tensor:
        return sum(matching.losses(cls, patches, crops, None, 2).values())

    loss().backward()
    for name in names:
        parameter = parameters[name]
        for place in (0, parameter.numel() // 2):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[place] += sign * 1e-5
                    values.append(loss().item())
                    parameter.view(-1)[place] -= sign * 1e-5
            numeric = (values[0] - values[1]) / 2e-5
            assert parameter.grad.view(-1)[place].item() == pytest.approx(numeric, rel=1e-6, abs=1e-10), name


def test_everything_learns_but_the_mask_token_and_the_teacher_gets_no_gradient():
    network, (cls, patches, crops) = student(), inputs()
    cls.requires_grad_()
    patches.requires_grad_()
    sum(Matching(network, torch.float64).losses(cls, patches, crops, None, IMAGES).values()).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == ["backbone.mask_token"]
    assert cls.grad is None
    assert patches.grad is None


def test_stochastic_depth_reaches_the_backbone():
    network, (cls, patches, crops) = student(), inputs()
    matching = Matching(network, torch.float64)
    everything = [torch.arange(len(crop)).expand(ARCH.depth, 2, -1) for crop in crops]
    half = [kept[..., ::2] for kept in everything]
    plain, full, halved = (matching.losses(cls, patches, crops, kept, IMAGES) for kept in (None, everything, half))
    for name, term in plain.items():
        assert full[name].item() == pytest.approx(term.item(), abs=1e-12)
        assert abs(halved[name].item() - term.item()) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_sums_in_fp32(dtype):
    cls, patches, crops = inputs(torch.float32)
    terms = Matching(student(dtype), dtype).losses(cls, patches, crops, None, IMAGES)
    exact = Matching(student(), torch.float64).losses(*inputs(), None, IMAGES)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert term.item() == pytest.approx(exact[name].item(), abs=1e-5 if dtype == torch.float32 else 1e-2)


def test_training_brings_the_student_near_the_teacher():
    torch.manual_seed(1)
    teacher = MatchedNetwork(replace(ARCH, width=WIDTH), 1).backbone
    _, _, crops = inputs(torch.float32, local=0)
    with torch.no_grad():
        features = teacher(crops)[0]
    cls, patches = features.cls.unflatten(0, (2, -1)).transpose(0, 1), features.patches.flatten(1, 2)
    network = student(torch.float32)
    matching = Matching(network, torch.float32)
    optimiser, history = torch.optim.AdamW(network.parameters(), 3e-3), []
    for _ in range(40):
        loss = sum(matching.losses(cls, patches, crops, None, IMAGES).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert history[-1] < 0.2 * history[0]


@pytest.mark.parametrize("wrong", ["grid", "broadcast", "width", "images"])
def test_tokens_of_another_grid_or_width_are_refused(wrong):
    cls, patches, crops = inputs()
    if wrong == "grid":
        patches = patches[:, :9]
    elif wrong == "broadcast":
        patches = patches[:, :1]
    elif wrong == "width":
        cls = cls[..., :-1]
    else:
        cls = cls[:1]
    with pytest.raises(
        OpsinError, match=r"the teacher gives class tokens .* where the student needs \[8, 2, 20\] and "
    ):
        Matching(student(), torch.float64).losses(cls, patches, crops, None, IMAGES)


def test_projections_start_as_stated_and_nothing_else_is_kept():
    network = student()
    for linear in network.projection.values():
        assert linear.weight.shape == (WIDTH, ARCH.width)
        assert 0.015 < linear.weight.std().item() < 0.025
        assert not linear.bias.any()
    assert set(network.projection) == {"cls", "patch"}
    assert Matching(network, torch.float64).state() == {}
