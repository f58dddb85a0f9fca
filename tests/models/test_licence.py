"""The licence of a base model: its card before its configuration, from this machine alone."""

import json
from pathlib import Path

import pytest

from recon.models import licence
from recon.models.licence import licence_of

CARD = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n\n# Model\n"


def test_the_card_wins_over_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"license": "mit"}))
    assert licence_of(str(tmp_path)) == {"license": "mit"}
    (tmp_path / "README.md").write_text(CARD)
    assert licence_of(str(tmp_path)) == {"license": "other", "license_name": "own", "license_link": "LICENSE"}


@pytest.mark.parametrize(
    "card", ["# no metadata", "---\n- a list\n---\n", "---\nlicense: [: \n---\n", "---\nlicense: 3\n---\n"]
)
def test_a_card_without_a_licence_gives_none(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence_of(str(tmp_path)) == {}
    (tmp_path / "config.json").write_text(json.dumps({"license": "mit"}))
    assert licence_of(str(tmp_path)) == {"license": "mit"}


def test_a_model_of_the_hub_is_looked_up_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text(CARD)
    asked = []

    def cached(name: str, file: str, revision: str | None) -> str | None:
        asked.append((name, file, revision))
        return str(tmp_path / file) if file == "README.md" else None

    monkeypatch.setattr(licence, "try_to_load_from_cache", cached)
    assert licence_of("org/model", "abc")["license_name"] == "own"
    assert asked == [("org/model", "README.md", "abc")]


@pytest.mark.parametrize("name", ["bundled", "random", "/gone/away", "a/b/c", "org/not-in-the-cache"])
def test_an_unknown_licence_is_left_out(name: str) -> None:
    assert licence_of(name) == {}
