"""Writing a recovered model: whole or not at all."""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.basics.files import Writer, placing
from recon.experiment.job import Job
from recon.models.anatomy import Anatomy
from recon.models.fewer_experts import smaller
from recon.profiling.phases import PhaseName
from recon.pruning.masks import Masks
from recon.pruning.prune import made_by
from recon.pruning.removal import kept_in


def write(job: Job) -> None:
    """Write the recovered model, and let go of it; first the masks, if recovery has chosen them.

    Raises:
        OSError: If there is no room.
    """
    scope, options = job.scope, job.options
    scope.phases.enter(PhaseName.SAVE)
    if options.interleaves:
        assert options.pattern is not None
        assert options.criterion is not None
        anatomy = Anatomy.of(scope.model)
        known = made_by(options.criterion, options.pattern, options.pruning, scope.masks, anatomy, scope.experts)
        scope.masks.save(job.run.masks, known, job.run.manifest.writing)
    assert job.data.tokenizer is not None
    model, state = with_survivors(*scope.result(), scope.masks)
    save_model(model, job.data.tokenizer, job.run.model, state, job.run.manifest.placing)
    del model, state
    scope.release()
    job.trainer.strategy.optimizers, job.trainer.strategy.lr_scheduler_configs = [], []  # they hold parameters


def with_survivors(
    model: PreTrainedModel, state: dict[str, Tensor] | None, masks: Masks
) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
    """Cut a model, and its weights if it is without them, to the experts that masks keep; as it is if they keep all."""
    if not (kept := kept_in(masks, model)):
        return model, state
    return smaller(model, len(next(iter(kept.values())))).model(model, state, kept)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    state: dict[str, Tensor] | None = None,
    placing: Writer = placing,
) -> None:
    """Write model and tokenizer as a plain Hugging Face directory that is whole or absent.

    An older model in its place stays until the new one is whole.

    Args:
        model: What to write.
        tokenizer: Written beside it.
        path: The directory.
        state: The weights, if `model` is without.
        placing: Makes the directory; `Manifest.placing` records its files, too.

    Raises:
        OSError: If it cannot be written, naming `path`; nothing of it is kept then.
    """
    try:
        with placing(path) as temporary:
            model.save_pretrained(temporary, state_dict=state)
            tokenizer.save_pretrained(temporary)
    except Exception as error:
        raise OSError(
            f"could not write the model to {path}, nothing of it was kept ({error}); free space there"
        ) from error
