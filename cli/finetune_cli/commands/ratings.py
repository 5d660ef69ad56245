"""`finetune ratings`: prints the statistics of rating sheets that raters have filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import DataFormatOption, require_format, write_data


def ratings(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Filled-in rating sheets, as CSV or JSON: one file per rater.")],
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file human_rating_key.json, which names the model for each row. Required to compare two models.")
    ] = None,
    output_format: DataFormatOption = None,
) -> None:
    """Print the statistics of rating sheets: scores of each model, agreement of the raters, and win rate of the trained model.

    Example: finetune ratings anna.csv ben.csv --key human_rating_key.json
    """
    from finetune_cli.ratings import read_ratings, summarise

    require_format(output_format, "yaml", "json")
    all_ratings = read_ratings(files, key)
    if not all_ratings:
        raise output.fail("the sheets contain no scores; fill in the columns relevance, accuracy, coherence and overall")
    summary = summarise(all_ratings)
    if output_format is not None:
        write_data(summary, output_format)
    else:
        output.write("\n".join(format_summary(summary)))


def format_summary(summary: dict[str, Any]) -> list[str]:
    """Return the statistics as lines of text."""
    lines = [f"{summary['answers']} answers, {len(summary['raters'])} raters: {', '.join(summary['raters'])}", ""]
    lines.append(f"{'MODEL':<8} {'SCORE':<10} {'COUNT':>5} {'MEAN':>6} {'MEDIAN':>6} {'STD':>6} {'MIN':>4} {'MAX':>4}")
    for model, scores in summary["scores"].items():
        for score_name, statistics in scores.items():
            score_cells = (
                _format_number(statistics["mean"]), _format_number(statistics["median"]), _format_number(statistics["std"]),
                statistics["min"], statistics["max"],
            )  # fmt: skip
            mean, median, deviation, low, high = ("-" if number is None else number for number in score_cells)
            lines.append(f"{model or '-':<8} {score_name:<10} {statistics['count']:>5} {mean:>6} {median:>6} {deviation:>6} {low:>4} {high:>4}")
    lines += ["", "agreement of the raters (Krippendorff's alpha: 1 is perfect, 0 is chance)"]
    for score_name, agreement in summary["agreement"].items():
        lines.append(f"  {score_name:<10} {_format_number(agreement['alpha']) or '- (' + agreement['reason'] + ')'}")
    win_rate_entry = summary["winRate"]
    if win_rate_entry["rate"] is None:
        win_rate_text = f"- ({win_rate_entry['reason']})"
    else:
        win_rate_text = f"{win_rate_entry['rate']:.2f}, 95 % interval {win_rate_entry['low']:.2f} to {win_rate_entry['high']:.2f}"
        win_rate_text += f", on {win_rate_entry['questions']} questions"
        win_rate_text += f" ({win_rate_entry['wins']} wins, {win_rate_entry['ties']} ties, {win_rate_entry['losses']} losses)"
    return [*lines, "", f"win rate of the trained model: {win_rate_text}"]


def _format_number(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
