"""The options of strategies, without processes."""

from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy

from recon.distributed.strategies import ZeroStrategy


def test_own_keys_of_deepspeed_are_merged_and_gradients_summed_in_fp32() -> None:
    own = {"zero_optimization": {"sub_group_size": 5}, "communication_data_type": "bf16", "wall_clock_breakdown": True}
    plain, merged = (ZeroStrategy(stage=3, config=one).config for one in (None, own))
    assert isinstance(plain, dict)
    assert isinstance(merged, dict)
    assert plain["communication_data_type"] == plain["data_types"]["grad_accum_dtype"] == "fp32"
    assert merged == plain | own | {"zero_optimization": plain["zero_optimization"] | {"sub_group_size": 5}}
    stage_1 = ZeroStrategy(stage=1).config
    assert isinstance(stage_1, dict)
    assert (stage_1["communication_data_type"], "data_types" in stage_1) == ("fp32", False)


@pytest.mark.parametrize(
    ("stage", "config", "said"),
    [
        (2, {"gradient_clipping": 1.0}, r"`gradient_clipping` is decided by trainer.gradient_clip_val, got 1.0"),
        (2, {"bf16": {"enabled": True}}, r"`bf16` is decided by trainer.precision"),
        (3, {"zero_optimization": {"stage": 1}}, r"`zero_optimization.stage` is decided by stage, got 1"),
        (1, {"data_types": {"grad_accum_dtype": "fp32"}}, r"leave it out, or choose stage 2"),
        (4, {}, "stage 1, 2 or 3, got 4"),
    ],
)
def test_keys_that_another_option_decides_are_refused(stage: int, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ZeroStrategy(stage=stage, config=config)


def test_zero_leaves_the_devices_alone_until_weights_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning tears a strategy down before `on_fit_end`: on the host NCCL could gather nothing any more."""
    calls: list[str] = []
    monkeypatch.setattr(DDPStrategy, "teardown", lambda self: calls.append("teardown"))
    strategy = ZeroStrategy(stage=2)
    strategy.teardown()
    assert calls == []
    strategy.let_go()
    assert calls == ["teardown"]
