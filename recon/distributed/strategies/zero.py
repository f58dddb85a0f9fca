"""ZeRO-1, -2 and -3 by DeepSpeed, as Lightning's strategy with what it lacks."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from recon.distributed.unpickling import unpickling_weights_only

OWNED = {
    "train_batch_size": "data.batch_size and trainer.accumulate_grad_batches",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gradient_clipping": "trainer.gradient_clip_val",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "amp": "trainer.precision",
    "torch_autocast": "trainer.precision",
    "optimizer": "--optimizer",
    "scheduler": "--lr_scheduler",
    "zero_force_ds_cpu_optimizer": "--optimizer",
    "zero_optimization.stage": "stage",
    "zero_optimization.offload_optimizer": "offload_optimizer",
    "zero_optimization.offload_param": "offload_parameters",
    "zero_optimization.stage3_param_persistence_threshold": "min_partitioned",
}
"""DeepSpeed's option -> the option of recon that decides it."""


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy, with gradients of the right size, and also on CPUs.

    Lightning and DeepSpeed both divide the loss by `accumulate_grad_batches`, which halves the gradients at 2;
    here it is divided once. DeepSpeed accumulates across the end of an epoch while Lightning does not, so
    a number of batches that does not divide is refused. On CPUs the processes talk over gloo: slow, but the
    same arithmetic, for tests and for trying out.

    Args:
        stage: 1 partitions the optimizer's state over the processes, 2 the gradients too, 3 the weights too.
        offload_optimizer: Keep the optimizer's state on the host and step there.
        offload_parameters: Stage 3: keep the weights on the host until they are needed.
        min_partitioned: Stage 3: parameters with fewer elements stay whole on every process.
        config: DeepSpeed's own options, merged into those made here, such as `{zero_optimization: {sub_group_size:
            100000000}}`. Unless `communication_data_type` and `data_types.grad_accum_dtype` say otherwise, gradients
            are reduced in fp32, and in stages 2 and 3 accumulated in fp32.
        **options: Of Lightning's DeepSpeedStrategy.

    Raises:
        ValueError: If the stage does not fit the other options, or `config` has a key that another option decides.
    """

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        min_partitioned: int = 100_000,
        config: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"ZeroStrategy needs stage 1, 2 or 3, got {stage}; without partitions it is strategy ddp")
        if offload_parameters and stage != 3:
            raise ValueError(
                f"offload_parameters needs stage 3, which partitions the weights, got stage {stage}; "
                f"use offload_optimizer alone, or stage 3"
            )
        _refuse_owned(config or {})
        if stage == 1 and config is not None and "data_types" in config:
            raise ValueError(
                f"stage 1 accumulates gradients in the precision of training, got data_types: {config['data_types']}, "
                f"with which DeepSpeed writes checkpoints that it cannot consolidate; leave it out, or choose stage 2"
            )
        super().__init__(
            stage=stage, offload_optimizer=offload_optimizer, offload_parameters=offload_parameters, **options
        )
        assert isinstance(self.config, dict)
        # Offload otherwise insists on DeepSpeed's own Adam, which is compiled on the spot and does not keep to torch's.
        self.config["zero_force_ds_cpu_optimizer"] = False
        if stage == 3:
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = min_partitioned
        # DeepSpeed's default is the precision of training: sums of many gradients lose most of their bits in bf16.
        self.config["communication_data_type"] = "fp32"
        if stage > 1:
            self.config["data_types"] = {"grad_accum_dtype": "fp32"}
        self.config = _merged(self.config, config or {})
        self.stage, self.offloads_optimizer = stage, offload_optimizer
        self.strategy_name = f"zero{stage}{'_offload' if offload_optimizer or offload_parameters else ''}"

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            return super().setup_environment()
        _allow_cpu()
        # DeepSpeed wants a device's index to be its local rank; Lightning's CPU devices have none.
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        DDPStrategy.setup_environment(self)  # past the check for CUDA in DeepSpeedStrategy

    @override
    def setup(self, trainer: L.Trainer) -> None:
        accumulate = trainer.accumulate_grad_batches
        if trainer.training and accumulate > 1:
            trainer.fit_loop.setup_data()
            batches = trainer.num_training_batches
            if batches % accumulate:
                raise ValueError(
                    f"ZeRO needs a number of batches per epoch and process that accumulate_grad_batches divides, got "
                    f"{batches} and {accumulate}; change data.num_sequences or data.batch_size, or set "
                    f"trainer.limit_train_batches to {batches - batches % accumulate}"
                )
        super().setup(trainer)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        with unpickling_weights_only():
            return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def teardown(self) -> None:
        """Nothing: Lightning calls this before `on_fit_end`, which gathers the weights from the devices."""

    def let_go(self) -> None:
        """Move what is left of the model and of the optimizer's state to the host, as Lightning's teardown does."""
        super().teardown()

    @override
    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization:  # Lightning has divided by accumulate_grad_batches already
            kwargs.setdefault("scale_wrt_gas", False)
        super().backward(closure_loss, optimizer, *args, **kwargs)

    def load(self, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """What `make` loads, partitioned while it loads: no process ever holds the whole model. Stage 3."""
        from transformers.integrations import HfDeepSpeedConfig

        # transformers partitions what it loads as long as this object lives.
        alive = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **self.config})  # pyright: ignore
        model = make()
        del alive
        return model

    def rounds(self, dtype: torch.dtype) -> bool:
        """Whether training rounds weights of this precision that do not learn: they have no master copy."""
        half = {"bf": torch.bfloat16, "16": torch.float16}.get(self.precision_plugin.precision[:2])
        return half not in (None, dtype)

    def frozen(self, model: nn.Module) -> nn.Module:
        """`model` for forward passes only, in the precision of training; in stage 3 partitioned too."""
        import deepspeed

        assert isinstance(self.config, dict)
        if self.stage < 3:
            bf16 = self.config.get("bf16", {}).get("enabled", False)
            return model.to(self.root_device, torch.bfloat16 if bf16 else None)
        partitions = {"stage": 3}
        for key in ("offload_param", "stage3_param_persistence_threshold"):
            if key in self.config["zero_optimization"]:
                partitions[key] = self.config["zero_optimization"][key]
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": partitions}
        config |= {key: self.config[key] for key in ("bf16", "fp16") if key in self.config}
        return deepspeed.initialize(model=model, config=config, dist_init_required=False)[0]


def _allow_cpu() -> None:
    """Let DeepSpeed run on this machine's CPUs without building an extension.

    Raises:
        ValueError: If DeepSpeed has chosen another accelerator already.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator().device_name()  # pyright: ignore[reportOptionalMemberAccess]
    if chosen != "cpu":
        raise ValueError(
            f"ZeRO on trainer.accelerator cpu needs DeepSpeed on the CPU too, but it chose {chosen}; "
            f"set the environment variable DS_ACCELERATOR=cpu"
        )
    # Only `inference_all_reduce` uses it, but every start on CPUs would compile it: 50 s, or a failure without g++.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _refuse_owned(config: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in config.items():
        if (name := f"{prefix}{key}") in OWNED:
            raise ValueError(
                f"DeepSpeed's `{name}` is decided by {OWNED[name]}, got {value!r} in the config of ZeroStrategy; "
                f"leave it out there and set {OWNED[name]}"
            )
        if isinstance(value, Mapping):
            _refuse_owned(value, f"{name}.")


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts merged key by key; where both have a value, the second one's counts."""
    both = {
        key: _merged(ours[key], value) if isinstance(value, Mapping) and isinstance(ours.get(key), Mapping) else value
        for key, value in theirs.items()
    }
    return {**ours, **both}
