"use strict";
// The graph after each pass, unfolded when it is first looked at, and how nodes of different passes correspond.
const data = JSON.parse(document.getElementById("data").textContent);
const pool = data.graph;
const stageNames = pool.stages.map((stage) => stage.name);
const unfolded = new Map();
const ROW = ["op", "target", "arguments", "inputs", "module", "value", "bytes", "flops", "precision", "kernel", "linears", "numbers", "origins"];

// A stage: {nodes: Map name -> node, order: [name], parts: [{path, body, nodes}]}
function stageOf(index) {
  if (unfolded.has(index)) return unfolded.get(index);
  const stage = { nodes: new Map(), order: [], parts: [], users: null, heirs: null };
  for (const [path, body, names, outer] of pool.stages[index].parts) {
    const here = pool.names[names].split(" "), outside = pool.outers[outer].split(" ");
    const whole = (text) => (text.startsWith("~") ? path + text.slice(1) : text);
    const nodes = pool.bodies[body].map((row, i) => {
      const node = Object.fromEntries(ROW.map((key, j) => [key, row[j]]));
      node.name = here[i];
      node.inputs = row[3].map((at) => (at >= 0 ? here[at] : outside[-1 - at]));
      node.arguments = whole(row[2].replace(/\u0001(\d+)\u0002/g, (_, at) => node.inputs[+at]));
      node.module = whole(row[4]);
      node.linears = row[10].map(whole);
      node.origins = row[12].map((at) => outside[at]);
      node.block = path;
      stage.nodes.set(node.name, node);
      return node;
    });
    stage.parts.push({ path, body, nodes });
  }
  const next = stage.parts.map(() => 0);
  for (const [part, count] of pool.stages[index].runs)
    for (let i = 0; i < count; i++) stage.order.push(stage.parts[part].nodes[next[part]++].name);
  unfolded.set(index, stage);
  return stage;
}

function usersOf(index) {
  const stage = stageOf(index);
  if (!stage.users) {
    stage.users = new Map();
    for (const node of stage.nodes.values())
      for (const input of node.inputs) {
        if (!stage.users.has(input)) stage.users.set(input, []);
        stage.users.get(input).push(node.name);
      }
  }
  return stage.users;
}

// Names of one stage that stand for names of the stage beside it.
function backward(names, index) {
  const stage = stageOf(index), before = stageOf(index - 1), found = new Set();
  for (const name of names) {
    const node = stage.nodes.get(name);
    if (!node) continue;
    if (node.origins.length) node.origins.forEach((old) => found.add(old));
    else if (before.nodes.has(name)) found.add(name);
  }
  return found;
}

function forward(names, index) {
  const after = stageOf(index + 1), found = new Set();
  if (!after.heirs) {
    after.heirs = new Map();
    for (const node of after.nodes.values())
      for (const old of node.origins) {
        if (!after.heirs.has(old)) after.heirs.set(old, []);
        after.heirs.get(old).push(node.name);
      }
  }
  for (const name of names) {
    if (after.nodes.has(name)) found.add(name);
    (after.heirs.get(name) || []).forEach((heir) => found.add(heir));
  }
  return found;
}

function matches(name, from, to) {
  let names = new Set([name]);
  for (let at = from; at > to; at--) names = backward(names, at);
  for (let at = from; at < to; at++) names = forward(names, at);
  return names;
}

const FLOATS = { bf16: "bf16", f16: "bf16", f32: "f32", f64: "f32" };
// Number formats of plug-ins, by name.
const FORMATS = [...new Set(data.linears.map((row) => row.decision))].filter((name) => name !== "hif4" && name !== "high_precision");
const decisionKind = (row) => (row.decision === "hif4" ? "hif4" : row.decision === "high_precision" ? "bf16" : "other4");
const inFour = (row) => row.decision !== "high_precision";
const fourBits = (four) => [...new Set(four.map((row) => row.decision))].map(formatName).join(", ") || "HiF4";
// HiF4 and each format of a plug-in: [name, its linears, colour].
const FORMAT_COLOURS = ["var(--other4)", "#c7559f", "#7d8f3c", "#a5673f"];
const formatName = (decision) => (decision === "hif4" ? "HiF4" : decision);
const byFormat = (rows) => ["hif4", ...FORMATS].map((decision) => [formatName(decision), rows.filter((row) => row.decision === decision),
  decision === "hif4" ? "var(--hif4)" : FORMAT_COLOURS[FORMATS.indexOf(decision) % FORMAT_COLOURS.length]])
  .filter(([name, list]) => list.length || (name === "HiF4" && !FORMATS.length));
const kindOf = (node) => (node.precision === "hif4" ? "hif4" : FORMATS.includes(node.precision) ? "other4" : FLOATS[node.precision] || (node.precision ? "int" : "none"));
const colourOf = (node) => `var(--${kindOf(node)})`;

// The module tree of a stage: {label, path, children: Map, items: [node or branch]}
function treeOf(index, withInputs) {
  const stage = stageOf(index);
  const branch = (label, path) => ({ label, path, branches: new Map(), items: [], nodes: 0, flops: 0, mix: {} });
  const quiet = (node) => node.op === "placeholder" || node.op === "get_attr" || node.target.includes("_assert_");
  const shown = (node) => withInputs || !quiet(node);
  const add = (root, node, from) => {
    const rest = node.module.slice(from.length).replace(/^\./, "");
    let at = root, path = from;
    for (const part of rest ? rest.split(".") : []) {
      path = path ? `${path}.${part}` : part;
      if (!at.branches.has(part)) {
        at.branches.set(part, branch(part, path));
        at.items.push(at.branches.get(part));
      }
      at = at.branches.get(part);
    }
    at.items.push(node);
  };
  const count = (at) => {
    Object.assign(at, { nodes: 0, flops: 0, time: 0, mix: {} });
    for (const item of at.items) {
      if (item.items) count(item);
      const own = item.items ? item : { nodes: 1, flops: item.flops, time: timed && data.milliseconds[item.name] || 0, mix: { [kindOf(item)]: item.flops } };
      at.nodes += own.nodes;
      at.flops += own.flops;
      at.time += own.time;
      for (const [kind, flops] of Object.entries(own.mix)) at.mix[kind] = (at.mix[kind] || 0) + flops;
    }
    return at;
  };
  const timed = index === stageNames.length - 1;
  const root = branch(data.title, "");
  const first = new Map();
  stage.order.forEach((name, i) => {
    const node = stage.nodes.get(name);
    if (shown(node) && !(first.get(node.block) < i)) first.set(node.block, i);
  });
  const pieces = [];
  for (const part of stage.parts) {
    if (part.path === "") continue;
    const block = branch(part.path, part.path);
    part.nodes.filter(shown).forEach((node) => add(block, node, part.path));
    if (block.items.length) pieces.push({ block: count(block), body: part.body, at: first.get(part.path) });
  }
  pieces.sort((a, b) => a.at - b.at);
  const parent = (path) => path.slice(0, path.lastIndexOf("."));
  const runs = [];
  for (const piece of pieces) {
    const last = runs[runs.length - 1];
    if (last && last.body === piece.body && parent(last.blocks[0].path) === parent(piece.block.path)) last.blocks.push(piece.block);
    else runs.push({ ...piece, blocks: [piece.block] });
  }
  const waiting = runs.map((run) => {
    if (run.blocks.length === 1) return [run.at, run.blocks[0]];
    const [one, two] = [run.blocks[0], run.blocks[run.blocks.length - 1]];
    const group = branch(`${one.path} … ${two.path.slice(parent(two.path).length + 1)}`, `${one.path}…`);
    group.alike = run.blocks.length;
    group.items = run.blocks;
    return [run.at, count(group)];
  });
  stage.order.forEach((name, i) => {
    while (waiting.length && waiting[0][0] <= i) root.items.push(waiting.shift()[1]);
    const node = stage.nodes.get(name);
    if (node.block === "" && shown(node)) add(root, node, "");
  });
  root.items.push(...waiting.map((entry) => entry[1]));
  root.items.forEach((item) => item.items && count(item));
  return root;
}
