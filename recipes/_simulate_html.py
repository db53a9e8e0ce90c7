"""The Gantt view as one self-contained page: choose a policy, hover, zoom with the wheel, drag to move."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lightning_easyscale.simulation.result import Result

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Simulated schedules</title><style>
body{font:14px system-ui,sans-serif;margin:16px;color:#222}
header{display:flex;gap:16px;align-items:baseline;flex-wrap:wrap}
#numbers{color:#555}#tip{position:fixed;pointer-events:none;background:#fff;border:1px solid #999;padding:4px 8px;
border-radius:4px;font-size:12px;display:none;white-space:pre}
canvas{border:1px solid #ddd;margin-top:8px;display:block;cursor:grab}.key{font-size:12px;margin-right:10px}
.key i{display:inline-block;width:10px;height:10px;margin-right:4px}</style></head><body>
<header><label>policy <select id="policy"></select></label><span id="numbers"></span>
<button id="reset">whole run</button></header><div id="keys"></div>
<canvas id="use" height="110"></canvas><canvas id="rows"></canvas><div id="tip"></div><script>
const DATA = /*DATA*/;
const colours = ["#4878a8","#ee854a","#6acc64","#d65f5f","#956cb4","#8c613c","#dc7ec0","#797979","#d5bb67","#82c6e2"];
const pick = document.getElementById("policy"), use = document.getElementById("use"),
  rows = document.getElementById("rows"), tip = document.getElementById("tip");
const loads = [...new Set(Object.values(DATA.runs).flatMap(r => r.jobs.map(j => j.workload)))].sort();
const colour = w => colours[loads.indexOf(w) % colours.length];
for (const name of Object.keys(DATA.runs)) pick.add(new Option(name, name));
document.getElementById("keys").innerHTML = loads.map(w =>
  `<span class="key"><i style="background:${colour(w)}"></i>${w}</span>`).join("") +
  '<span class="key"><i style="background:#ccc"></i>waiting</span><span class="key">height: devices / maxP</span>';
let run, from = 0, to = 1;
const left = 150, step = 14, end = () => Math.max(...run.jobs.map(j => j.finish)) * 1.01;
const x = t => left + (t - from) / (to - from) * (rows.width - left - 10);
function draw() {
  rows.width = use.width = Math.max(600, innerWidth - 40);
  rows.height = run.jobs.length * step + 24;
  const c = rows.getContext("2d"); c.font = "10px sans-serif";
  run.jobs.forEach((j, i) => {
    const y = i * step + 2;
    c.fillStyle = "#ccc"; c.fillRect(x(j.submit), y + 5, Math.max(0, x(j.start) - x(j.submit)), 2);
    c.fillStyle = colour(j.workload);
    for (let k = 0; k + 1 < j.segments.length; k++) {
      const [t, n] = j.segments[k], after = j.segments[k + 1][0];
      if (!n) { c.fillStyle = "#ccc"; c.fillRect(x(t), y + 5, x(after) - x(t), 2); c.fillStyle = colour(j.workload);
        continue; }
      const held = n.reduce((a, b) => a + b), h = 3 + (step - 5) * Math.min(1, held / j.size);
      c.fillRect(x(t), y + (step - 2 - h) / 2, Math.max(0.7, x(after) - x(t)), h);
    }
    c.fillStyle = "#fff"; c.fillRect(0, y - 2, left - 4, step);
    c.fillStyle = "#333"; c.fillText(j.name.slice(0, 24), 2, y + 9);
  });
  axis(c, rows.height - 8); drawUse();
}
function axis(c, y) {
  c.fillStyle = "#555";
  for (let k = 0; k <= 8; k++) { const t = from + (to - from) * k / 8; c.fillText(t.toFixed(0) + " s", x(t) - 10, y); }
}
function drawUse() {
  const c = use.getContext("2d"), h = use.height - 14, all = DATA.capacity.reduce((a, b) => a + b);
  c.font = "10px sans-serif"; c.fillStyle = "#333"; c.fillText("devices in use, of " + all, 2, 12);
  const shades = ["#33608c", "#6f9bc4", "#b7cfe5"];
  for (let k = 0; k + 1 < run.use.length; k++) {
    const [t, n] = run.use[k]; let base = h;
    n.forEach((v, g) => { const d = v / all * (h - 4); c.fillStyle = shades[g % 3];
      c.fillRect(x(t), base - d, Math.max(0.5, x(run.use[k + 1][0]) - x(t)), d); base -= d; });
  }
  c.clearRect(0, 16, left - 4, h); DATA.types.forEach((t, g) => { c.fillStyle = shades[g % 3];
    c.fillRect(2, 22 + 14 * g, 9, 9); c.fillStyle = "#333"; c.fillText(t, 16, 30 + 14 * g); });
}
function choose() {
  run = DATA.runs[pick.value]; from = 0; to = end();
  document.getElementById("numbers").textContent = run.numbers; draw();
}
rows.onmousemove = e => {
  const j = run.jobs[Math.floor(e.offsetY / step)];
  if (drag) { const d = (drag - e.offsetX) / (rows.width - left) * (to - from); from += d; to += d; drag = e.offsetX;
  draw(); } if (!j || drag) { tip.style.display = "none"; return; }
  const t = from + (e.offsetX - left) / (rows.width - left - 10) * (to - from);
  let now = null; for (const [s, n] of j.segments) if (s <= t) now = n;
  const held = now ? DATA.types.map((g, i) => now[i] ? now[i] + " " + g : "").filter(Boolean).join(", ") : "none";
  tip.textContent = `${j.name} (${j.workload}, maxP ${j.size})\\nsubmitted ${j.submit.toFixed(0)} s, started ` +
    `${j.start.toFixed(0)} s, finished ${j.finish.toFixed(0)} s\\nat ${t.toFixed(0)} s: ${held}; ` +
    `${j.rescales} rescales`;
  tip.style.display = "block"; tip.style.left = e.clientX + 14 + "px"; tip.style.top = e.clientY + 10 + "px";
};
let drag = 0;
rows.onmousedown = e => { drag = e.offsetX; }; addEventListener("mouseup", () => { drag = 0; });
rows.onmouseleave = () => { tip.style.display = "none"; };
rows.addEventListener("wheel", e => {
  if (!e.ctrlKey && !e.shiftKey) return; e.preventDefault();
  const t = from + (e.offsetX - left) / (rows.width - left - 10) * (to - from), f = (e.deltaY || e.deltaX) > 0 ? 1.2 : 1
  / 1.2; from = t - (t - from) * f; to = t + (to - t) * f; draw();
}, {passive: false});
rows.ondblclick = e => {
  const t = from + (e.offsetX - left) / (rows.width - left - 10) * (to - from), w = (to - from) / 6; from = t - w; to =
  t + w; draw();
};
document.getElementById("reset").onclick = () => { from = 0; to = end(); draw(); };
pick.onchange = choose; addEventListener("resize", draw); choose();
</script><p>Shift or Ctrl and the wheel zoom, a double click zooms in, dragging moves.</p></body></html>
"""


def gantt_page(results: Mapping[str, Result], limit: int) -> str:
    """The page for several policies on one trace, with the first `limit` jobs by submission each."""
    some = next(iter(results.values()))
    runs = {}
    for name, result in results.items():
        summary = result.summary()
        times, levels = result.usage()
        thin = max(1, len(times) // 4000)
        runs[name] = {
            "numbers": f"average JCT {summary['avg_jct_s']:.0f} s, makespan {summary['makespan_s']:.0f} s,"
            f" utilisation {float(summary['utilisation']):.0%}, {summary['rescales']} rescales",
            "use": [[round(t, 2), c] for t, c in zip(times[::thin], levels[::thin], strict=True)],
            "jobs": [
                {
                    "name": r.name,
                    "workload": r.workload,
                    "size": r.max_ests,
                    "submit": round(r.submit_s, 2),
                    "start": round(r.start_s, 2),
                    "finish": round(r.finish_s, 2),
                    "rescales": r.rescales,
                    "segments": [[round(t, 2), c] for t, c in r.segments],
                }
                for r in sorted(result.records, key=lambda r: r.submit_s)[:limit]
            ],
        }
    data = json.dumps({"types": some.types, "capacity": some.capacity, "runs": runs}, separators=(",", ":"))
    return _PAGE.replace("/*DATA*/", data.replace("</", "<\\/"))
