"""`recon push`: upload the model of a run, with its card, to the Hugging Face hub; a dry run unless told otherwise."""

from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id
from jsonargparse import ArgumentParser
from rich.console import Console

from recon.basics.locks import owned
from recon.basics.refusals import UsageError
from recon.basics.run_paths import RunPaths
from recon.basics.units import readable
from recon.cli.arrange import arrange
from recon.cli.errors import usage
from recon.cli.quiet import quiet
from recon.experiment.carding import write_card
from recon.experiment.verification import verify


def build_parser() -> ArgumentParser:
    """The parser of `recon push`."""
    parser = ArgumentParser(
        prog="recon push",
        exit_on_error=False,
        description="Upload the model of a finished run, with its card, to the Hugging Face hub. Prints the files and "
        "the head of the card; sends them only with --yes. The run is verified first.",
    )
    parser.add_argument("run_dir", type=str, help="The directory of the run.")
    parser.add_argument("repository", type=str, help="Where to upload, such as org/name; made if there is none.")
    parser.add_argument("--yes", type=bool, default=False, help="Upload; without it nothing is sent.")
    parser.add_argument("--private", type=bool, default=False, help="Make a new repository private.")
    return parser


def main(args: list[str]) -> int:
    """Parse, verify, show, upload."""
    quiet()
    with usage():
        config = build_parser().parse_args(arrange("push", args))
        validate_repo_id(config.repository)
        if "/" not in config.repository:
            raise UsageError(f"recon push needs a repository such as org/name, got {config.repository}")
    run = RunPaths(Path(config.run_dir))
    files = whole_files(run)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    visibility = "private if it is new" if config.private else "public if it is new"
    console.print(f"{run.model} -> {config.repository} ({visibility})")
    for file in files:
        console.print(f"  {readable(file.stat().st_size):>10}  {file.relative_to(run.model).as_posix()}")
    console.print(f"  {readable(sum(file.stat().st_size for file in files)):>10}  in all")
    console.print(f"---\n{ModelCard.load(run.card).data.to_yaml()}\n---")
    if not config.yes:
        console.print("dry run: nothing was sent; --yes uploads these files")
        return 0
    console.print(f"uploaded to {upload(run, files, config.repository, config.private)}")
    return 0


def whole_files(run: RunPaths) -> list[Path]:
    """The files of a finished run's model, its card among them, which is written now if it is missing.

    Raises:
        ValueError: If the run has no model, is damaged, is owned by another process, or its card cannot be read.
    """
    found = verify(run.path)
    if found.faults:
        raise ValueError(
            f"recon push needs a run as recon wrote it, got {run.path}, in which {len(found.faults)} checks failed, "
            f"the first: {found.faults[0]}; `recon verify {run.path}` tells all, the run's own command may repair it"
        )
    if not run.manifest.records(run.report) or not run.manifest.records(run.model):
        raise ValueError(
            f"recon push needs the directory of a finished run with its model, got {run.path}; let the run end, name a "
            f"cell of a comparison, or prune with --save_model"
        )
    with owned(run.path):
        write_card(run)
    if not run.card.is_file():
        raise ValueError(f"recon push needs the card of the model, {run.card}, which could not be written; see above")
    try:
        ModelCard.load(run.card)
    except Exception as error:  # of any YAML that an editor may have left
        reason = " ".join(f"{error}".split())
        raise ValueError(
            f"recon push needs a card with metadata as YAML, got {run.card} ({reason}); correct it, or delete it: then "
            f"it is written again"
        ) from error
    return sorted(file for file in {run.card, *run.manifest.records(run.model)} if file.is_file())


def upload(run: RunPaths, files: list[Path], repository: str, private: bool) -> str:
    """Upload files of a run's model in one commit.

    Returns:
        The address of the repository.

    Raises:
        OSError: If the hub refuses, or cannot be reached.
        ValueError: If there is no token.
    """
    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=run.model,
            commit_message="Upload a model pruned by recon",
            allow_patterns=[file.relative_to(run.model).as_posix() for file in files],
        )
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the hub's HTTP library, which changes between releases
        raise OSError(
            f"recon push needs the Hugging Face hub, which cannot be reached ({error}); try again with a network"
        ) from error
    return str(made)
