"""Model cards: accepted by huggingface_hub's own readers, with the numbers of the report."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from recon.report import Report
from recon.report.card import Facts, card
from recon.report.card_recipe import options_of

OPTIONS = {
    "seed_everything": 3,
    "model": {"class_path": "recon.scopes.BlockDistillation", "init_args": {"lr": 1e-3, "epochs": 2, "start": "exact"}},
    "data": {"source": None, "num_sequences": 8, "seq_len": 64, "seed": 3},
    "pruning": {
        "inputs": "dense",
        "exclude": [],
        "allocation": {"class_path": "recon.allocation.OWL", "init_args": {}},
    },
}
MADE_WITH = {
    "options": OPTIONS,
    "versions": {"recon": "1.2.3"},
    "model": {"name": "org/dense", "revision": "main", "dtype": "float32"},
    "data": {"source": "HubDataset", "path": "org/text", "name": "en", "revision": "abc", "column": "text"},
}


def facts(made_with: dict[str, Any] | None = None, **changes: Any) -> Facts:
    known: dict[str, Any] = {
        "scope": "block",
        "model": "org/dense",
        "criterion": "wanda",
        "pattern": "2:4",
        "seed": 3,
        "perplexity": 12.345678901234567,
        "pruned_perplexity": 20.0,
        "dense_perplexity": 10.0,
        "model_sparsity": 0.25,
        "disk_bytes": 3 * 2**20,
        "references": {"dense": {"disk_bytes": 4 * 2**20}},
        "protocol": {"split": "test", "num_sequences": 16, "seq_len": 64, "tokens_scored": 1008, "logits": "float32"},
        "run_dir": "/home/somebody/runs/mine",
    }
    report = Report(**(known | changes))
    return Facts(
        report,
        MADE_WITH if made_with is None else made_with,
        kinds={"mlp.up": (6, 12), "attn.q": (3, 12)},
        packed_bytes=2 * 2**20,
        weights={"model.safetensors": "f" * 64},
        licence={"license": "other", "license_name": "own", "license_link": "LICENSE"},
    )


def test_the_hub_reads_metadata_and_results(tmp_path: Path) -> None:
    made = card(facts())
    made.save(tmp_path / "README.md")
    loaded, plain = ModelCard.load(tmp_path / "README.md"), metadata_load(tmp_path / "README.md")
    assert loaded.data.to_dict() == made.data.to_dict() == plain
    assert plain is not None
    assert (plain["base_model"], plain["library_name"], plain["datasets"]) == (
        "org/dense",
        "transformers",
        ["org/text"],
    )
    assert [plain[key] for key in ("license", "license_name", "license_link")] == ["other", "own", "LICENSE"]
    assert {"pruned", "sparse", "block-recovery"} <= set(plain["tags"])
    name, results = model_index_to_eval_results(plain["model-index"])
    assert name == "org/dense, pruned to 2:4, trained at scope block"
    assert [one.metric_value for one in results] == [12.345678901234567, 20.0, 10.0]
    assert {(one.metric_type, one.dataset_type, one.dataset_config, one.dataset_split) for one in results} == {
        ("perplexity", "org/text", "en", "test")
    }
    assert results[0].dataset_args == {"num_sequences": 16, "seq_len": 64}
    assert len({one.metric_name for one in results}) == 3


def test_the_text_has_the_facts_and_no_path_of_the_run() -> None:
    text = card(facts()).text
    for line in (
        "| `mlp.up` | 12 | 50.00% |",
        "| `attn.q` | 12 | 25.00% |",
        "| all of these | 24 | 37.50% |",
        "| all parameters |  | 25.00% |",
        "| this model | 12.346 |",
        "| dense | 4.0 MiB |",
        "| this model, as saved | 3.0 MiB |",
        "| bit-packed in theory (kept weights, and one bit for each prunable weight) | 2.0 MiB |",
        "| lr | `0.001` |",
        "| allocation of pruning | `OWL` |",
        "| tokens | `512` |",
        "| source | `HubDataset` |",
        "Recovery closed 76.5% of the gap",
        "`recon verify runs/mine`",
        "other, own, LICENSE",
    ):
        assert line in text, line
    assert "/home" not in text


def test_a_directory_is_no_base_model_of_the_hub() -> None:
    local = MADE_WITH | {"model": {"files": "digest", "dtype": "float32"}, "data": {"source": "StandardLibrary"}}
    made = card(facts(local, model="/home/somebody/llama"))
    assert "base_model" not in made.data.to_dict()
    assert "datasets" not in made.data.to_dict()
    assert made.data.model_name == "llama, pruned to 2:4, trained at scope block"
    assert "/home" not in str(made)


@pytest.mark.parametrize("odd", ["a: b", "- x", "`|`", "line\nline", "'quoted\" #", "---"])
def test_any_label_stays_readable(odd: str, tmp_path: Path) -> None:
    made = card(facts(label=odd))
    made.save(tmp_path / "README.md")
    name, _ = model_index_to_eval_results(ModelCard.load(tmp_path / "README.md").data.to_dict()["model-index"])
    assert name == f"org/dense, pruned to 2:4, trained at scope {odd}"
    (row,) = [line for line in made.text.splitlines() if line.startswith("| scope |")]
    assert row.replace("\\|", "").count("|") == 3


def test_what_was_not_measured_is_left_out() -> None:
    made = card(facts(perplexity=None, pruned_perplexity=None, dense_perplexity=None, disk_bytes=None, references={}))
    assert made.data.eval_results is None
    assert "| this model, as saved | not known |" in made.text
    assert "this model | 1" not in made.text
    assert "gap" not in made.text


def test_the_recipe_is_the_options_without_the_linked_seed() -> None:
    text = card(facts(MADE_WITH | {"masks": "digest"})).text
    assert "    recon fit -c recipe.yaml --masks masks.safetensors\n" in text
    written = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert written == options_of(MADE_WITH)
    assert written["data"] == {
        "class_path": "recon.data.TokenData",
        "init_args": {"source": None, "num_sequences": 8, "seq_len": 64},
    }
    assert OPTIONS["data"]["seed"] == 3
    assert "    recon prune -c recipe.yaml\n" in card(facts(scope="pruned")).text
