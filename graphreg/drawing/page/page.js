// The page: mouse, keys, search, the selector box and the panel. Tests, and a browser's console, use `window.graphreg`.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
data.boxes = record(data.boxes);
data.nodes = record(data.nodes);
const element = (id) => document.getElementById(id);
const scene = new Scene(data, element("graph"));
const siteOf = record(), sitesAt = record();
for (const site of data.sites) {
  if (site.kind === "value") siteOf[site.name] = site;
  if (site.at !== null) (sitesAt[site.at] ??= []).push(site);
}

// The panel

function rows(pairs) {
  return `<dl>${pairs.filter(([, text]) => text).map(([name, text]) => `<dt>${html(name)}</dt><dd>${html(text)}</dd>`).join("")}</dl>`;
}

function action({ regularizer, matched }) {
  const { name, cls, strength, doc, code, colour } = data.regularizers[regularizer];
  return `<section class="act" style="--colour: ${colour}"><h3>${html(name)} <small>${html(cls)}, strength ${strength}${matched ? `, matched by ${html(matched)}` : ""}</small></h3>
    <p>${html(doc)}</p>${code ? `<pre>${html(code)}</pre>` : ""}</section>`;
}

function described(site) {
  return `${rows([["also called", site.names.slice(1).join(", ")], ["op", site.op], ["shape", site.shape], ["dtype", site.dtype],
    ["role", marked(site).join(", ")], ["not selectable", site.why_not], ["source", site.source], ["native dropout", site.own_dropout]])}
    ${site.acts.map(action).join("")}${site.acts.length ? "" : "<p>No regularizer acts here.</p>"}`;
}

function showDetails(key) {
  const box = data.boxes[key], node = data.nodes[key];
  if (!box && !node) return void (element("panel").innerHTML = element("start").innerHTML);
  const parameters = box ? [] : (sitesAt[key] ?? []).filter((site) => site.name !== node.site);
  const site = node && siteOf[node.site];
  element("panel").innerHTML = box
    ? `<h2>${html(box.path)}</h2>${rows([["class", box.op], ["nodes drawn inside", box.nodes]])}
       <p>${Object.entries(box.acts).map(([i, count]) => `${html(data.regularizers[i].name)}: ${count}`).join("<br>") || "No regularizer acts inside."}</p>`
    : `<h2>${html(site ? site.name : node.name)}</h2>${site ? described(site) : rows([["op", node.op], ["shape", node.shape], ["source", node.source]])}
       ${node.regularizer >= 0 ? action({ regularizer: node.regularizer }) + rows([["site", node.acts_at]]) : ""}`;
  for (const parameter of parameters) element("panel").insertAdjacentHTML("beforeend", `<h2 class="parameter">${html(parameter.name)}</h2>${described(parameter)}`);
}

function choose(key) {
  scene.choose(key);
  showDetails(key);
}

function toggle(key) {
  if (key in data.boxes) scene.toggle(key);
}

// The selector box

const kind = element("kind"), field = element("selector");
kind.innerHTML = data.rules.map(({ key, cls }, i) => `<option value="${i}" title="${html(cls)}">${html(key)}</option>`).join("");

let pressed = null; // the index of the legend's regularizer whose sites are lit; null for none
let typed = []; // the sites that the text in the selector box selects

/** The sites that the text selects for a kind of regularizer, as the library would select them. */
function selected(text, rule = data.rules[Number(kind.value)]) {
  return select(apart(text), data.sites, rule);
}

/** What the selector box asks for: a regularizer's key, its weight, and its selector, as text that Python and TOML read alike. */
function asked(text) {
  const { key, weight } = data.rules[Number(kind.value)];
  const texts = apart(text).map((one) => JSON.stringify(one));
  return { key: JSON.stringify(key), weight: String(weight), pattern: texts.length === 1 ? texts[0] : `[${texts.join(", ")}]` };
}

function pasted({ key, weight, pattern }) {
  return `module = graphreg.regularize(model, graphreg.build(${key}, weight=${weight}, pattern=${pattern}))`;
}

/** A recipe in TOML with these regularizers: regularize(model, recipe="recipe.toml") reads it. */
function asRecipe(regularizers) {
  const tables = regularizers.map((each) => `\n[[regularizers]]\n${Object.entries(each).map(([name, value]) => `${name} = ${value}\n`).join("")}`);
  return `recipe = 1\n${tables.join("")}`;
}

let kept = []; // the regularizers that the recipe has besides the one in the selector box

/** Show the recipe of what is kept and of what the selector box asks for; null if it asks for nothing. */
function showRecipe(present) {
  const regularizers = present === null ? kept : [...kept, present];
  element("asrecipe").hidden = !regularizers.length;
  element("recipe").textContent = regularizers.length ? asRecipe(regularizers) : "";
  element("keep").hidden = present === null;
  element("drop").hidden = !kept.length;
}

function showSelected() {
  const text = apart(field.value).length ? field.value : "";
  let selection = { chosen: [], errors: [] };
  try {
    if (text) selection = selected(text);
  } catch (error) {
    selection.errors = [error.message];
  }
  typed = selection.chosen;
  press(null);
  const count = selection.chosen.length;
  element("count").textContent = text ? `${count} site${count === 1 ? "" : "s"}` : "";
  element("wrong").textContent = selection.errors.join("\n");
  const present = count && !selection.errors.length ? asked(text) : null;
  element("paste").textContent = present ? pasted(present) : "";
  showRecipe(present);
  element("copy").hidden = !element("paste").textContent;
  element("found").innerHTML = selection.chosen.slice(0, 200).map((site) => `<li><button data-go="${html(site.at ?? "")}">${html(site.name)}</button></li>`).join("");
}

/** Light up the sites where a regularizer of the legend acts; for null, the sites that the selector box selects. */
function press(rule) {
  pressed = rule;
  for (const button of element("legend").querySelectorAll("button")) button.setAttribute("aria-pressed", button.dataset.rule === rule);
  light(rule === null ? typed : data.sites.filter((site) => site.acts.some((act) => act.regularizer === Number(rule))));
}

function light(sites) {
  const counts = record();
  for (const site of sites) if (site.at !== null) counts[site.at] = (counts[site.at] ?? 0) + 1;
  scene.light(counts);
  scene.showLit();
}

// Search

function showHits() {
  const text = element("search").value.trim().toLowerCase();
  const known = Object.entries(data.nodes).map(([key, node]) => [key, node.name, node.op]);
  known.push(...Object.entries(data.boxes).filter(([key]) => key !== "/").map(([key, box]) => [key, box.path, box.op]));
  const hits = text ? known.filter(([, name, op]) => `${name} ${op}`.toLowerCase().includes(text)) : [];
  element("hits").innerHTML = hits.slice(0, 40).map(([key, name, op]) => `<li><button data-go="${html(key)}">${html(name)} <small>${html(op)}</small></button></li>`).join("");
  element("hitcount").textContent = text ? `${hits.length} found` : "";
}

function go(key) {
  if (!key) return;
  scene.reveal(key);
  choose(key);
  scene.centre(key);
}

// Mouse and keys

const graph = element("graph");
let drag = null;
graph.addEventListener("pointerdown", (event) => (drag = { x: event.clientX, y: event.clientY, moved: false, key: event.target.closest("[data-key]")?.dataset.key ?? null }));
window.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const [x, y] = [event.clientX - drag.x, event.clientY - drag.y];
  if (!drag.moved && Math.hypot(x, y) < 4) return;
  drag = { ...drag, x: event.clientX, y: event.clientY, moved: true };
  scene.pan(x, y);
});
window.addEventListener("pointerup", () => {
  if (drag && !drag.moved) {
    toggle(drag.key);
    choose(drag.key);
  }
  drag = null;
});
graph.addEventListener("wheel", (event) => {
  event.preventDefault();
  const at = graph.getBoundingClientRect();
  scene.zoom(Math.exp(-event.deltaY * 0.0015), [event.clientX - at.left, event.clientY - at.top]);
}, { passive: false });

const ARROWS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
const COMMANDS = {
  "+": () => scene.zoom(1.25), "=": () => scene.zoom(1.25), "-": () => scene.zoom(0.8), 0: () => scene.fit(), w: () => scene.fit(true),
  "/": () => element("search").focus(), s: () => field.focus(), f: () => foldAll(false), u: () => foldAll(true), t: () => theme(),
  Escape: () => letGo(), Enter: () => toggle(scene.chosen), " ": () => toggle(scene.chosen),
};

/** Empty a text box, and thereby its results. */
function clear(box) {
  box.value = "";
  box.dispatchEvent(new Event("input"));
}

function letGo() {
  choose(null);
  clear(field);
  clear(element("search"));
}

function foldAll(open) {
  scene.opened = new Set(open ? Object.keys(data.boxes) : ["/"]);
  scene.draw();
  scene.fit();
}

function theme() {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
}

document.addEventListener("keydown", (event) => {
  const inside = event.target.tagName;
  if (event.key === "Escape") {
    if (inside === "INPUT") clear(event.target);
    else if (inside !== "SELECT") letGo();
    graph.focus();
    return event.preventDefault();
  }
  if (/^(INPUT|SELECT)$/.test(inside) || (inside === "BUTTON" && /^(Enter| )$/.test(event.key))) return;
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
  else if (button.dataset.key) COMMANDS[button.dataset.key]();
  else if (button.dataset.rule) press(button.dataset.rule === pressed ? null : button.dataset.rule);
  else if (button.id === "copy") navigator.clipboard?.writeText(element("paste").textContent);
  else if (button.id === "copyrecipe") navigator.clipboard?.writeText(element("recipe").textContent);
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
element("search").addEventListener("input", showHits);
element("search").addEventListener("keydown", (event) => event.key === "Enter" && go(element("hits").querySelector("button")?.dataset.go));

element("legend").innerHTML = data.regularizers
  .map(({ name, text, colour }, i) => `<li><button data-rule="${i}" aria-pressed="false" style="--colour: ${colour}"><i></i>${html(name)} <small>${html(text)}</small></button></li>`)
  .join("");
showDetails(null);
scene.draw();
scene.fit();
new ResizeObserver(() => scene.refit()).observe(graph);
window.graphreg = { data, scene, select, selected, glob, parse, choose, toggle, go };
