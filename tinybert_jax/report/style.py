"""The style sheet of report.html: a light and a dark palette, rules for screen, phone, print."""

from tinybert_jax.report.charts import CHART_CSS

LIGHT = """
--paper:#fff;--ink:#16212c;--soft:#5c6975;--line:#e1e6ea;--wash:#f3f6f7;
--teacher:#8693a0;--student:#00776e;--baseline:#c07a12;--other:#a7b0b8;--miss:#bf3b4b;
--c0:#16212c;--c1:#00776e;--c2:#2d66d3;--c3:#c0457e;--c4:#c07a12;--c5:#7a4fc4;--c6:#5d7a17;
"""
DARK = """
--paper:#11171d;--ink:#e8edf1;--soft:#97a4b0;--line:#28323b;--wash:#19212a;
--teacher:#8493a1;--student:#35c4b5;--baseline:#e3a547;--other:#66727d;--miss:#f07584;
--c0:#e8edf1;--c1:#35c4b5;--c2:#7ba6ff;--c3:#ee86b4;--c4:#e3a547;--c5:#b296f2;--c6:#a5c55a;
"""
STYLE = (
    f":root{{{LIGHT}}}@media screen and (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    + CHART_CSS
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1160px;margin:0 auto;padding:clamp(20px,4vw,56px) clamp(16px,4vw,40px) 64px}
header{display:flex;justify-content:space-between;align-items:flex-end;gap:24px 64px;
padding-bottom:40px}
header>div{flex:1 1 560px}
.run{margin:0 0 12px;color:var(--soft)}
h1{margin:0;max-width:22em;font-size:clamp(1.6rem,3.6vw,2.6rem);line-height:1.18;font-weight:600;
letter-spacing:-.02em;text-wrap:balance}
h1 b{font-weight:600}
.lead{margin:18px 0 0;max-width:46em;font-size:1.08rem;color:var(--soft)}
b.teacher{color:var(--soft)}b.student{color:var(--student)}b.baseline{color:var(--baseline)}
.mark{flex:0 0 168px}
.mark svg{display:block;width:100%}
.mark rect.teacher{fill:var(--wash);stroke:var(--teacher);stroke-width:1.5}
.mark rect.student{fill:var(--student)}
.mark figcaption{margin-top:8px;font-size:.8rem;line-height:1.35;color:var(--soft)}
section{border-top:1px solid var(--line);padding:28px 0 32px}
h2{margin:0 0 18px;font-size:1.2rem;letter-spacing:-.01em}
.note,.soft{color:var(--soft)}.compare td .soft{white-space:nowrap}
.note{margin:12px 0 0;font-size:.875rem;max-width:60em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th{font-weight:400;text-align:left}
.num{text-align:right;white-space:nowrap}
.bar{display:block;height:4px;min-width:1px;border-radius:2px;background:var(--other)}
.bar.teacher{background:var(--teacher)}.bar.student{background:var(--student)}
.dot.teacher,.key.teacher{fill:var(--teacher);background:var(--teacher)}
.dot.student,.key.student{fill:var(--student);background:var(--student)}
.dot.baseline,.key.baseline{fill:var(--baseline);background:var(--baseline)}
.bar.baseline{background:var(--baseline)}.bar.miss{background:var(--miss)}
.calibration{max-width:260px;margin:0}.calibration polyline{fill:none;stroke-width:2}
.calibration rect{fill:none;stroke:var(--line)}
.calibration .diagonal{stroke:var(--soft);stroke-dasharray:4 4;stroke-width:1}
.calibration polyline.teacher{stroke:var(--teacher);stroke-width:4;opacity:.55}
.calibration polyline.student{stroke:var(--student)}
.calibration polyline.baseline{stroke:var(--baseline);stroke-dasharray:5 3}
.differing{width:100%;table-layout:fixed}
.differing td,.differing th{padding:6px 16px 6px 0;vertical-align:top;font-size:.875rem;
overflow-wrap:anywhere}
.differing thead th{color:var(--soft)}
.answers th:first-child{width:52%}
.plain td,.plain th{padding:4px 24px 4px 0;vertical-align:top}
.plain thead th{color:var(--soft);font-size:.875rem}
.compare{width:100%;table-layout:fixed}
.compare th,.compare td{padding:10px 20px 8px 0;vertical-align:top}
.compare tbody tr{border-top:1px solid var(--line)}
.compare thead th{font-size:.875rem;color:var(--soft);overflow-wrap:anywhere}
.compare thead span{display:block;font-size:1rem;font-weight:600;color:var(--ink)}
.compare thead .student span{color:var(--student)}
.compare thead .baseline span{color:var(--baseline)}
.compare thead span::first-letter{text-transform:uppercase}
.compare .bar{margin:5px 0 3px}
.compare td b{font-weight:500}
.compare small{display:block;min-height:1.2em;font-size:.8rem;line-height:1.2;color:var(--soft)}
.compare .main b{font-size:1.35rem;font-weight:600;letter-spacing:-.01em}
.compare .main th{font-weight:600}
.heat{border-collapse:separate;border-spacing:3px}
.heat thead td{font-size:.75rem;color:var(--soft);white-space:nowrap;padding-right:10px;
vertical-align:bottom}
.heat thead th{text-align:center;vertical-align:bottom;font-size:.85rem;padding:0 2px 4px}
.heat tbody th{text-align:right;padding-right:10px;font-size:.85rem;max-width:24em;
overflow-wrap:break-word;
position:sticky;left:0;z-index:1;background:var(--paper)}
.heat td[style]{position:relative;isolation:isolate;min-width:44px;padding:8px 6px;
text-align:center;line-height:1.2}
.heat td[style]::before{content:"";position:absolute;inset:0;z-index:-1;border-radius:3px;
opacity:var(--v);background:var(--miss)}
.heat .hit::before{background:var(--student)!important}
.heat td b{font-weight:500}
.heat small{display:block;font-size:.75rem;opacity:.85}
.heat .none{color:var(--soft)}
.heat .deep{color:var(--paper)}
.heat.few td[style]{min-width:104px;padding:18px 8px}.heat.few td b{font-size:1.25rem}
.heat.many small{display:none}.heat.many td[style]{font-size:.8rem}
.heat.many thead th span{writing-mode:vertical-rl;transform:rotate(180deg);white-space:nowrap}
b.hit{color:var(--student)}b.miss{color:var(--miss)}
.pairs th,.pairs td,.classes th,.classes td{padding:7px 28px 7px 0}
.pairs tbody tr,.classes tbody tr{border-top:1px solid var(--line)}
.classes thead th{vertical-align:bottom}.classes .num{min-width:88px}
.pairs thead th,.classes thead th{font-size:.85rem;color:var(--soft)}
.pairs .bar,.classes .bar{margin-top:4px}.pairs td:nth-child(3){min-width:120px;text-align:left}
.times{width:100%}
.times th{white-space:nowrap;padding-right:18px}
.times.scores .soft{display:inline}
.times td,.times th{padding-top:5px;padding-bottom:5px}
.times .num{padding-left:18px}
.track{width:100%}.track .bar{height:14px;border-radius:3px;background:var(--c0);opacity:.75}
.whisker{display:block;position:relative;height:14px}
.whisker .range{position:absolute;top:6px;height:2px;min-width:1px;background:var(--other)}
.whisker .point{position:absolute;top:2px;width:10px;height:10px;margin-left:-5px;
border-radius:50%;background:var(--other)}
.whisker .teacher{background:var(--teacher)}.whisker .student{background:var(--student)}
.whisker .baseline{background:var(--baseline)}
table+h3{margin-top:20px}.scroll+.scroll{margin-top:20px}
a{color:inherit;text-decoration-color:var(--teacher);text-underline-offset:3px}
article+article{margin-top:40px}
h3{margin:0 0 2px;font-size:1.05rem}
dl{display:flex;flex-wrap:wrap;gap:2px 22px;margin:0 0 16px;font-size:.875rem}
dl div{display:flex;gap:6px}
dt{color:var(--soft)}
dd{margin:0;font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:22px 28px;align-items:start}
figure{margin:0}
.figures .wide{grid-column:span 2;grid-row:span 2}
.figures figcaption{font-size:.875rem;font-weight:600;margin-bottom:4px}
figcaption small{font-weight:400;color:var(--soft)}
figure ul{display:flex;flex-wrap:wrap;gap:0 16px;margin:6px 0 0;padding:0;list-style:none;
font-size:.8rem;color:var(--soft)}
figure li b{font-weight:600;color:var(--ink);font-variant-numeric:tabular-nums}
.key{display:inline-block;width:14px;height:3px;margin-right:6px;vertical-align:middle;
border-radius:2px}
pre{margin:0;padding:14px 16px;overflow-x:auto;border-radius:6px;background:var(--wash);
font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.env{margin:18px 0;font-size:.875rem}
.env th{color:var(--soft);padding:3px 28px 3px 0;vertical-align:top}.env td{overflow-wrap:anywhere}
summary{cursor:pointer;font-size:.9rem;padding:6px 0}
summary:focus-visible,a:focus-visible{outline:2px solid var(--student);outline-offset:2px}
@media (max-width:900px){
.figures{grid-template-columns:repeat(3,minmax(0,1fr))}
.chart text{font-size:12.5px}.wide .chart text{font-size:15px}
}
@media (max-width:620px){
header{flex-direction:column;align-items:flex-start;padding-bottom:28px}
header>div{flex:none}
.mark{flex:none;display:flex;align-items:flex-end;gap:16px}.mark svg{width:112px}
.figures{grid-template-columns:minmax(0,1fr)}.figures .wide{grid-column:auto}
.chart text{font-size:10.5px}.wide .chart text{font-size:19px}
.times tr{display:grid;grid-template-columns:minmax(0,1fr) auto;padding-bottom:8px}
.times th{white-space:normal;overflow-wrap:anywhere}.times .soft{display:none}
.heat.many td[style]{min-width:36px;padding:6px 2px}
.heat tbody th{max-width:8.5em;overflow-wrap:anywhere;line-height:1.2}
.answers tr{display:grid;grid-template-columns:repeat(3,minmax(0,1fr))}
.answers td:first-child,.answers th:first-child{grid-column:1/-1;width:auto;padding-bottom:0}
.answers tbody tr{border-top:1px solid var(--line)}
.differing:not(.answers){min-width:560px}
.times .track{grid-row:2;grid-column:1/-1;padding:0}.track .bar{height:6px}
.compare thead tr,.compare tbody tr{display:grid;grid-auto-flow:column;
grid-auto-columns:minmax(132px,1fr)}
.compare thead td{display:none}
.compare tbody th{grid-row:1;grid-column:1;padding-bottom:0;color:var(--soft);font-size:.875rem;
white-space:nowrap}
.compare tbody td{grid-row:2;padding-top:2px}
.compare th,.compare td{padding-right:14px}
}
@media print{
@page{margin:14mm}
body{font-size:10.5pt}main{max-width:none;padding:0}
header{padding-bottom:20px}section{padding:18px 0}section:last-child{padding-bottom:0}
.compare th,.compare td{padding-top:5px;padding-bottom:3px}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
article,figure,tr{break-inside:avoid}h2,h3,dl{break-after:avoid}
.scroll{overflow:visible}pre{white-space:pre-wrap}
}
"""
)
