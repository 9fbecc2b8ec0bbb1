"""Pre-training without labels: views, the slow encoder, and that what is learned serves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.checkpoints import Checkpoint
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture
from holdfast.selfsupervised import Encoder, Pair, SelfSupervision, Views, pretrain_encoder
from holdfast.training import evaluate

pytest.importorskip("lightly")
TUNING = FineTuning("scratch", optimiser="adam", lr=2e-3, weight_decay=0.0, batch_size=64, steps=60)
SPEC = SelfSupervision(hidden=32, projection=16, queue=256, flip=False, head_steps=60)


def test_views_are_two_different_ones_of_each_image_and_repeat(original, runtime) -> None:
    train = original.train
    views = Views(train.images, train.labels, train.preprocessing, 3, False)
    images, labels = views.batch(torch.tensor([4, 9]), runtime)
    assert images.shape == (4, 1, 8, 8)
    assert labels.tolist() == train.labels[[4, 9, 4, 9]].tolist()
    assert not torch.equal(images[0], images[2])
    assert torch.equal(images, views.batch(torch.tensor([4, 9]), runtime)[0])
    assert not torch.equal(images[:2], views.batch(torch.tensor([9, 4]), runtime)[0][[1, 0]])
    assert not torch.equal(images, replace(views, seed=4).batch(torch.tensor([4, 9]), runtime)[0])


def test_the_slow_encoder_follows_by_hand() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.Linear(2, 3))
    pair = Pair(Encoder(model, "2", nn.Identity()), momentum=0.9)
    assert pair.slow is not None
    before = pair.slow.model[1].weight.clone()
    with torch.no_grad():
        model[1].weight.add_(1.0)
    pair.follow()
    assert torch.allclose(pair.slow.model[1].weight, before + 0.1)
    images = torch.randn(4, 1, 1, 2)
    outputs = pair(images)
    assert torch.equal(outputs[:2], model[1](images[:2].flatten(1)))
    assert torch.equal(outputs[2:], pair.slow.model[1](images[2:].flatten(1)))
    assert outputs[:2].requires_grad
    assert all(p.grad is None for p in pair.slow.parameters())


@pytest.mark.parametrize("method", ["simclr", "moco-v2"])
def test_a_linear_head_on_what_was_learned(method, architecture, original, task, runtime) -> None:
    """Better than a linear head on a body of random weights."""
    spec = replace(SPEC, method=method, momentum=0.9)
    scores = []
    for steps in (60, 1):
        state = pretrain_encoder(architecture, original, replace(TUNING, steps=steps), spec, task, runtime)
        model = architecture.build(5)
        model.load_state_dict(state)
        scores.append(evaluate(model, original.validation, task, runtime)[0])
    assert scores[0] > 0.75
    assert scores[0] > scores[1] + 0.05


@pytest.mark.parametrize("method", ["simclr", "moco-v2"])
def test_resumed_is_undisturbed(method, architecture, original, task, runtime, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOLDFAST_SAVE_SECONDS", "0")
    tuning, spec = replace(TUNING, steps=6), replace(SPEC, method=method, head_steps=2)
    whole = pretrain_encoder(architecture, original, tuning, spec, task, runtime)
    follow, count = Pair.follow, [0]

    def dying(self: Pair) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        follow(self)

    monkeypatch.setattr(Pair, "follow", dying)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        pretrain_encoder(architecture, original, tuning, spec, task, runtime, checkpoint=Checkpoint(path))
    monkeypatch.setattr(Pair, "follow", follow)
    again = pretrain_encoder(
        architecture, original, tuning, spec, task, runtime, checkpoint=Checkpoint(path, resume=True)
    )
    assert all(torch.equal(whole[n], again[n]) for n in whole)


@pytest.mark.parametrize("bad", [{"method": "byol"}, {"momentum": 1.0}, {"temperature": 0.0}, {"queue": 0}])
def test_values_out_of_range(bad) -> None:
    with pytest.raises(UserError):
        SelfSupervision(**bad)


def test_a_vision_transformer_too(original, task, runtime) -> None:
    architecture = Architecture(
        "vit_tiny_patch16_224", 32, 1, options={"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
    )
    from holdfast.domains import DomainSpec, load_domain

    few = load_domain(DomainSpec("digits[0-4]", per_class=10, test_per_class=2), architecture.preprocessing)
    spec = replace(SPEC, head_steps=1)
    state = pretrain_encoder(architecture, few, replace(TUNING, steps=1, batch_size=8), spec, task, runtime)
    assert state.keys() == architecture.build(5).state_dict().keys()
