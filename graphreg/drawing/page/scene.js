// The drawing: what is visible, as SVG elements, and the part of it that is in view.
"use strict";

const html = (text) => String(text).replace(/[&<>"]/g, (letter) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[letter]);
const fixed = (number) => Math.round(number * 10) / 10;

class Scene {
  constructor(data, svg) {
    this.data = data;
    this.svg = svg;
    this.opened = new Set(data.opened);
    this.view = { x: 0, y: 0, zoom: 1 };
    this.fitted = null; // "width" or "whole": what the view was fitted to; null once the user has moved it
    this.lit = record(); // by key: the number of selected sites
    this.chosen = null;
    this.around = record(); // by key of a node or box: the key of the box around it
    for (const key in data.boxes) for (const layer of data.boxes[key].layers) for (const id of layer) if (!/^[<>]$|^~/.test(id)) this.around[id] = key;
  }

  /** Lay out and draw all that is visible. */
  draw() {
    const laid = arrange(this.data, "/", this.opened);
    this.laid = laid;
    this.places = record();
    for (const thing of [...laid.boxes, ...laid.things]) this.places[thing.key] = thing;
    const boxes = laid.boxes.filter((box) => box.key !== "/").map((box) => this.boxMarkup(box));
    const lines = laid.lines.map((one) => this.lineMarkup(one));
    const things = laid.things.map((thing) => this.thingMarkup(thing));
    this.svg.innerHTML = `<g id="scene">${boxes.join("")}${lines.join("")}${things.join("")}</g>`;
    this.elements = new Map([...this.svg.querySelectorAll("[data-key]")].map((element) => [element.dataset.key, element]));
    this.light(this.lit);
    this.choose(this.chosen);
    this.look();
  }

  boxMarkup({ key, x, y, width, height }) {
    const { path, op } = this.data.boxes[key];
    const size = `x="${fixed(x)}" y="${fixed(y)}" width="${fixed(width)}"`;
    return `<g class="open" data-key="${html(key)}" role="button" aria-expanded="true" aria-label="${html(`${path} ${op}`)}">
      <rect class="box" ${size} height="${fixed(height)}" rx="4"/><rect class="head" ${size} height="${HEADER}" rx="4"/>
      <text x="${fixed(x + 8)}" y="${fixed(y + 14)}">▾ ${html(this.data.boxes[key].name)}</text></g>`;
  }

  thingMarkup({ key, x, y, width, height }) {
    const box = this.data.boxes[key], thing = box ?? this.data.nodes[key];
    const [first, second] = thing.lines, middle = fixed(x + width / 2);
    const colour = thing.regularizer >= 0 ? ` style="--colour: ${this.data.regularizers[thing.regularizer].colour}"` : "";
    const badges = Object.entries(box?.acts ?? {}).map(([number, count], i, all) => {
      const left = x + width / 2 - 14 * all.length + 28 * i;
      return `<circle class="addition" style="--colour: ${this.data.regularizers[number].colour}" cx="${fixed(left + 5)}" cy="${fixed(y + 41)}" r="4"/>
        <text class="second" x="${fixed(left + 12)}" y="${fixed(y + 45)}">${count}</text>`;
    });
    return `<g class="thing" data-key="${html(key)}" role="button"${box ? ' aria-expanded="false"' : ""} aria-label="${html(`${first} ${second}`)}"${colour}>
      <rect class="${box ? "folded" : thing.kind}" x="${fixed(x)}" y="${fixed(y)}" width="${width}" height="${height}" rx="${/^(addition|end)$/.test(thing.kind) ? 12 : 4}"/>
      <text class="middle ${thing.kind}" x="${middle}" y="${fixed(y + 15)}">${box ? "▸ " : ""}${html(first)}</text>
      <text class="middle second ${thing.kind}" x="${middle}" y="${fixed(y + 28)}">${html(second)}</text>${badges.join("")}</g>`;
  }

  lineMarkup({ points, regularizer, arrow, back }) {
    let path = `M${fixed(points[0][0])} ${fixed(points[0][1])}`;
    for (let i = 1; i < points.length; i++) {
      const [[x, y], [u, v]] = [points[i - 1], points[i]], half = (y + v) / 2;
      path += x === u ? `V${fixed(v)}` : `C${fixed(x)} ${fixed(half)} ${fixed(u)} ${fixed(half)} ${fixed(u)} ${fixed(v)}`;
    }
    const colour = regularizer >= 0 ? ` style="--colour: ${this.data.regularizers[regularizer].colour}"` : "";
    const [x, y] = points.at(-1), up = back ? 1 : -1;
    const head = arrow ? `<path class="arrow" d="M${fixed(x)} ${fixed(y)}l-3.2 ${6 * up}h6.4z"/>` : "";
    return `<g${colour}><path class="line" d="${path}"/>${head}</g>`;
  }

  /** The key of what shows a node: the node itself, or the outermost folded module around it. */
  visible(key) {
    let shown = key;
    for (let at = this.around[key]; at !== undefined && at !== "/"; at = this.around[at]) if (!this.opened.has(at)) shown = at;
    return shown;
  }

  /** Light up nodes; `counts`: the number of selected sites by key. A folded module shows the sum of what is inside. */
  light(counts) {
    this.lit = counts;
    const shown = record();
    for (const key in counts) shown[this.visible(key)] = (shown[this.visible(key)] ?? 0) + counts[key];
    for (const [key, element] of this.elements) {
      element.classList.toggle("lit", key in shown);
      element.querySelector(".count")?.remove();
      if (!(key in shown) || !(key in this.data.boxes) || element.classList.contains("open")) continue;
      const { x, y, width } = this.places[key];
      element.insertAdjacentHTML("beforeend", `<text class="count" x="${fixed(x + width)}" y="${fixed(y - 4)}">${shown[key]}</text>`);
    }
    this.svg.classList.toggle("lighted", Object.keys(shown).length > 0);
  }

  choose(key) {
    this.elements.get(this.chosen)?.classList.remove("chosen");
    this.chosen = key;
    this.elements.get(key)?.classList.add("chosen");
    this.svg.setAttribute("aria-label", key ? `chosen: ${key}` : "the graph");
  }

  /** Fold or unfold a module, and keep its title at the same point of the screen. */
  toggle(key) {
    const before = this.places[key];
    if (!this.opened.delete(key)) this.opened.add(key);
    this.draw();
    const after = this.places[key];
    this.fitted = null;
    this.view.x += (before.x + before.width / 2 - after.x - after.width / 2) * this.view.zoom;
    this.view.y += (before.y - after.y) * this.view.zoom;
    this.look();
  }

  /** Unfold all modules around a node or module. */
  reveal(key) {
    for (let at = this.around[key]; at !== undefined && at !== "/"; at = this.around[at]) this.opened.add(at);
    this.draw();
  }

  look() {
    const { x, y, zoom } = this.view;
    this.svg.firstChild?.setAttribute("transform", `translate(${fixed(x)} ${fixed(y)}) scale(${zoom.toPrecision(6)})`);
  }

  zoom(by, at = [this.svg.clientWidth / 2, this.svg.clientHeight / 2]) {
    const least = Math.min(0.03, this.zoomOf(true)); // there is no need to be smaller than the whole drawing in view
    const zoom = Math.min(4, Math.max(least, this.view.zoom * by)), ratio = zoom / this.view.zoom;
    this.fitted = null;
    this.view = { x: at[0] - (at[0] - this.view.x) * ratio, y: at[1] - (at[1] - this.view.y) * ratio, zoom };
    this.look();
  }

  pan(x, y) {
    this.fitted = null;
    this.view.x += x;
    this.view.y += y;
    this.look();
  }

  /** The zoom at which the full width is in view, with a margin; `whole`: the full height too. */
  zoomOf(whole) {
    const [wide, tall] = [this.svg.clientWidth, this.svg.clientHeight].map((room) => Math.max(room - 32, 1));
    return Math.min(1.2, wide / this.laid.width, whole ? tall / this.laid.height : Infinity);
  }

  /** Show the full width, from the top of the drawing; `whole`: show the full height too. */
  fit(whole = false) {
    const zoom = this.zoomOf(whole);
    this.fitted = whole ? "whole" : "width";
    this.view = { x: (this.svg.clientWidth - this.laid.width * zoom) / 2, y: 16, zoom };
    this.look();
  }

  /** After the window has changed its size, fit the view again, unless the user has moved it. */
  refit() {
    if (this.fitted) this.fit(this.fitted === "whole");
  }

  /** The position in the window of the middle of a node or folded module, or of the title of an open module. */
  spot({ x, y, width, height }) {
    const { zoom } = this.view;
    return [this.view.x + (x + width / 2) * zoom, this.view.y + (y + Math.min(height, 40) / 2) * zoom];
  }

  centre(key, least = 0.6) {
    const place = this.places[key];
    if (!place) return;
    this.view.zoom = Math.max(this.view.zoom, least);
    const [x, y] = this.spot(place);
    this.pan(this.svg.clientWidth / 2 - x, this.svg.clientHeight / 2 - y);
  }

  /** Scroll to the uppermost lit node or module, unless a lit one is in view. */
  showLit() {
    const lit = [...this.elements].filter(([, element]) => element.classList.contains("lit")).map(([key]) => this.places[key]);
    const seen = (place) => this.spot(place).every((at, i) => at >= 0 && at <= [this.svg.clientWidth, this.svg.clientHeight][i]);
    if (!lit.length || lit.some(seen)) return;
    this.centre(lit.reduce((first, place) => (place.y < first.y ? place : first)).key, 0);
  }

  /** The key of the visible node or module that is nearest to the chosen one in a direction; [0, 1] is down. */
  nearest([right, down]) {
    const from = this.places[this.chosen];
    const things = Object.values(this.places).filter(({ key }) => key !== "/" && key !== this.chosen);
    if (!from) return things.sort((a, b) => a.y - b.y || a.x - b.x)[0]?.key;
    const far = (thing) => {
      const x = thing.x + thing.width / 2 - from.x - from.width / 2;
      const y = thing.y + (thing.key in this.data.boxes ? 10 : thing.height / 2) - from.y - (from.key in this.data.boxes ? 10 : from.height / 2);
      const along = x * right + y * down, across = Math.abs(x * down) + Math.abs(y * right);
      return along > 4 ? along + 2 * across : Infinity;
    };
    const best = things.reduce((closest, thing) => (far(thing) < far(closest) ? thing : closest));
    return far(best) < Infinity ? best.key : this.chosen;
  }
}
