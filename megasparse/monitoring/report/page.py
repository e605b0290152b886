"""The page around the charts: style for light and dark, and the script that shows values under the pointer."""

from __future__ import annotations

from megasparse.monitoring.report.charts import esc

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbf9;--panel:#fff;--text:#1d2024;--quiet:#646b75;--line:#e3e4e0;--grid:#ecece8;
--c0:#1f6fd0;--c1:#d9580d;--c2:#16876b;--c3:#a3379a;--c4:#8a6a00;--c5:#5b5fc7;--warn:#b3261e}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--panel:#1c1f24;--text:#e7e9ec;--quiet:#9aa2ad;--line:#30353c;
--grid:#2a2e35;--c0:#6aa9ff;--c1:#ff9a57;--c2:#4cc9a4;--c3:#e08bd8;--c4:#d9b64a;--c5:#a5a8ff;--warn:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1360px;padding:28px 24px 60px;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:26px;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:18px;margin:38px 0 12px}
h3{font-size:15px;margin:0;font-weight:600}
p{margin:0}
.quiet,figcaption p{color:var(--quiet);font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0 6px}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:22px;font-weight:600;line-height:1.25;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:14px}
figure{margin:0;background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:14px 16px 10px;
position:relative;min-width:0}
svg.plot{display:block;width:100%;height:auto;margin-top:8px;overflow:visible}
.tick{fill:var(--quiet);font-size:11px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid);stroke-width:1}.axis{stroke:var(--line);stroke-width:1}
.mark{stroke:var(--quiet);stroke-width:1;stroke-dasharray:2 3}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.line.dashed{stroke-dasharray:5 4}
.dot{fill:var(--c);stroke:var(--panel);stroke-width:1}.bar{fill:var(--c)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin-top:6px}
.legend .key{display:inline-block;width:18px;height:0;border-top:3px solid var(--c);vertical-align:middle;
margin-right:6px}
.legend .key.dashed{border-top-style:dashed}
.scale{align-items:center;gap:8px;font-variant-numeric:tabular-nums}
.tip{position:absolute;pointer-events:none;display:none;background:var(--text);color:var(--bg);border-radius:6px;
padding:6px 9px;font-size:12px;line-height:1.45;white-space:nowrap;z-index:2;font-variant-numeric:tabular-nums}
.cross{stroke:var(--quiet);stroke-width:1}
.scroll{overflow-x:auto;background:var(--panel);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:6px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--quiet);font-size:13px}
td:first-child,th:first-child,.left td,.left th{text-align:left}
.left td+td{white-space:normal;overflow-wrap:anywhere}
tr:last-child td{border-bottom:0}
details{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:10px 16px;margin-top:10px}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:10px 0 4px}
.warn{color:var(--warn)}
@media print{body{max-width:none}figure,.tile{break-inside:avoid}}
"""

SCRIPT = """
const L=62,R=14,T=10,W=640,P=W-L-R;
for(const f of document.querySelectorAll('figure[data-chart]')){
 const d=JSON.parse(f.dataset.chart),svg=f.querySelector('svg.plot'),tip=document.createElement('div');
 tip.className='tip';f.append(tip);
 const cross=document.createElementNS('http://www.w3.org/2000/svg','line');cross.setAttribute('class','cross');
 cross.style.display='none';svg.append(cross);
 const hide=()=>{tip.style.display='none';cross.style.display='none'};
 svg.addEventListener('pointerleave',hide);
 svg.addEventListener('pointermove',e=>{
  const b=svg.getBoundingClientRect(),x=(e.clientX-b.left)*W/b.width,y=(e.clientY-b.top)*W/b.width;
  const rows=[];
  if(x<L-4||x>W-R+4)return hide();
  if(d.kind==='line'){
   const span=(d.x[1]-d.x[0])||1,at=d.x[0]+(x-L)/P*span;let best=null;
   for(const s of d.series)for(const p of s.p)if(best===null||Math.abs(p[0]-at)<Math.abs(best-at))best=p[0];
   rows.push(d.over+' '+best);
   for(const s of d.series){let q=null;for(const p of s.p)if(q===null||Math.abs(p[0]-best)<Math.abs(q[0]-best))q=p;
    if(q&&Math.abs(q[0]-best)<=span/40)rows.push(s.name+': '+q[1]+(q[0]===best?'':' ('+d.over+' '+q[0]+')'))}
   const px=L+(best-d.x[0])/span*P;cross.setAttribute('x1',px);cross.setAttribute('x2',px);
   cross.setAttribute('y1',T);cross.setAttribute('y2',svg.viewBox.baseVal.height-34);cross.style.display='';
  }else{
   const c=Math.min(d.steps.length-1,Math.max(0,Math.floor((x-L)/P*d.steps.length))),r=Math.floor((y-T)/d.row);
   if(r<0||r>=d.layers.length)return hide();
   rows.push('step '+d.steps[c],'layer '+d.layers[r]+': '+d.v[r][c]);
  }
  tip.replaceChildren(...rows.map(t=>{const p=document.createElement('div');p.textContent=t;return p}));
  tip.style.display='block';
  const g=f.getBoundingClientRect(),left=e.clientX-g.left;
  tip.style.left=(left>g.width/2?left-tip.offsetWidth-14:left+14)+'px';
  tip.style.top=(e.clientY-g.top-tip.offsetHeight-10)+'px';
 });
}
"""


def page(title: str, subtitle: str, body: str) -> str:
    """The whole HTML document; `body` is HTML, the rest is text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head><body>\n"
        f'<h1>{esc(title)}</h1><p class="quiet">{esc(subtitle)}</p>\n{body}\n<script>{SCRIPT}</script></body></html>\n'
    )


def table(head: list[str], rows: list[list[str]], *, words: bool = False) -> str:
    """`words`: every column is text, not figures."""
    top = "".join(f"<th>{esc(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    style = ' class="left"' if words else ""
    return f'<div class="scroll"><table{style}><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>\n'


def tiles(items: list[tuple[str, str, str]]) -> str:
    """(label, value, remark) each."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span class="quiet">{esc(label)}</span><b>{esc(value)}</b>'
            f'<span class="quiet">{esc(remark)}</span></div>'
            for label, value, remark in items
        )
        + "</div>\n"
    )


def section(title: str, *figures: str) -> str:
    """A heading and its charts; "" where every chart is empty."""
    drawn = "".join(figures)
    return f'<h2>{esc(title)}</h2><div class="charts">{drawn}</div>\n' if drawn else ""


def fold(title: str, text: str) -> str:
    return f"<details><summary>{esc(title)}</summary><pre>{esc(text)}</pre></details>\n"
