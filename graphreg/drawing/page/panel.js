// The panel at the right: what was clicked, the selector box, the legend, the differences of a comparison, and search.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
data.boxes = record(data.boxes);
data.nodes = record(data.nodes);
const element = (id) => document.getElementById(id);
const scene = new Scene(data, element("graph"));
const siteOf = record(), sitesAt = record();
for (const site of data.sites) {
  if (site.kind === "value") siteOf[site.name] = site;
  for (const key of site.at === null ? [] : [site.at, ...site.also_at]) (sitesAt[key] ??= []).push(site); // a tied parameter is at several
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
  markLines(box ? [box.path] : node ? (siteOf[node.site]?.names ?? []) : []);
  if (!box && !node) return void (element("panel").innerHTML = litLine === null ? element("start").innerHTML : lineDetails());
  const parameters = box ? [] : (sitesAt[key] ?? []).filter((site) => site.name !== node.site);
  const site = node && siteOf[node.site];
  element("panel").innerHTML = box
    ? `<h2>${html(box.full || data.title)}</h2>${rows([[box.kind === "module" ? "class" : "holds", box.op], ["nodes drawn inside", box.nodes], ["reads from afar", scene.reads(key).join(", ")]])}
       <p>${Object.entries(box.acts).map(([i, count]) => `${html(data.regularizers[i].name)}: ${count}`).join("<br>") || "No regularizer acts inside."}</p>`
    : `<h2>${html(site ? site.name : node.name)}</h2>${changes(node)}${site ? described(site) : rows([["op", node.op], ["shape", node.shape], ["source", node.source]])}
       ${node.regularizer >= 0 ? action({ regularizer: node.regularizer }) + rows([["site", node.acts_at]]) : ""}`;
  showSeries(site);
  for (const parameter of parameters) element("panel").insertAdjacentHTML("beforeend", `<h2 class="parameter">${html(parameter.name)}</h2>${described(parameter)}`);
}

function choose(key) {
  scene.choose(key);
  element("said").textContent = key ? scene.label(key) : "";
  showDetails(key);
  scene.changed();
}

function toggle(key) {
  if (!(key in data.boxes)) return;
  scene.toggle(key);
  element("said").textContent = scene.label(key);
}

// The selector box

const kind = element("kind"), field = element("selector");
kind.innerHTML = data.rules.map(({ key, cls }, i) => `<option value="${i}" title="${html(cls)}">${html(key)}</option>`).join("");
kind.value = String(Math.max(0, data.rules.findIndex(({ key }) => key === "dropout")));

let pressed = null; // the index of the legend's regularizer whose sites are lit; null for none
let typed = []; // the sites that the text in the selector box selects

/** The sites that the text selects for a kind of regularizer, as the library would select them. */
function selected(text, rule = data.rules[Number(kind.value)]) {
  return select(apart(text), data.sites, rule);
}

/** What the selector box asks for: a regularizer's key, its weight, and its selector, as text that Python and TOML read alike. */
function asked(text) {
  const { key, weight, options } = data.rules[Number(kind.value)];
  const texts = apart(text).map((one) => JSON.stringify(one));
  const more = Object.fromEntries(Object.entries(options).map(([name, value]) => [name, JSON.stringify(value)]));
  return { key: JSON.stringify(key), weight: String(weight), ...more, pattern: texts.length === 1 ? texts[0] : `[${texts.join(", ")}]` };
}

function pasted({ key, ...options }) {
  const texts = Object.entries(options).map(([name, value]) => `, ${name}=${value}`);
  return `module = graphreg.regularize(model, graphreg.build(${key}${texts.join("")}))`;
}

/** What `plan` would say where it refuses selected sites; "" if it does not, as far as the page knows. */
function refusal(sites) {
  const number = kind.value, refused = sites.filter((site) => data.refusals[site.refusal]?.[number]);
  if (!refused.length) return "";
  return `plan refuses ${refused.length} of ${sites.length}. ${data.refusals[refused[0].refusal][number].replaceAll("{}", () => refused[0].name)}`;
}

/** What `plan` would say of dropout and noise at these sites: a line for each kind of known harm. */
function harmLines(sites) {
  return data.kinds.flatMap(({ kind, mark, least, why }) => {
    const count = record();
    for (const site of sites) if (site[mark]) count[site[mark]] = (count[site[mark]] ?? 0) + 1;
    const found = sites.filter((site) => count[site[mark]] >= least).length;
    return found ? [`${kind}: ${found} of ${sites.length} sites: ${why}`] : [];
  });
}

const asItems = (lines) => lines.map((line) => `<li>${html(line)}</li>`).join("");

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
  const refused = refusal(typed);
  if (refused) selection.errors.push(refused);
  press(null);
  const count = selection.chosen.length;
  element("count").textContent = text ? `${count} site${count === 1 ? "" : "s"}` : "";
  element("wrong").textContent = selection.errors.join("\n");
  element("harm").innerHTML = asItems(data.rules[Number(kind.value)]?.raises ? harmLines(typed) : []);
  const present = count && !selection.errors.length ? asked(text) : null;
  element("paste").textContent = present ? pasted(present) : "";
  element("unsure").hidden = !present || !data.rules[Number(kind.value)].unsure;
  showRecipe(present);
  element("copy").hidden = !element("paste").textContent;
  element("found").innerHTML = selection.chosen.slice(0, 200).map((site) => `<li><button data-go="${html(site.at ?? "")}">${html(site.name)}</button></li>`).join("");
}

/** Light up the badges of a regularizer of the legend, and what they are on; for null, the sites that the selector box selects. */
function press(rule) {
  letGoOfLine();
  pressed = rule;
  for (const button of element("legend").querySelectorAll("button")) button.setAttribute("aria-pressed", button.dataset.rule === rule);
  const counts = record();
  if (rule === null) {
    for (const site of typed) if (site.at !== null) counts[site.at] = (counts[site.at] ?? 0) + 1;
  } else {
    for (const [key, node] of Object.entries(data.nodes)) {
      const count = node.badges.filter(([number]) => number === Number(rule)).length + (node.regularizer === Number(rule));
      if (count) counts[key] = count;
    }
  }
  scene.light(counts, rule === null ? null : Number(rule));
  scene.showLit();
  scene.changed();
}

// What differs, in a comparison

const STATES = { added: "+", removed: "−", changed: "→" };

function changes(node) {
  const texts = node.badges.filter(([, , state]) => state).map(([, text, state]) => `<li>${html(state)}: ${html(text)}</li>`);
  return texts.length ? `<ul class="changes">${texts.join("")}</ul>` : "";
}

function showChanges() {
  element("differences").hidden = !data.compared;
  if (!data.compared) return;
  const found = Object.entries(data.nodes).flatMap(([key, { name, badges }]) => badges.filter(([, , state]) => state).map(([, text, state]) => ({ key, name, text, state })));
  const count = (state) => found.filter((one) => one.state === state).length;
  element("differing").textContent = found.length ? Object.keys(STATES).filter(count).map((state) => `${STATES[state]} ${count(state)} ${state}`).join(", ") : "No difference in what acts where.";
  element("changed").innerHTML = found.map(({ key, name, text, state }) => `<li><button data-go="${html(key)}">${html(name)} <small>${state === "changed" ? "→ " : ""}${html(text)}</small></button></li>`).join("");
}

// Search

const FIRST = 12; // results that are listed at first

/** How well a name fits: the name itself, then names whose last part begins with the text, then other names, then operations. */
function rank(text, name, op) {
  const lower = name.toLowerCase();
  if (lower === text) return 0;
  if (lower.slice(lower.lastIndexOf(".") + 1).startsWith(text)) return 1;
  if (lower.includes(text)) return 2;
  return op.toLowerCase().includes(text) ? 3 : 4;
}

function showHits(all = false) {
  const text = element("search").value.trim().toLowerCase();
  const known = Object.entries(data.nodes).map(([key, node]) => [key, node.name, node.op]);
  known.push(...Object.entries(data.boxes).filter(([key, box]) => key !== "/" && box.kind === "module").map(([key, box]) => [key, box.path, box.op]));
  const ranked = text ? known.map((one) => [rank(text, one[1], one[2]), one]).filter(([place]) => place < 4) : [];
  const hits = ranked.sort(([a], [b]) => a - b).map(([, one]) => one);
  const listed = hits.slice(0, all ? hits.length : FIRST);
  const more = hits.length > listed.length ? `<li><button id="more">${hits.length - listed.length} more</button></li>` : "";
  element("hits").innerHTML = listed.map(([key, name, op]) => `<li><button data-go="${html(key)}">${html(name)} <small>${html(op)}</small></button></li>`).join("") + more;
  element("hitcount").textContent = text ? `${hits.length} found` : "";
}

function go(key) {
  if (!(key in data.nodes) && !(key in data.boxes)) return;
  scene.reveal(key);
  choose(key);
  scene.centre(key);
}
