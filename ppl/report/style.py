"""The look of a page: one style sheet, light and dark."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #60656c; --line: #d9dce0; --back: #ffffff; --well: #f5f6f7;
  --accent: #2a6fb0; --truth: #d1495b; --warn: #a33a2c; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8ea; --soft: #9aa1a9; --line: #3a3f45; --back: #16181b;
  --well: #1f2226; --accent: #6aa9e0; --truth: #ff7b8a; --warn: #ff9a8a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; font-weight: 650; margin: 0 0 1.2rem; }
h2 { font-size: 1.25rem; font-weight: 650; margin: 2.4rem 0 .5rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }
h1 + section h2 { border-top: 0; margin-top: 0; padding-top: 0; }
h3 { font-size: 1rem; font-weight: 650; margin: 1.8rem 0 .3rem; }
p { max-width: 75ch; margin: .4rem 0 .8rem; }
.key, figcaption, summary, dl { color: var(--soft); font-size: .87rem; }
.warn, .error { color: var(--warn); }
pre { background: var(--well); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto;
  font-size: .84rem; line-height: 1.45; margin: .5rem 0; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
li code { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; } dd { margin: 0; }
.scroll { overflow-x: auto; }
table.figures { border-collapse: collapse; margin: 1rem 0 .6rem; font-variant-numeric: tabular-nums; font-size: .9rem; }
table.figures th, table.figures td { padding: .32rem .55rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: bottom; }
table.figures thead th { color: var(--soft); font-weight: 500; }
table.figures tbody th, table.figures .exact, table.figures td.error { text-align: left; white-space: nowrap; }
table.figures td.error { white-space: normal; }
table.figures tbody th { font-weight: 600; padding-left: 0; }
.problem { display: flex; gap: 1.4rem; align-items: flex-start; margin: .8rem 0 1.6rem; }
.known { display: flex; flex-direction: column; gap: .6rem; padding-top: 1.75rem; }
figure { margin: 0; } .known figcaption { text-align: center; }
table.pictures { border-collapse: separate; border-spacing: 3px; }
table.pictures td { padding: 0; background: repeating-linear-gradient(45deg, var(--line) 0 2px, var(--well) 2px 7px); }
table.pictures td:empty { background: none; }
table.pictures th { font-weight: 500; font-size: .84rem; color: var(--soft); padding: 0 .6rem 0 0; text-align: right;
  white-space: nowrap; }
table.pictures tr:first-child th { text-align: center; padding: 0; }
table.pictures tr:first-child th.left { text-align: left; }
table.pictures img { display: block; width: 76px; height: auto; image-rendering: pixelated; }
.known table.pictures img { width: 110px; }
.bar { display: inline-block; width: 60px; height: .7em; border-radius: 2px; vertical-align: -.03em; }
.bar.sd { background: linear-gradient(90deg, #000004, #51127c, #b73779, #fc8961, #fcfdbf); }
.bar.residual { background: linear-gradient(90deg, #053061, #6bacd1, #f7f7f7, #e58368, #67001f); }
.plots { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; }
svg.plot { display: block; max-width: 100%; } svg.plot text { fill: var(--soft); font-size: 10px; }
svg.plot .bars rect, svg.plot circle { fill: var(--accent); } svg.plot .axis { stroke: var(--line); }
svg.plot .interval { stroke: var(--accent); stroke-width: 2; opacity: .55; }
svg.plot .truth { stroke: var(--truth); stroke-width: 2; }
"""
