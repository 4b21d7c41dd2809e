"""Pages: the one look of everything that is written as HTML: colours, light and dark as the reader, nothing fetched.

Owns the style and the frame around a page's parts. No script: a page works from file://, mailed or kept for years."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
:root{--bg:#faf9f6;--card:#fff;--ink:#1d2430;--soft:#5d6675;--line:#e3e1da;--met:#11866b;--missed:#d07c00;
--refused:#7457c4;--lost:#c43a3a;--good:#11866b14;--one:#2a6fdb;--two:#d07c00;--three:#11866b;--four:#7457c4}
@media(prefers-color-scheme:dark){:root{--bg:#14171d;--card:#1c2129;--ink:#e8eaee;--soft:#9aa4b2;--line:#323944;
--met:#3fc29f;--missed:#f0a83c;--refused:#a68df0;--lost:#f07575;--good:#3fc29f14;
--one:#6ea3ff;--two:#f0a83c;--three:#3fc29f;--four:#a68df0}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:36px 28px 60px}
h1{font-size:26px;margin:0 0 2px;letter-spacing:-.01em}h2{font-size:17px;margin:38px 0 4px}
h3{font-size:14px;margin:20px 0 2px}
p{margin:0 0 12px;color:var(--soft);max-width:80ch}
.badge{display:inline-block;padding:3px 12px;border-radius:99px;color:var(--card);font-weight:650;font-size:14px;
margin-left:12px;vertical-align:4px}
.pass{background:var(--met)}.fail{background:var(--missed)}.unsure{background:var(--refused)}.invalid{background:var(--lost)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(205px,1fr));gap:14px;margin:22px 0}
.card,figure,.scroll{background:var(--card);border:1px solid var(--line);border-radius:10px}
.card{padding:16px 18px}.card b{display:block;font-size:30px;font-weight:620;letter-spacing:-.02em;line-height:1.2}
.card span{color:var(--soft);font-size:13px}.card h3{margin:0;font-size:14px;font-weight:600}
figure{margin:8px 0;padding:12px 14px 4px}figure svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:12.5px}
th,td{padding:7px 5px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tr:last-child td{border-bottom:0}th{color:var(--soft);font-weight:550}
th:first-child,td:first-child{text-align:left;padding-left:14px}
td:last-child,th:last-child{padding-right:14px}
tr.class td{font-weight:620}tr.worker td:first-child{padding-left:26px;color:var(--soft)}
.heat td,.heat th{text-align:center}.heat small,.users small{color:var(--soft)}
.heat .gauge{margin:6px auto 2px}.heat td:first-child{text-align:left}
.grid{stroke:var(--line);stroke-width:1}.tick,.axis{fill:var(--soft);font-size:12px}
.axis{font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:4px}
circle.met,rect.met{fill:var(--met)}circle.plain{fill:var(--ink);fill-opacity:.55}circle.met{fill-opacity:.62}rect.missed,circle.missed{fill:var(--missed)}
.cross{stroke-width:2;fill:none}.cross.missed{stroke:var(--missed)}.cross.lost{stroke:var(--lost)}
.target{fill:none;stroke:var(--ink);stroke-width:1.6;stroke-dasharray:6 4}.good{fill:var(--good)}
.target-name{fill:var(--ink);font-size:12px;text-anchor:end}
.gauge{width:100%;max-width:260px;display:block;margin-top:8px}.rail{fill:var(--line)}
.whisker{stroke:var(--ink);stroke-width:2}.wanted{stroke:var(--ink);stroke-width:2}
.event{stroke:var(--lost);stroke-width:2;stroke-dasharray:5 4}
.curve{fill:none;stroke-width:2}
.key{display:inline-flex;align-items:center;gap:6px;margin-right:16px;font-size:13px;color:var(--soft)}
.key i{width:11px;height:11px;border-radius:3px;display:inline-block}
pre{white-space:pre-wrap;font:12.5px/1.6 ui-monospace,SFMono-Regular,Menlo,monospace;margin:0;padding:14px 18px}
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title>"
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def table(rows: Iterable[Iterable[str]], style: str = "") -> str:
    """Cells as text, the first row as heads."""
    head, *body = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    heads = head.replace("<td>", "<th>").replace("</td>", "</th>")
    lines = "".join(f"<tr>{line}</tr>" for line in (heads, *body))
    return f'<div class="scroll"><table class="{style}">{lines}</table></div>'
