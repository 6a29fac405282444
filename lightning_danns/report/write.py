"""The folder of a report: a table for each data set (Markdown, CSV), figures (PNG, SVG), and all in report.md."""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lightning_danns.errors import UsageError
from lightning_danns.report import figures
from lightning_danns.report.runs import read
from lightning_danns.report.style import RC, plt, save, styles
from lightning_danns.report.tables import markdown, remarks, run_errors, table, unfinished


def write_report(folders: Sequence[Path], out: Path, last: int = 5, distributions: Path | None = None) -> str:
    """Write the report of all runs below ``folders`` into ``out``; returns its tables and where it is.

    Raises:
        UsageError: there is no run, or ``distributions`` is none that can be drawn.
    """
    runs, omitted = read(*folders)
    if runs.empty:
        listed = "".join(f"\n{folder}: {reason}" for folder, reason in list(omitted.items())[:3])
        raise UsageError(f"no runs (folders with config.yaml and metrics.csv) below {_names(folders)}{listed}")
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(RC):
        report = _Report(out, runs, last)
        for data in sorted(runs.data.unique()):
            report.section(data)
        report.diagnostics()
        report.distributions(distributions)
    report.listing("Left out:", [f"{folder}: {reason}" for folder, reason in omitted.items()])
    (out / "report.md").write_text("\n\n".join([f"# Runs of {_names(folders)}", *report.parts]) + "\n")
    return "\n\n".join([*(part for part in report.parts if "![" not in part), f"report: {out / 'report.md'}"])


class _Report:
    """The parts of report.md, as their files are written."""

    def __init__(self, out: Path, runs: pd.DataFrame, last: int) -> None:
        self.out, self.runs, self.last = out, runs, last
        self.errors, self.table = run_errors(runs, last), table(runs, last)
        self.look = styles(sorted({*runs.arm, *runs.family}))
        self.parts: list[str] = []

    def section(self, data: str) -> None:
        """All that is known about one data set."""
        self.parts.append(f"## {data}")
        for error_of, arms in self.table[self.table.data == data].groupby("error_of"):
            self.comparison(data, str(error_of), arms)
        own = self.runs[self.runs.data == data]
        self.listing("Not finished, and in no table:", unfinished(own))
        self.figure(
            figures.learning_rates(own, self.last, self.look),
            f"{data} learning_rates",
            "Error against learning rate: lines join means of what was trained to the end.",
        )

    def comparison(self, data: str, error_of: str, arms: pd.DataFrame) -> None:
        """The table of one kind of error, and its figures."""
        errors = self.errors[(self.errors.data == data) & (self.errors.error_of == error_of)]
        over = "" if error_of.endswith("checkpoint") else f", mean of the last {self.last} epochs"
        before, title = len(self.parts), f"{error_of}{over}".capitalize()
        self.parts += [f"### {title}", markdown(arms)]
        if arms.seconds.notna().any():
            devices = "; ".join(errors.device.dropna().unique())
            self.parts.append(f"s / epoch: by the clock, evaluation included{f' ({devices})' if devices else ''}.")
        self.listing("Note:", remarks(errors, self.last))
        name = _file_name(f"{data} {error_of}")
        arms.to_csv(self.out / f"{name}.csv", index=False)
        text = "\n\n".join([f"# {data}: {title.lower()}", *self.parts[before + 1 :]])
        (self.out / f"{name}.md").write_text(text + "\n")
        band = "; the bands reach from the best to the worst seed" if errors.arm.duplicated().any() else ""
        self.figure(
            figures.learning_curves(self.runs, errors, error_of, self.look),
            f"{name} curves",
            f"Learning curves: mean over seeds{band}. Early epochs may lie above the figure.",
        )
        self.figure(
            figures.seeds(errors, arms, self.look),
            f"{name} seeds",
            f"{title}: every seed a point; above them their mean and its 95 % interval (Student's t).",
        )

    def diagnostics(self) -> None:
        for data, own in self.runs.groupby("data"):
            for arm, figure in figures.diagnostics(own):
                self.figure(figure, f"{data} {arm} diagnostics", f"{data}, {arm}: diagnostics of each layer.")

    def distributions(self, run: Path | None) -> None:
        """Weights and activity of ``run``, or of the first finished run that has layers of a DANN."""
        # imported here: they load the run's model and data, and so Lightning
        from lightning_danns.report.distributions import activity, has_dann, histograms, trained_dann, weights

        if run is None:
            finished = self.runs[self.runs.finished & ~self.runs.trial].folder.drop_duplicates()
            candidates = (Path(folder) for folder in finished)
            chosen = next((folder for folder in candidates if has_dann(folder)), None)
        else:
            chosen = run
        if chosen is None:
            return
        try:
            model, batches = trained_dann(chosen)
        except UsageError as error:
            if run is not None:
                raise
            self.parts.append(f"No distributions: {error}")
            return
        self.parts.append(f"## A trained DANN\n\n{chosen}")
        self.figure(
            histograms(weights(model)),
            "weights",
            "Weights of each layer; zeros are counted apart, 0.1 % on either side are drawn at the edge.",
        )
        self.figure(
            histograms(activity(model, batches)),
            "activity",
            "z and h = ReLU(z) of each layer over the test images (no h in the output layer).",
        )

    def figure(self, figure: Figure | None, name: str, caption: str) -> None:
        if figure is not None:
            path = self.out / _file_name(name)
            save(figure, path)
            self.parts.append(f"![{caption}]({path.name}.png)\n\n*{caption}*")

    def listing(self, heading: str, lines: list[str]) -> None:
        if lines:
            self.parts.append("\n".join([heading, "", *(f"- {line}" for line in lines)]))


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))


def _file_name(text: str) -> str:
    name = re.sub(r"[^\w.+-]+", "_", text).strip("_").lower()
    return name if len(name) <= 100 else f"{name[:90]}_{zlib.crc32(text.encode()):08x}"
