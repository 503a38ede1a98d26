"""The look of the report: one HTML page that loads nothing, light and dark, readable on a phone."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

STYLE = """
:root { --paper: #fbfaf8; --card: #fff; --ink: #1d1d1f; --muted: #6b6b70; --line: #e4e2dd; --accent: #2857c8;
  --s0: #2857c8; --s1: #c8552b; --s2: #2c8a57; --s3: #8a4fb8; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16171a; --card: #1e2024; --ink: #ececee; --muted: #9a9ba1; --line: #33353b; --accent: #7ea2ff;
    --s0: #7ea2ff; --s1: #f08a5d; --s2: #63c28e; --s3: #c390ea; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 36px 20px 72px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 0; display: inline; color: var(--ink); }
.contents { position: sticky; top: 0; z-index: 1; display: flex; gap: 18px; overflow-x: auto; scrollbar-width: none;
  margin-top: 28px; padding: 10px 0; background: var(--paper); border-bottom: 1px solid var(--line);
  font-size: 13.5px; }
.contents a { color: var(--muted); text-decoration: none; white-space: nowrap; }
.contents a:hover, .contents a:focus { color: var(--accent); }
.part { margin-top: 40px; scroll-margin-top: 52px; }
.part > summary { margin-bottom: 6px; } .part:target > summary h2 { color: var(--accent); }
.alarms { margin-top: 20px; padding: 12px 16px; background: var(--card); border: 1px solid var(--s1);
  border-left-width: 5px; border-radius: 8px; }
.alarms b { color: var(--s1); } .alarms ul { margin: 6px 0 0; padding-left: 20px; overflow-wrap: anywhere; }
.calm { margin: 14px 0 0; }
h3 { font-size: 15px; margin: 24px 0 8px; }
p { margin: 0 0 14px; max-width: 70ch; }
.note, figcaption, .muted { color: var(--muted); font-size: 13.5px; }
.numbers { display: flex; flex-wrap: wrap; gap: 1px; margin: 24px 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.numbers div { flex: 1 1 112px; background: var(--card); padding: 12px; }
.numbers b { display: block; font-size: 20px; line-height: 1.25; font-weight: 600; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.numbers span { display: block; color: var(--muted); font-size: 12.5px; line-height: 1.35; }
.classes { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 20px 24px;
  margin-top: 16px; }
.classes h3 { margin: 0 0 6px; font-weight: 600; overflow-wrap: anywhere; }
.pairs { display: flex; flex-wrap: wrap; gap: 12px; }
.pair { display: grid; grid-template-columns: auto auto; gap: 2px; }
.pair span, .mix span { font-size: 11.5px; color: var(--muted); text-align: center; }
img { display: block; image-rendering: pixelated; border-radius: 3px; background: var(--line); max-width: 100%; }
.missing { display: grid; place-items: center; border: 1px dashed var(--line); border-radius: 3px;
  color: var(--muted); font-size: 11px; }
.strip { width: 100%; height: auto; background: none; border-radius: 0; }
.strips { display: grid; grid-template-columns: minmax(70px, 110px) 1fr; gap: 6px 12px; align-items: center;
  margin-top: 16px; font-size: 13.5px; overflow-wrap: anywhere; }
.mixes { display: flex; flex-wrap: wrap; gap: 20px 40px; margin-top: 16px; }
.mix { display: flex; align-items: center; gap: 8px; flex-wrap: wrap; }
.mix figure { margin: 0; display: grid; justify-items: center; gap: 2px; max-width: 160px; }
.mix span { overflow-wrap: anywhere; }
.boxed { position: relative; }
.boxed i { position: absolute; border: 2px solid var(--s1); border-radius: 2px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 20px;
  margin-top: 16px; }
.alone { max-width: 500px; }
.chart { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 12px 8px; }
.chart figcaption { display: flex; justify-content: space-between; gap: 4px 16px; flex-wrap: wrap; }
.chart figcaption b { color: var(--ink); font-weight: 600; }
.legend { display: flex; gap: 12px; flex-wrap: wrap; }
.legend span::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin: 0 5px 3px 0; background: var(--s0); }
.legend .k1::before { background: var(--s1); } .legend .k2::before { background: var(--s2); }
.legend .k3::before { background: var(--s3); }
svg { width: 100%; height: auto; display: block; overflow: visible; }
svg text { font-size: 11px; fill: var(--muted); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke: var(--s0); }
svg .s1 { stroke: var(--s1); } svg .s2 { stroke: var(--s2); } svg .s3 { stroke: var(--s3); }
svg circle { fill: var(--s0); } svg .c1 { fill: var(--s1); } svg .c2 { fill: var(--s2); } svg .c3 { fill: var(--s3); }
.bars { display: grid; gap: 6px; margin: 12px 0; max-width: 640px; }
.bar { display: grid; grid-template-columns: minmax(84px, 130px) 1fr 88px; gap: 12px; align-items: center;
  font-size: 13.5px; }
.bar > span { overflow-wrap: anywhere; } .bar > span:last-child { text-align: right;
  font-variant-numeric: tabular-nums; }
.bar i { height: 10px; background: var(--line); border-radius: 5px; overflow: hidden; }
.bar b { display: block; height: 100%; background: var(--accent); border-radius: 5px; }
.moves { display: grid; gap: 5px; margin: 12px 0; max-width: 780px; font-size: 13.5px; }
.move { display: grid; grid-template-columns: minmax(110px, 220px) 1fr 124px 52px; gap: 12px; align-items: center; }
.move > span { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.move > span ~ span { text-align: right; } .move small { color: var(--muted); }
.track { position: relative; height: 12px; margin: 0 6px; }
.track::before { content: ""; position: absolute; inset: 5.5px 0; background: var(--line); }
.track u { position: absolute; top: 4px; height: 4px; background: var(--s0); opacity: 0.35; }
.track b { position: absolute; top: 1px; width: 10px; height: 10px; margin-left: -5px; border-radius: 50%;
  background: var(--s0); }
.track .from { background: var(--paper); border: 2px solid var(--s1); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 50%; background: var(--s0); }
.key.from { background: none; border: 2px solid var(--s1); }
.scroll { overflow-x: auto; margin-top: 12px; }
/* A shadow at an edge beyond which there is more; paper that scrolls along hides it at the end. */
.scroll, .contents { background:
  linear-gradient(to right, var(--paper) 30%, transparent) left / 44px 100% no-repeat local,
  linear-gradient(to left, var(--paper) 30%, transparent) right / 44px 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / 10px 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / 10px 100% no-repeat scroll, var(--paper);
  --shade: color-mix(in srgb, var(--muted) 45%, transparent); }
.scroll + .note { margin-top: 12px; }
.plain th, .plain td { padding: 4px 18px 4px 0; text-align: right; white-space: nowrap; }
.plain .word { text-align: left; } .plain th { font-weight: 400; color: var(--muted); }
.plain tbody td.word:first-child { white-space: normal; min-width: 120px; max-width: 240px; overflow-wrap: anywhere; }
.plain tbody tr > * { border-top: 1px solid var(--line); }
svg rect { fill: var(--s0); } svg .counts { fill: var(--muted); opacity: 0.5; }
svg .ideal { stroke: var(--s1); stroke-width: 1.5; stroke-dasharray: 4 4; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
.heat td { min-width: 38px; height: 30px; text-align: center; border-radius: 3px;
  background: color-mix(in srgb, var(--accent) var(--v, 0%), var(--card)); }
.heat { border-collapse: separate; border-spacing: 2px; }
.heat .strong { color: #fff; } .heat thead td { background: none; }
.heat th { font-weight: 400; color: var(--muted); text-align: right; padding-right: 8px; white-space: nowrap; }
.heat thead th { vertical-align: bottom; padding: 0 0 6px; }
.heat thead th span { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; }
.facts th { text-align: left; font-weight: 400; color: var(--muted); padding: 4px 18px 4px 0; vertical-align: top;
  white-space: nowrap; }
.facts td { padding: 4px 0; overflow-wrap: anywhere; } .facts tr + tr > * { border-top: 1px solid var(--line); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 8px 48px;
  align-items: start; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--accent); }
code, pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px;
  overflow-x: auto; }
@media (prefers-color-scheme: dark) { .heat .strong { color: #101216; } }
@media (max-width: 520px) { main { padding: 24px 14px 48px; } h1 { font-size: 23px; } .numbers b { font-size: 18px; }
  .facts th { white-space: normal; padding-right: 12px; }
  .strips { grid-template-columns: 1fr; gap: 2px; } .strips span { margin-top: 6px; }
  .move { grid-template-columns: 1fr auto 44px; gap: 2px 10px; } .move .track { grid-column: 1 / -1; grid-row: 2; } }
"""


class Part(NamedTuple):
    """A part of the page that folds, and that the contents lead to."""

    name: str
    """Anchor, and in the contents: a word in small letters."""
    title: str
    body: str
    """HTML."""


def page(title: str, head: str, parts: Sequence[Part]) -> str:
    """The whole document; ``head`` is HTML above the contents, ``title`` is escaped."""
    links = "".join(f'<a href="#{part.name}">{part.name.capitalize()}</a>' for part in parts)
    contents = f'<nav class="contents" aria-label="Contents">{links}</nav>' if parts else ""
    folds = "\n".join(
        f'<details class="part" id="{part.name}" open><summary><h2>{escape(part.title)}</h2></summary>'
        f"{part.body}</details>"
        for part in parts
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{head}\n{contents}\n{folds}\n"
        "</main></body></html>\n"
    )


def picture(content: bytes | None, alternative: str, size: int, kind: str = "png") -> str:
    """An embedded square image shown ``size`` CSS pixels wide; a dashed box where there is none."""
    if content is None:
        return f'<div class="missing" style="width:{size}px;height:{size}px">none</div>'
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(alternative)}" width="{size}" height="{size}" src="data:image/{kind};base64,{data}">'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values, both plain text."""
    lines = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f'<table class="facts">{lines}</table>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table that scrolls by itself where it is too wide; all plain text, the columns of ``words`` to the left."""
    kinds = [' class="word"' if place in words else "" for place in range(len(head))]
    titles = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    lines = "".join(
        f"<tr>{''.join(f'<td{kind}>{escape(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="plain"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def fold(title: str, body: str) -> str:
    """What only some want to see: closed at first."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"
