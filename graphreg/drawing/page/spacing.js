// Where things stand. Graphviz's dot has decided, when the page was made, in which layer of its module each thing stands and in
// which order; what is left is the room between them, which changes when a module is folded. It is the least-squares answer to
// "as near to your neighbours as may be, in this order, without touching", one layer at a time.
"use strict";

/** A record whose keys are names of the user's: it has no `constructor` and the like of its own. */
const record = (entries = {}) => Object.assign(Object.create(null), entries);

const PAD = 12, HEADER = 20, BAND = 14, BETWEEN_LAYERS = 30, BETWEEN_NODES = 16;
const OVERLAP = 0.5; // of the pieces of a line: where two just touch between two pixels, the ground shines through

/** An open box by itself: its size, and `things`, `boxes` and `lines` within it, relative to its upper left corner. */
function arrange(data, key, opened) {
  const box = data.boxes[key];
  const inner = record(), size = record();
  for (const layer of box.layers)
    for (const id of layer) {
      if (id in data.boxes && opened.has(id)) inner[id] = arrange(data, id, opened);
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
  const laid = { width, height, things: [], boxes: [{ key, x: 0, y: 0, width, height }], lines: [] };
  for (const id in at) {
    const x = at[id] + left, y = rows.middle[rows.layer[id]], [w, h] = size[id];
    const border = (points) => laid.lines.push({ regularizer: through(box, id), points });
    if (id === "<") border([[width / 2, head], [x, rows.top[0] + OVERLAP]]);
    else if (id === ">") border([[x, rows.bottom - OVERLAP], [width / 2, height + OVERLAP]]);
    else if (inner[id]) place(laid, inner[id], x - w / 2, y - h / 2);
    else if (!id.startsWith("~")) laid.things.push({ key: id, x: x - w / 2, y: y - h / 2, width: w, height: h });
  }
  for (const link of box.links) laid.lines.push(line(link, at, left, rows, size));
  return laid;
}

/** The regularizer whose colour all lines through an end of the module's own lines have; -1 where they differ. */
function through(box, pin) {
  const [first, ...more] = new Set(box.links.filter(({ chain }) => chain.includes(pin)).map(({ regularizer }) => regularizer));
  return more.length ? -1 : first;
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

function place(laid, inner, x, y) {
  const moved = (thing) => ({ ...thing, x: thing.x + x, y: thing.y + y });
  laid.things.push(...inner.things.map(moved));
  laid.boxes.push(...inner.boxes.map(moved));
  laid.lines.push(...inner.lines.map((one) => ({ ...one, points: one.points.map(([a, b]) => [a + x, b + y]) })));
}

/** A line's points, from what it leaves to what it reaches: down to the end of the layer, over to the next, straight through it. */
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

/** The middle of each thing, from left to right. */
function columns(box, size) {
  const neighbours = record();
  const join = (a, b, weight) => (neighbours[a] ??= []).push([b, weight]);
  for (const link of box.links)
    for (let i = 1; i < link.chain.length; i++) {
      const [a, b] = [link.chain[i - 1], link.chain[i]];
      const weight = (link.regularizer < 0 ? 3 : 1) * (a[0] === "~" && b[0] === "~" ? 8 : a[0] === "~" || b[0] === "~" ? 2 : 1);
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

/** The two ends of a module's own lines, each alone in its layer, go to the middle. */
function pinned(at, size) {
  const { left, right } = extent(at, size);
  for (const pin of ["<", ">"]) if (pin in at) at[pin] = (left + right) / 2;
}

/** A long line that can run straight down from its one end, or up from its other, or between, does. */
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

/** Isotonic regression: the places nearest to what is wished for, in this order, with room for each. Pools of neighbours that touch. */
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
