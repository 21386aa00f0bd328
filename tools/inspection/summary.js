"use strict";
// The views of plots and passes.
let drawn = false;
function drawPlots() {
  if (drawn) return;
  drawn = true;
  const box = $("plots"), rows = data.linears, sum = (list, key) => list.reduce((total, row) => total + row[key], 0);
  const formats = byFormat(rows), high = rows.filter((r) => !inFour(r));
  const parts = (key) => formats.map(([name, list, colour]) => [name, sum(list, key), colour]);
  const last = [...stageOf(stageNames.length - 1).nodes.values()], attention = last.filter((n) => n.target.includes("scaled_dot_product"));
  const flops = (list) => list.reduce((total, n) => total + n.flops, 0);
  box.append(plotCard("Memory and FLOPs by precision", "Weights of the linears as they are and as the plan leaves them; products and attention cores of one call.",
    stacked([
      { name: "weights before", parts: [["as they are", sum(rows, "bytes_before"), "var(--bf16)"]] },
      { name: "weights after", whole: sum(rows, "bytes_before"), parts: [...parts("bytes_after"), ["high precision", sum(high, "bytes_after"), "var(--bf16)"]] },
      { name: "FLOPs", parts: [...parts("flops"), ["linears high", sum(high, "flops"), "var(--bf16)"], ["attention", flops(attention), "var(--f32)"]] },
    ], [bytes, bytes, short]),
    legend([...formats.map(([name, , colour]) => [name, colour]), ["high precision", "var(--bf16)"], ["attention", "var(--f32)"]])));
  depthPlot(box, rows);
  stepPlots(box, rows);
  activationPlots(box);
  if (Object.keys(data.milliseconds).length) timePlot(box, last);
}

function depthPlot(box, rows) {
  const series = (key, make) => {
    const found = new Map();
    for (const row of rows) {
      const parts = row.module.split("."), at = parts.findIndex((part) => /^\d+$/.test(part));
      if (at < 0 || row[key] == null) continue;
      const name = [...parts.slice(0, at), "*", ...parts.slice(at + 1)].join(".");
      if (!found.has(name)) found.set(name, []);
      found.get(name).push([+parts[at], make(row[key]), `${row.module}: ${make(row[key]).toPrecision(4)}`]);
    }
    return [...found].map(([name, points]) => ({ name, points }));
  };
  const noise = series("sqnr_db", (v) => v), effect = series("effect", (v) => Math.log10(Math.max(v, 1e-12)));
  const none = "Not measured: give a recipe that was made with sensitivity (tahf4 calibrate does).";
  box.append(plotCard("Error along depth", "Signal-to-quantization-noise ratio of each linear's own output on calibration rows, in dB.",
    ...(noise.length ? lines(noise, { xName: "block", yName: "dB" }) : [empty(none)])));
  box.append(plotCard("Effect along depth", "Relative squared error of the network's output when only that linear is quantized.",
    ...(effect.length ? lines(effect, { xName: "block", yName: "effect", yText: (v) => `1e${+v.toFixed(1)}` }) : [empty(none)])));
}

// Errors that a recipe holds: of the linears by part of the schedule, and of the network's output by denoising step.
function stepPlots(box, rows) {
  const kinds = new Map();
  for (const row of rows) {
    if ((row.step_sqnr_db || []).length < 2) continue;
    const name = row.module.replace(/(^|\.)\d+(?=\.|$)/, "$1*");
    if (!kinds.has(name)) kinds.set(name, []);
    kinds.get(name).push(row.step_sqnr_db);
  }
  const middle = (values) => { const sorted = values.sort((a, b) => a - b); return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2; };
  const series = [...kinds].map(([name, found]) => ({ name, points: found[0].flatMap((_, step) => {
    const values = found.map((along) => along[step]).filter((v) => v != null);
    return values.length ? [[step, middle(values), `${name}, part ${step}: ${middle([...values]).toFixed(2)} dB in the middle, ${Math.min(...values).toFixed(2)} dB at least`]] : [];
  }) })).filter((s) => s.points.length);
  const none = "Not measured: give a recipe of a calibration that kept parts of the schedule apart (tahf4 calibrate keeps four; tahf4.calibrate(step_groups=4)), made with sensitivity.";
  box.append(plotCard("Error along steps", "Signal-to-quantization-noise ratio of the linears' own outputs on rows of each part of the denoising schedule, in dB: the middle of the blocks.",
    ...(series.length ? lines(series, { xName: "part of the schedule", yName: "dB" }) : [empty(none)])));
  const high = data.evidence.high_precision_steps, inHigh = (step, steps) => high.some((s) => (s < 0 ? steps + s : s) === step);
  const branches = new Map(), counts = new Set(data.evidence.errors.map((e) => e.steps));
  for (const { step, steps, branch, error } of data.evidence.errors) {
    const name = branch || "output";
    if (!branches.has(name)) branches.set(name, []);
    const noise = -10 * Math.log10(Math.max(error, 1e-30));
    branches.get(name).push([counts.size > 1 ? step / steps : step, noise, `${name}, step ${step} of ${steps}: ${noise.toFixed(2)} dB, relative squared error ${error.toExponential(2)}${inHigh(step, steps) ? "; it runs in high precision: this is what that saves" : ""}`, inHigh(step, steps)]);
  }
  box.append(plotCard("Error of the output along steps", "Signal-to-quantization-noise ratio of the network's output with everything in 4 bits that the recipe says, in the calls that the calibration kept, in dB."
    + (high.length ? ` The recipe runs the steps ${high.join(", ")}${high.some((s) => s < 0) ? " (negative ones from the end)" : ""} in high precision; hollow points are what they would lose in 4 bits.` : ""),
    ...(branches.size ? lines([...branches].map(([name, points]) => ({ name, points })), { xName: counts.size > 1 ? "share of the denoising steps" : `denoising step of ${[...counts][0]}`, yName: "dB" })
      : [empty("Not measured: give a recipe that was made with sensitivity, and not planned again since.")])));
}

function activationPlots(box) {
  const names = Object.keys(data.evidence.activations), hint = "Not measured: give the statistics of a calibration (--calibration FILE; tahf4 calibrate writes them beside the recipe).";
  const one = element("div"), two = element("div");
  const select = element("select", { "aria-label": "Activation" }, ...names.map((name) => element("option", {}, name)));
  const redraw = () => {
    const found = data.evidence.activations[select.value];
    one.replaceChildren(...distribution(found));
    const along = (key) => found.steps.map((s) => [s.step, Math.log2(Math.max(s[key], 1e-6)), `${key}: ${short(s[key])}`]);
    two.replaceChildren(...lines([{ name: "maximum", points: along("max") }, { name: `percentile ${found.percent}, largest channel`, points: along("percentile") },
      { name: `percentile ${found.percent}, median channel`, points: along("median") }], { xName: "part of the schedule", yName: "|x|", yText: (v) => short(2 ** v) }));
  };
  select.addEventListener("change", redraw);
  const have = names.length > 0;
  box.append(plotCard("Activation distribution", "Histogram of |x| of what a linear reads.", ...(have ? [select, one] : [empty(hint)])));
  box.append(plotCard("Activations along steps", "Maximum and percentile of the activation at each part of the denoising schedule.", have ? two : empty(hint)));
  if (have) redraw();
}

function timePlot(box, nodes) {
  const by = new Map();
  for (const node of nodes) {
    const time = data.milliseconds[node.name];
    if (time != null) by.set(node.target, (by.get(node.target) || 0) + time);
  }
  const top = [...by].sort((a, b) => b[1] - a[1]).slice(0, 10), most = top.length ? top[0][1] : 1;
  box.append(plotCard("Time by operator", `Milliseconds of the nodes of one call, run one by one, not compiled: what Inductor would fuse is measured apart, so shares are no shares of a compiled call${data.compiled == null ? "" : `, which takes ${data.compiled.toFixed(2)} ms as a whole`} (${data.device}).`,
    stacked(top.map(([name, time]) => ({ name, whole: most, parts: [[name, time, name.startsWith("tahf4") ? "var(--hif4)" : "var(--bf16)"]], text: `${time.toFixed(3)} ms` })), top.map(() => (v) => `${v.toFixed(3)} ms`))));
}

function passes() {
  const head = element("tr", {}, ...["pass", "matches", "nodes", "seconds", "added error", "what it says"].map((text, i) => element("th", { class: i && i < 5 ? "num" : "" }, text)));
  const body = data.passes.map((pass) => element("tr", {}, element("td", {}, pass.name), ...["matches", "nodes", "seconds", "error"].map((key) =>
    element("td", { class: "num" }, pass[key] == null ? "" : key === "error" && pass[key].toExponential ? pass[key].toExponential(2) : `${pass[key]}`)),
    element("td", { class: "reason" }, (data.notes[pass.name] || []).join("; "))));
  $("passes").append(element("div", { class: "card" }, element("h2", {}, "What each pass did"), element("table", {}, element("thead", {}, head), element("tbody", {}, ...body))));
  const sources = data.evidence.sources;
  const high = data.evidence.high_precision_steps;
  $("passes").append(element("div", { class: "card" }, element("h2", {}, "Recipe"), element("p", {}, sources.length ? sources.join("; ") : "No recipe was given."),
    high.length ? element("p", {}, `Denoising steps in high precision: ${high.join(", ")}`) : null,
    Object.keys(data.evidence.provenance).length ? element("pre", {}, JSON.stringify(data.evidence.provenance, null, 2)) : null));
}
