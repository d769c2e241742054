// Places nodes and modules. When the page was made, Graphviz's dot chose the layer of each node in its module, and the order in each
// layer. The distances are computed here, because they change when a module is folded: one layer at a time, by least squares, each
// node as near to its neighbours as the order allows without overlap.
"use strict";

/** An object without a prototype: its keys are names that the user chose, and may be `constructor`. */
const record = (entries = {}) => Object.assign(Object.create(null), entries);

const PAD = 12, HEADER = 20, BADGE = 15, BAND = 14, BETWEEN_LAYERS = 30, BETWEEN_NODES = 16;
const OVERLAP = 0.5; // pixels by which the pieces of a line overlap; without it a gap would show where two pieces meet between two pixels

/**
 * Lay out an open box by itself. `things` and `lines` are what is directly inside, relative to the box's upper left corner; `inner` has the
 * open boxes inside, each with its place. `known` has the boxes that are laid out already, by key.
 */
function arrange(data, key, opened, known) {
  if (known.has(key)) return known.get(key);
  const laid = arranged(data, key, opened, known);
  known.set(key, laid);
  return laid;
}

function arranged(data, key, opened, known) {
  const box = data.boxes[key];
  const inner = record(), size = record();
  for (const layer of box.layers)
    for (const id of layer) {
      if (id in data.boxes && opened.has(id)) inner[id] = arrange(data, id, opened, known);
      size[id] = inner[id] ? [inner[id].width, inner[id].height] : (data.boxes[id] ?? data.nodes[id])?.size ?? [0, 0];
    }
  const at = columns(box, size);
  const head = key === "/" ? 0 : HEADER;
  const content = extent(at, size);
  const pins = (id) => (id in at ? BAND : 0);
  const width = Math.max(content.right - content.left + 2 * PAD, key === "/" ? 0 : box.head);
  const left = (width - content.right - content.left) / 2;
  const rows = layersDown(box, size, head + pins("<") + PAD / 2);
  const height = rows.bottom + PAD / 2 + pins(">");
  const laid = { key, width, height, things: [], inner: [], lines: [] };
  for (const id in at) {
    const x = at[id] + left, y = rows.middle[rows.layer[id]], [w, h] = size[id];
    const border = (points) => laid.lines.push({ points });
    if (id === "<") border([[width / 2, head], [x, rows.top[0] + OVERLAP]]);
    else if (id === ">") border([[x, rows.bottom - OVERLAP], [width / 2, height + OVERLAP]]);
    else if (inner[id]) laid.inner.push({ laid: inner[id], x: x - w / 2, y: y - h / 2 });
    else if (!id.startsWith("~")) laid.things.push({ key: id, x: x - w / 2, y: y - h / 2, width: w, height: h });
  }
  for (const link of box.links) laid.lines.push(line(link, at, left, rows, size));
  return laid;
}

function extent(at, size) {
  const ids = Object.keys(at);
  return { left: Math.min(...ids.map((id) => at[id] - size[id][0] / 2)), right: Math.max(...ids.map((id) => at[id] + size[id][0] / 2)) };
}

function layersDown(box, size, start) {
  const rows = { top: [], middle: [], low: [], layer: record(), bottom: start };
  box.layers.forEach((layer, i) => {
    const tall = Math.max(...layer.map((id) => size[id][1]));
    const top = i ? rows.bottom + BETWEEN_LAYERS : start;
    rows.top.push(top);
    rows.middle.push(top + tall / 2);
    rows.low.push((rows.bottom = top + tall));
    for (const id of layer) rows.layer[id] = i;
  });
  return rows;
}

/** All boxes, things and lines of a layout, in the coordinates of the whole drawing. */
function flat(laid, x = 0, y = 0, all = { width: laid.width, height: laid.height, boxes: [], things: [], lines: [] }) {
  all.boxes.push({ key: laid.key, x, y, width: laid.width, height: laid.height });
  for (const thing of laid.things) all.things.push({ ...thing, x: thing.x + x, y: thing.y + y });
  for (const line of laid.lines) all.lines.push({ ...line, points: line.points.map(([a, b]) => [a + x, b + y]) });
  for (const inner of laid.inner) flat(inner.laid, inner.x + x, inner.y + y, all);
  return all;
}

/** The points of a line: from its node down to the end of the layer, across to the next layer, straight through that, and so on. */
function line(link, at, left, rows, size) {
  const chain = link.chain, points = [];
  chain.forEach((id, i) => {
    const x = at[id] + left, row = rows.layer[id], half = size[id][1] / 2, middle = rows.middle[row];
    const through = id.startsWith("~");
    if (i > 0) points.push([x, rows.top[row]], [x, through ? rows.low[row] : middle - half]);
    else points.push([x, middle + half], [x, rows.low[row]]);
  });
  if (link.back) points.reverse();
  return { ...link, points, arrow: chain[link.back ? 0 : chain.length - 1] !== ">" };
}

/** The x of the middle of each node and module in a box. */
function columns(box, size) {
  const neighbours = record();
  const join = (a, b, weight) => (neighbours[a] ??= []).push([b, weight]);
  for (const link of box.links)
    for (let i = 1; i < link.chain.length; i++) {
      const [a, b] = [link.chain[i - 1], link.chain[i]];
      const weight = 3 * (a[0] === "~" && b[0] === "~" ? 8 : a[0] === "~" || b[0] === "~" ? 2 : 1);
      join(a, b, weight);
      join(b, a, weight);
    }
  const at = record(), row = record();
  box.layers.forEach((layer, i) => {
    for (const id of layer) row[id] = i;
    spread(layer, size, layer.map(() => 0), layer.map(() => 1), at);
  });
  for (let sweep = 0; sweep < 12; sweep++) {
    const down = sweep % 2 === 0;
    for (const layer of down ? box.layers : box.layers.toReversed()) {
      const both = sweep > 7;
      const wish = [], weight = [];
      for (const id of layer) {
        const seen = (neighbours[id] ?? []).filter(([other]) => both || (down ? row[other] < row[id] : row[other] > row[id]));
        const total = seen.reduce((sum, [, w]) => sum + w, 0);
        wish.push(total ? seen.reduce((sum, [other, w]) => sum + w * at[other], 0) / total : at[id]);
        weight.push(total || 0.01);
      }
      spread(layer, size, wish, weight, at);
    }
  }
  pinned(at, size);
  straighten(box, size, at);
  pinned(at, size);
  return at;
}

/** Move the points where lines pass the box's borders (`<` and `>`, each alone in its layer) to the middle. */
function pinned(at, size) {
  const { left, right } = extent(at, size);
  for (const pin of ["<", ">"]) if (pin in at) at[pin] = (left + right) / 2;
}

/** Make the middle part of each long line vertical if there is room: below its upper end, else above its lower end, else between. */
function straighten(box, size, at) {
  const room = record();
  for (const layer of box.layers) layer.forEach((id, i) => (room[id] = [layer[i - 1], layer[i + 1]]));
  const edge = (id, side) => (id === undefined ? -side * Infinity : at[id] + (side * size[id][0]) / 2 + (side * BETWEEN_NODES) / 2);
  for (const { chain } of box.links) {
    const through = chain.slice(1, -1);
    const fits = (x) => through.every((id) => edge(room[id][0], 1) <= x && x <= edge(room[id][1], -1));
    const mean = through.reduce((sum, id) => sum + at[id], 0) / through.length;
    const x = [at[chain[0]], at[chain.at(-1)], mean].find(fits);
    if (x !== undefined) for (const id of through) at[id] = x;
  }
}

/** Place a layer by isotonic regression: as near to the wished x as the order and the widths allow. A pool is a run that touches. */
function spread(layer, size, wish, weight, at) {
  const offset = [];
  layer.forEach((id, i) => offset.push(i ? offset[i - 1] + (size[layer[i - 1]][0] + size[id][0]) / 2 + BETWEEN_NODES : 0));
  const pools = [];
  layer.forEach((_, i) => {
    pools.push({ from: i, sum: weight[i] * (wish[i] - offset[i]), weight: weight[i] });
    while (pools.length > 1 && pools.at(-2).sum / pools.at(-2).weight > pools.at(-1).sum / pools.at(-1).weight) {
      const last = pools.pop();
      pools.at(-1).sum += last.sum;
      pools.at(-1).weight += last.weight;
    }
  });
  pools.forEach((pool, p) => {
    const end = p + 1 < pools.length ? pools[p + 1].from : layer.length;
    for (let i = pool.from; i < end; i++) at[layer[i]] = pool.sum / pool.weight + offset[i];
  });
}
