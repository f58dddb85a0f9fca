"""Every shipped configuration is parsed by the real command line."""

import pytest

from recon.cli.compare import build_parser
from recon.cli.configs import config_directory, find_config, resolve_config_names, shipped_configs
from recon.cli.fit import parse_only

NAMES = [path.relative_to(config_directory()).with_suffix("").as_posix() for path in shipped_configs()]
COMPARISONS = [name for name in NAMES if name.startswith("comparisons/")]
OVERLAYS = [name for name in NAMES if not name.startswith(("comparisons/", "scopes/", "pretrain/"))]
RUNS = [name for name in NAMES if name.startswith(("scopes/", "pretrain/"))]


def test_none_is_forgotten():
    assert len(NAMES) == len(COMPARISONS) + len(OVERLAYS) + len(RUNS) == 67


@pytest.mark.parametrize("name", RUNS)
def test_run(name):
    assert parse_only(["-c", name]).model.class_path.startswith("recon.scopes.")


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_of_a_scope(name):
    parse_only(["-c", "scopes/submodule", "-c", name])


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison(name):
    config = build_parser().parse_args(resolve_config_names(["-c", name]))
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


def test_unknown_name_lists_what_is_shipped():
    with pytest.raises(ValueError, match=r"got 'scopes/nope'; shipped: .*scopes/block"):
        resolve_config_names(["-c", "scopes/nope"])
