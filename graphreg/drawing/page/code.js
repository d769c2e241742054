// The model's own code beside the graph: a click on a line lights up its sites, and what is chosen marks its lines.
"use strict";

const code = element("code");
const linesOf = record(), siteCalled = record(); // by each name of a value: the ids of the lines that make it, and the site
let litLine = null; // the id of the line whose sites are lit; null for none
let chosenNames = []; // the names of what is chosen

for (const site of data.sites) if (site.kind === "value") for (const name of site.names) siteCalled[name] = site;
data.source.forEach(({ lines }, i) => lines.forEach(({ sites }, j) => sites.forEach((name) => (linesOf[name] ??= []).push(`${i}.${j}`))));

code.innerHTML = data.source.map(({ name, file, lines }, i) => {
  const items = lines.map(({ number, code, sites }, j) => {
    const text = `<span>${number}</span><code>${html(code)}</code>`;
    return `<li>${sites.length ? `<button data-line="${i}.${j}" aria-pressed="false">${text}<small title="sites">${sites.length}</small></button>` : text}</li>`;
  });
  return `<h2>${html(name)} <small>${html(file)}</small></h2><ol>${items.join("")}</ol>`;
}).join("");
document.querySelector("[data-key='c']").hidden = !data.source.length;

function showCode(open) {
  code.hidden = !open || !data.source.length;
  document.body.classList.toggle("coded", !code.hidden);
  document.querySelector("[data-key='c']").setAttribute("aria-pressed", !code.hidden);
  markLines(chosenNames);
  scene.changed();
}

/** Mark the lines that make what is chosen, and scroll to the first of them. */
function markLines(names) {
  chosenNames = names;
  for (const button of code.querySelectorAll(".here")) button.classList.remove("here");
  const buttons = names.flatMap((name) => linesOf[name] ?? []).map((id) => code.querySelector(`[data-line="${id}"]`));
  for (const button of buttons) button.classList.add("here");
  buttons[0]?.scrollIntoView({ block: "nearest" });
}

/** Light up the sites of a line, and list them. */
function pressLine(id) {
  const button = code.querySelector(`[data-line="${CSS.escape(id)}"]`);
  press(null);
  if (!button) return;
  litLine = id;
  button.setAttribute("aria-pressed", true);
  const counts = record();
  for (const name of sitesOfLine()) if (siteCalled[name].at !== null) counts[siteCalled[name].at] = 1;
  scene.light(counts, null);
  scene.showLit();
  choose(null);
}

function letGoOfLine() {
  if (litLine === null) return;
  code.querySelector(`[data-line="${litLine}"]`).setAttribute("aria-pressed", false);
  litLine = null;
  if (scene.chosen === null) showDetails(null);
}

function sitesOfLine() {
  const [i, j] = litLine.split(".");
  return data.source[i].lines[j].sites;
}

function lineDetails() {
  const [i, j] = litLine.split("."), { name, file, lines } = data.source[i], { number, code } = lines[j];
  const items = sitesOfLine().map((name) => `<li><button data-go="${html(siteCalled[name].at ?? "")}">${html(name)}</button></li>`);
  return `<h2>${html(`${name}, ${file}:${number}`)}</h2><pre>${html(code.trim())}</pre><ul aria-label="sites of the line">${items.join("")}</ul>`;
}
