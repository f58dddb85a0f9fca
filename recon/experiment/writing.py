"""Writing a recovered model: whole or not at all."""

import shutil
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.basics.files import partial, put_in_place
from recon.experiment.job import Job
from recon.profiling.phases import PhaseName


def write(job: Job) -> None:
    """Write the recovered model, and let go of it; first the masks, if recovery has chosen them.

    Raises:
        OSError: If there is no room.
    """
    scope, options = job.scope, job.options
    scope.phases.enter(PhaseName.SAVE)
    if options.interleaves:
        assert options.pattern is not None
        made_by = {"criterion": str(options.criterion), "pattern": options.pruning.describe(options.pattern)}
        scope.masks.save(job.run.masks, made_by)
    assert job.data.tokenizer is not None
    model, state = scope.result()
    save_model(model, job.data.tokenizer, job.run.model, state)
    del model, state
    scope.release()
    job.trainer.strategy.optimizers, job.trainer.strategy.lr_scheduler_configs = [], []  # they hold parameters


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write model and tokenizer as a plain Hugging Face directory that is whole or absent.

    An older model in its place stays until the new one is whole.

    Args:
        model: What to write.
        tokenizer: Written beside it.
        path: The directory.
        state: The weights, if `model` is without.

    Raises:
        OSError: If it cannot be written, naming `path`; nothing of it is kept then.
    """
    temporary = partial(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        put_in_place(path)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"could not write the model to {path}, nothing of it was kept ({error}); free space there"
        ) from error
