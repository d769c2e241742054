// The drawing: what is visible, and the part of it that is in view. Only this part is in the document, as SVG elements.
"use strict";

const html = (text) => String(text).replace(/[&<>"]/g, (letter) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[letter]);
const fixed = (number) => Math.round(number * 10) / 10;
const LEAST_ZOOM = 0.7; // of the first view: smaller text cannot be read
const READABLE = 0.3, VISIBLE = 3; // the zoom below which text is left out, and the pixels below which a thing is

class Scene {
  constructor(data, svg) {
    this.data = data;
    this.svg = svg;
    this.opened = new Set(data.opened);
    this.view = { x: 0, y: 0, zoom: 1 };
    this.fitted = null; // "width", "whole" or "first": what the view was fitted to; null once the user has moved it
    this.lit = record(); // by key: the number of selected sites
    this.shown = record(); // by key of what is visible: the number of selected sites in it
    this.rule = null; // the number of the regularizer whose badges are lit
    this.values = null; // by key: [text, share of the largest value]
    this.chosen = null;
    this.known = new Map();
    this.changed = () => {}; // is called when the view or what is unfolded has changed
    this.around = record(); // by key of a node or box: the key of the box around it
    for (const key in data.boxes) for (const layer of data.boxes[key].layers) for (const id of layer) if (!/^[<>]$|^~/.test(id)) this.around[id] = key;
  }

  /** Lay out all that is visible, and draw what of it is in view. */
  draw() {
    this.laid = flat(arrange(this.data, "/", this.opened, this.known));
    this.places = record();
    for (const thing of [...this.laid.boxes, ...this.laid.things]) this.places[thing.key] = thing;
    this.light(this.lit);
  }

  /** Forget how a box, and those around it, were laid out. */
  forget(key) {
    for (let at = key; at !== undefined; at = this.around[at]) this.known.delete(at);
  }

  /** Put what is in view into the document, and what is half a screen around it. */
  render() {
    const { x, y, zoom } = this.view, [wide, tall] = [this.svg.clientWidth, this.svg.clientHeight];
    const rect = { left: (-x - wide / 2) / zoom, top: (-y - tall / 2) / zoom, right: (1.5 * wide - x) / zoom, bottom: (1.5 * tall - y) / zoom };
    const inside = (one) => one.x <= rect.right && one.x + one.width >= rect.left && one.y <= rect.bottom && one.y + one.height >= rect.top;
    const seen = (one) => inside(one) && one.height * zoom >= VISIBLE;
    const boxes = this.laid.boxes.filter((box) => box.key !== "/" && seen(box)).map((box) => this.boxMarkup(box));
    const things = this.laid.things.filter(seen).map((thing) => this.thingMarkup(thing));
    const lines = zoom * 30 < VISIBLE ? [] : this.laid.lines.filter((one) => inside(extentOf(one))).map((one) => this.lineMarkup(one));
    this.svg.innerHTML = `<g id="scene">${boxes.join("")}${lines.join("")}${things.join("")}</g>`;
    this.svg.classList.toggle("lighted", Object.keys(this.shown).length > 0);
    this.rendered = { ...rect, zoom };
    this.name();
    this.move();
  }

  /** Say what is chosen. The page also says it to readers of the screen. */
  name() {
    const place = this.places[this.chosen];
    this.svg.setAttribute("aria-label", place ? `graph, chosen: ${this.label(this.chosen)}` : "graph; the arrow keys go from node to node");
  }

  /** What a reader of the screen says: the path, what it is, its shape, and what acts there. */
  label(key) {
    const box = this.data.boxes[key], node = this.data.nodes[key];
    const lit = key in this.shown && this.shown[key] ? [`${this.shown[key]} selected`] : [];
    if (this.reads(key).length) lit.unshift(`reads ${this.reads(key).join(", ")}`);
    if (box) {
      const acts = Object.entries(box.acts).map(([number, count]) => `${this.data.regularizers[number].name} at ${count}`);
      return [box.full, box.kind === "module" ? box.op : "", `${box.nodes} nodes`, this.opened.has(key) ? "unfolded" : "folded", ...acts, ...lit].filter(Boolean).join(", ");
    }
    return [node.name, node.op, node.shape, ...node.badges.map(([, text]) => text), ...lit].filter(Boolean).join(", ");
  }

  marks(key) {
    return { classes: `${key in this.shown ? " lit" : ""}${key === this.chosen ? " chosen" : ""}`, id: key === this.chosen ? ' id="chosen"' : "" };
  }

  boxMarkup({ key, x, y, width, height }) {
    const { classes, id } = this.marks(key), readable = this.view.zoom >= READABLE;
    const size = `x="${fixed(x)}" y="${fixed(y)}" width="${fixed(width)}"`;
    return `<g class="open${classes}"${id} data-key="${html(key)}" role="button" aria-expanded="true" aria-label="${html(this.label(key))}">
      <rect class="box" ${size} height="${fixed(height)}" rx="4"/><rect class="head" ${size} height="${HEADER}" rx="4"/>
      ${readable ? `<text x="${fixed(x + 8)}" y="${fixed(y + 14)}">▾ ${html(this.data.boxes[key].name)}</text>` : ""}${this.stub(key, x, y, width)}</g>`;
  }

  /** A short line to a block that reads a value from far above, and the last part of the value's name. */
  stub(key, x, y, width) {
    const text = this.reads(key, true).join(", "), most = Math.max(4, Math.floor((width / 2 - 13) / (0.9 * 6.2)));
    if (!text || this.view.zoom < READABLE) return "";
    const [left, top] = [fixed(x + 4), fixed(y)], shown = text.length <= most ? text : `${text.slice(0, most - 1)}…`;
    return `<path class="line" d="M${left} ${fixed(y - 16)}V${top}"/><path class="arrow" d="M${left} ${top}l-3.2 -6h6.4z"/>
      <text class="second stub" x="${fixed(x + 9)}" y="${fixed(y - 7)}">${html(shown)}<title>${html(this.reads(key).join(", "))}</title></text>`;
  }

  /** The names of the values that a block reads by a stub, or the last parts of the names. */
  reads(key, last = false) {
    const names = (this.data.boxes[key] ?? this.data.nodes[key]).reads.map((value) => this.data.nodes[value].name);
    return last ? names.map((name) => name.slice(name.lastIndexOf(".") + 1)) : names;
  }

  thingMarkup({ key, x, y, width, height }) {
    const box = this.data.boxes[key], thing = box ?? this.data.nodes[key], { classes, id } = this.marks(key);
    const kind = box ? "folded" : thing.kind, [first, second] = thing.lines, middle = fixed(x + width / 2);
    const colour = thing.regularizer >= 0 ? ` style="--colour: ${this.data.regularizers[thing.regularizer].colour}"` : "";
    const rect = (more, dx = 0) => `<rect class="${kind}" x="${fixed(x + dx)}" y="${fixed(y + dx)}" width="${width}" height="${height}" rx="${/^(addition|end)$/.test(kind) ? 12 : 4}"${more}/>`;
    const value = this.values?.[key], heat = value ? ` style="--heat: ${Math.round(value[1] * 100)}%"` : "";
    const start = `<g class="thing${classes}${value ? " valued" : ""}"${id} data-key="${html(key)}" role="button"${box ? ' aria-expanded="false"' : ""} aria-label="${html(this.label(key))}"${colour}>
      ${box?.stacked ? rect(' aria-hidden="true"', 4) : ""}${rect(heat)}`;
    if (this.view.zoom < READABLE) return `${start}</g>`;
    const under = value ? value[0] : box && this.shown[key] ? `${this.shown[key]} selected` : second;
    return `${start}<text class="middle ${kind}" x="${middle}" y="${fixed(y + 15)}">${box ? "▸ " : ""}${html(first)}</text>
      <text class="middle second ${kind}${under === second ? "" : " count"}" x="${middle}" y="${fixed(y + 28)}">${html(under)}</text>${box ? this.dots(box, x, y, width) : this.badges(thing, x, y, width, height)}${this.stub(key, x, y, width)}</g>`;
  }

  /** A folded box has a dot and a count for each regularizer that acts in it. */
  dots(box, x, y, width) {
    const entries = Object.entries(box.acts), wide = entries.map(([, count]) => 20 + 0.9 * 6.2 * String(count).length);
    let left = x + width / 2 - wide.reduce((sum, one) => sum + one, 0) / 2;
    return entries.map(([number, count], i) => {
      const at = left;
      left += wide[i];
      return `<circle class="addition${this.rule === Number(number) ? " on" : ""}" style="--colour: ${this.data.regularizers[number].colour}" cx="${fixed(at + 7)}" cy="${fixed(y + 41)}" r="4"/><text class="second" x="${fixed(at + 14)}" y="${fixed(y + 45)}">${count}</text>`;
    }).join("");
  }

  badges({ badges }, x, y, width, height) {
    return badges.map(([number, text, state], i) => {
      const wide = 0.9 * 6.2 * text.length + 16, left = x + (width - wide) / 2, top = y + height - 2 - BADGE * (badges.length - i);
      const colour = number >= 0 ? ` style="--colour: ${this.data.regularizers[number].colour}"` : "";
      return `<g class="badge ${state}${this.rule === number ? " on" : ""}"${colour}><rect class="addition" x="${fixed(left)}" y="${fixed(top)}" width="${fixed(wide)}" height="${BADGE - 2}" rx="6"/><text class="middle small" x="${fixed(x + width / 2)}" y="${fixed(top + 9.7)}">${html(text)}</text></g>`;
    }).join("");
  }

  lineMarkup({ points, arrow, back }) {
    let path = `M${fixed(points[0][0])} ${fixed(points[0][1])}`;
    for (let i = 1; i < points.length; i++) {
      const [[x, y], [u, v]] = [points[i - 1], points[i]], half = (y + v) / 2;
      path += x === u ? `V${fixed(v)}` : `C${fixed(x)} ${fixed(half)} ${fixed(u)} ${fixed(half)} ${fixed(u)} ${fixed(v)}`;
    }
    const [x, y] = points.at(-1), up = back ? 1 : -1;
    const head = arrow ? `<path class="arrow" d="M${fixed(x)} ${fixed(y)}l-3.2 ${6 * up}h6.4z"/>` : "";
    return `<path class="line" d="${path}"/>${head}`;
  }

  /** The key of what shows a node: the node itself, or the outermost folded module around it. */
  visible(key) {
    let shown = key;
    for (let at = this.around[key]; at !== undefined && at !== "/"; at = this.around[at]) if (!this.opened.has(at)) shown = at;
    return shown;
  }

  /** Light up nodes; `counts`: the number of selected sites by key. A folded module shows the sum of what is inside. */
  light(counts, rule = this.rule) {
    [this.lit, this.rule, this.shown] = [counts, rule, record()];
    for (const key in counts) this.shown[this.visible(key)] = (this.shown[this.visible(key)] ?? 0) + counts[key];
    this.render();
  }

  choose(key) {
    this.chosen = key;
    this.render();
  }

  /** Fold or unfold a module, and keep its title at the same point of the screen. */
  toggle(key) {
    if (!this.places[key]) this.reveal(key);
    const before = this.places[key];
    if (!this.opened.delete(key)) this.opened.add(key);
    this.forget(key);
    this.draw();
    const after = this.places[key];
    this.fitted = null;
    this.view.x += (before.x + before.width / 2 - after.x - after.width / 2) * this.view.zoom;
    this.view.y += (before.y - after.y) * this.view.zoom;
    this.look();
  }

  /** Unfold these boxes and no others. */
  open(keys) {
    this.opened = new Set(["/", ...keys]);
    this.known.clear();
    this.draw();
  }

  /** Unfold all modules around a node or module. */
  reveal(key) {
    for (let at = this.around[key]; at !== undefined && at !== "/"; at = this.around[at]) {
      if (this.opened.has(at)) continue;
      this.opened.add(at);
      this.forget(at);
    }
    this.draw();
  }

  move() {
    const { x, y, zoom } = this.view;
    this.svg.firstChild?.setAttribute("transform", `translate(${fixed(x)} ${fixed(y)}) scale(${zoom.toPrecision(6)})`);
  }

  /** Move the drawing to the view; draw anew if that shows what is not in the document. */
  look() {
    const { x, y, zoom } = this.view, has = this.rendered, [right, bottom] = [(this.svg.clientWidth - x) / zoom, (this.svg.clientHeight - y) / zoom];
    const enough = has && -x / zoom >= has.left && -y / zoom >= has.top && right <= has.right && bottom <= has.bottom;
    if (enough && zoom < 1.5 * has.zoom && zoom > 0.6 * has.zoom && zoom >= READABLE === has.zoom >= READABLE) this.move();
    else this.render();
    this.changed();
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

  /** Show the full width, from the top of the drawing; `how`: "whole", the full height too; "first", never so small that it cannot be read. */
  fit(how = "width") {
    const zoom = Math.max(this.zoomOf(how === "whole"), how === "first" ? LEAST_ZOOM : 0);
    this.fitted = how;
    this.view = { x: (this.svg.clientWidth - this.laid.width * zoom) / 2, y: 16, zoom };
    this.look();
  }

  /** After the window has changed its size, fit the view again, unless the user has moved it. */
  refit() {
    if (this.fitted) this.fit(this.fitted);
    else this.look();
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
    const lit = Object.keys(this.shown).map((key) => this.places[key]).filter(Boolean);
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

/** The rectangle around a line. A line is as wide as its points: its curves do not leave them. */
function extentOf(line) {
  if (!line.extent) {
    const xs = line.points.map(([x]) => x), ys = line.points.map(([, y]) => y), left = Math.min(...xs), top = Math.min(...ys);
    line.extent = { x: left, y: top, width: Math.max(...xs) - left, height: Math.max(...ys) - top };
  }
  return line.extent;
}
