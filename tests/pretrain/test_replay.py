"""A step is run again, and what was broken in it is found."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from watched import tiny, train, varied

from opsin.errors import OpsinError
from opsin.pretrain import objective
from opsin.pretrain import replay as module
from opsin.pretrain.replay import replay


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return varied(tmp_path_factory.mktemp("replayed"), 40)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A run of six steps with a checkpoint after the third; read only."""
    out = tmp_path_factory.mktemp("runs") / "run"
    records, _, _ = train(replace(tiny(6), log_every=1), images, out, save=(3,))
    assert len(records) == 6
    return out, records


class Broken(module.Step):
    """A step that an infinity gets into before its last call."""

    name = ""
    at = 5

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.done = None

    def __call__(self, batch, values):
        if batch.step == self.at:
            with torch.no_grad():
                network, _, name = self.name.partition(".")
                getattr(self, network).get_parameter(name).view(-1)[0] = torch.inf
            self.loaded()
        return super().__call__(batch, values)


def test_a_replayed_step_is_the_step_of_the_run(images, run, monkeypatch):
    out, records = run
    seen = []
    real = module.Step.__call__

    def listen(self, batch, values):
        outcome = real(self, batch, values)
        seen.append((batch.step, float(outcome.terms["dino"])))
        return outcome

    monkeypatch.setattr(module.Step, "__call__", listen)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    found = replay(images, out, 5, device="cpu")
    assert seen == [(step, records[step]["loss.dino"]) for step in (3, 4, 5)]  # from the checkpoint, bit for bit
    assert found.began is None
    assert str(found).startswith("step 5: all of it is finite\n")
    assert len(found.images) == 32
    assert all(path.startswith(str(images)) for path in found.images)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {path: time for path, time in after.items() if "cache" not in str(path)} == before


@pytest.mark.parametrize(
    ("name", "output", "part"),
    [
        ("student.backbone.blocks.1.mlp.fc1.weight", "student.backbone.blocks.1.mlp.fc1", "the student's backbone"),
        ("student.backbone.blocks.0.attn.qkv.bias", "student.backbone.blocks.0.attn.qkv", "the student's backbone"),
        ("student.dino_head.mlp.2.weight", "student.dino_head.mlp.2", "dino_head"),
        ("student.ibot_head.mlp.4.bias", "student.ibot_head.mlp.4", "ibot_head"),
        ("student.dino_head.last_layer.weight_v", "student.dino_head.last_layer", "dino_head"),
        ("average.backbone.patch_embed.proj.weight", "teacher.backbone.patch_embed.proj", "the teacher's backbone, or"),
        ("average.dino_head.mlp.0.weight", "teacher.dino_head.mlp.0", "dino_head"),
    ],
)
def test_the_module_is_found(images, run, monkeypatch, name, output, part):
    monkeypatch.setattr(Broken, "name", name)
    monkeypatch.setattr(module, "Step", Broken)
    found = replay(images, run[0], 5, device="cpu")
    assert found.output == output
    assert found.began.startswith(part)
    assert f"first output that is not finite: {output}" in str(found)


def test_weights_that_are_broken_before_the_step_are_named(images, run, monkeypatch):
    monkeypatch.setattr(Broken, "name", "student.dino_head.mlp.2.weight")
    monkeypatch.setattr(Broken, "at", 4)
    monkeypatch.setattr(module, "Step", Broken)
    assert replay(images, run[0], 5, device="cpu").weights == ["student.dino_head.mlp.2.weight"]


def test_the_teachers_prototypes_are_found(images, run, monkeypatch):
    monkeypatch.setattr(Broken, "name", "average.dino_head.last_layer.weight_v")
    monkeypatch.setattr(module, "Step", Broken)
    found = replay(images, run[0], 5, device="cpu")
    assert "prototypes of the image targets" in found.targets
    assert found.began == "dino_head"


def test_a_term_of_the_loss_is_found(images, run, monkeypatch):
    real = objective.koleo
    monkeypatch.setattr(objective, "koleo", lambda x: real(x) * math.nan)
    found = replay(images, run[0], 5, device="cpu")
    assert found.output is None
    assert found.losses == ["koleo"]
    assert found.began == "the koleo loss"


def test_a_gradient_is_found(images, run, monkeypatch):
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.clone()

        @staticmethod
        def backward(_, gradient):
            return gradient * torch.inf

    real = objective.Head.forward
    monkeypatch.setattr(objective.Head, "forward", lambda self, x: real(self, Overflow.apply(x)))
    found = replay(images, run[0], 5, device="cpu")
    assert found.losses == []
    assert found.output is None
    assert found.parts == ["backbone"]
    assert found.gradient == "the output of student.backbone"
    assert found.began == "the gradient of backbone"


def test_the_images_with_features_that_are_not_finite_are_named(images, run, monkeypatch):
    class OneImage(module.Step):
        def __call__(self, batch, values):
            if batch.step == 5:
                batch.crops("global", 0)[[7, 32 + 7]] = torch.nan
            return super().__call__(batch, values)

    monkeypatch.setattr(module, "Step", OneImage)
    found = replay(images, run[0], 5, device="cpu")
    assert found.suspects == [found.images[7]]
    assert "1 image(s) with features that are not finite:" in str(found)


def test_without_a_checkpoint_it_begins_at_the_start(images, run, monkeypatch):
    said = []
    replay(images, run[0], 1, device="cpu", say=said.append)
    assert said[0] == "computing steps 0 to 1 again, from the beginning"


def test_mistakes_are_one_sentence(images, run, tmp_path):
    with pytest.raises(OpsinError, match=r"holds no run: give --replay with the --out of the run"):
        replay(images, tmp_path, 1)
    with pytest.raises(OpsinError, match=r"--replay is 6, and the run in .* has steps 0 to 5: give one of them"):
        replay(images, run[0], 6, device="cpu")
    with pytest.raises(OpsinError, match=r"--replay is -1"):
        replay(images, run[0], -1, device="cpu")
    assert np.isfinite(run[1][0]["loss"])
