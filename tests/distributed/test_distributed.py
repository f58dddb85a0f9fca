"""Full retraining in two processes: the weights of one process, with exact masks, and after any interruption the same.

Every run writes to <directory of the module>/<kind>/<name>; the model and the masks of all are in <directory>/masks.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recon.basics.manifest import Manifest
from recon.cli import main
from recon.distributed.parameters import FROZEN
from recon.distributed.unpickling import unpickling_weights_only
from recon.models.loading import ModelSource
from recon.pruning.masks import Masks
from tests.support import distributed_runs as runs
from tests.support.processes import Failed, in_processes
from tests.support.slow import quick, slow

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
PRECISIONS = ("32-true", "bf16-mixed")
ROOT = Path(__file__).parents[2]
SECONDS = 20.0  # from the checkpoint of a process that is told to stop to its end; two, but for a machine under load
PATIENCE = 120.0  # seconds


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distributed")
    in_processes(runs.prune_model, directory / "masks", world=1)
    for precision in PRECISIONS:
        in_processes(runs.fit, "auto", precision, 1, directory / "one" / precision, world=1)
    return directory


def finished(directory: Path, strategy: str, precision: str) -> Path:
    """The directory of an uninterrupted run; run now if no test has before."""
    run = directory / ("one" if strategy == "auto" else strategy) / precision
    if not (run / "report.json").exists():
        in_processes(runs.fit_keeping_checkpoint, strategy, precision, 2, run)
    return run


@pytest.mark.parametrize(
    ("strategy", "precision"),
    quick(
        itertools.product((*STRATEGIES, "zero3_offload"), PRECISIONS),
        *(("ddp", "32-true"), ("zero3", "bf16-mixed"), ("fsdp2", "bf16-mixed")),
    ),
)
def test_weights_of_one_process_with_exact_masks(strategy: str, precision: str, directory: Path) -> None:
    run = directory / strategy / precision
    expected = {"working copy"} | ({"fp32 master copy"} if strategy.startswith("zero") else set())
    for largest in in_processes(runs.fit_keeping_checkpoint, strategy, precision, 2, run):
        assert largest == dict.fromkeys(expected, 0.0)
    assert runs.largest_pruned(run) == 0
    one, two = runs.weights(directory / "one" / precision), runs.weights(run)
    assert runs.difference(one, two) < (1e-6 if precision == "32-true" else 5e-3)
    assert all(two[name].dtype == weight.dtype for name, weight in one.items())
    frozen = "model.embed_tokens.weight"
    assert (one[frozen] == two[frozen]).all()  # not rounded by 16-bit training
    report = json.loads((run / "report.json").read_text())
    assert report["mask_violations"] == 0
    assert report["train_tokens"] == 2 * 64 * 32
    assert len(report["ranks"]) == report["environment"]["processes"] == 2
    assert report["environment"]["strategy"] == strategy


@pytest.mark.parametrize("strategy", quick(STRATEGIES, "zero3", "fsdp2"))
def test_the_last_checkpoint_is_consolidated_to_the_model_that_the_run_wrote(
    strategy: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(directory, strategy, "bf16-mixed")
    assert main(["consolidate", str(run)]) == 0
    written = run / "model-step-000008"
    assert capsys.readouterr().out.strip() == f"{run}/checkpoints/step-000008.ckpt written to {written}, masks exact"
    assert runs.same(load_file(written / "model.safetensors"), runs.weights(run))
    assert AutoModelForCausalLM.from_pretrained(written).dtype == torch.float32
    for file in ("config.json", "tokenizer.json"):
        assert (written / file).read_text() == (run / "model" / file).read_text()


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        slow("ddp", ()),
        slow("zero2", ()),
        slow("zero3", ("--model.partitioned", "true")),
        slow("fsdp2", ("--model.train", "all")),
    ],
)
def test_the_best_weights_are_kept_wherever_they_are_sharded(
    strategy: str, more: tuple[str, ...], directory: Path
) -> None:
    train = more if "--model.train" in more else ()
    one, two = directory / "best" / f"one{len(train)}", directory / "best" / strategy
    if not one.exists():
        in_processes(runs.fit_best_first, "auto", "32-true", 1, one, *train, world=1)
    in_processes(runs.fit_best_first, strategy, "32-true", 2, two, *more)
    assert "weights after step 4 of 8 are kept" in (two / "log.txt").read_text()
    assert not (two / "best.safetensors").exists()
    assert runs.difference(runs.weights(one), runs.weights(two)) < 1e-6
    if not train:
        assert runs.difference(runs.weights(one), runs.weights(finished(directory, "auto", "32-true"))) > 1e-4
    measured, expected = (json.loads((run / "report.json").read_text()) for run in (two, one))
    assert measured["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert measured["mask_violations"] == 0


@pytest.mark.slow
def test_fsdp2_gathers_in_bf16_and_reduces_once_a_step(directory: Path) -> None:
    groups = 2  # blocks; the rest of the model does not learn
    for precision, dtype in (("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)):
        run = directory / "shards" / precision
        for dtypes, reduced in in_processes(runs.fit_watching_shards, precision, run):
            assert (dtypes, reduced) == ({dtype}, groups * runs.STEPS)
    often = directory / "shards" / "often"
    more = ("--trainer.strategy.init_args.reduce_each_batch", "true")
    for _, reduced in in_processes(runs.fit_watching_shards, "32-true", often, *more):
        assert reduced == groups * runs.STEPS * 2
    assert runs.difference(runs.weights(directory / "shards" / "32-true"), runs.weights(often)) < 1e-6


def test_weights_that_do_not_learn_are_in_the_checkpoint_of_rank_0_alone(directory: Path) -> None:
    run = finished(directory, "zero3", "bf16-mixed")
    files = sorted((run / "checkpoints" / "step-000008.ckpt" / "checkpoint").glob("*_model_states.pt"))
    with unpickling_weights_only():
        held = [set(torch.load(file, "cpu", weights_only=False)[FROZEN]) for file in files]
    assert held == [{"model.embed_tokens.weight", "model.norm.weight"}, set()]


@pytest.mark.parametrize("strategy", [slow("zero2"), "zero3", slow("fsdp2")])
def test_an_own_list_of_callbacks_loses_no_mask(strategy: str, directory: Path) -> None:
    run = directory / f"{strategy}-own-callbacks" / "bf16-mixed"
    for largest in in_processes(runs.fit, strategy, "bf16-mixed", 2, run, "--trainer.callbacks", "[]"):
        assert set(largest.values()) == {0.0}
    assert runs.largest_pruned(run) == 0
    assert runs.same(runs.weights(run), runs.weights(finished(directory, strategy, "bf16-mixed")))


@pytest.mark.parametrize("strategy", [slow("zero2"), slow("fsdp2")])
def test_another_optimizer_and_schedule_keep_exact_masks(strategy: str, directory: Path) -> None:
    run = directory / f"{strategy}-sgd" / "32-true"
    chosen = ("--optimizer", "SGD", "--optimizer.lr", "0.05", "--optimizer.momentum", "0.9")
    schedule = ("--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1")
    for largest in in_processes(runs.fit, strategy, "32-true", 2, run, *chosen, *schedule):
        assert set(largest.values()) == {0.0}
    assert runs.largest_pruned(run) == 0
    one = directory / "sgd" / "32-true"
    if not one.exists():
        in_processes(runs.fit, "auto", "32-true", 1, one, *chosen, *schedule, world=1)
    assert runs.difference(runs.weights(one), runs.weights(run)) < 1e-6


@pytest.mark.slow
def test_a_terminated_run_with_another_schedule_ends_bit_identically(directory: Path) -> None:
    chosen = ("--optimizer", "Adam", "--lr_scheduler", "ExponentialLR", "--lr_scheduler.gamma", "0.5")
    straight, stopped = (directory / name / "32-true" for name in ("schedule", "schedule-stopped"))
    in_processes(runs.fit, "auto", "32-true", 1, straight, *chosen, world=1)
    stop = runs.Stop(signal.SIGTERM, 10)  # in the second of two epochs
    with pytest.raises(Failed, match="SIGTERMException: 143"):
        in_processes(runs.fit_and_stop, stop, "auto", "32-true", 1, stopped, *chosen, world=1)
    in_processes(runs.fit, "auto", "32-true", 1, stopped, *chosen, world=1)
    assert runs.same(runs.weights(stopped), runs.weights(straight))


def test_zeroing_weights_after_each_step_leaves_the_master_copy_to_drift(directory: Path) -> None:
    run = directory / "zero2-advice" / "run"
    with pytest.raises(
        Failed, match=r"pruned weights need to be zero, got .* in the fp32 master copy of `model\.layers\.0"
    ):
        in_processes(runs.train_without_enforcer, "zero2", run)
    assert not (run / "model").exists()


@pytest.mark.parametrize(
    ("strategy", "which"),
    [
        ("zero3", "all"),
        *(slow(*one) for one in (("fsdp2", "one"), ("ddp", "all"), ("zero1", "all"), ("zero2", "one"))),
    ],
)
def test_a_killed_run_ends_bit_identically(strategy: str, which: str, directory: Path) -> None:
    run = directory / f"{strategy}-killed" / "bf16-mixed"
    often = ("--checkpoint_every_n_steps", "3")
    stop = runs.Stop(signal.SIGKILL, batch=9, only_rank_1=which == "one")  # in step 4 of 8, the first of epoch 2
    with pytest.raises(Failed, match="died with exit code -9"):
        in_processes(runs.fit_and_stop, stop, strategy, "bf16-mixed", 2, run, *often)
    assert not (run / "report.json").exists()
    in_processes(runs.fit, strategy, "bf16-mixed", 2, run, *often)
    assert runs.same(runs.weights(run), runs.weights(finished(directory, strategy, "bf16-mixed")))
    assert json.loads((run / "report.json").read_text())["environment"]["resumed"]
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("strategy", "world", "batch", "step"),
    [slow("auto", 1, 4, 3), ("auto", 1, 7, 4), slow("zero2", 2, 4, 3), slow("fsdp2", 2, 7, 4)],
)
def test_a_terminated_run_saves_the_step_that_it_is_in_and_ends_bit_identically(
    strategy: str, world: int, batch: int, step: int, directory: Path
) -> None:
    run = directory / f"{strategy}-terminated-{step}" / "bf16-mixed"  # step 4 ends the first epoch
    stop = runs.Stop(signal.SIGTERM, batch, only_rank_1=world > 1)
    with pytest.raises(Failed, match="SIGTERMException: 143"):
        in_processes(runs.fit_and_stop, stop, strategy, "bf16-mixed", world, run, world=world)
    assert [path.name for path in (run / "checkpoints").glob("*.json")] == [f"step-00000{step}.json"]
    in_processes(runs.fit, strategy, "bf16-mixed", world, run, world=world)
    assert runs.same(runs.weights(run), runs.weights(finished(directory, strategy, "bf16-mixed")))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.slow
@pytest.mark.parametrize("told", [1, 0])
def test_both_processes_of_a_command_end_when_one_is_told_to(told: int, directory: Path) -> None:
    run = directory / f"ddp-told-{told}" / "bf16-mixed"
    args = [sys.executable, "-m", "tests.support.stopped_run", str(told), *runs.options("ddp", "bf16-mixed", 2, run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(args, env=environment, cwd=ROOT, start_new_session=True) as first:
        try:
            assert first.wait(PATIENCE) == 143
            written = run / "checkpoints" / "step-000003.json"
            assert time.time() - written.stat().st_mtime < SECONDS
            end = time.monotonic() + SECONDS
            while living := in_session(first.pid):
                assert time.monotonic() < end, f"{living} outlived the command"
                time.sleep(0.1)
        finally:
            if in_session(first.pid):
                os.killpg(first.pid, signal.SIGKILL)
    assert not (run / "report.json").exists()
    in_processes(runs.fit, "ddp", "bf16-mixed", 2, run)
    assert json.loads((run / "report.json").read_text())["environment"]["resumed"]
    assert runs.same(runs.weights(run), runs.weights(finished(directory, "ddp", "bf16-mixed")))


def in_session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_one_process_that_fails_saves_its_last_step_and_ends_bit_identically(directory: Path) -> None:
    run = directory / "failed" / "bf16-mixed"
    with pytest.raises(Failed, match="the test says stop"):  # when batch 5 begins, the second of step 3
        in_processes(runs.fit_and_stop, runs.Fail(5), "auto", "bf16-mixed", 1, run, world=1)
    assert [path.name for path in (run / "checkpoints").glob("*.json")] == ["step-000002.json"]
    more = ("--data.batch_size", "8")
    with pytest.raises(Failed, match=r"needs a new directory or one of this very run, .* differs in .*processes"):
        in_processes(runs.fit, "ddp", "bf16-mixed", 2, run, *more)
    masks = Masks.load(run / "masks.safetensors")
    writing = Manifest(run).writing
    Masks({name: ~keep for name, keep in masks.items()}).save(run / "masks.safetensors", writing=writing)
    with pytest.raises(Failed, match="written with other masks"):
        in_processes(runs.fit, "auto", "bf16-mixed", 1, run, world=1)
    masks.save(run / "masks.safetensors", Masks.read_metadata(directory / "masks" / "masks.safetensors"), writing)
    in_processes(runs.fit, "auto", "bf16-mixed", 1, run, world=1)
    assert runs.same(runs.weights(run), runs.weights(finished(directory, "auto", "bf16-mixed")))


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        slow("zero2", ()),
        slow("zero3", ("--model.partitioned", "true", "--model.gradient_checkpointing", "true")),
        slow("fsdp2", ("--model.gradient_checkpointing", "true")),
    ],
)
def test_distillation_by_a_sharded_teacher(strategy: str, more: tuple[str, ...], directory: Path) -> None:
    one, two = directory / "distilled" / "one", directory / "distilled" / strategy
    distilled = ("--model.loss", "distillation", "--model.train", "all")
    if not one.exists():
        in_processes(runs.fit, "auto", "32-true", 1, one, *distilled, world=1)
    in_processes(runs.fit, strategy, "32-true", 2, two, *distilled, *more)
    assert runs.difference(runs.weights(one), runs.weights(two)) < 1e-6
    assert runs.largest_pruned(two) == 0
    measured, expected = (json.loads((run / "report.json").read_text()) for run in (two, one))
    assert measured["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert measured["mask_violations"] == 0


@pytest.mark.parametrize(
    ("strategy", "loss"),
    [
        slow("zero2", "distillation"),
        slow("zero3", "cross_entropy"),
        slow("zero3", "distillation"),
        slow("fsdp2", "distillation"),
    ],
)
def test_a_loss_in_chunks_by_a_sharded_head(strategy: str, loss: str, directory: Path) -> None:
    one, two = directory / "chunked" / f"one-{loss}", directory / "chunked" / f"{strategy}-{loss}"
    options = ("--model.loss", loss, "--model.train", "all")
    if not one.exists():
        in_processes(runs.fit, "auto", "32-true", 1, one, *options, world=1)
    in_processes(runs.fit, strategy, "32-true", 2, two, *options, "--model.logits_memory", "100KiB")
    assert runs.difference(runs.weights(one), runs.weights(two)) < 2e-6
    assert runs.largest_pruned(two) == 0
    assert "logits" not in (two / "log.txt").read_text()  # where chunks are refused, the log says why


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--model.parameters", "lora")], ids=["all", "lora"])
def test_a_partitioned_bf16_model_is_measured_as_it_is_written(more: tuple[str, ...], directory: Path) -> None:
    source = directory / "masks" / "bf16"
    if not source.exists():
        AutoModelForCausalLM.from_pretrained(directory / "masks" / "source", dtype=torch.bfloat16).save_pretrained(
            source
        )
        ModelSource().load_tokenizer().save_pretrained(source)
    run = directory / "partitioned" / f"bf16{len(more)}"
    more = ("--model.name", str(source), "--model.partitioned", "true", *more)
    in_processes(runs.fit, "zero3", "32-true", 2, run, *more)
    assert {weight.dtype for weight in runs.weights(run).values()} == {torch.bfloat16}
    assert runs.largest_pruned(run) == 0
    measured = json.loads((run / "report.json").read_text())["perplexity"]
    assert main(["test", str(run), "--run_dir", str(run / "tested"), "--device", "cpu"]) == 0
    assert json.loads((run / "tested" / "report.json").read_text())["perplexity"] == pytest.approx(measured, rel=1e-6)


@pytest.mark.slow
def test_a_partitioned_model_is_pruned_and_measured_from_disk(directory: Path) -> None:
    whole, parts = (directory / "from_disk" / name for name in ("whole", "parts"))
    more = ("--masks", "null", "--baselines", "true", "--model.start", "exact")
    in_processes(runs.fit, "zero3", "32-true", 2, whole, *more)
    in_parts = (*more, "--model.partitioned", "true", "--model.offload", "disk")
    in_processes(runs.fit, "zero3", "32-true", 2, parts, *in_parts)
    assert Masks.load(parts / "masks.safetensors") == Masks.load(whole / "masks.safetensors")
    assert runs.difference(runs.weights(whole), runs.weights(parts)) < 1e-6
    assert runs.largest_pruned(parts) == 0
    measured, expected = (json.loads((run / "report.json").read_text()) for run in (parts, whole))
    for name in ("perplexity", "dense_perplexity", "pruned_perplexity"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-5)
    assert measured["drift"]["kl"] == pytest.approx(expected["drift"]["kl"], rel=1e-3)


@pytest.mark.parametrize(
    ("strategy", "more", "match"),
    [
        ("zero2", ("--data.num_sequences", "24"), "got 3 and 2; change data.num_sequences .*limit_train_batches to 2"),
        ("zero2", ("--model.partitioned", "true"), "needs a strategy that loads weights in parts, .* got zero2"),
        ("zero3", ("--model.partitioned", "true", "--baselines", "true"), "takes the whole model, and no baselines"),
        ("ddp", ("-c", "scopes/submodule"), "submodule scope runs in one process, got .* that make 2"),
    ],
)
def test_what_cannot_work_is_refused(strategy: str, more: tuple[str, ...], match: str, directory: Path) -> None:
    with pytest.raises(Failed, match=match):
        in_processes(runs.fit, strategy, "32-true", 2, directory / "refused" / strategy, *more)
