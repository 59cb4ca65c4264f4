"""A shard set's samples on one HTML page that loads nothing. Every text goes through `escape`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from qwen_lora.shards.safe import printable

# Said to the browser: nothing from anywhere, no script, whatever a caption holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_BUCKETS_SHOWN = 16
_STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfa;--ink:#1b1e23;--soft:#5c636d;--rule:#dfe1dd;
--well:#f2f3ef;--edge:#0000001c}
@media (prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e7e9ec;--soft:#a0a7b1;
--rule:#31353b;--well:#1e2125;--edge:#ffffff24}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1280px;margin:0 auto;padding:36px 24px 56px}
h1,p,ul,dl,dd{margin:0;padding:0}
h1{font-size:28px;line-height:1.2;letter-spacing:-.015em}
p{color:var(--soft);max-width:75ch;margin-top:6px;overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:1px;margin:24px 0;background:var(--rule);
border:1px solid var(--rule);border-radius:8px;overflow:hidden}
dl div{flex:1 1 130px;background:var(--paper);padding:10px 16px 11px}
dt{color:var(--soft);font-size:13px}
dd{font-size:20px;font-weight:600;font-variant-numeric:tabular-nums}
.buckets{display:flex;flex-wrap:wrap;gap:6px;list-style:none;margin-bottom:28px;font-size:13px;
color:var(--soft);font-variant-numeric:tabular-nums}
.buckets li{border:1px solid var(--rule);border-radius:99px;padding:1px 10px}
.samples{list-style:none;display:grid;gap:24px 18px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,210px),1fr))}
.samples li{min-width:0}
.box{display:flex;align-items:center;justify-content:center;aspect-ratio:1;background:var(--well);
border-radius:6px;overflow:hidden;outline:1px solid var(--edge);outline-offset:-1px;
margin-bottom:8px}
.box img{max-width:100%;max-height:100%;width:100%;height:100%;object-fit:contain}
.samples p{color:var(--ink);font-size:14px;line-height:1.4;margin:0 0 4px;max-height:15em;
overflow:auto}
.samples small{display:block;color:var(--soft);font-size:12.5px;font-variant-numeric:tabular-nums}
code{font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
.samples code{font-size:10.5px}
@media (max-width:560px){main{padding:24px 16px 40px}.samples{grid-template-columns:1fr 1fr}}
@media print{main{max-width:none;padding:0}.samples li{break-inside:avoid}}
"""


@dataclass(frozen=True)
class Shown:
    """A sample on the page."""

    sample_id: str
    captions: tuple[str, ...]  # none where the set stores none
    bucket: tuple[int, int]  # [height, width] pixels
    tokens: tuple[int, ...]  # T of each caption
    webp: bytes
    size: tuple[int, int]  # of the picture: width, height


@dataclass(frozen=True)
class PageFacts:
    """What stands above the samples."""

    generation: str
    model: str
    fingerprint: str
    samples: int
    images: int
    captions: int
    buckets: Mapping[str, int]
    how: str  # the pictures were made


def render(facts: PageFacts, shown: Sequence[Shown]) -> str:
    """The whole page."""
    figures = (
        ("Samples", f"{facts.samples:,}"),
        ("Images", f"{facts.images:,}"),
        ("Captions", f"{facts.captions:,}"),
        ("Shown here", f"{len(shown):,}"),
    )
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    title = f"Shard set {facts.generation.removeprefix('manifest-').removesuffix('.json')}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_text(title)}</h1>\n<p>Made with {_text(facts.model)}, fingerprint "
        f"<code>{_text(facts.fingerprint)}</code>. {_text(facts.how)}</p>\n<dl>{cells}</dl>\n"
        f'<ul class="buckets">{_buckets(facts.buckets)}</ul>\n'
        f'<ul class="samples">\n{"".join(map(_sample, shown))}</ul>\n</main>\n</body>\n</html>\n'
    )


def _buckets(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    items = [f"{name.replace('x', ' × ')}: {count:,}" for name, count in ordered[:_BUCKETS_SHOWN]]
    if len(ordered) > _BUCKETS_SHOWN:
        items.append(f"{len(ordered) - _BUCKETS_SHOWN} more buckets")
    return "".join(f"<li>{_text(item)}</li>" for item in items)


def _sample(one: Shown) -> str:
    captions = one.captions or ("(no captions stored)",)
    texts = "".join(f'<p dir="auto">{_text(caption)}</p>' for caption in captions)
    picture = base64.b64encode(one.webp).decode("ascii")
    tokens = " + ".join(map(str, one.tokens))
    return (
        f'<li><div class="box"><img src="data:image/webp;base64,{picture}" width="{one.size[0]}" '
        f'height="{one.size[1]}" alt="{_text(captions[0])}"></div>{texts}'
        f"<small>{one.bucket[0]} × {one.bucket[1]} px, {tokens} tokens</small>"
        f"<small><code>{_text(one.sample_id)}</code></small></li>\n"
    )


def _text(text: str) -> str:
    """Other people's text for a page: no markup, nothing invisible that could reorder it."""
    return escape(printable(text.replace("\n", " ")), quote=True)
