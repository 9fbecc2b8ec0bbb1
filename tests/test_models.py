"""Heads are found by running the model; weights are read without running anything."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.bundle import read_weights
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.layers import executed_layers, find_head, initialise_head, last_layers
from holdfast.models import Architecture, load_state, load_weights, save_weights, state_of

TIMM = {
    "resnet18": ["fc"],
    "vgg11_bn": ["head.fc"],
    "caformer_s18": ["head.fc.fc2"],
    "vit_tiny_patch16_224": ["head"],
    "deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "convnext_atto": ["head.fc"],
    "mobilenetv3_small_050": ["classifier"],
}


@pytest.mark.parametrize("name", TIMM)
def test_the_head_of_any_timm_classifier_is_found(name: str) -> None:
    architecture = Architecture(name, size=32)
    model = architecture.build(7)
    assert architecture.head(model, 7) == TIMM[name]
    assert model(architecture.example(2)).shape[-1] == 7 or model.training


class Odd(nn.Module):
    """Layers are made in another order than they run, and the head is a 1×1 convolution."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(6, classes, 1)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Conv2d(3, 6, 3)
        self.unused = nn.Linear(6, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.first(x)).relu()).mean((2, 3))


def test_the_head_of_a_users_own_module_is_found_in_order_of_execution() -> None:
    architecture = Architecture("mine", size=8, factory=Odd)
    model = architecture.build(4)
    assert architecture.head(model, 4) == ["out"]
    assert executed_layers(model, architecture.example()) == ["first", "norm", "out"]
    assert last_layers(model, 2, architecture.example()) == ["first", "norm", "out"]
    assert last_layers(model, 1, architecture.example()) == ["out"]


def test_looking_for_the_head_changes_nothing() -> None:
    model = Odd(4).train()
    model.norm.eval()
    before = state_of(model)
    find_head(model, 4, torch.randn(2, 3, 8, 8))
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_head_and_classes_that_disagree() -> None:
    with pytest.raises(UserError, match=r"head and classes do not agree.*'out' has 4 outputs.*5 classes"):
        find_head(Odd(4), 5, torch.zeros(1, 3, 8, 8))


def test_a_model_that_does_not_run_on_its_input() -> None:
    with pytest.raises(UserError, match="does not run on an input of shape"):
        find_head(Odd(4), 4, torch.zeros(1, 1, 8, 8))


def test_head_initialisation_is_xavier_and_seeded() -> None:
    a, b = nn.Linear(30, 10), nn.Conv2d(30, 10, 1)
    initialise_head(a, torch.Generator().manual_seed(1))
    initialise_head(b, torch.Generator().manual_seed(1))
    bound = (6 / 40) ** 0.5
    assert a.weight.abs().max() <= bound
    assert a.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert a.bias.abs().max() == 0
    assert torch.equal(a.weight, b.weight.flatten(1))


def test_builds_are_seeded_and_leave_the_global_generator_alone(architecture) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, two, other = (state_of(architecture.build(5, s)) for s in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_small_conv_has_the_documented_number_of_parameters() -> None:
    count = sum(p.numel() for p in Architecture().build(10).parameters())
    assert count == pytest.approx(94_000, rel=0.01)


class Block(nn.Module):
    """A block that owns a scale besides its layers, as BEiT's and ConvNeXt's do; it runs after its children."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma * self.inner(x)


def test_re_initialising_the_last_layers_leaves_what_is_inside_a_block() -> None:
    def net(classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), Block(6), nn.Linear(6, classes))

    architecture = Architecture("mine", 8, 1, factory=net)
    state = {k: v + 5 for k, v in architecture.build(3).state_dict().items()}
    model = architecture.build(3)
    tuning = FineTuning.named("last-k+all", k=1)
    assert tuning.initialise_from(model, state, architecture, 3, 0) == {"3.weight", "3.bias"}
    tuning = FineTuning.named("last-k+all", k=2)
    fresh = tuning.initialise_from(model, state, architecture, 3, 0)
    assert fresh == {"2.inner.weight", "2.inner.bias", "2.gamma", "3.weight", "3.bias"}
    assert torch.equal(model[1].weight, state["1.weight"])


@pytest.mark.parametrize(("name", "count"), [("convnext_atto", 7), ("vit_tiny_patch16_224", 6), ("resnet18", 5)])
def test_last_2_of_real_models_is_two_layers_and_their_norms(name: str, count: int) -> None:
    """Of ConvNeXt: fc2 with its bias and scale, the norm and the head with their biases."""
    architecture = Architecture(name, size=32)
    model = architecture.build(4)
    state = state_of(architecture.build(4, seed=1))
    fresh = FineTuning.named("last-k+all", k=2).initialise_from(model, state, architecture, 4, 0)
    assert len(fresh) == count
    kept = [n for n, _ in model.named_parameters() if n not in fresh]
    assert all(torch.equal(model.state_dict()[n], state[n]) for n in kept)


def test_an_unknown_model_names_near_ones() -> None:
    with pytest.raises(UserError, match="unknown model 'resnet81'"):
        Architecture("resnet81").build(3)
    with pytest.raises(UserError, match="cannot import"):
        Architecture("nosuchpackage:net").build(3)
    with pytest.raises(UserError, match="cannot build model 'small_conv'"):
        Architecture(options={"depth": 3}).build(3)


class TestWeights:
    def test_round_trip_in_both_formats(self, tmp_path: Path, architecture) -> None:
        state = state_of(architecture.build(5))
        save_weights(tmp_path / "w.safetensors", state)
        torch.save(state, tmp_path / "w.pt")
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.pt")
        for name in ("w.safetensors", "w.pt", "wrapped.pt"):
            found = load_weights(tmp_path / name)
            assert found.keys() == state.keys()
            assert all(torch.equal(found[k], state[k]) for k in state)

    def test_tied_weights_are_saved(self, tmp_path: Path) -> None:
        w = torch.ones(3)
        save_weights(tmp_path / "w.safetensors", {"a": w, "b": w, "c": w[1:]})
        assert load_weights(tmp_path / "w.safetensors")["c"].tolist() == [1, 1]

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        (tmp_path / "evil.pt").write_bytes(pickle.dumps({"w": Trap()}))
        torch.save({"w": Trap()}, tmp_path / "evil2.pt")
        for name in ("evil.pt", "evil2.pt"):
            with pytest.raises(UserError, match="weights_only"):
                load_weights(tmp_path / name)
        assert not (tmp_path / "ran").exists()

    def test_truncated_missing_and_foreign_files(self, tmp_path: Path, architecture) -> None:
        save_weights(tmp_path / "w.safetensors", state_of(architecture.build(5)))
        whole = (tmp_path / "w.safetensors").read_bytes()
        (tmp_path / "w.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"cannot read .*w\.safetensors: truncated"):
            load_weights(tmp_path / "w.safetensors")
        with pytest.raises(UserError, match="weights not found"):
            load_weights(tmp_path / "none.safetensors")
        torch.save({"epoch": 3}, tmp_path / "log.pt")
        with pytest.raises(UserError, match="holds no state dict"):
            load_weights(tmp_path / "log.pt")

    def test_weights_of_another_model(self, architecture) -> None:
        model = architecture.build(5)
        with pytest.raises(UserError, match="does the number of classes agree"):
            load_state(model, architecture.build(6).state_dict())
        with pytest.raises(UserError, match="missing"):
            load_state(model, {"a": torch.zeros(1)})


def test_a_folder_without_its_config_is_no_bundle(tmp_path: Path) -> None:
    """The config is written last: a folder without one is torn, and its weights are nobody's word."""
    save_weights(tmp_path / "model.safetensors", {"w": torch.ones(1)})
    with pytest.raises(UserError, match=r"no whole bundle \(expected config.json and model.safetensors\)"):
        read_weights(str(tmp_path), Architecture("small_conv"))
    assert read_weights(str(tmp_path / "model.safetensors"), Architecture("small_conv")).keys() == {"w"}
