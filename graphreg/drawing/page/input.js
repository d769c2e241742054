// Mouse, touch, keys and buttons.
"use strict";

const graph = element("graph");
const pointers = new Map(); // the fingers or the mouse, by id: where they are
let press0 = null; // where the first pointer went down, until it has moved; `key`: what is there

graph.addEventListener("pointerdown", (event) => {
  pointers.set(event.pointerId, [event.clientX, event.clientY]);
  press0 = pointers.size === 1 ? { at: [event.clientX, event.clientY], key: event.target.closest("[data-key]")?.dataset.key ?? null } : null;
});

/** Where two fingers are: their middle within the graph, and how far apart they are. */
function pinch() {
  const [[a, b], [c, d]] = [...pointers.values()], at = graph.getBoundingClientRect();
  return { middle: [(a + c) / 2 - at.left, (b + d) / 2 - at.top], far: Math.hypot(a - c, b - d) };
}

window.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) return;
  const now = [event.clientX, event.clientY];
  if (press0 && Math.hypot(now[0] - press0.at[0], now[1] - press0.at[1]) < 4) return;
  press0 = null;
  const old = pointers.size === 2 ? pinch() : null;
  pointers.set(event.pointerId, now);
  if (pointers.size === 1) return scene.pan(now[0] - before[0], now[1] - before[1]);
  if (!old) return;
  const { middle, far } = pinch();
  scene.pan(middle[0] - old.middle[0], middle[1] - old.middle[1]);
  scene.zoom(far / Math.max(old.far, 1), middle);
});
function released(event, clicked) {
  if (!pointers.delete(event.pointerId)) return;
  if (clicked && press0) {
    const { key } = press0;
    toggle(key);
    choose(key);
  }
  press0 = null;
}
window.addEventListener("pointerup", (event) => released(event, true));
window.addEventListener("pointercancel", (event) => released(event, false));
graph.addEventListener("wheel", (event) => {
  event.preventDefault();
  const at = graph.getBoundingClientRect();
  scene.zoom(Math.exp(-event.deltaY * 0.0015), [event.clientX - at.left, event.clientY - at.top]);
}, { passive: false });

const ARROWS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
const COMMANDS = {
  "+": () => scene.zoom(1.25), "=": () => scene.zoom(1.25), "-": () => scene.zoom(0.8), 0: () => scene.fit(), w: () => scene.fit("whole"),
  "/": () => element("search").focus(), s: () => field.focus(), f: () => foldAll(false), u: () => foldAll(true), t: () => theme(), c: () => showCode(code.hidden),
  Escape: () => letGo(), Enter: () => toggle(scene.chosen), " ": () => toggle(scene.chosen),
};

/** Empty a text box, and thereby its results. */
function clear(box) {
  box.value = "";
  box.dispatchEvent(new Event("input"));
}

function letGo() {
  clear(field);
  clear(element("search"));
  choose(null);
}

function foldAll(open) {
  scene.open(open ? Object.keys(data.boxes) : []);
  scene.fit();
}

function theme() {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  scene.changed();
}

/** Copy the text of an element, and say so on the button; where the browser does not allow that, select the text to be copied by hand. */
async function copy(button, source) {
  let said = "copied";
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    getSelection().selectAllChildren(source);
    if (!document.execCommand("copy")) said = "press Ctrl+C";
  }
  button.textContent = said;
  setTimeout(() => (button.textContent = "copy"), 2000);
}

document.addEventListener("keydown", (event) => {
  const inside = event.target.tagName;
  if (event.key === "Escape") {
    if (inside === "INPUT" && event.target.type !== "range") clear(event.target);
    else if (inside !== "SELECT") letGo();
    graph.focus();
    return event.preventDefault();
  }
  if (/^(INPUT|SELECT|SUMMARY)$/.test(inside) || (inside === "BUTTON" && /^(Enter| )$/.test(event.key))) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (ARROWS[event.key]) {
    choose(scene.nearest(ARROWS[event.key]) ?? null);
    scene.centre(scene.chosen);
  } else if (COMMANDS[event.key]) COMMANDS[event.key]();
  else return;
  event.preventDefault();
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.go !== undefined) go(button.dataset.go);
  else if (button.dataset.line) button.dataset.line === litLine ? press(null) : pressLine(button.dataset.line);
  else if (button.dataset.key) COMMANDS[button.dataset.key]();
  else if (button.dataset.rule) press(button.dataset.rule === pressed ? null : button.dataset.rule);
  else if (button.id === "copy") copy(button, element("paste"));
  else if (button.id === "copyrecipe") copy(button, element("recipe"));
  else if (button.id === "more") showHits(true);
  else if (button.id === "keep") {
    kept.push(asked(field.value));
    field.value = "";
    showSelected();
    field.focus();
  } else if (button.id === "drop") {
    kept.pop();
    showSelected();
  }
});
field.addEventListener("input", showSelected);
kind.addEventListener("input", showSelected);
element("search").addEventListener("input", () => {
  showHits();
  scene.changed();
});
element("search").addEventListener("keydown", (event) => event.key === "Enter" && go(element("hits").querySelector("button")?.dataset.go));
element("statistic").addEventListener("input", showValues);
element("step").addEventListener("input", showValues);
element("readings").addEventListener("change", (event) => event.target.files[0] && readFile(event.target.files[0]));
graph.addEventListener("dragover", (event) => event.preventDefault());
graph.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files[0]) readFile(event.dataTransfer.files[0]);
});
