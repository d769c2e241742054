// The state of the page in its address, so that a link shows what its sender sees; and the start of the page.
"use strict";

const ORDER = Object.keys(data.boxes); // boxes go by their numbers in the address
const AT_FIRST = new Set(data.opened);

/** The state as the text of an address, without what is as it was when the page was opened. */
function stateText() {
  const { x, y, zoom } = scene.view, state = new URLSearchParams();
  const toggled = ORDER.map((key, i) => [key, i]).filter(([key]) => scene.opened.has(key) !== AT_FIRST.has(key)).map(([, i]) => i.toString(36));
  const entries = {
    s: field.value, for: field.value ? data.rules[Number(kind.value)].key : "", q: element("search").value, c: scene.chosen ?? "",
    rule: pressed === null ? "" : data.regularizers[Number(pressed)].name, open: toggled.join("."),
    at: scene.fitted === "first" ? "" : [Math.round(x), Math.round(y), Number(zoom.toPrecision(3))].join(","),
    theme: document.documentElement.dataset.theme ?? "", code: code.hidden ? "" : (litLine ?? "open"),
    value: readings.steps.length ? `${element("statistic").value},${element("step").value}` : "",
  };
  for (const [name, text] of Object.entries(entries)) if (text) state.set(name, text);
  return state.toString();
}

/** Show a state. What the page does not know, such as a box of an older page, is passed over. */
function showState(text) {
  const state = new URLSearchParams(text);
  if (/^(light|dark)$/.test(state.get("theme"))) document.documentElement.dataset.theme = state.get("theme");
  const opened = new Set(AT_FIRST);
  for (const number of (state.get("open") ?? "").split(".")) {
    const key = ORDER[Number.parseInt(number, 36)];
    if (key !== undefined && !opened.delete(key)) opened.add(key);
  }
  scene.open(opened);
  const rule = data.rules.findIndex(({ key }) => key === state.get("for"));
  if (rule >= 0) kind.value = String(rule);
  field.value = state.get("s") ?? "";
  element("search").value = state.get("q") ?? "";
  showHits();
  const [statistic, step] = (state.get("value") ?? "").split(",");
  if (statistic && readings.series[statistic]) [element("statistic").value, element("step").value] = [statistic, step];
  if (readings.steps.length) showValues();
  scene.fit("first");
  showSelected();
  const pressedNow = data.regularizers.findIndex(({ name }) => name === state.get("rule"));
  if (pressedNow >= 0) press(String(pressedNow));
  showCode(state.has("code"));
  if (/^\d+\.\d+$/.test(state.get("code"))) pressLine(state.get("code"));
  const chosen = state.get("c");
  choose(chosen !== null && (chosen in data.nodes || chosen in data.boxes) ? chosen : null);
  const at = (state.get("at") ?? "").split(",").map(Number);
  if (at.length === 3 && at.every(Number.isFinite) && at[2] > 0) {
    [scene.view, scene.fitted] = [{ x: at[0], y: at[1], zoom: at[2] }, null];
    scene.look();
  }
}

let waiting = null, written = null;
function keepState() {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const text = stateText();
    if (text === written) return;
    written = text;
    try {
      history.replaceState(null, "", text ? `#${text}` : location.href.replace(/#.*/, ""));
    } catch {} // a page within a notebook has no address of its own
  }, 200);
}

element("harms").innerHTML = asItems(data.harms);
element("legend").innerHTML = data.regularizers
  .map(({ name, text, colour }, i) => `<li><button data-rule="${i}" aria-pressed="false" style="--colour: ${colour}"><i></i>${html(name)} <small>${html(text)}</small></button></li>`)
  .join("");
showChanges();
showDetails(null);
scene.draw();
if (data.values) takeReadings(data.values);
showState(location.hash.slice(1));
scene.changed = keepState;
new ResizeObserver(() => scene.refit()).observe(graph);
window.addEventListener("hashchange", () => location.hash.slice(1) !== written && showState(location.hash.slice(1)));
window.graphreg = { data, scene, select, selected, glob, parse, choose, toggle, go, stateText };
