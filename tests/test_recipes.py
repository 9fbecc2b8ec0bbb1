"""Recipes are validated before any work begins; what is wrong is said in one line."""

import json
from pathlib import Path

import pytest

from holdfast.comparison import presets_of
from holdfast.defences.ntp import NTP
from holdfast.defences.registry import Identity
from holdfast.defences.sophon import Sophon
from holdfast.errors import UserError, unknown
from holdfast.recipes import apply_changes, list_recipes, load_recipe, parse_recipe

MINIMAL = {"original": "digits[0-4]", "restricted": "digits[5-9]"}


@pytest.mark.parametrize(("name", "preset"), [(n, p) for n in list_recipes() for p in (None, *presets_of(n))])
def test_shipped_recipes_are_valid(name: str, preset: str | None) -> None:
    recipe = load_recipe(name, preset)
    json.dumps(recipe.as_dict())
    again = parse_recipe(recipe.as_dict())
    assert again == recipe
    if preset == "paper":
        assert recipe.task == "denoising" or recipe.defence == Sophon("ice")  # every default is the paper's


def test_the_named_recipes_ship() -> None:
    shipped = set(list_recipes())
    assert {"demo", "sophon/mnist-usps", "sophon/cifar10-mnist_m", "sophon/cifar10-split"} <= shipped
    assert {"mit/cifar10-split", "ntp/mnist-mnist_m", "ntp/mnist-usps", "ntp/usps-mnist_m"} <= shipped
    assert {"mit/omniglot-mnist", "ntp/sensitivity", "ntp/encoders"} <= shipped


def test_a_minimal_recipe_and_changes() -> None:
    recipe = parse_recipe(MINIMAL)
    assert recipe.defence == Sophon()
    changes = ["defence.alpha=1e-3", "audit.seeds=5", "original.per_class=9", "weights=null"]
    changed = parse_recipe({**MINIMAL, "defence": "sophon"}, changes=changes)
    assert (changed.defence.alpha, changed.audit.seeds, changed.original.per_class) == (1e-3, 5, 9)
    assert isinstance(parse_recipe({**MINIMAL, "defence": "identity"}).defence, Identity)


def test_presets_are_laid_over() -> None:
    raw = {**MINIMAL, "preset": "b", "presets": {"a": {"seed": 1}, "b": {"seed": 2, "audit": {"seeds": 4}}}}
    assert parse_recipe(raw).seed == 2
    assert parse_recipe(raw, "a").seed == 1
    with pytest.raises(UserError, match="unknown preset of recipe 'c'"):
        parse_recipe(raw, "c")


def test_another_defence_takes_the_place_of_one() -> None:
    """Its fields are not those of the one before; fields of the same one are laid over."""
    raw = {"original": "digits[0-4]", "restricted": "digits[5-9]", "defence": {"name": "sophon", "alpha": 0.1}}
    for changes in (["defence.name=ntp", "defence.rho=0.1"], ["defence=ntp", "defence.rho=0.1"]):
        assert parse_recipe(raw, changes=changes).defence == NTP(rho=0.1)
    assert parse_recipe(raw, changes=["defence.name=sophon", "defence.beta=0.2"]).defence == Sophon(alpha=0.1, beta=0.2)
    raw["presets"] = {"a": {"defence": {"name": "ntp"}}, "b": {"defence": {"beta": 0.3}}}
    assert parse_recipe(raw, "a").defence == NTP()
    assert parse_recipe(raw, "b").defence == Sophon(alpha=0.1, beta=0.3)


def test_what_was_meant() -> None:
    with pytest.raises(UserError, match=r"did you mean 'defence\.gamma'"):
        parse_recipe({"original": "digits", "restricted": "digits"}, changes=["defence.name=ntp", "defence.gama=1"])
    with pytest.raises(UserError, match="did you mean 'ntp/mnist-usps'"):
        load_recipe("ntp/mnist-usp")


def test_changes_do_not_reach_into_values() -> None:
    with pytest.raises(UserError, match="'seed' is a value"):
        apply_changes({"seed": 1}, ["seed.x=2"])
    with pytest.raises(UserError, match="expects key=value"):
        apply_changes({}, ["seed"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defense": {}}, "unknown key 'defense'"),
        ({"defence": {"name": "sophon", "alhpa": 1}}, "unknown key 'defence.alhpa'"),
        ({"defence": {"name": "sofon"}}, "unknown defence 'sofon'"),
        ({"defence": {"alpha": -1}}, "alpha must lie in"),
        ({"defence": {"alpha": True}}, "recipe: defence.alpha: expected a number, but got true$"),
        ({"defence": {"inner_lr": [1e-3, True]}}, "recipe: defence.inner_lr: expected a number, but got true$"),
        ({"audit": {"seeds": True}}, "recipe: audit.seeds: expected a number, but got true$"),
        ({"defence": {"iterations": "many"}}, "defence.iterations: .*but got 'many'"),
        ({"defence": {"iterations": "many"}}, "expected a valid integer, but got 'many'$"),
        ({"defence": {"inner_lr": 0.1}}, "expected a valid list, but got 0.1$"),
        ({"defence": {"name": "ntp", "regulariser": "x"}}, "expected 'fisher', 'mmd' or 'none', but got 'x'$"),
        ({"runtime": {"compile": "maybe"}}, "runtime.compile: expected a valid boolean or 'graphs', but got 'maybe'$"),
        (
            {"audit": {"steps": "x", "seeds": "x"}},
            r"audit.steps: expected a valid integer, but got 'x' \(and 1 more\)$",
        ),
        ({"defence": [1]}, r"defence: expected a name or a mapping with a 'name', but got \[1\]$"),
        ({"defence": False}, "defence: expected a name or a mapping with a 'name', but got False$"),
        ({"model": "resnet18"}, "model: expected a mapping, but got 'resnet18'$"),
        ({"presets": {"p": [1]}, "preset": "p"}, "preset 'p' must be a mapping"),
        ({"audit": {"battery": "quik"}}, "unknown battery 'quik'.*did you mean 'quick'"),
        ({"audit": {"seeds": 0}}, "seeds must be at least 1"),
        ({"pretrain": {"lr": 9999}}, "lr must lie in"),
        (
            {"pretrain": {"mixup": 0.2}, "self_supervised": {"method": "simclr"}},
            "self_supervised makes views of its own",
        ),
        ({"pretrain": {"optimizer": "adam"}}, "unknown key 'pretrain.optimizer'"),
        ({"model": {"size": 2}}, "image size must be in"),
        ({"model": {"channels": 2}}, "channels must be 1"),
        ({"original": {"data": "digits", "validation_fraction": 2}}, "validation_fraction must lie in"),
        ({"restricted": None}, "restricted"),
        ({"runtime": {"precision": "int8"}}, "precision must be"),
        ({"audit": {"attacks": [{"name": "x", "tuning": {"lr": 0}}]}}, "lr must lie in"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(change, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_recipe({**MINIMAL, **change})
    assert "\n" not in str(caught.value)


def test_a_missing_section() -> None:
    with pytest.raises(UserError, match="'restricted' is missing"):
        parse_recipe({"original": "digits"})


def test_an_attack_of_ones_own_in_one_line() -> None:
    tuning = {"initialise": "head", "optimiser": "adamw", "lr": 0.003, "steps": 40}
    recipe = parse_recipe({**MINIMAL, "audit": {"attacks": [{"name": "mine", "tuning": tuning}]}})
    assert recipe.audit.all_attacks()[-1].tuning.optimiser == "adamw"


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recipe not found"):
        load_recipe("sophon/nothing")
    (tmp_path / "a.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(UserError, match="is no recipe"):
        load_recipe(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(tmp_path / "c.yaml")


def test_a_long_table_is_not_read_out_in_an_error() -> None:
    names = [f"attack {i:02d}" for i in range(53)]
    said = str(unknown("attack", "atack 07", names))
    assert said.startswith("unknown attack 'atack 07' (did you mean 'attack 07'?); valid: attack 07, ")
    assert said.endswith(" and 41 more")
    assert said.count("attack ") == 1 + 1 + 12
    assert str(unknown("attack", "x", names[:3])).endswith("valid: attack 00, attack 01, attack 02")
