// The values that a monitor has written while the module trained: on the drawing at one step, and in the panel over all steps.
"use strict";

const STATISTIC = /^(.*)\/(mean|std|near_zero|norm|kept\/[^/]+)$/;
let readings = { steps: [], series: record() }; // by statistic, then by site: a number for each step

/** Sort readings by statistic and site. */
function sorted(lines) {
  const series = record();
  lines.forEach(({ values }, i) => {
    for (const [name, value] of Object.entries(values)) {
      const [, site, statistic] = STATISTIC.exec(name) ?? [null, name, ""];
      ((series[statistic] ??= record())[site] ??= Array(lines.length).fill(null))[i] = Number(value);
    }
  });
  return { steps: lines.map(({ step }) => step), series };
}

const short = (value) => (value === null ? "–" : Number.isFinite(value) ? String(Number(value.toPrecision(3))) : String(value));

/** Take over the readings of a file, and show the last one. */
function takeReadings(lines) {
  readings = sorted(lines);
  const statistics = Object.keys(readings.series).filter(Boolean);
  element("statistic").innerHTML = statistics.map((name) => `<option>${html(name)}</option>`).join("");
  element("monitored").hidden = !statistics.length;
  element("step").max = String(readings.steps.length - 1);
  element("step").value = element("step").max;
  showValues();
}

/** Write the values of the chosen statistic at the chosen step onto the drawing; a folded module has the mean of what is inside. */
function showValues() {
  const of = readings.series[element("statistic").value] ?? {}, step = Number(element("step").value), at = record();
  for (const [name, series] of Object.entries(of)) {
    const key = siteOf[name]?.at ?? null;
    if (key === null || series[step] === null) continue;
    for (let shown = key; shown !== undefined && shown !== "/"; shown = scene.around[shown]) (at[shown] ??= []).push(series[step]);
  }
  const mean = (all) => all.reduce((sum, one) => sum + one, 0) / all.length;
  const largest = Math.max(...Object.values(at).map((all) => Math.abs(mean(all))).filter(Number.isFinite), 1e-30);
  const share = (value) => (Number.isFinite(value) ? Math.abs(value) / largest : 1);
  scene.values = Object.fromEntries(Object.entries(at).map(([key, all]) => [key, [`${short(mean(all))}${key in data.boxes ? ` (${all.length})` : ""}`, share(mean(all))]]));
  const penalties = Object.entries(readings.series[""] ?? {}).map(([key, series]) => `${key} ${short(series[step])}`);
  element("stepname").textContent = `step ${readings.steps[step] ?? ""}`;
  element("others").textContent = penalties.join(", ");
  scene.render();
  scene.changed();
}

/** The panel's curves of a site: one for each statistic, over all steps. */
function showSeries(site) {
  const found = site ? Object.entries(readings.series).filter(([name, of]) => name && site.name in of).map(([name, of]) => [name, of[site.name]]) : [];
  if (found.length) element("panel").insertAdjacentHTML("beforeend", found.map(([name, series]) => curve(name, series)).join(""));
}

function curve(name, series) {
  const known = series.map((value, i) => [i, value]).filter(([, value]) => Number.isFinite(value));
  const [low, high] = [Math.min(...known.map(([, value]) => value)), Math.max(...known.map(([, value]) => value))];
  const x = (i) => fixed(4 + (192 * i) / Math.max(1, series.length - 1)), y = (value) => fixed(40 - (36 * (value - low)) / (high - low || 1));
  const path = known.map(([i, value]) => `${x(i)},${y(value)}`).join(" ");
  const told = known.length ? `from ${short(known[0][1])} to ${short(known.at(-1)[1])}, between ${short(low)} and ${short(high)}` : "no numbers";
  return `<figure><figcaption>${html(name)} <small>${told}</small></figcaption><svg class="curve" viewBox="0 0 200 44" role="img" aria-label="${html(`${name}: ${told}`)}"><polyline points="${path}"/></svg></figure>`;
}

/** Read a file that the user has chosen. */
async function readFile(file) {
  try {
    const lines = (await file.text()).split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line));
    if (!lines.length || !lines.every(({ step, values }) => Number.isInteger(step) && typeof values === "object")) throw new Error("no readings");
    element("unread").textContent = "";
    takeReadings(lines);
  } catch {
    element("unread").textContent = `${file.name} is no file that graphreg.monitor(module, file=...) wrote.`;
  }
}
