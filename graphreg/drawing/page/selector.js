// Selects sites as graphreg/ir/selector.py does, with the same names and error messages. tests/data/selectors.json tests both.
"use strict";

const MARKS = ["branch", "trunk", "normed"];
const ROLES = ["input", "hidden", "output", ...MARKS]; // what `#` takes
const GRAMMAR = /^(!?)((?:\\[^]|[^@:#\\])*)(?:@((?:\\[^]|[^:#\\])+))?(?::((?:\\[^]|[^#\\])+))?(?:#([^]*))?$/u;

const SPECIAL = /[\\@:#*?[]|^!|^\s|\s$/; // characters with a meaning in a selector

/** A function that matches a whole text against a shell glob (`*`, `?`, `[seq]`, `[!seq]`), as Python's fnmatch.translate does. */
function glob(pattern) {
  const letters = Array.from(pattern);
  let source = "";
  for (let i = 0; i < letters.length; ) {
    const letter = letters[i++];
    if (letter === "*") source += "[^]*";
    else if (letter === "?") source += "[^]";
    else if (letter !== "[") source += escaped(letter);
    else {
      let end = i;
      if (letters[end] === "!") end++;
      if (letters[end] === "]") end++;
      while (end < letters.length && letters[end] !== "]") end++;
      if (end >= letters.length) source += "\\[";
      else {
        source += letterClass(letters.slice(i, end));
        i = end + 1;
      }
    }
  }
  const compiled = new RegExp(`^(?:${source})$`, "u");
  return (text) => compiled.test(text);
}

function letterClass(letters) {
  const not = letters[0] === "!";
  const rest = not ? letters.slice(1) : letters;
  const ranges = [];
  for (let i = 0; i < rest.length; i++) {
    if (rest[i + 1] === "-" && i + 2 < rest.length) {
      if (rest[i].codePointAt(0) <= rest[i + 2].codePointAt(0)) ranges.push(`${escaped(rest[i])}-${escaped(rest[i + 2])}`);
      i += 2; // a range such as z-a is empty
    } else ranges.push(escaped(rest[i]));
  }
  if (!ranges.length) return not ? "[^]" : "[]";
  return `[${not ? "^" : ""}${ranges.join("")}]`;
}

function escaped(letter) {
  return /[\\^$.*+?()[\]{}|/-]/.test(letter) ? `\\u{${letter.codePointAt(0).toString(16)}}` : letter;
}

/** The part of a selector as a shell glob; a character after a backslash matches itself. */
function asGlob(part) {
  return part?.replace(/\\([^])/gu, (_, letter) => ("*?[".includes(letter) ? `[${letter}]` : letter));
}

/** The selector that matches this label only: its name, with a backslash before each character that has a meaning in a selector. */
function exactly(label) {
  const texts = [label.name, label.ports[0]].map((text) => text.replace(new RegExp(SPECIAL, "g"), (one) => (one.trim() ? `\\${one}` : `[${one}]`)));
  return label.default ? texts[0] : texts.join(":");
}

/** Parse one string, `[!]name-glob[@op-glob][:port-glob][#role]`. Throws an Error with the library's message. */
function parse(text) {
  const bare = text.trim();
  const match = GRAMMAR.exec(bare);
  if (!match || !bare.replace(/[! ]/g, "")) {
    const more = /[\\@:#]/.test(text) ? " A backslash makes the next character part of the name: \\@, \\:, \\#, \\\\." : "";
    throw new Error(`${quoted(text)} is no selector. Write [!]name[@op][:port][#role], e.g. 'layer4.*', '**@ReLU', '*.weight'.${more}`);
  }
  const [exclude, role] = [match[1], match[5]];
  const [name, op, port] = match.slice(2, 5).map(asGlob);
  if (role !== undefined && !ROLES.includes(role))
    throw new Error(`${quoted(text)} asks for the role ${quoted(role)}; roles are ${ROLES.join(", ")}. Where # is a part of the name, write \\#.`);
  const glob_of = (part) => (part === undefined ? null : glob(part));
  return { text, exclude: exclude === "!", name: name || "**", named: glob(name || "**"), op: glob_of(op), port, ports: glob_of(port), role };
}

function names(pattern, label, site) {
  if (site.kind === "parameter" && pattern.port !== undefined) return glob(`${pattern.name}:${pattern.port}`)(label.name);
  return pattern.named(label.name);
}

/** The site's role, if it has one, and its marks: what `#` in a selector matches. */
const marked = (site) => [site.role, ...MARKS.filter((mark) => site[mark])].filter(Boolean);

function within(name, modules) {
  for (let end = name.lastIndexOf("."); end > 0; end = name.lastIndexOf(".", end - 1)) if (modules.has(name.slice(0, end))) return true;
  return false;
}

/** The sites that a parsed string matches, selectable or not. Without `**`, a module's name does not match the values inside it. */
function find(pattern, sites) {
  const named = [];
  for (const site of sites)
    for (const label of site.labels) {
      const filtered = (!pattern.op || pattern.op(label.op)) && (pattern.role === undefined || marked(site).includes(pattern.role));
      if (filtered && names(pattern, label, site)) named.push([label, site]);
    }
  const takes = (label) => (pattern.ports ? label.ports.some(pattern.ports) : label.default);
  let matching = named.filter(([label, site]) => site.kind === "parameter" || takes(label));
  if (!pattern.name.includes("**")) {
    const modules = new Set(named.filter(([label, site]) => label.module !== null && site.kind === "value").map(([label]) => label.module));
    matching = matching.filter(([label, site]) => site.kind === "parameter" || !within(label.name, modules));
  }
  return new Set(matching.map(([, site]) => site));
}

/** The sites of the kind that a regularizer acts on (`seen`), and whether it can act on one of them (`usable`). */
function candidates(sites, rule) {
  const usable = (site) => site.selectable && (rule.on === "parameters" ? site.dims >= rule.min_dims : !rule.splice || site.used);
  const seen = sites.filter((site) => site.kind === (rule.on === "parameters" ? "parameter" : "value"));
  return { seen, usable };
}

/** Split the typed text into strings at spaces and commas, except within brackets or after a backslash. */
function apart(text) {
  return text.match(/(?:\\[^]|\[!?\]?[^\s\]]*\]|[^\s,])+/gu) ?? [];
}

const lone = (text) => text.replace(/^[! ]+|[! ]+$/g, "") === "*";

/**
 * Select sites by several strings. `chosen`: the selected sites, in the order of the graph. `errors`: for each string that selects
 * nothing, the message that the library would raise, without near names.
 */
function select(texts, sites, rule) {
  const { seen, usable } = candidates(sites, rule);
  const patterns = texts.map(parse);
  const usual = seen.filter((site) => rule.default.includes(site.id));
  const excludes = patterns.every((pattern) => pattern.exclude);
  const wanted = new Set(excludes ? usual : []);
  const gone = new Set();
  const errors = rule.needs && (excludes || texts.some(lone)) ? [rule.needs] : [];
  if (excludes && !usual.length && !rule.needs && !texts.some(lone)) errors.push(noDefault(seen, rule));
  for (const pattern of patterns) {
    const matching = lone(pattern.text) ? usual : [...find(pattern, seen)];
    const acceptable = matching.filter(usable);
    const elsewhere = () => find(pattern, sites.filter((site) => !seen.includes(site))).size;
    const unmarked = () => pattern.role !== undefined && find({ ...pattern, role: undefined }, seen).size;
    const needless = pattern.exclude && (matching.length || elsewhere() || unmarked());
    if (!acceptable.length && !lone(pattern.text) && !needless) errors.push(nothing(pattern, matching, seen, sites, rule, usable));
    if (!acceptable.length && lone(pattern.text) && !rule.needs) errors.push(noDefault(seen, rule));
    for (const site of acceptable) (pattern.exclude ? gone : wanted).add(site);
  }
  const chosen = seen.filter((site) => wanted.has(site) && !gone.has(site));
  if (!chosen.length && wanted.size) {
    const all = texts.map(quoted).join(", ");
    errors.push(`[${all}] leaves no ${what(rule)} of ${rule.model}: what is selected is taken away again by '!'.`);
  }
  return { chosen, errors };
}

// The error messages

const quoted = (text) => `'${text.replaceAll("\\", "\\\\")}'`; // as Python's repr shows a text
const what = (rule) => (rule.on === "parameters" ? `parameter of ${rule.min_dims} dims or more` : "value");
const listed = (texts, end = 6) => [...new Set(texts)].sort().slice(0, end).join(", ");

function noDefault(seen, rule) {
  const norms = rule.on === "values" ? seen.filter((site) => site.norm && site.role === "hidden").length : 0;
  const leftOut = norms ? `; it has hidden outputs of norms (${norms}), which '**#hidden' selects` : "";
  const cure = `Name a ${what(rule)} by a selector instead; graphreg.names(model) lists them.`;
  return `${rule.model} has none of the default sites of ${rule.cls} (${rule.usual})${leftOut}. ${cure}`;
}

function nothing(pattern, matching, seen, sites, rule, usable) {
  const start = `${quoted(pattern.text)} matches no ${what(rule)} of ${rule.model}.`;
  if (matching.length) {
    const reasons = matching.slice(0, 3).map((site) => `${site.name} (${reason(site, rule)})`);
    const labels = pattern.ports ? [] : seen.filter((site) => usable(site)).flatMap((site) => site.labels.filter((label) => names(pattern, label, site)));
    const write = labels.length ? ` Write a part of it: ${labels.slice(0, 6).map(exactly).join(", ")}.` : "";
    return `${start} It finds only what cannot be regularized: ${reasons.join(", ")}.${write}`;
  }
  const bare = pattern.text.trim().replace(/^!/, "");
  const literal = seen.flatMap((site) => site.labels).find((label) => label.name === bare);
  if (literal && SPECIAL.test(bare))
    return `${start} A site has that very name: write ${exactly(literal)} (in Python r'${exactly(literal)}'), for ${bare} asks for something else.`;
  if (pattern.role !== undefined && rule.on === "parameters" && seen.length)
    return `${start} #${pattern.role} is a role of values, and ${rule.cls} acts on a ${what(rule)}; leave the role out.`;
  const named = seen.flatMap((site) => site.labels.filter((label) => names(pattern, label, site)).map((label) => [label, site]));
  if (named.length && (pattern.op || pattern.ports || pattern.role !== undefined)) {
    const ops = listed(named.map(([label]) => label.op)), ports = listed(named.flatMap(([label]) => label.ports));
    const roles = listed(named.flatMap(([, site]) => marked(site))) || "none";
    return `${start} The name exists, but not with this op, port or role. It has: ops ${ops}; ports ${ports}; roles ${roles}.`;
  }
  if (named.length) return `${start} It has several ports; write one of ${named.slice(0, 6).map(([label]) => exactly(label)).join(", ")}.`;
  const others = [...find(pattern, sites.filter((site) => !seen.includes(site)))];
  if (!others.length) return start;
  const kind = rule.on === "parameters" ? "values" : "parameters";
  return `${start} It names ${kind} (${others.slice(0, 3).map((site) => site.name).join(", ")}), and ${rule.cls} acts on a ${what(rule)}.`;
}

function reason(site, rule) {
  if (site.why_not) return site.why_not;
  return rule.on === "parameters" ? `${site.dims} dim${site.dims === 1 ? "" : "s"}, ${rule.min_dims} needed` : "its value is not used";
}
