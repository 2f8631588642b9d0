"""A comparison as one HTML file: style and pictures inside, no script, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl.report.draw import histogram_svg, image_uri, intervals_svg
from ppl.report.style import STYLE
from ppl.report.view import Pictures, data_range, describe_model, kind_of, pictures, problem_count

if TYPE_CHECKING:
    from ppl.compare import Comparison

__all__ = ["Section", "table_html", "write_page"]

DRAWS = 8  # single draws shown
RESIDUAL = 3.0  # range of residuals, in standard deviations of the noise
ENTRIES = 60  # most intervals in one plot


@dataclass(frozen=True)
class Section:
    """One comparison on a page.

    Args:
        heading: its title.
        comparison: what is shown.
        text: a paragraph of plain text below the heading.
    """

    heading: str
    comparison: Comparison
    text: str = ""


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write one self-contained HTML page, and return its path.

    Args:
        path: the file; its folder is made if need be.
        title: of the page.
        sections: one for each comparison.
    """
    body = "".join(_section(s) for s in sections)
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{body}</main></body></html>\n",
        encoding="utf-8",
    )
    return place


def _section(section: Section) -> str:
    comparison = section.comparison
    program = comparison.program
    parts = [f"<section><h2>{escape(section.heading)}</h2>"]
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>")
    if not comparison.complete:
        parts.append('<p class="warn">The run was interrupted; what was finished is shown.</p>')
    parts.append(
        f"<details open><summary>The program: {escape(repr(program))}</summary>"
        f"<pre><code>{escape(describe_model(program))}</code></pre></details>"
    )
    parts.append(table_html(comparison))
    for site in program.latents:
        kind = kind_of(program, site)
        if kind == "image":
            parts.append(_images(comparison, site))
        elif kind == "scalar":
            parts.append(_scalars(comparison, site))
        else:
            parts.append(_vectors(comparison, site))
    parts.append(_notes(comparison))
    parts.append(_options(comparison))
    return "".join(parts) + "</section>"


def table_html(comparison: Comparison) -> str:
    """The table of figures, with the meaning of each column below it."""
    columns = [c for c in comparison.columns if c.key != "notes"]
    head = "".join(f'<th class="{c.key}" title="{escape(c.meaning)}">{escape(c.head)}</th>' for c in columns)
    rows = []
    for row in comparison.rows:
        if row.error and row.posterior is None:
            cells = f'<td class="error" colspan="{len(columns)}">{escape(row.error)}</td>'
        else:
            cells = "".join(f'<td class="{c.key}">{escape(row.cell(c))}</td>' for c in columns)
        rows.append(f"<tr><th>{escape(row.name)}</th>{cells}</tr>")
    meaning = "".join(f"<dt>{escape(c.head)}</dt><dd>{escape(c.meaning)}</dd>" for c in columns)
    return (
        f'<div class="scroll"><table class="figures"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f"<details><summary>What the columns mean</summary><dl>{meaning}</dl></details>"
    )


def _images(comparison: Comparison, site: str) -> str:
    found, data = pictures(comparison, site, DRAWS)
    if not found:
        return ""
    program = comparison.program
    shape = program.sites[site].shape
    truth = comparison.truth.get(site)
    if truth is not None:
        truth = truth.detach().double().cpu().expand(problem_count(program), *shape)
        truth = truth if truth.ndim >= 4 else truth.unsqueeze(1)
    spread = max(float(p.sd.max()) for p in found.values())
    blocks = []
    items = shape[:-3].numel() if len(shape) > 3 else 1
    for problem in range(problem_count(program)):
        for item in range(min(items, 4)):

            def one(x: Tensor, problem: int = problem, item: int = item) -> Tensor:
                picked = x[problem]
                return picked.reshape(-1, *picked.shape[-3:])[item]

            there = {n: p for n, p in found.items() if problem < len(p.mean)}
            low, high = data_range(program, site, *(one(p.mean) for p in there.values()))
            blocks.append(_picture_table(there, one, (low, high), spread, truth, data))
    key = (
        f'<p class="key">Images from {low:g} (black) to {high:g} (white). '
        f'Standard deviation from 0 <span class="bar sd"></span> {spread:.2g}. '
        f'Residual of the mean from &minus;{RESIDUAL:g} <span class="bar residual"></span> +{RESIDUAL:g} standard '
        "deviations of the noise: a pattern is structure that the mean misses, blank is a mean that fits the noise as "
        "well. Hatched pixels were not measured.</p>"
    )
    return f"<h3>{escape(site)}</h3>{key}<div class='scroll'>{''.join(blocks)}</div>"


def _picture_table(
    found: dict[str, Pictures],
    one: Callable[[Tensor], Tensor],
    span: tuple[float, float],
    spread: float,
    truth: Tensor | None,
    data: Tensor | None,
) -> str:
    """One problem: a row with truth and data, then a row for each backend."""

    def cell(image: Tensor | None, low: float, high: float, colours: str = "gray", alt: str = "") -> str:
        if image is None:
            return "<td></td>"
        uri = image_uri(one(image), low, high, colours)
        return f'<td><img src="{uri}" alt="{escape(alt)}"></td>'

    count = max((p.draws.shape[1] for p in found.values()), default=0)
    rows = [f'<tr><th></th><th>mean</th><th>sd</th><th>residual</th><th colspan="{count}" class="left">draws</th></tr>']
    for name, p in found.items():
        # Draws have an axis more than the other pictures.
        draws = "".join(cell(p.draws[:, i], *span, alt=f"{name}, draw {i}") for i in range(p.draws.shape[1]))
        rows.append(
            f"<tr><th>{escape(name)}</th>{cell(p.mean, *span, alt=f'{name}, mean')}"
            f"{cell(p.sd, 0.0, spread, 'magma', f'{name}, standard deviation')}"
            f"{cell(p.residual, -RESIDUAL, RESIDUAL, 'RdBu_r', f'{name}, residual')}{draws}</tr>"
        )
    known = [("truth", truth), ("data", data)]
    first = "".join(
        f"<figure><table class='pictures'><tr>{cell(image, *span, alt=label)}</tr></table>"
        f"<figcaption>{label}</figcaption></figure>"
        for label, image in known
        if image is not None
    )
    return f'<div class="problem"><div class="known">{first}</div><table class="pictures">{"".join(rows)}</table></div>'


def _scalars(comparison: Comparison, site: str) -> str:
    program, cells = comparison.program, []
    values = {n: p._lanes(site).double().flatten(1) for n, p in comparison.posteriors.items() if site in p}
    values = {n: v for n, v in values.items() if v.numel()}
    if not values:
        return ""
    problems = problem_count(program)
    truth = comparison.truth.get(site)
    true = None if truth is None else truth.double().reshape(-1).expand(problems)
    for problem in range(problems):
        shown = [v[problem] for v in values.values() if problem < len(v)]
        if not shown:
            continue
        pool = torch.cat([*shown, *([] if true is None else [true[problem : problem + 1]])])
        low, high = _span(pool)
        for name, posterior in comparison.posteriors.items():
            if name not in values or problem >= len(values[name]):
                continue
            one = posterior.sample(site, len(posterior), torch.Generator().manual_seed(0)).double()
            one = one.reshape(posterior.problems or 1, -1)[problem]
            mean, sd = (float(s(site).reshape(-1)[problem]) for s in (posterior.mean, posterior.sd))
            plot = histogram_svg(one, low, high, None if true is None else float(true[problem]))
            cells.append(
                f"<figure>{plot}<figcaption>{escape(name)}: {mean:.3g} &plusmn; {sd:.2g}</figcaption></figure>"
            )
    line = "" if true is None else " The line is the truth."
    return f"<h3>{escape(site)}</h3><p class='key'>Posterior draws.{line}</p><div class='plots'>{''.join(cells)}</div>"


def _vectors(comparison: Comparison, site: str) -> str:
    program, cells = comparison.program, []
    problems = problem_count(program)
    size = program.sites[site].shape.numel()
    shown = torch.arange(min(size, ENTRIES)) * size // min(size, ENTRIES)
    truth = comparison.truth.get(site)
    true = None if truth is None else truth.double().expand(problems, *program.sites[site].shape).flatten(1)[:, shown]
    levels = {}
    for name, posterior in comparison.posteriors.items():
        if site in posterior and len(posterior) and posterior[site].is_floating_point():
            levels[name] = posterior.quantile(site, [0.05, 0.5, 0.95]).double()
            levels[name] = levels[name].reshape(3, posterior.problems or 1, -1)[..., shown]
    if not levels:
        return ""
    for problem in range(problems):
        there = {n: q for n, q in levels.items() if problem < q.shape[1]}
        if not there:
            continue
        pool = torch.cat([q[:, problem].flatten() for q in there.values()])
        low, high = _span(pool if true is None else torch.cat([pool, true[problem]]))
        for name, q in there.items():
            labels = [str(int(i)) for i in shown]
            plot = intervals_svg(q[:, problem], low, high, labels, None if true is None else true[problem])
            cells.append(f"<figure>{plot}<figcaption>{escape(name)}</figcaption></figure>")
    some = f" {len(shown)} of {size} entries are shown." if len(shown) < size else ""
    mark = "" if true is None else " Short lines are the truth."
    return (
        f"<h3>{escape(site)}</h3><p class='key'>Medians and central 90 % intervals.{mark}{some}</p>"
        f"<div class='plots'>{''.join(cells)}</div>"
    )


def _span(pool: Tensor) -> tuple[float, float]:
    """Ends of an axis that shows all but the last per mille."""
    pool = pool[torch.isfinite(pool)]
    low, high = (float(q) for q in torch.quantile(pool[:100_000], torch.tensor([0.001, 0.999], dtype=pool.dtype)))
    margin = 0.05 * (high - low) or max(abs(high), 1.0) * 0.05
    return low - margin, high + margin


def _notes(comparison: Comparison) -> str:
    said = [(r.name, n) for r in comparison.rows for n in ([r.error] if r.error else []) + list(r.notes)]
    if not said:
        return ""
    items = "".join(f"<li><b>{escape(name)}</b>: {escape(note)}</li>" for name, note in said)
    return f"<h3>Notes</h3><ul>{items}</ul>"


def _options(comparison: Comparison) -> str:
    items = []
    for row in comparison.rows:
        cost = "" if row.posterior is None else f": {escape(str(row.posterior.cost))}"
        given = "a posterior given by the caller" if row.posterior is not None else "no backend"
        options = given if row.backend is None else escape(repr(row.backend))
        items.append(f"<li><b>{escape(row.name)}</b>{cost}<br><code>{options}</code></li>")
    sizes = sorted(set(comparison.draws.values()))
    chosen = f"{' or '.join(map(str, sizes))} draws per chain, seed {comparison.seed}"
    return f"<details><summary>Cost and options ({chosen})</summary><ul>{''.join(items)}</ul></details>"
