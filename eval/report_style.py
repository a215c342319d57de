"""The report's style sheet: one column, system fonts, light and dark by the reader's setting, printable."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #fbfbf9; --panel: #ffffff; --ink: #1b1f24; --soft: #59626d; --faint: #8a929c; --rule: #e2e3df;
    --grid: #ecece8;
  --source: #8b95a1; --quantized: #1f6feb; --first: #0f766e; --second: #5fb3a8;
  --pass: #1a7f4b; --pass-bg: #eaf5ee; --fail: #b3261e; --fail-bg: #fbecea; --inconclusive: #8a5a00;
    --inconclusive-bg: #fbf3e0; --warn: #a04a00;
  --h0: #c0392b; --h1: #e4ecf7; --h2: #c6d8f0; --h3: #9dbde6; --h4: #6d9dd9; --h5: #3f7cc7; --h6: #1f5aa8;
    --h7: #123b78; --starved: #e8a13a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #13161a; --panel: #1a1e23; --ink: #e6e8ea; --soft: #a3abb4; --faint: #767f89; --rule: #2d333a;
      --grid: #262b31;
    --source: #7d8792; --quantized: #5b9dff; --first: #2aa79a; --second: #a5e6dd;
    --pass: #5fcf93; --pass-bg: #14281d; --fail: #ff8a80; --fail-bg: #341917; --inconclusive: #f0b94b;
      --inconclusive-bg: #2e2410; --warn: #ffa066;
    --h0: #e5534b; --h1: #1d2a3c; --h2: #213a5c; --h3: #28507f; --h4: #336aa8; --h5: #4888cf; --h6: #74abea;
      --h7: #b3d3fb; --starved: #d98a1f;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans",
    sans-serif; }
main { max-width: 920px; margin: 0 auto; padding: 48px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 4px 0 6px;
  overflow-wrap: anywhere; }
h2 { font-size: 20px; font-weight: 650; letter-spacing: -0.01em; margin: 56px 0 4px; }
h3 { font-size: 15px; font-weight: 650; margin: 28px 0 2px; }
p { margin: 6px 0 12px; max-width: 46em; }
.eyebrow { color: var(--soft); font-size: 13px; letter-spacing: 0.02em; margin: 0; }
.soft, figcaption, .note { color: var(--soft); }
figcaption, .note { font-size: 14px; max-width: 52em; }
figcaption { margin-top: 6px; }
code, pre, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 13px; }
code { overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: 12px 14px;
  margin: 8px 0 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.verdict { border-left: 4px solid; border-radius: 4px; padding: 16px 20px; margin: 24px 0 8px; }
.verdict strong { display: block; font-size: 21px; font-weight: 650; letter-spacing: -0.01em; }
.verdict ul { margin: 6px 0 0; padding-left: 18px; color: var(--ink); }
.verdict p { margin: 4px 0 0; color: var(--ink); }
.verdict.pass { background: var(--pass-bg); border-color: var(--pass); } .verdict.pass strong { color: var(--pass); }
.verdict.fail { background: var(--fail-bg); border-color: var(--fail); } .verdict.fail strong { color: var(--fail); }
.verdict.inconclusive { background: var(--inconclusive-bg); border-color: var(--inconclusive); }
.verdict.inconclusive strong { color: var(--inconclusive); }
.tag { font-weight: 600; white-space: nowrap; }
.tag.pass { color: var(--pass); } .tag.warn { color: var(--warn); }
.tag.fail { color: var(--fail); } .tag.inconclusive { color: var(--inconclusive); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 10px 0 8px; font-size: 15px;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 13px; color: var(--soft); border-bottom: 1px solid var(--faint); }
th, td { padding: 8px 20px 8px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--rule); }
td:last-child, th:last-child { padding-right: 0; }
.num { text-align: right; white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: 13px; line-height: 1.4; }
.checks td:first-child { width: 1%; padding-right: 28px; }
.identity td:first-child { color: var(--soft); white-space: nowrap; width: 1%; padding-right: 28px; }
.identity td { overflow-wrap: anywhere; }
figure { margin: 16px 0 28px; }
figure svg { display: block; width: 100%; height: auto; }
figure svg.swatch { display: inline; width: 9px; height: 9px; }
.on-narrow { display: none; }
.panels { display: grid; grid-template-columns: repeat(3, 1fr); gap: 28px; }
details { border-top: 1px solid var(--rule); padding: 10px 0; }
details:last-of-type { border-bottom: 1px solid var(--rule); }
summary { cursor: pointer; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin-top: 8px; }
.answers > div { min-width: 0; }
.answers pre { max-height: 280px; overflow: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
  fill: var(--soft);
  font-variant-numeric: tabular-nums; }
svg text.strong { fill: var(--ink); paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--faint); }
svg .source { fill: var(--source); } svg .quantized { fill: var(--quantized); }
svg .first { fill: var(--first); } svg .second { fill: var(--second); }
svg .first-line { stroke: var(--first); fill: none; } svg .second-line { stroke: var(--second); fill: none; }
svg .source-line { stroke: var(--source); fill: none; } svg .quantized-line { stroke: var(--quantized); fill: none; }
svg .h0 { fill: var(--h0); } svg .h1 { fill: var(--h1); } svg .h2 { fill: var(--h2); } svg .h3 { fill: var(--h3); }
svg .h4 { fill: var(--h4); } svg .h5 { fill: var(--h5); } svg .h6 { fill: var(--h6); } svg .h7 { fill: var(--h7); }
svg .starved { fill: var(--starved); }
footer { margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--rule); color: var(--soft); font-size: 13px; }
@media (max-width: 700px) {
  main { padding: 28px 16px 56px; }
  h1 { font-size: 25px; }
  .on-wide { display: none; } .on-narrow { display: block; }
  th.num, td.num small { white-space: normal; }
  .panels { grid-template-columns: 1fr; } .panels svg { max-width: 300px; }
  .answers { grid-template-columns: 1fr; }
  th, td { padding-right: 8px; font-size: 15px; } th { font-size: 12px; } td small { font-size: 12px; }
  th:last-child, td:last-child { padding-right: 0; }
  .gate tr { display: grid; grid-template-columns: auto 1fr; border-bottom: 1px solid var(--rule); }
  .gate tr:first-child { display: none; }
  .gate td { border: 0; padding-bottom: 4px; }
  .gate td:nth-child(2) { grid-column: 1 / -1; grid-row: 2; padding-top: 0; padding-bottom: 8px; }
  .gate td:last-child { padding-right: 0; }
}
@media print { body { background: #fff; } details > * { display: block; } figure, details { break-inside: avoid; } }
"""
