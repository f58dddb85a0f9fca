"""Every shipped configuration is parsed by the real command line."""

from dataclasses import asdict
from pathlib import Path

import pytest

from recon.basics.refusals import UsageError
from recon.cli.arrange import arrange
from recon.cli.compare import build_parser, parsed
from recon.cli.configs import config_directory, find_config, load_config, shipped_configs
from recon.cli.fit import parse_only
from recon.cli.recipe_names import candidates
from recon.experiment.comparison.cluster import Cluster
from recon.experiment.recipes import Recipe, lay_out
from recon.planner.rates import PRECISIONS, as_rates

NAMES = [path.relative_to(config_directory()).with_suffix("").as_posix() for path in shipped_configs()]
COMPARISONS = [name for name in NAMES if name.startswith("comparisons/")]
OTHERS = ("clusters/", "comparisons/", "devices/", "recipes/", "scopes/", "pretrain/")
OVERLAYS = [name for name in NAMES if not name.startswith(OTHERS)]
RECIPES = [name for name in NAMES if name.startswith("recipes/")]
CLUSTERS = [name for name in NAMES if name.startswith("clusters/")]
DEVICES = [name for name in NAMES if name.startswith("devices/")]
RUNS = [name for name in NAMES if name.startswith(("scopes/", "pretrain/"))]


def test_none_is_forgotten():
    assert len(NAMES) == sum(map(len, (CLUSTERS, COMPARISONS, OVERLAYS, DEVICES, RUNS, RECIPES))) == 103


@pytest.mark.parametrize("name", RUNS)
def test_run(name):
    assert parse_only(["-c", name]).model.class_path.startswith("recon.scopes.")


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_of_a_scope(name):
    parse_only(["-c", "scopes/submodule", "-c", name])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    for one, content in candidates(name).items():
        for stage in lay_out(Recipe.of(one, content), [], 0, Path("runs/x")):
            assert parse_only(stage.recoveries[0].command[1:]).model.class_path.startswith("recon.scopes.")


@pytest.mark.parametrize("name", DEVICES)
def test_device(name):
    assert as_rates(load_config(find_config(name))["rates"]).keys() == set(PRECISIONS)


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster(name):
    config, comparison = parsed(["-c", "comparisons/smoke", "--workers=slurm", "-c", name])
    assert (config.workers, comparison.name) == ("slurm", "smoke")
    assert config.cluster.as_dict() == asdict(Cluster())  # a cluster's file lists the defaults, to be copied


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison(name):
    config = build_parser().parse_args(arrange("compare", ["-c", name]))
    assert config.name == name.removeprefix("comparisons/")
    assert {entry.scope for entry in config.recoveries} <= {"matrix", "submodule", "block", "full"}


@pytest.mark.parametrize("name", NAMES)
def test_opens_with_its_command_and_is_short(name):
    text = (config_directory() / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 40
    if name != "cell":
        assert text.startswith("# recon ")
        assert f" -c {name}" in text.splitlines()[0]


def test_a_real_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("scopes/block") == str(config_directory() / "scopes/block.yaml")
    (tmp_path / "scopes").mkdir()
    (tmp_path / "scopes" / "block").write_text("run_dir: mine\n")
    assert find_config("scopes/block") == "scopes/block"


def test_an_unknown_name_is_answered_with_the_closest():
    with pytest.raises(UsageError, match=r"got 'scopes/blok'; did you mean scopes/block\?$"):
        find_config("scopes/blok")
    with pytest.raises(UsageError, match=r"got 'submodul'; did you mean scopes/submodule"):
        find_config("submodul")
    with pytest.raises(UsageError, match=r"there are .*scopes/matrix, scopes/submodule"):
        find_config("scopes/xyzzy")


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n", "just words\n"])
def test_a_file_that_holds_no_options_is_refused(text, tmp_path):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"-c needs a YAML file.*my\.yaml"):
        load_config(str(tmp_path / "my.yaml"))


def test_numbers_and_times_are_read_as_a_user_means_them(tmp_path):
    (tmp_path / "my.yaml").write_text("a: 2:4\nb: 1e-3\nc: 12\nd: -1.5\ne: 060\nf: 1_000\n")
    content = load_config(str(tmp_path / "my.yaml"))
    assert content == {"a": "2:4", "b": 1e-3, "c": 12, "d": -1.5, "e": "060", "f": 1000}
