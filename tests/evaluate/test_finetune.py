"""Fine-tuning: learns, leaves the model alone, goes on after a stop, and writes weights that load."""

import contextlib
import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import small, write_digits

from opsin.errors import OpsinError
from opsin.evaluate import finetune as tuning
from opsin.evaluate.classifier import Classifier, load
from opsin.evaluate.finetune import Finetune, Tuned, depth_of, finetune, groups, merged, mixed, trainable
from opsin.evaluate.model import open_model, wrap
from opsin.evaluate.probe import Probe
from opsin.evaluate.task import Run
from opsin.evaluate.training import train as training
from opsin.evaluate.views import Box


@pytest.fixture(autouse=True)
def short_linear(monkeypatch):
    monkeypatch.setattr(tuning, "LINEAR", Probe(steps=20, train_batch=16, blocks=(1,), crops="centre"))


@pytest.fixture
def model():
    return small(seed=5)  # another than the settings' seed, from which fresh weights would be the same


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), classes=3, each=8)


@pytest.fixture
def run(tmp_path):
    return Run(batch_size=16, workers=2, cache=tmp_path / "kept", progress=False)


def settings(digits, **given):
    return Finetune(
        str(digits), test_fraction=0.25, **{"size": 16, "epochs": 2, "train_batch": 9, "rate": 3e-3} | given
    )


def test_rates_rise_and_fall_to_what_is_asked_for():
    own = [tuning.schedule(step, 100, Finetune()) for step in range(100)]
    assert own[0] == pytest.approx(0.1)
    assert max(own) == own[9] == pytest.approx((1 + np.cos(np.pi * 0.09)) / 2)
    assert own[99] < 1e-3
    assert own[10:] == sorted(own[10:], reverse=True)
    flat = [tuning.schedule(step, 100, Finetune(warmup=0.25, last_rate=1.0)) for step in range(100)]
    assert flat[4] == pytest.approx(0.2)
    assert flat[24:] == [1.0] * 76


def test_the_test_crop_can_be_the_whole_width(model, digits, run):
    finetune(model, settings(digits, epochs=1, shorter=16), run)
    finetune(model, settings(digits, epochs=1), run)
    facts = [json.loads(path.read_text()) for path in run.cache.glob("features-*/facts.json")]
    tuned = sorted(one["transform"] for one in facts if one["weights"] != model.digest)
    assert tuned == ["centre-16-of-16", "centre-16-of-18"]  # one training, tested in two ways
    assert len(list(run.cache.glob("finetuned-*"))) == 1
    with pytest.raises(OpsinError, match="--shorter is 8"):
        Finetune(size=16, shorter=8)


def head(model, classes=3):
    return Classifier(torch.randn(classes, 2 * model.arch.width), torch.zeros(classes), 1, True)


@pytest.mark.parametrize("lora", [0, 4])
def test_a_tiny_set_is_learned_and_the_model_is_not_changed(model, digits, run, monkeypatch, lora):
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    # On the centre crops of the very images that train: whether it can learn, not whether it generalises.
    sets = tuning.train_and_test
    monkeypatch.setattr(tuning, "train_and_test", lambda *args: (sets(*args)[0],) * 2)
    monkeypatch.setattr("opsin.evaluate.views.draw_box", lambda height, width, _: Box(1, 1, height - 2, width - 2))
    given = settings(digits, epochs=30, rate=1e-2, train_batch=18, mix=False, smoothing=0.0, layer_decay=0.9, lora=lora)
    result = finetune(model, given, run)
    assert result.metrics["accuracy"] == 1.0
    assert result.metrics["accuracy"] >= result.metrics["linear"]
    assert result.table.rows[0][0] == "linear head, frozen backbone"
    assert list(result.outcomes) == [1.0] * 18
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_rates_fall_from_the_head_to_the_embedding(model, digits):
    given = settings(digits, rate=1.0, layer_decay=0.5)
    module = Tuned(trainable(model, 0), head(model))
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups(module, 4, given) for p in g["params"]}
    told = {name: rates[id(p)] for name, p in module.named_parameters() if p.requires_grad}
    assert told["head.weight"] == (1.0, 0.05)
    assert told["head.bias"] == (1.0, 0.0)
    assert told["backbone.norm.weight"] == (1.0, 0.0)
    assert told["backbone.blocks.3.mlp.fc1.weight"] == (0.5, 0.05)
    assert told["backbone.blocks.0.norm1.weight"] == (0.0625, 0.0)
    assert told["backbone.blocks.0.attn.qkv.weight"] == (0.0625, 0.05)
    for name in ("cls_token", "pos_embed", "patch_embed.proj.bias"):
        assert told[f"backbone.{name}"] == (0.03125, 0.0)
    assert told["backbone.patch_embed.proj.weight"] == (0.03125, 0.05)
    assert len(told) == len(list(module.parameters())) - 1  # all but the mask token
    assert depth_of("backbone.blocks.11.norm2.bias", 12) == 12


def test_lora_leaves_the_weights_alone_and_can_be_merged(model):
    images = torch.randn(3, 3, 16, 16)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    module = trainable(model, 3)
    torch.testing.assert_close(module([images])[0].cls, model.backbone([images])[0].cls)  # starts as the model
    learns = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert len(learns) == 4 * 2 * 2
    assert all("lora_" in name and ".attn." in name for name in learns)
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        module([images])[0].patches[..., 0].sum().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1)
        optimiser.step()
    frozen = {name: p for name, p in module.named_parameters() if "lora_" not in name}
    for name, tensor in before.items():
        assert sum(torch.equal(tensor, p) for p in frozen.values() if p.shape == tensor.shape), name
    wanted = module([images])[0]
    assert not torch.allclose(wanted.cls, model.backbone([images])[0].cls, atol=1e-3)
    plain = merged(module)
    assert plain.state_dict().keys() == before.keys()
    torch.testing.assert_close(plain([images])[0].cls, wanted.cls, atol=1e-5, rtol=1e-4)


def test_images_and_targets_are_mixed_alike():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16)
    targets, kinds = torch.eye(4), set()
    for seed in range(40):
        together, shares = mixed(images, targets, np.random.default_rng(seed))
        assert shares.sum(1).tolist() == pytest.approx([1] * 4, abs=1e-5)
        torch.testing.assert_close(together.mean((1, 2, 3)), shares @ torch.arange(4.0), atol=1e-4, rtol=1e-4)
        kinds.add("mixup" if len(together[0].unique()) == 1 and not together[0].frac().eq(0).all() else "cutmix")
    assert kinds == {"mixup", "cutmix"}
    assert images[0].eq(0).all()


def test_the_backbone_rests_while_the_head_learns_first(model, digits, run):
    given = settings(digits, epochs=1, freeze_backbone_epochs=1, save=run.cache / "tuned")
    finetune(model, given, run)
    tuned = open_model(run.cache / "tuned" / "backbone.safetensors", device="cpu")
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tuned.backbone.state_dict()[name], tensor), name


@pytest.mark.parametrize("lora", [0, 2])
def test_what_is_saved_loads_and_scores_as_measured(model, digits, run, lora):
    folder = run.cache / "tuned"
    result = finetune(model, settings(digits, save=folder, lora=lora), run)
    tuned, classifier = (
        open_model(folder / "backbone.safetensors", device="cpu"),
        load(folder / "head.safetensors", 24, 3),
    )
    _, test = tuning.train_and_test(str(digits), None, 0.25, 0)
    known = tuning.features(tuned, test, tuning.Centre(16), run)
    right = classifier.logits(known.pooled).argmax(1).numpy() == test.labels
    assert right.mean() == result.metrics["accuracy"]
    assert tuned.digest != model.digest


def test_parts_of_a_batch_give_the_same_gradient(model):
    module, images = Tuned(trainable(model, 0), head(model)), torch.randn(7, 3, 16, 16)
    found = []
    for part in (7, 3):
        module.zero_grad()
        tuning._scores(module, images, part, False).square().sum().backward()
        found.append([p.grad.clone() for p in module.parameters() if p.requires_grad])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-3, rtol=1e-4)


@contextlib.contextmanager
def stops(what, *_):
    done = 0

    def advance(number):
        nonlocal done
        done += number
        if what == "fine-tuning" and done >= 3:
            raise KeyboardInterrupt

    yield advance


def test_a_stopped_training_goes_on_as_if_it_had_not_been(model, digits, run, tmp_path, monkeypatch):
    given = settings(digits, epochs=3, freeze_backbone_epochs=1)
    finetune(model, replace(given, save=tmp_path / "whole"), run)
    other = replace(run, cache=tmp_path / "other")
    monkeypatch.setattr(tuning, "training", functools.partial(training, every=0))
    with monkeypatch.context() as patch:
        patch.setattr("opsin.evaluate.training.progress", stops)
        with pytest.raises(KeyboardInterrupt):
            finetune(model, given, other)
    finetune(model, replace(given, save=tmp_path / "parts"), other)
    for name in ("backbone", "head"):
        whole, parts = (load_file(tmp_path / kind / f"{name}.safetensors") for kind in ("whole", "parts"))
        assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())


def test_mistakes_are_told_in_a_sentence(model, digits, run, monkeypatch):
    with pytest.raises(OpsinError, match=r"--freeze.backbone.epochs is 3"):
        Finetune(epochs=2, freeze_backbone_epochs=3)
    with pytest.raises(OpsinError, match=r"--layer.decay is 2"):
        Finetune(layer_decay=2)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(OpsinError, match="needs peft, which is missing"):
        trainable(model, 2)


def test_the_rate_warms_up_then_falls_and_gradients_are_clipped(model, digits, run, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        tuning, "training", lambda m, o, rate, b, loss, steps, f, **k: asked.update(rate=rate, steps=steps, **k)
    )
    finetune(model, settings(digits, epochs=40), run)
    rate, steps = asked["rate"], asked["steps"]
    assert steps == 80
    assert [rate(0), rate(3)] == pytest.approx([1 / 8, 0.5 * (1 + np.cos(3 * np.pi / 80)) / 2])
    assert rate(60) == pytest.approx((1 + np.cos(0.75 * np.pi)) / 2)
    assert asked["clip"] == 1.0


def test_settings_weights_and_labels_lead_to_backbones_of_their_own(model, digits, run, monkeypatch):
    monkeypatch.setattr(tuning, "training", lambda *a, **k: None)
    given, real = settings(digits), tuning.train_and_test
    for changed in (given, replace(given, rate=1.0), replace(given, smoothing=0.5), replace(given, mix=False)):
        finetune(model, changed, run)
    finetune(wrap(type(model.backbone)(model.arch)), given, run)

    def relabelled(*a):
        train, test = real(*a)
        return replace(train, labels=(train.labels + 1) % 3), test

    monkeypatch.setattr(tuning, "train_and_test", relabelled)
    finetune(model, given, run)
    assert len(list(run.cache.glob("finetuned-*"))) == 6


def test_a_step_is_of_the_seed_and_its_number(model, digits, run, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        tuning, "training", lambda m, o, r, batches, loss, s, f, **k: asked.update(module=m, batches=batches, loss=loss)
    )
    kinds, seen = [], []
    monkeypatch.setattr(tuning, "mixed", lambda i, t, rng: kinds.append(rng.random()) or (i, t))
    for seed in (0, 1):
        finetune(model, settings(digits, seed=seed, epochs=4, smoothing=0.3), run)
        batches = list(asked["batches"](0))
        seen.append(batches[0][1])
    assert len(set(kinds)) == len(kinds)
    assert not torch.equal(*seen)
    _, images, targets = batches[0]
    wanted = torch.nn.functional.cross_entropy(asked["module"](images), targets * 0.7 + 0.1)
    torch.testing.assert_close(asked["loss"](batches[0]), wanted)


def test_steps_are_rounded():
    assert tuning.steps_of(tuning.Finetune(epochs=3, train_batch=8), 10) == 4


def test_shares_of_cutmix_are_uniform():
    images, targets = torch.arange(2.0)[:, None, None, None].expand(2, 3, 224, 224), torch.eye(2)
    shares = []
    for seed in range(600):
        mixed_images, found = mixed(images, targets, np.random.default_rng(seed))
        inside = mixed_images[0].unique()
        if set(inside.tolist()) <= {0.0, 1.0}:
            rng = np.random.default_rng(seed)
            rng.random()
            shares.append((rng.beta(1, 1), float(found[0, 0])))
    drawn, told = np.array(shares).T
    assert (told >= drawn - 0.02).all()  # clipping at the border only makes the piece smaller
    assert np.mean(np.abs(told - drawn) < 0.02) > 0.1


def test_crops_follow_from_the_seed(model, digits, run, monkeypatch):
    asked, real = [], tuning.Views
    monkeypatch.setattr(tuning, "training", lambda m, o, r, batches, *a, **k: next(batches(0)))
    monkeypatch.setattr(tuning, "Views", lambda *a: asked.append(a[1:]) or real(*a))
    tuning.finetune(model, settings(digits, seed=5), run)
    assert asked == [(16, 9, 5)]
