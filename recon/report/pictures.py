"""Pictures and pages of results on disk.

matplotlib costs a second and 50 MiB, plotly half a second, hence they are imported by those who draw only.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from shutil import rmtree

from recon.report.schema import Results

log = logging.getLogger("recon")


def draw_pareto(results: Results, directory: Path | str) -> list[Path]:
    """Draw perplexity against peak memory and against recovery time, one picture per comparable group.

    Args:
        results: What was measured. Several seeds become one point with error bars (sample standard
            deviation); failed cells are left out and named in a footnote.
        directory: Where `pareto.png` and `pareto.svg` go; with several groups of model, criterion and
            pattern `pareto-<group>.png` and `.svg`. It is created if needed; equal results make equal files.

    Returns:
        The files written. A group in which no recovery was measured has none.
    """
    from recon.report.plots.pareto import draw_group
    from recon.report.plots.style import draw_groups

    return draw_groups(results, Path(directory), "pareto", draw_group)


def draw_drift(results: Results, directory: Path | str) -> list[Path]:
    """Draw the error of the hidden state against depth, one picture per comparable group.

    Args:
        results: What was measured. Several seeds become one line (mean) in a band (sample standard deviation).
        directory: Where `drift.png` and `drift.svg` go; with several groups `drift-<group>.png` and `.svg`,
            named as the pictures of `draw_pareto`. It is created if needed; equal results make equal files.

    Returns:
        The files written. A group in which no drift was measured has none.
    """
    from recon.report.plots.drift import draw_depth
    from recon.report.plots.style import draw_groups

    return draw_groups(results, Path(directory), "drift", draw_depth)


def draw_across(results: Results, directory: Path | str) -> list[Path]:
    """Draw the loss above the dense model's along the axis in which comparable groups differ most, such as patterns.

    Args:
        results: What was measured. Several seeds become one point with error bars (sample standard deviation).
        directory: Where `across.png` and `across.svg` go. It is created if needed; equal results make equal files.

    Returns:
        The files written; none for a single group, or if too many groups differ in several respects.
    """
    from recon.report.groups import group_cells
    from recon.report.plots.across import draw_across as draw
    from recon.report.plots.style import plain_style, save

    with plain_style():
        figure = draw(group_cells(results))
        return [] if figure is None else save(figure, Path(directory), "across")


def log_pictures(pictures: Iterable[Path], directory: Path) -> None:
    """Show pictures in TensorBoard, in place of those of an earlier call; a failure is a warning.

    Args:
        pictures: Files; those other than PNG are left out.
        directory: Where TensorBoard finds them.
    """
    try:
        from matplotlib.image import imread
        from torch.utils.tensorboard import SummaryWriter

        rmtree(directory, ignore_errors=True)
        with SummaryWriter(str(directory)) as writer:
            for picture in (one for one in pictures if one.suffix == ".png"):
                writer.add_image(picture.stem, imread(picture)[..., :3], dataformats="HWC")
    except Exception as error:
        log.warning(f"could not show the pictures in TensorBoard ({error}); they are in their files")


def draw_page(results: Results, directory: Path) -> list[Path]:
    """Write the page of a comparison; a failure is a warning, for the comparison has ended well.

    Args:
        results: What was measured.
        directory: Where `page.html` goes, and where the directories of the cells are.

    Returns:
        The file, if it was written.
    """
    try:
        from recon.report.page.build import NAME, write_page

        return [write_page(results, directory / NAME)]
    except Exception as error:
        reason = " ".join(f"{error}".split()) or type(error).__name__
        log.warning(f"could not write the page ({reason}); `recon report {directory} --html` tries again")
        return []
