"""The report as one HTML page that loads nothing: style, charts and pictures stand in it.

Every text goes through `escape`; captions and names come from other people's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from qwen_lora.train.report.charts import Series, line_chart, number
from qwen_lora.train.report.facts import SHOWN_BUCKETS, Curves, DataFacts, Sample
from qwen_lora.train.report.style import STYLE

# Said to the browser: nothing from anywhere, no script, whatever a caption holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STATES = {"running": "training", "stopped": "stopped", "done": "done"}
SIGMA_COLORS = (3, 4, 5, 6, 7)
COLUMN_PX = (112, 230)  # a column of drawn pictures is between so wide


@dataclass(frozen=True)
class LoraFacts:
    """The adapter."""

    rank: int
    alpha: float
    targets: str
    layers: int
    parameters: int
    file_bytes: int | None  # None: not written yet
    dtype: str


@dataclass(frozen=True)
class Drawn:
    """Previews: a column a step, a row a prompt."""

    steps: list[int]
    rows: list[tuple[str, list[str | None]]]  # prompt, data URIs
    how: str  # "20 steps, guidance 4, seed 0, 512 × 512 px"
    exact: bool  # decoded by the VAE
    prompts_left_out: int
    steps_left_out: int


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    name: str
    state: str  # a key of STATES
    step: int
    steps: int
    model: str  # id, or a folder's name
    revision: str | None
    pipeline: str  # diffusers' class
    written: str  # date and time
    version: str
    epoch: int
    machine: str  # "bfloat16 on cuda, 2 processes"
    curves: Curves
    data: DataFacts
    lora: LoraFacts
    drawn: Drawn | None
    changed: list[tuple[str, str]]
    default: list[tuple[str, str]]


def render(page: Page) -> str:
    """The whole page."""
    title = f"{page.name} · qwen-lora"
    parts = [
        _head(page),
        _drawn(page.drawn),
        _loss(page),
        _data(page.data),
        _speed(page.curves),
        _lora(page),
        _settings(page),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>Written by qwen-lora {escape(page.version)} on {escape(page.written)}."
        "</footer>\n</main>\n</body>\n</html>\n"
    )


# ---- head ----------------------------------------------------------------------------------------


def _head(page: Page) -> str:
    curves = page.curves
    figures = [
        ("Steps", f"{page.step:,}", f"of {page.steps:,}, epoch {page.epoch + 1}"),
        ("Training time", duration(curves.training_seconds), _rate(curves)),
        ("Loss, smoothed", _or_dash(curves.last("smoothed_loss")), "on training batches"),
    ]
    measured = curves.of(curves.measure)
    if measured:
        what = "Held-out loss" if curves.measure == "validation_loss" else "Loss, fixed images"
        figures.append((what, number(measured[-1][1]), _since(measured)))
    peak = _peak(curves, "peak_memory_gib")
    if peak:
        figures.append(("GPU memory", f"{peak:.1f} GiB", "at most"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in figures
    )
    return (
        f'<header><h1>{escape(page.name)}<span class="state {page.state}">{STATES[page.state]}'
        f'</span></h1><p class="sub">LoRA of rank {page.lora.rank} for {escape(_model(page))}, '
        f"{escape(page.machine)}</p>"
        f'<dl class="figures">{cells}</dl></header>'
    )


def _model(page: Page) -> str:
    return f"{page.model}@{page.revision[:12]}" if page.revision else page.model


def _since(points: Sequence[tuple[float, float]]) -> str:
    (first_step, first), (_, last) = points[0], points[-1]
    if len(points) < 2 or not first:
        return f"at step {int(first_step):,}"
    return f"{last / first - 1:+.1%} since step {int(first_step):,}".replace("-", "−")


def _rate(curves: Curves) -> str:
    seconds, steps = curves.training_seconds, curves.of("step_seconds")
    return f"{number(seconds / steps[-1][0])} s a step" if steps and steps[-1][0] else ""


def _or_dash(value: float | None) -> str:
    return "–" if value is None else number(value)


def _peak(curves: Curves, key: str) -> float:
    return max((value for _, value in curves.of(key)), default=0.0)


def duration(seconds: float) -> str:
    """4 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


# ---- curves --------------------------------------------------------------------------------------


def _loss(page: Page) -> str:
    curves = page.curves
    held = "held-out images" if curves.measure == "validation_loss" else "fixed training images"
    charts = [
        line_chart(
            "Loss",
            [
                Series("each interval", curves.of("loss"), 1, faint=True),
                Series("smoothed", curves.of("smoothed_loss"), 1),
                Series(held, curves.of(curves.measure), 2, dots=True),
            ],
            page.step,
        ),
        '<div class="two">'
        + line_chart(
            "Learning rate", [Series("", curves.of("learning_rate"), 1)], page.step, low=True
        )
        + line_chart(
            "Gradient norm, before clipping",
            [Series("", curves.of("grad_norm"), 1)],
            page.step,
            low=True,
        )
        + "</div>",
        _by_sigma(page),
    ]
    return "<section><h2>Curves</h2>" + "".join(charts) + "</section>"


def _by_sigma(page: Page) -> str:
    found = [(sigma, points) for sigma, points in page.curves.by_sigma if points]
    if not found:
        return ""
    series = [
        Series(f"σ {sigma:g}", points, SIGMA_COLORS[index % len(SIGMA_COLORS)], dots=True)
        for index, (sigma, points) in enumerate(found)
    ]
    rows = "".join(
        f"<tr><td>{sigma:g}</td><td>{number(points[0][1])}</td><td>{number(points[-1][1])}</td>"
        f"{_change(points[0][1], points[-1][1])}</tr>"
        for sigma, points in found
    )
    first, last = int(found[0][1][0][0]), int(found[0][1][-1][0])
    what = "Held-out loss" if page.curves.measure == "validation_loss" else "Loss of fixed images"
    return (
        '<div class="two gap">'
        + line_chart(f"{what} by noise level", series, page.step)
        + f"<div><h3>{what} by noise level</h3>"
        '<p class="note">σ runs from 0, the clean image, to 1, pure noise; the five levels are the '
        "middles of equal parts. Images, noise and levels are the same at every measurement.</p>"
        '<table class="numbers"><thead><tr>'
        f"<th>σ</th><th>step {first:,}</th><th>step {last:,}</th><th>change</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def _change(first: float, last: float) -> str:
    if not first:
        return "<td>–</td>"
    kind = "down" if last < first else "up" if last > first else ""
    return f'<td class="{kind}">{f"{last / first - 1:+.1%}".replace("-", "−")}</td>'


# ---- pictures ------------------------------------------------------------------------------------


def _drawn(drawn: Drawn | None) -> str:
    if drawn is None or not drawn.rows:
        return ""
    columns = len(drawn.steps)
    heads = "".join(
        f'<th scope="col">{"base" if step == 0 else f"step {step:,}"}</th>' for step in drawn.steps
    )
    rows = "".join(_drawn_row(drawn.steps, prompt, uris) for prompt, uris in drawn.rows)
    source = (
        "Decoded with the model's VAE."
        if drawn.exact
        else "The shard set's linear map turns latents into colours: shapes and colours are right, "
        "fine detail is not drawn. <code>qwen-lora sample</code> shows the exact pictures."
    )
    left = ""
    if drawn.prompts_left_out or drawn.steps_left_out:
        counts = (
            (drawn.steps_left_out, "steps"),
            (drawn.prompts_left_out, "prompts"),
        )
        more = " and ".join(f"{count} more {what}" for count, what in counts if count)
        left = f" {more} in <code>previews/</code>."
    style = f"width:min(100%,{columns * COLUMN_PX[1]}px);min-width:{columns * COLUMN_PX[0]}px"
    return (
        "<section><h2>Samples while training</h2>"
        f'<p class="note">The same noise at every step: {escape(drawn.how)}. {source}{left}</p>'
        f'<div class="scroll"><table class="drawn" style="{style}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _drawn_row(steps: Sequence[int], prompt: str, uris: Sequence[str | None]) -> str:
    cells = "".join(
        "<td></td>"
        if uri is None
        else f'<td><img src="{uri}" alt="{escape(prompt[:80])}, step {step}"></td>'
        for step, uri in zip(steps, uris, strict=True)
    )
    head = f'<th scope="rowgroup" colspan="{len(steps)}"><div>{escape(prompt)}</div></th>'
    return f"<tr>{head}</tr><tr>{cells}</tr>"


def _samples(shown: Sequence[Sample], total: int) -> str:
    if not shown:
        return ""
    items = "".join(_one_sample(sample) for sample in shown)
    heading = f"{len(shown)} of {total:,} samples" if total > len(shown) else "The samples"
    return f'<h3>{heading}</h3><ul class="samples">{items}</ul>'


def _one_sample(sample: Sample) -> str:
    text = escape(sample.caption)
    mark = "<b>held out</b> " if sample.held_out else ""
    picture = ""
    if sample.picture is not None:
        picture = f'<div class="box"><img src="{sample.picture}" alt=""></div>'
    return f'<li>{picture}<span title="{text}">{mark}{text}</span></li>'


# ---- the rest ------------------------------------------------------------------------------------


def _data(data: DataFacts) -> str:
    facts = [
        ("Samples", f"{data.samples:,} trained on, {data.visits:,.4g} visits an epoch"),
        ("Images", f"{data.images:,}"),
        ("Captions", f"{data.captions:,}"),
        ("Held out", f"{data.held_out:,} images" if data.held_out else "none"),
    ]
    if data.duplicates:
        facts.append(("Duplicates", f"{data.duplicates:,} left out"))
    for one in data.sets:
        weight = f", weight {one.weight:g}" if len(data.sets) > 1 else ""
        facts += [
            ("Shard set", f"{one.name}: {one.samples:,} samples{weight}"),
            ("Generation", one.generation),
        ]
    facts.append(("Fingerprint", data.sets[0].fingerprint))
    bars = _bars("Buckets, height × width", data.buckets, SHOWN_BUCKETS)
    if data.groups:
        named = [
            (f"{name or '(top folder)'}, {visits:,.4g} visits", count)
            for name, count, visits in data.groups
        ]
        bars += _bars("Groups and their visits an epoch", named, SHOWN_BUCKETS)
    bars += _bars("Caption length in tokens", data.tokens, len(data.tokens))
    return (
        f"<section><h2>Data</h2>{_facts(facts)}"
        f'<div class="columns gap">{bars}</div>'
        f"{_samples(data.shown, sum(one.samples for one in data.sets))}</section>"
    )


def _bars(title: str, counts: Sequence[tuple[str, int]], most: int) -> str:
    if not counts:
        return ""
    shown, rest = list(counts[:most]), counts[most:]
    if rest:
        shown.append((f"{len(rest)} others", sum(count for _, count in rest)))
    top = max(count for _, count in shown) or 1
    lines = "".join(
        f'<span title="{escape(name)}">{escape(name)}</span>'
        f'<i style="width:{count / top:.1%}"></i><em>{count:,}</em>'
        for name, count in shown
    )
    return f'<div><h3>{escape(title)}</h3><div class="bars">{lines}</div></div>'


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f'<dl class="facts">{lines}</dl>'


def _speed(curves: Curves) -> str:
    last = curves.rows[-1]["step"] if curves.rows else 0
    facts = []
    if rate := _rate(curves):
        facts.append(("Step", rate.replace(" a step", "")))
    samples = curves.last("samples")
    if samples and curves.training_seconds:
        facts.append(("Samples", f"{number(samples / curves.training_seconds)} a second"))
    if (share := curves.waiting_share) is not None:
        facts.append(("Waiting for data", f"{share:.1%} of the time"))
    for name, key in (("Memory, process", "peak_rss_gib"), ("Memory, GPU", "peak_memory_gib")):
        if peak := _peak(curves, key):
            facts.append((name, f"{peak:.2f} GiB at most"))
    if not facts:
        return ""
    chart = line_chart("Seconds a step", [Series("", curves.of("step_seconds"), 1)], last, low=True)
    return (
        f'<section><h2>Speed and memory</h2><div class="two">{chart}{_facts(facts)}</div></section>'
    )


def _lora(page: Page) -> str:
    lora = page.lora
    size = "written at the end of the run"
    if lora.file_bytes is not None:
        size = f"{lora.file_bytes / 1e6:,.1f} MB, {lora.dtype}"
    facts = [
        ("lora.safetensors", size),
        ("Rank and alpha", f"{lora.rank}, {lora.alpha:g}"),
        ("Targets", f"{lora.targets} ({lora.layers:,} layers)"),
        ("Parameters", f"{lora.parameters:,}"),
    ]
    code = (
        f'pipeline = {page.pipeline}.from_pretrained("{page.model}", torch_dtype=torch.bfloat16)\n'
        'pipeline.load_lora_weights("lora.safetensors")\n'
        f'pipeline.to("cuda")("{_first_prompt(page)}").images[0].save("picture.png")'
    )
    return f"<section><h2>The LoRA</h2>{_facts(facts)}<pre>{escape(code)}</pre></section>"


def _first_prompt(page: Page) -> str:
    """For a line of Python: no quotes, no backslashes, one line."""
    prompt = page.drawn.rows[0][0] if page.drawn and page.drawn.rows else "a picture"
    plain = " ".join(prompt.replace('"', "'").replace("\\", " ").split())
    return plain if len(plain) <= 60 else plain[:57] + "..."


def _settings(page: Page) -> str:
    def table(lines: Sequence[tuple[str, str]]) -> str:
        rows = "".join(
            f"<tr><td><code>{escape(key)}</code></td><td><code>{escape(value)}</code></td></tr>"
            for key, value in lines
        )
        return f'<table class="settings"><tbody>{rows}</tbody></table>'

    changed = table(page.changed) if page.changed else '<p class="note">All are the defaults.</p>'
    return (
        "<section><h2>Settings</h2><details><summary>"
        f"{len(page.changed)} that differ from the defaults, {len(page.default)} that do not"
        f'</summary><h3 class="gap">Different from the defaults</h3>{changed}'
        f'<h3 class="gap">Defaults</h3>{table(page.default)}</details></section>'
    )
