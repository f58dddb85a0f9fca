"""`recon merge`: put the windows that several jobs have recovered together, save and evaluate the model."""

from pathlib import Path

from jsonargparse import ArgumentParser

from recon.basics.run_paths import RunPaths
from recon.cli.fit import run


def main(args: list[str]) -> int:
    """Parse, and end the run that the directory holds."""
    parser = ArgumentParser(
        prog="recon merge",
        exit_on_error=False,
        description="Put the windows together that several `recon fit ... --windows i/n` have recovered into one run "
        "directory, then save, evaluate and report as `recon fit` does. Trains nothing.",
    )
    parser.add_argument("run_dir", type=str, help="The directory of the run.")
    directory = RunPaths(Path(parser.parse_args(args).run_dir))
    if not directory.config.exists() or not directory.windows.is_dir():
        raise ValueError(
            f"merge needs the directory of a run that has recovered windows, got {directory.path}, which has none; run "
            f"recon fit --windows 1/n and the other parts first"
        )
    directory.manifest.require(directory.config, "copy it again, or repeat `recon fit` with the options of the run")
    return run(["-c", str(directory.config), "--run_dir", str(directory.path)], merge=True)
