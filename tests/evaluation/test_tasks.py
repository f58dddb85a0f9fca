"""Scores on tasks: those of a hand-made forward pass, the same every time, and refusals that name the cure."""

import copy
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.data import StandardLibrary
from recon.evaluation.tasks import options as options_module
from recon.evaluation.tasks.identifiers import CHOICES, CONTEXT, PER_FILE, SHORTEST, documents, questions
from recon.evaluation.tasks.options import TaskOptions
from recon.evaluation.tasks.suite import Suite
from recon.models.loading import ModelSource

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: the extra `eval`")

CPU = torch.device("cpu")
NUM = 12


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return ModelSource().load_tokenizer()


@pytest.fixture(scope="module")
def bundled() -> PreTrainedModel:
    return ModelSource(dtype="float32").model(CPU)


@pytest.fixture(scope="module")
def identifiers() -> Suite:
    return Suite(TaskOptions("identifiers", limit=NUM))


def metrics(suite: Suite, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "identifiers") -> Any:
    return suite.score(name, model, tokenizer)[name]["metrics"]


@torch.no_grad()
def by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> float:
    """The log-likelihood of a choice, one sequence at a time; spaces in front of it are its own, as in its tokens."""
    stem = context.rstrip()
    given, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (stem, context + choice))
    likelihoods = model(input_ids=torch.tensor([both])).logits[0].double().log_softmax(-1)  # pyright: ignore
    return sum(float(likelihoods[i - 1, both[i]]) for i in range(len(given), len(both)))  # pyright: ignore


def test_scores_are_those_of_a_forward_pass_by_hand(identifiers, bundled, tokenizer):
    rows = documents()["test"].select(range(NUM))
    right = {"acc": 0, "acc_norm": 0}
    for row in rows:
        likelihoods = [by_hand(bundled, tokenizer, row["context"], one) for one in row["choices"]]
        normed = [one / len(choice) for one, choice in zip(likelihoods, row["choices"], strict=True)]
        for name, values in (("acc", likelihoods), ("acc_norm", normed)):
            right[name] += values.index(max(values)) == row["answer"]
    score = identifiers.score("identifiers", bundled, tokenizer)["identifiers"]
    for name, number in right.items():
        p = number / NUM
        assert score["metrics"][name]["value"] == pytest.approx(p)
        assert score["metrics"][name]["stderr"] == pytest.approx((p * (1 - p) / (NUM - 1)) ** 0.5)
    assert (score["main"], score["num_documents"], score["num_fewshot"], score["limit"]) == ("acc", NUM, 0, NUM)


def test_the_bundled_model_is_above_chance_and_pruning_hurts_it(bundled, tokenizer):
    suite = Suite(TaskOptions("identifiers", limit=60))
    dense = metrics(suite, bundled, tokenizer)["acc"]
    pruned = ModelSource(dtype="float32").model(CPU)
    for name, weight in pruned.named_parameters():
        if "proj" in name:
            weight.data[weight.abs() < weight.abs().quantile(0.8)] = 0
    assert dense["value"] - 4 * dense["stderr"] > 1 / CHOICES
    assert metrics(suite, pruned, tokenizer)["acc"]["value"] < dense["value"] - 2 * dense["stderr"]


def test_scores_leave_everything_else_as_it_was(identifiers, bundled, tokenizer):
    first = metrics(identifiers, bundled, tokenizer)
    state = torch.get_rng_state()
    assert metrics(identifiers, bundled, tokenizer) == first
    assert torch.equal(torch.get_rng_state(), state)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert metrics(identifiers, bundled, bare) == first
    assert bare.pad_token is None
    small = Suite(TaskOptions("identifiers", limit=NUM, task_batch_size=3))
    assert metrics(small, bundled, tokenizer) == first


def test_bf16_is_scored_in_fp32(identifiers, bundled, tokenizer):
    model = ModelSource(dtype="bfloat16").model(CPU)
    half, full = (metrics(identifiers, one, tokenizer)["acc"]["value"] for one in (model, bundled))
    assert abs(half - full) <= 2 / NUM


def test_questions_are_of_the_test_split_and_the_same_every_time():
    texts = [row["text"] for row in StandardLibrary().documents("test")]
    rows = documents()["test"].to_list()
    assert rows == [one for text in texts for one in questions(text)]
    assert 300 < len(rows) <= len(texts) * PER_FILE
    files = {split: set(StandardLibrary().documents(split).with_format(None)["path"]) for split in ("train", "test")}
    assert not files["train"] & files["test"]
    whole = "\n".join(texts)
    for row in rows[::7]:
        name = row["choices"][row["answer"]]
        assert row["context"] + name in whole
        assert len(row["context"]) == CONTEXT
        assert len(set(row["choices"])) == CHOICES
        assert not any(one.startswith("_") for one in row["choices"])
        assert all(len(one) >= SHORTEST and abs(len(one) - len(name)) <= 1 for one in row["choices"])
    share = sum(row["answer"] == 0 for row in rows) / len(rows)
    assert share == pytest.approx(1 / CHOICES, abs=0.08)


def test_a_broken_file_gives_the_questions_before_its_fault():
    text = "first_name = other_name = third_name = forth_name = fifth_name\n" * 3
    assert len(questions(text)) > 0
    assert questions(text + "'''never closed\n") == questions(text)
    assert questions("") == []


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes the YAML of a task on local data: the stand-in for a data set of the hub."""
    data = tmp_path / "data.jsonl"
    lines = [{"question": f"def f{i}(self", "choices": [", other):", ")+"], "answer": i % 2} for i in range(6)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(name: str, **changes: Any) -> str:
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
            "test_split": "test",
            "fewshot_split": "train",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        } | changes
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / f"{name}.yaml")

    return write


def test_a_file_is_a_task_with_solved_examples(write, bundled, tokenizer):
    path = write("mine")
    scores = {}
    for shots in (None, 2):
        score = Suite(TaskOptions([path], num_fewshot=shots)).score(path, bundled, tokenizer)["mine"]
        assert (score["num_fewshot"], score["num_documents"]) == (shots or 0, 6)
        scores[shots] = score["metrics"]
    assert scores[None]["acc"]["value"] == 0.5  # the first choice is far likelier, and right every other time
    again = Suite(TaskOptions([path], num_fewshot=2)).score(path, bundled, tokenizer)["mine"]["metrics"]
    assert again == scores[2]


def test_generation_has_a_score_for_each_filter(write, bundled, tokenizer):
    match = {"function": "regex", "regex_pattern": r"(\w+)"}
    path = write(
        "generated",
        output_type="generate_until",
        doc_to_text="import os\nimport sys\nfrom typing import A",
        doc_to_target="ny",
        doc_to_choice=None,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[{"name": "word", "filter": [match, {"function": "take_first"}]}],
    )
    suite = Suite(TaskOptions([path]))
    score = suite.score(path, bundled, tokenizer)["generated"]
    assert score["main"] == "exact_match (word)"
    assert 0 <= score["metrics"]["exact_match (word)"]["value"] <= 1
    assert suite.score(path, bundled, tokenizer)["generated"] == score  # though it samples


def test_a_group_is_one_score_over_its_tasks(write, tmp_path, bundled, tokenizer):
    write("one")
    inline = yaml.safe_load(Path(write("two")).read_text())
    aggregate = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": "both", "task": ["one", inline], "aggregate_metric_list": aggregate}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    path = str(tmp_path / "both.yaml")
    scores = Suite(TaskOptions([path])).score(path, bundled, tokenizer)
    assert scores.keys() == {"both"}
    assert scores["both"]["num_documents"] == 12
    assert scores["both"]["metrics"]["acc"]["value"] == 0.5


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the harness's tasks, those of ARC alone: the index of all takes seconds."""
    import lm_eval.tasks.manager as manager

    monkeypatch.setattr(manager, "__file__", str(Path(manager.__file__).parent / "arc" / "x.py"))


def test_a_task_of_the_hub_by_name(hub, monkeypatch, bundled, tokenizer):
    import datasets

    asked = []

    def stand_in(path: str, name: str | None = None, **options: Any) -> datasets.DatasetDict:
        asked.append((path, name))
        choices = {"text": ["self", "import"], "label": ["A", "B"]}
        rows = [{"id": "0", "question": "What follows `def f(`?", "choices": choices, "answerKey": "A"}] * 4
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    suite = Suite(TaskOptions("arc_easy", num_fewshot=1, limit=3))
    score = suite.score("arc_easy", bundled, tokenizer)["arc_easy"]
    assert asked == [("allenai/ai2_arc", "ARC-Easy")]
    assert (score["num_documents"], score["num_fewshot"]) == (3, 1)
    assert score["metrics"].keys() == {"acc", "acc_norm"}


def test_a_task_that_cannot_be_read_is_refused_with_the_cure(hub, write, tmp_path):
    for tasks, said in (
        ("arc_easy", "the task arc_easy must be one that can be read and scored here, got .*HF_HUB_OFFLINE"),
        ("arc_eazy", "needs tasks of lm-evaluation-harness .*, got arc_eazy; did you mean arc_easy"),
        ("identifers", "did you mean identifiers"),
        (f"{tmp_path}/none.yaml", "none.yaml, which is no file"),
        (f"{write('a')},{write('b', task='a')}", "needs different tasks, got a in "),
        (write("c", dataset_kwargs={"data_files": {"test": "/nowhere.jsonl"}}), "the task .*c.yaml must be one"),
        (write("d", output_type="dance"), "the task .*d.yaml must be one"),
    ):
        with pytest.raises(ValueError, match=said):
            Suite(TaskOptions(tasks)).load()


def test_options_are_checked_and_named_by_their_content(write, tmp_path, monkeypatch):
    assert TaskOptions(" a, b,").names == TaskOptions(["a", "b"]).names == ("a", "b")
    assert TaskOptions().names == ()
    for options, said in (
        ({"limit": 0}, "--limit must be at least 1"),
        ({"num_fewshot": -1}, "--num_fewshot must be at least 0"),
        ({"task_batch_size": 0}, "--task_batch_size must be at least 1"),
        ({"tasks": "a,b,a"}, "got a twice"),
    ):
        with pytest.raises(ValueError, match=said):
            TaskOptions(**options)
    path = write("mine")
    identity = TaskOptions([path]).identity()
    assert identity == TaskOptions([path], task_batch_size=1).identity()
    assert identity != TaskOptions([path], limit=5).identity()
    (tmp_path / "data.jsonl").write_text("{}\n")
    assert identity != (edited := TaskOptions([path]).identity())
    write("mine", doc_to_text="{{choices}}")
    assert edited != TaskOptions([path]).identity()
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"broken.yaml.*; correct it"):
        TaskOptions([str(tmp_path / "broken.yaml")]).identity()

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(options_module, "version", missing)
    for ask in (TaskOptions("identifiers").identity, Suite(TaskOptions("identifiers")).load):
        with pytest.raises(ValueError, match=r"needs lm-evaluation-harness .* install the extra `eval`"):
            ask()
    Suite().load()  # without tasks nothing is needed
