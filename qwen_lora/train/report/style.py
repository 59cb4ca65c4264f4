"""The page's style sheet: light and dark, from a phone to a wide screen, nothing loaded."""

STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfa;--ink:#1b1e23;--soft:#5c636d;--rule:#dfe1dd;
--well:#f2f3ef;--edge:#0000001c;--c1:#1f63c6;--c2:#c8480f;--c3:#4b2a9b;--c4:#9a2a92;--c5:#d0426b;--c6:#dd7420;
--c7:#b58a00;--good:#1d7a46;--warn:#9c5b00}
@media (prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e7e9ec;--soft:#a0a7b1;
--rule:#31353b;--well:#1e2125;--edge:#ffffff24;--c1:#74a9ff;--c2:#ff9a5f;--c3:#a392ff;--c4:#dd7fe0;--c5:#ff82a3;
--c6:#ffae5e;--c7:#f2d24b;--good:#6fcf97;--warn:#f0b35a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:36px 24px 56px}
h1,h2,h3,p,ul,ol,dl,dd,figure{margin:0;padding:0}
ul,ol{list-style:none}
h1{font-size:30px;line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:20px;line-height:1.3;letter-spacing:-.01em;margin:48px 0 14px;padding-top:16px;
border-top:1px solid var(--rule)}
h3{font-size:14px;font-weight:600;margin:0 0 8px}
p.note{color:var(--soft);max-width:75ch;margin-bottom:14px}
.state{display:inline-block;vertical-align:.3em;margin-left:10px;padding:2px 10px;
border:1px solid currentColor;border-radius:99px;font-size:12.5px;font-weight:600;
letter-spacing:.01em;white-space:nowrap;line-height:1.5}
.state.done{color:var(--good)}.state.running{color:var(--c1)}.state.stopped{color:var(--warn)}
.sub{color:var(--soft);margin-top:6px;overflow-wrap:anywhere}
.figures{display:flex;flex-wrap:wrap;gap:1px;margin-top:24px;background:var(--rule);
border:1px solid var(--rule);border-radius:8px;overflow:hidden}
.figures div{flex:1 1 150px;background:var(--paper);padding:12px 16px 13px}
.figures dt{color:var(--soft);font-size:13px}
.figures dd{font-size:23px;font-weight:600;letter-spacing:-.02em;line-height:1.3;
font-variant-numeric:tabular-nums}
.figures small{display:block;font-size:12.5px;font-weight:400;letter-spacing:0;color:var(--soft)}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:28px 36px}
.two>*{min-width:0}
.chart+.chart,.two+.chart,.chart+.two{margin-top:44px}
.two .chart+.chart{margin-top:0}
.two>.chart{margin-top:0}
figcaption{display:flex;flex-wrap:wrap;gap:2px 18px;align-items:baseline;font-weight:600;
font-size:14px}
figcaption ul{display:flex;flex-wrap:wrap;gap:0 16px;font-weight:400;font-size:13px;
color:var(--soft)}
figcaption i{display:inline-block;width:16px;height:0;border-top:3px solid;border-radius:2px;
margin-right:6px;vertical-align:.28em}
figcaption i.faint{border-top-width:2px;opacity:.5}
i.c1{color:var(--c1)}i.c2{color:var(--c2)}i.c3{color:var(--c3)}i.c4{color:var(--c4)}
i.c5{color:var(--c5)}i.c6{color:var(--c6)}i.c7{color:var(--c7)}
.plot{position:relative;height:300px;margin:14px 14px 30px 48px}
.plot.low{height:150px}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.plot path{fill:none;stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round;
stroke-linecap:round}
.plot path.rule{stroke:var(--rule);stroke-width:1}
.plot .c1{stroke:var(--c1)}.plot .c2{stroke:var(--c2)}.plot .c3{stroke:var(--c3)}
.plot .c4{stroke:var(--c4)}.plot .c5{stroke:var(--c5)}.plot .c6{stroke:var(--c6)}
.plot .c7{stroke:var(--c7)}
.plot path.faint{stroke-width:1;opacity:.36}
.plot path.dot{stroke-width:7}
.plot span{position:absolute;font-size:12px;line-height:1;color:var(--soft);white-space:nowrap;
font-variant-numeric:tabular-nums}
.plot .y{right:calc(100% + 8px);transform:translateY(-50%)}
.plot .x{top:calc(100% + 9px);transform:translateX(-50%)}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
table.numbers{font-size:14px;min-width:min(100%,420px)}
.numbers th,.numbers td{text-align:right;padding:5px 0 5px 22px;
border-bottom:1px solid var(--rule);white-space:nowrap}
.numbers th:first-child,.numbers td:first-child{text-align:left;padding-left:0}
.numbers thead th{font-weight:500;color:var(--soft)}
.down{color:var(--good)}.up{color:var(--warn)}
.drawn{table-layout:fixed}
.drawn thead th{font-weight:500;font-size:13px;color:var(--soft);padding:0 3px 2px}
.drawn tbody th{text-align:left;font-weight:400;padding:12px 3px 5px}
.drawn tbody th div{position:sticky;left:3px;display:inline-block;
max-width:min(100%,calc(100vw - 44px));overflow-wrap:anywhere}
.drawn td{padding:0 3px;vertical-align:top}
.drawn img,.samples img{display:block;width:100%;height:auto;border-radius:4px;
background:var(--well)}
.drawn img,.samples .box{outline:1px solid var(--edge);outline-offset:-1px}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(116px,1fr));gap:16px 12px}
.samples li{min-width:0;font-size:12.5px;line-height:1.4;color:var(--soft)}
.samples .box{position:relative;display:flex;align-items:center;justify-content:center;
aspect-ratio:1;background:var(--well);border-radius:4px;margin-bottom:6px;overflow:hidden}
.samples .box img{height:100%;object-fit:contain}
.samples b{color:var(--c2);font-weight:600}
.samples span{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:3;
overflow:hidden;overflow-wrap:anywhere}
.columns{columns:2 360px;column-gap:36px}
.columns>div{break-inside:avoid;padding-bottom:28px}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:5px 12px;
align-items:center;font-size:13.5px;font-variant-numeric:tabular-nums}
.bars span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;max-width:180px}
.bars i{display:block;height:10px;min-width:2px;background:var(--c1);opacity:.75;
border-radius:2px}
.bars em{font-style:normal;color:var(--soft);text-align:right}
dl.facts{display:grid;align-content:start;grid-template-columns:max-content 1fr;gap:5px 22px;
font-size:14px}
dl.facts dt{color:var(--soft)}
dl.facts dd{overflow-wrap:anywhere}
code,pre{font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{margin:16px 0 0;padding:14px 16px;background:var(--well);border-radius:8px;overflow-x:auto}
details{margin-top:8px}
summary{cursor:pointer;color:var(--c1);font-weight:500;padding:4px 0}
.settings{font-size:13.5px;width:100%;table-layout:fixed}
.settings td{padding:4px 14px 4px 0;border-bottom:1px solid var(--rule);vertical-align:top;
overflow-wrap:anywhere}
.settings td:first-child{width:44%}
footer{margin-top:48px;padding-top:14px;border-top:1px solid var(--rule);font-size:13px;
color:var(--soft)}
.gap{margin-top:32px}
@media (max-width:560px){main{padding:24px 16px 40px}h1{font-size:25px}
h2{margin-top:36px}.figures div{flex-basis:130px}.figures dd{font-size:20px}
.plot{height:220px;margin-left:42px}.plot.low{height:130px}
.samples{grid-template-columns:repeat(3,1fr)}
.numbers th,.numbers td{padding-left:14px}dl.facts{gap:5px 14px}}
@media print{main{max-width:none;padding:0}h2{break-after:avoid}.chart,.samples li{
break-inside:avoid}}
"""
