import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from recon.profiling import ledger as account
from recon.profiling.entries import CATEGORIES, Held
from recon.profiling.ledger import Ledger, claim, followed, sampled

pytestmark = pytest.mark.filterwarnings("error")

HOLDERS: Any = {torch.optim.Optimizer: lambda optimizer: [Held("optimizer", optimizer.state)]}
ROWS = 50


@pytest.fixture(autouse=True)
def _only_this_test() -> Iterator[None]:
    """The tensors of other tests are no concern of this one's."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger(HOLDERS)
    yield ledger
    ledger.close()
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks
    assert account._open == []


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def sizes(ledger: Ledger) -> dict[str, int]:
    """What is not zero at the host's peak."""
    return {name: size for name, size in ledger.close()["device"].categories.items() if size}


def saved_bytes(model: nn.Module, x: Tensor, loss: Any = loss_of) -> int:
    """What autograd itself says that it keeps, without weights and inputs."""
    outside = {id(tensor.untyped_storage()) for tensor in (x, *model.parameters())}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in outside:
            kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, x)
    return sum(storage.nbytes() for storage in kept.values())


def test_a_peak_is_what_was_alive_at_once_and_views_count_once(ledger: Ledger) -> None:
    ledger.open("work")
    ledger.listen()
    a = torch.zeros(256)
    b = a.view(16, 16).t()[2:]
    c = torch.ones(64)
    del c
    d = a + 1
    del a, d
    e = torch.ones(8)
    peak = ledger.close()["device"]
    assert peak.total == peak.categories["other"] == 2 * 4 * 256
    assert (peak.stage, peak.operation) == ("work", "aten.add.Tensor")
    assert peak.seconds < 5
    assert len(b) + len(e) == 22


def test_what_lived_before_is_counted_and_its_death_too(ledger: Ledger) -> None:
    before = [torch.ones(1000), torch.from_numpy(np.ones(500))]
    ledger.open("work")
    ledger.listen()
    del before[0]
    keep = torch.ones(300)
    assert sizes(ledger) == {"other": 8000}
    assert ledger.look("later")["device"].total == 8000
    ledger.reset()
    assert ledger.look("later")["device"].categories["other"] == 4000 + 1200
    assert len(keep) + len(before) == 301


def test_tensors_made_behind_the_dispatchers_back_are_found_in_the_end(ledger: Ledger) -> None:
    ledger.open("work")
    ledger.listen()
    tensor = torch.from_numpy(np.ones(500))
    assert sizes(ledger) == {"other": 4000}
    assert len(tensor) == 500


def test_a_training_step_by_category_as_counted_by_hand(ledger: Ledger) -> None:
    model, x = network(), torch.ones(ROWS, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    num = 8 * 16 + 16 + 16 * 4 + 4
    ledger.open("")
    ledger.listen()
    for step in (1, 2):
        ledger.forward(f"step {step}, forward")
        loss = loss_of(model, x)
        ledger.backward(f"step {step}, backward")
        if step == 1:
            loss.backward()
        else:
            torch.ones(10_000)  # the most, before anything kept is let go
        ledger.step("optimizer")
        ledger.label("gradients", [parameter.grad for parameter in model.parameters()])
        if step == 1:
            optimizer.step()
            ledger.settle()
        del loss
    peak = ledger.close()["device"]
    found = peak.categories
    assert tuple(found) == CATEGORIES
    assert (found["weights"], found["gradients"], found["optimizer"]) == (4 * num, 4 * num, 8 * num + 4 * 4)
    # ReLU keeps its output, the square its input; the loss is one number
    assert found["activations"] == 4 * ROWS * (16 + 4) + 4 == saved_bytes(model, x) + 4
    assert found["other"] == 4 * ROWS * 8 + 4 * 10_000  # the inputs
    assert (peak.stage, peak.operation) == ("step 2, backward", "aten.ones.default")
    assert peak.total == sum(found.values())


def test_a_checkpoint_computes_again_what_is_kept_for_backward(ledger: Ledger) -> None:
    blocks = nn.ModuleList(network() for _ in range(4))
    for block in blocks:
        block[2] = nn.Linear(16, 8)
    x = torch.ones(64, 8)

    def run(with_checkpoints: bool) -> int:
        ledger.reset()
        ledger.open("")
        ledger.listen()
        ledger.forward("forward")
        hidden = x
        for block in blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if with_checkpoints else block(hidden)
        loss = hidden.sum()
        ledger.backward("backward")
        loss.backward()
        ledger.step("")
        for parameter in blocks.parameters():
            parameter.grad = None
        return ledger.close()["device"].categories["activations"]

    all_kept, recomputed = run(False), run(True)
    between, within = 4 * 64 * 8, 4 * 64 * 16
    assert all_kept == 4 * (within + between) + 8  # the loss and its gradient
    # the outputs of the blocks, and what one block keeps
    assert 4 * between < recomputed <= 4 * between + within + between + 8


def test_makers_claim_what_they_make_and_bool_matrices_are_masks(ledger: Ledger) -> None:
    model = network()
    claim("gram", torch.ones(3))  # nobody listens
    ledger.open("")
    ledger.listen()
    gram = torch.zeros(16, 16)
    claim("gram", gram)
    claim("calibration", gram)  # what was said before stands
    mask = torch.zeros(16 * 8, dtype=torch.bool).view(16, 8)
    other = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    assert sizes(ledger) == {"weights": 4 * 212, "gram": 1024, "masks": 128, "other": 25}
    assert len(model) + len(mask) + len(other) == 20


def test_a_pause_misses_births_but_no_deaths(ledger: Ledger) -> None:
    ledger.open("")
    ledger.listen()
    a = torch.ones(100)
    ledger.pause()
    torch.ones(1000)
    del a
    ledger.listen()
    b = torch.ones(90)
    assert sizes(ledger) == {"other": 400}
    assert len(b) == 90


def test_of_a_loop_the_first_turn_is_followed_once(ledger: Ledger) -> None:
    def loop() -> list[bool]:
        return [ledger.listens for _ in sampled(range(3), "walk")]

    assert loop() == [False, False, False]  # nobody asked
    ledger.open("")
    assert loop() == [True, False, False]
    assert loop() == [False, False, False]
    assert list(sampled([], "nothing")) == []
    with followed("solve"):
        assert (ledger.listens, ledger.stage) == (True, "solve")
    assert (ledger.listens, ledger.stage) == (False, "")
    ledger.listen()
    with followed("more"):
        pass
    assert ledger.listens


def test_a_loop_that_breaks_off_is_followed_no_longer(ledger: Ledger) -> None:
    ledger.open("")
    for _ in sampled(range(3), "walk"):
        break
    assert not ledger.listens
    rows = sampled(range(3), "another")  # as a traceback may keep it
    next(rows)
    assert ledger.listens
    ledger.close()
    ledger.open("")
    ledger.listen()
    rows.close()
    assert ledger.listens


@pytest.mark.parametrize("inference", [True, False])
def test_inference_mode_and_listening_may_be_nested(inference: bool, ledger: Ledger) -> None:
    # Left inside, with the guard ending later, the mode stayed half on, and the next tensor could not be made.
    ledger.open("")
    with torch.inference_mode(inference):
        for _ in sampled(range(2), "walk"):
            torch.ones(3)
    torch.tensor([1])
    with followed("solve"), torch.inference_mode(inference):
        torch.ones(3)
    torch.tensor([1])
    assert torch._C._len_torch_dispatch_stack() == 0


def test_what_stays_on_the_host_is_on_its_side(ledger: Ledger) -> None:
    host_copy, here = torch.ones(100), torch.ones(10)
    ledger.open("")
    ledger.label("weights", [host_copy], on_host=True)
    ledger.label("weights", [here])
    copy = host_copy.clone()
    claim("weights", copy)
    ledger.listen()
    copy = host_copy.clone()
    peaks = ledger.close()
    assert peaks["host"].categories["weights"] == peaks["host"].total == 400
    assert peaks["device"].categories["weights"] == 440
    assert len(copy) == 100


def test_with_an_accelerator_all_that_is_on_the_cpu_is_the_hosts(ledger: Ledger) -> None:
    ledger.device = torch.device("cuda")
    tensor = torch.ones(100)
    assert {side: peak.total for side, peak in ledger.look("").items()} == {"host": 400}
    assert len(tensor) == 100


def test_mapped_files_take_no_memory(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    tensor = torch.from_file(str(file), shared=True, size=100)
    assert ledger.look("") == {}
    assert len(tensor) == 100


def test_an_account_that_cannot_be_opened_is_none() -> None:
    def fail(one: Any) -> Any:
        raise KeyError

    ledger, optimizer = Ledger({torch.optim.Optimizer: fail}), torch.optim.SGD([torch.ones(1)])
    with pytest.raises(KeyError):
        ledger.open("")
    assert not ledger.is_open
    assert account._open == []
    assert optimizer.state == {}


def test_what_is_followed_has_the_same_bits(ledger: Ledger) -> None:
    def train() -> list[Tensor]:
        model, x = network(), torch.linspace(0, 1, ROWS * 8).view(ROWS, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            ledger.forward("")
            loss = loss_of(model, x)
            ledger.backward("")
            loss.backward()
            ledger.step("")
            optimizer.step()
        return list(model.parameters())

    alone = train()
    ledger.open("")
    ledger.listen()
    assert all(torch.equal(a, b) for a, b in zip(alone, train(), strict=True))


def test_live_entries_know_the_module_that_made_them(ledger: Ledger) -> None:
    model, x = network(), torch.ones(ROWS, 8)
    ledger.open("")
    ledger.listen()
    out = model(x)
    entry = ledger.live()[id(out.untyped_storage())]
    assert entry.module is not None
    assert entry.module() is model[2]
    assert entry.nbytes == 4 * ROWS * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_tracked_peak_is_that_of_the_allocator(ledger: Ledger) -> None:
    # Large, for the workspaces of cuBLAS and cuBLASLt, of 32 MiB each, are the allocator's too.
    model = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(4))).cuda()
    x = torch.ones(8192, 4096, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()
    ledger.device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    ledger.open("")
    ledger.listen()
    ledger.forward("forward")
    loss = loss_of(model, x)
    ledger.backward("backward")
    loss.backward()
    ledger.step("optimizer")
    optimizer.step()
    peak = ledger.close()["device"]
    assert peak.total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.05)
