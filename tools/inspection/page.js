"use strict";
// Tabs, panes, details, the table of linears and the search box.
const $ = (id) => document.getElementById(id);
const linears = new Map(data.linears.map((row) => [row.module, row]));
const state = { panes: [], chosen: null, sort: ["", 1] };

function tiles() {
  const chosen = data.linears.filter(inFour);
  const sum = (rows, key) => rows.reduce((total, row) => total + row[key], 0);
  const flops = sum(data.linears, "flops"), before = sum(data.linears, "bytes_before"), after = sum(data.linears, "bytes_after");
  const found = [
    [`${chosen.length} of ${data.linears.length}`, FORMATS.length ? `linears in ${fourBits(chosen)}` : "linears in HiF4 W4A4"],
    [flops ? `${((100 * sum(chosen, "flops")) / flops).toFixed(2)} %` : "none", `of ${short(flops)}FLOP of the linears a call`],
    [`${bytes(before)} → ${bytes(after)}`, after ? `weights of the linears, ${(before / after).toFixed(2)}x smaller` : "weights"],
    [`${stageOf(0).order.length} → ${stageOf(stageNames.length - 1).order.length}`, `nodes, ${stageNames.length - 1} passes`],
  ];
  const times = Object.values(data.milliseconds);
  if (times.length) found.push([`${times.reduce((a, b) => a + b, 0).toFixed(2)} ms`, `sum over the nodes, run one by one and not compiled (${data.device})`]);
  if (data.compiled != null) found.push([`${data.compiled.toFixed(2)} ms`, `a whole call, compiled (${data.device})`]);
  $("tiles").append(...found.map(([big, text]) => element("div", { class: "tile" }, element("b", {}, big), element("span", {}, text))));
}

// -- tabs ------------------------------------------------------------------------------------------------------------
const TABS = [["graph", "Graph"], ["linears", "Linears"], ["plots", "Plots"], ["passes", "Passes"]];
function show(name) {
  for (const [other] of TABS) {
    $(`view-${other}`).hidden = other !== name;
    const tab = $(`tab-${other}`);
    tab.setAttribute("aria-selected", String(other === name));
    tab.tabIndex = other === name ? 0 : -1;
  }
  if (name === "plots") drawPlots();
}
function makeTabs() {
  for (const [name, text] of TABS)
    $("tabs").append(element("button", { id: `tab-${name}`, role: "tab", type: "button", "aria-controls": `view-${name}`, onclick: () => show(name) }, text));
  $("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const at = TABS.findIndex(([name]) => $(`tab-${name}`).getAttribute("aria-selected") === "true");
    const [name] = TABS[(at + step + TABS.length) % TABS.length];
    show(name);
    $(`tab-${name}`).focus();
  });
}

// -- panes -----------------------------------------------------------------------------------------------------------
function addPane(stage) {
  const pane = { stage, open: new Set(), rows: new Map() };
  const select = element("select", { "aria-label": "Graph after" }, ...stageNames.map((name, i) =>
    element("option", { value: i, selected: i === stage }, i ? `after ${name}` : name)));
  select.addEventListener("change", () => { pane.stage = +select.value; draw(pane); });
  pane.note = element("small");
  pane.tree = element("div", { class: "tree", role: "tree", "aria-label": "Modules" });
  pane.tree.addEventListener("keydown", treeKeys);
  const close = element("button", { type: "button", title: "Close this pane", "aria-label": "Close this pane", onclick: () => {
    if (state.panes.length === 1) return;
    state.panes.splice(state.panes.indexOf(pane), 1);
    pane.box.remove();
  } }, "×");
  pane.box = element("div", { class: "pane" }, element("div", {}, select, pane.note, element("span", { class: "grow" }), close), pane.tree);
  state.panes.push(pane);
  $("panes").append(pane.box);
  draw(pane);
  return pane;
}

function draw(pane) {
  const root = treeOf(pane.stage, $("inputs").checked);
  const pass = data.passes[pane.stage];
  pane.note.textContent = `${stageOf(pane.stage).order.length} nodes${pass && pass.matches && pane.stage ? `, ${pass.matches} matches` : ""}`;
  pane.rows.clear();
  pane.tree.replaceChildren();
  root.items.forEach((item) => pane.tree.append(rowOf(pane, item, 0)));
  const first = pane.tree.querySelector(".row");
  if (first) first.tabIndex = 0;
  mark(pane);
}

function mixBar(item) {
  const bar = element("span", { class: "mix", title: "FLOPs by precision" });
  if (!item.flops) return null;
  for (const kind of ["hif4", "other4", "bf16", "f32"])
    if (item.mix[kind]) bar.append(element("i", { style: `background:var(--${kind});width:${(100 * item.mix[kind]) / item.flops}%` }));
  return bar;
}

function rowOf(pane, item, depth) {
  if (!item.items) {
    const time = pane.stage === stageNames.length - 1 ? data.milliseconds[item.name] : null;
    const row = element("div", { class: "row", role: "treeitem", tabindex: -1, style: `--depth:${depth}`, "data-node": item.name, title: item.module },
      element("i", { class: "dot", style: `background:${colourOf(item)}` }), element("span", { class: "name" }, item.name),
      element("span", { class: "kind" }, item.target.replace(/^aten\./, "")),
      element("span", { class: "end" }, time != null ? `${time.toFixed(3)} ms` : item.value.split("; ")[0]));
    row.addEventListener("click", () => choose(item.name, pane.stage, pane));
    pane.rows.set(item.name, row);
    return row;
  }
  const inside = element("div", { role: "group", hidden: true });
  const row = element("div", { class: "row group", role: "treeitem", tabindex: -1, "aria-expanded": "false", style: `--depth:${depth}`, "data-path": item.path },
    element("span", { class: "twist" }, "▸"), element("span", { class: "name" }, item.label),
    item.alike ? element("span", { class: "count" }, `${item.alike} alike`) : null,
    element("span", { class: "end" }, mixBar(item), [`${item.nodes} node${item.nodes === 1 ? "" : "s"}`, item.flops ? `${short(item.flops)}FLOP` : "", item.time ? `${item.time.toFixed(2)} ms` : ""].filter(Boolean).join(" · ")));
  const set = (open) => {
    row.setAttribute("aria-expanded", String(open));
    inside.hidden = !open;
    pane.open[open ? "add" : "delete"](item.path);
    if (open && !inside.childElementCount) item.items.forEach((child) => inside.append(rowOf(pane, child, depth + 1)));
    if (open) mark(pane);
  };
  row.toggle = set;
  row.addEventListener("click", () => set(row.getAttribute("aria-expanded") !== "true"));
  if (pane.open.has(item.path)) set(true);
  return element("div", {}, row, inside);
}

function treeKeys(event) {
  const row = event.target.closest(".row");
  if (!row) return;
  const rows = [...event.currentTarget.querySelectorAll(".row")].filter((r) => r.offsetParent);
  const at = rows.indexOf(row), open = row.getAttribute("aria-expanded");
  let next = null;
  if (event.key === "ArrowDown") next = rows[at + 1];
  else if (event.key === "ArrowUp") next = rows[at - 1];
  else if (event.key === "Home") next = rows[0];
  else if (event.key === "End") next = rows[rows.length - 1];
  else if (event.key === "ArrowRight" && open === "false") row.toggle(true);
  else if (event.key === "ArrowRight" && open) next = rows[at + 1];
  else if (event.key === "ArrowLeft" && open === "true") row.toggle(false);
  else if (event.key === "ArrowLeft") next = row.parentElement.closest("[role=group]")?.previousElementSibling;
  else if (event.key === "Enter" || event.key === " ") row.click();
  else return;
  event.preventDefault();
  if (next) { row.tabIndex = -1; next.tabIndex = 0; next.focus(); }
}

// Unfolds what is around a node. A node that is not shown (a weight, say) has no row.
function reveal(pane, name) {
  const node = stageOf(pane.stage).nodes.get(name);
  if (!node) return null;
  const paths = [];
  node.module.split(".").reduce((path, part) => { paths.push(path ? `${path}.${part}` : part); return paths[paths.length - 1]; }, "");
  const open = (wanted) => [...pane.tree.querySelectorAll(".row.group")].filter(wanted).forEach((row) => row.toggle(true));
  for (const path of paths) {
    if (path === node.block) open((row) => row.querySelector(".count") && inRun(row, path));
    open((row) => row.dataset.path === path);
  }
  return pane.rows.get(name);
}
function inRun(row, block) {
  const [first, last] = row.querySelector(".name").textContent.split(" … ");
  const cut = first.lastIndexOf("."), number = +block.slice(block.lastIndexOf(".") + 1);
  return block.slice(0, block.lastIndexOf(".")) === first.slice(0, cut) && number >= +first.slice(cut + 1) && number <= +last;
}

function mark(pane) {
  for (const row of pane.rows.values()) row.classList.remove("chosen", "match");
  if (!state.chosen) return;
  const { name, stage } = state.chosen;
  for (const other of pane.stage === stage ? [name] : matches(name, stage, pane.stage))
    pane.rows.get(other)?.classList.add(pane.stage === stage ? "chosen" : "match");
}

function choose(name, stage, from) {
  state.chosen = { name, stage };
  for (const pane of state.panes) {
    const names = pane.stage === stage ? [name] : [...matches(name, stage, pane.stage)];
    const rows = names.map((other) => reveal(pane, other)).filter(Boolean);
    mark(pane);
    if (rows.length && pane !== from) rows[0].scrollIntoView({ block: "center" });
    const row = pane.rows.get(name);
    if (pane === from && row) { pane.tree.querySelectorAll('[tabindex="0"]').forEach((r) => (r.tabIndex = -1)); row.tabIndex = 0; }
  }
  details();
}

// -- details ---------------------------------------------------------------------------------------------------------
function facts(pairs) {
  const list = element("dl");
  for (const [term, value] of pairs) if (value !== "" && value != null) list.append(element("dt", {}, term), element("dd", {}, value));
  return list;
}
const link = (name, stage) => element("button", { class: "link mono", type: "button", onclick: () => choose(name, stage) }, name);
function links(names, stage) {
  const box = element("div");
  names.slice(0, 12).forEach((name) => box.append(link(name, stage), " "));
  if (names.length > 12) box.append(element("span", { class: "muted" }, `and ${names.length - 12} more`));
  return box;
}

function linearFacts(row) {
  const mask = row.mask;
  return facts([
    ["decision", element("span", { class: "tag", style: `background:var(--${decisionKind(row)})` }, { hif4: "HiF4 W4A4", high_precision: "high precision" }[row.decision] || row.decision)],
    ["reason", row.reason], ["weight", `${row.n} × ${row.k}`], ["bytes", `${bytes(row.bytes_before)} → ${bytes(row.bytes_after)}`],
    ["FLOPs", short(row.flops)], ["kernel", row.kernel], ["SQNR", row.sqnr_db != null ? `${row.sqnr_db.toFixed(1)} dB` : ""],
    ["SQNR along steps", (row.step_sqnr_db || []).length > 1 ? `${row.step_sqnr_db.map((v) => v?.toFixed(1) ?? "none seen").join(", ")} dB` : ""],
    ["effect", row.effect != null ? row.effect.toExponential(2) : ""], ["percentile", row.percentile ?? ""],
    ["weight exponent", row.weight_exponent], ["mask", mask ? `${short(mask.min)} to ${short(mask.max)}, median ${short(mask.median)}; ${(100 * mask.far).toFixed(1)} % of channels 4x off` : ""],
    ["rotation", row.hadamard_block ? `blocks of ${row.hadamard_block}` : ""], ["scale search", row.search],
    ["time", row.milliseconds != null ? `${row.milliseconds} ms${(row.with || []).length ? `, with ${row.with.join(", ")}` : ""}` : ""], ...Object.entries(row.numbers || {}),
  ]);
}

function details() {
  const box = $("details");
  box.replaceChildren();
  if (!state.chosen) {
    box.append(element("h2", {}, "Nothing selected"), element("p", { class: "muted" }, "Choose a node: the nodes that it came from, or became, are marked in the other panes. Keys: arrows move and unfold, Enter chooses, / searches."));
    return;
  }
  const { name, stage } = state.chosen, node = stageOf(stage).nodes.get(name);
  box.append(element("h2", { class: "mono" }, name), element("div", { class: "muted" }, `${stage ? "after " : ""}${stageNames[stage]}`));
  box.append(facts([
    ["operator", node.target], ["module", node.module || "(root)"], ["result", node.value], ["bytes", node.bytes ? bytes(node.bytes) : ""],
    ["FLOPs", node.flops ? short(node.flops) : ""], ["kernel", node.kernel], ["precision", { hif4: "HiF4" }[node.precision] || node.precision],
    ["time", stage === stageNames.length - 1 && data.milliseconds[name] != null ? `${data.milliseconds[name]} ms (${data.device})` : ""],
    ...Object.entries(node.numbers),
  ]));
  for (const path of node.linears) {
    box.append(element("h3", {}, `Linear ${path}`));
    if (linears.has(path)) box.append(linearFacts(linears.get(path)));
  }
  const users = usersOf(stage).get(name) || [];
  if (node.inputs.length) box.append(element("h3", {}, "Reads"), links(node.inputs, stage));
  if (users.length) box.append(element("h3", {}, "Read by"), links(users, stage));
  if (node.arguments) box.append(element("h3", {}, "Arguments"), element("pre", {}, node.arguments));
  box.append(element("h3", {}, "Across passes"));
  let before = "";
  stageNames.forEach((other, i) => {
    const names = [...matches(name, stage, i)], text = names.join(" ");
    if (text === before && i !== stage) return;
    before = text;
    const line = element("div", {}, element("span", { class: "muted" }, `${other}: `));
    line.append(names.length ? links(names, i) : "not there");
    box.append(line);
  });
}

// -- search ----------------------------------------------------------------------------------------------------------
function search() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), list = $("hits");
  list.replaceChildren();
  const found = [];
  if (words.length) {
    const stages = [...new Set([...state.panes.map((pane) => pane.stage), stageNames.length - 1])];
    for (const stage of stages)
      for (const node of stageOf(stage).nodes.values()) {
        const text = `${node.name} ${node.target} ${node.module} ${node.linears.join(" ")}`.toLowerCase();
        if (words.every((word) => text.includes(word))) found.push([node, stage]);
      }
    found.sort((a, b) => (b[0].flops > 0) - (a[0].flops > 0));
  }
  for (const [node, stage] of found.slice(0, 60)) {
    const hit = element("li", { role: "option", "aria-selected": "false" }, element("i", { class: "dot", style: `background:${colourOf(node)}` }),
      element("span", { class: "mono" }, node.name), element("span", { class: "muted" }, node.target),
      element("small", {}, `${node.module || "(root)"} · ${stageNames[stage]}`));
    hit.addEventListener("click", () => {
      list.hidden = true;
      show("graph");
      if (!state.panes.some((pane) => pane.stage === stage)) { state.panes[0].stage = stage; state.panes[0].box.querySelector("select").value = stage; draw(state.panes[0]); }
      if (!state.panes[0].rows.has(node.name) && (node.op !== "call_function" || node.target.includes("_assert_")) && !$("inputs").checked) { $("inputs").checked = true; state.panes.forEach(draw); }
      choose(node.name, stage);
    });
    list.append(hit);
  }
  if (words.length && !found.length) list.append(element("li", { class: "muted" }, "nothing found"));
  if (found.length > 60) list.append(element("li", { class: "muted" }, `and ${found.length - 60} more: type further words`));
  list.hidden = !words.length;
  $("search").setAttribute("aria-expanded", String(!list.hidden));
}

function searchKeys(event) {
  const hits = [...$("hits").querySelectorAll("[role=option]")], at = hits.findIndex((hit) => hit.getAttribute("aria-selected") === "true");
  if (event.key === "Escape") $("hits").hidden = true;
  else if (event.key === "Enter") (hits[at] || hits[0])?.click();
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const next = hits[Math.max(0, Math.min(hits.length - 1, at + (event.key === "ArrowDown" ? 1 : -1)))];
    hits.forEach((hit) => hit.setAttribute("aria-selected", String(hit === next)));
    next?.scrollIntoView({ block: "nearest" });
  } else return;
  event.preventDefault();
}

// -- linears ---------------------------------------------------------------------------------------------------------
const COLUMNS = [
  ["module", "module", (r) => element("code", {}, r.module)],
  ["decision", "decision", (r) => element("span", { class: "tag", style: `background:var(--${decisionKind(r)})` }, { hif4: "HiF4", high_precision: "high" }[r.decision] || r.decision)],
  ["k", "in"], ["n", "out"], ["bytes_before", "bytes", (r) => bytes(r.bytes_before)], ["bytes_after", "after", (r) => bytes(r.bytes_after)],
  ["flops", "FLOPs", (r) => short(r.flops)], ["sqnr_db", "SQNR dB", (r) => r.sqnr_db?.toFixed(1) ?? ""],
  ["effect", "effect", (r) => r.effect?.toExponential(1) ?? ""], ["percentile", "percentile"],
  ["mask_max", "mask", (r) => (r.mask ? `${short(r.mask.min)} – ${short(r.mask.max)}` : "")],
  ["milliseconds", "ms"], ["kernel", "kernel"], ["reason", "reason"],
];
const TEXTS = new Set(["module", "decision", "kernel", "reason"]);
const valueOf = (row, key) => (key === "mask_max" ? row.mask?.max : row[key]);
function table() {
  const used = COLUMNS.filter(([key]) => data.linears.some((row) => valueOf(row, key) != null && valueOf(row, key) !== ""));
  const [key, way] = state.sort;
  const head = element("tr");
  for (const [name, text] of used)
    head.append(element("th", { class: TEXTS.has(name) ? "" : "num", "aria-sort": name === key ? (way > 0 ? "ascending" : "descending") : "none" },
      element("button", { type: "button", onclick: () => { state.sort = [name, name === key ? -way : 1]; table(); } }, text + (name === key ? (way > 0 ? " ▲" : " ▼") : ""))));
  document.querySelector("#linears thead").replaceChildren(head);
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = data.linears.filter((row) => words.every((word) => `${row.module} ${row.decision} ${row.reason} ${row.kernel}`.toLowerCase().includes(word)));
  if (key) rows.sort((a, b) => {
    const [x, y] = [valueOf(a, key), valueOf(b, key)];
    if (x == null || y == null) return (x == null) - (y == null);
    return way * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  });
  $("count").textContent = `${rows.length} of ${data.linears.length}`;
  document.querySelector("#linears tbody").replaceChildren(...rows.map((row) => {
    const line = element("tr", { tabindex: 0 }, ...used.map(([name, , cell]) =>
      element("td", { class: name === "reason" ? "reason" : TEXTS.has(name) ? "" : "num" }, cell ? cell(row) : `${row[name] ?? ""}`)));
    const open = () => {
      const last = stageNames.length - 1, name = row.node || [...stageOf(last).nodes.values()].find((n) => n.linears.includes(row.module))?.name;
      if (name) { show("graph"); choose(name, last); }
    };
    line.addEventListener("click", open);
    line.addEventListener("keydown", (event) => event.key === "Enter" && open());
    return line;
  }));
}

$("title").textContent = data.title;
$("source").textContent = data.source;
tiles();
makeTabs();
for (const [kind, text] of [["hif4", "HiF4"], ...(FORMATS.length ? [["other4", `other 4-bit format: ${FORMATS.join(", ")}`]] : []), ["bf16", "16-bit float"], ["f32", "32-bit float"], ["int", "integer"]])
  $("legend").append(element("span", {}, element("i", { class: "dot", style: `background:var(--${kind})` }), text));
addPane(0);
addPane(stageNames.length - 1);
details();
table();
passes();
show("graph");
$("inputs").addEventListener("change", () => state.panes.forEach(draw));
$("close-all").addEventListener("click", () => state.panes.forEach((pane) => { pane.open.clear(); draw(pane); }));
$("add-pane").addEventListener("click", () => addPane(Math.min(state.panes.length, stageNames.length - 1)));
$("filter").addEventListener("input", table);
$("search").addEventListener("input", search);
$("search").addEventListener("keydown", searchKeys);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) { event.preventDefault(); $("search").focus(); }
});
document.addEventListener("click", (event) => { if (!event.target.closest(".search")) $("hits").hidden = true; });
