"use strict";
// Small plots as SVG, without a library. A plot is given numbers and says so where there are none.
const LINES = ["#12a082", "#4a86e0", "#e09a2b", "#b063c9", "#d65f5f", "#4fb3bf", "#8d9b3a", "#c77f4a", "#7a88d9", "#9aa3ae"];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function short(value) {
  if (value == null) return "";
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return `${+(value / unit).toPrecision(3)} ${letter}`;
  return size && size < 0.01 ? value.toExponential(1) : `${+value.toPrecision(3)}`;
}

function bytes(value) {
  for (const [unit, letter] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (value >= unit) return `${+(value / unit).toPrecision(3)} ${letter}`;
  return `${value} B`;
}

function plotCard(title, explanation, ...content) {
  return element("div", { class: "plot" }, element("h2", {}, title), element("p", {}, explanation), ...content);
}

const empty = (text) => element("div", { class: "empty" }, text);

function legend(entries) {
  const made = element("div", { class: "legend" });
  for (const [name, colour] of entries)
    made.append(element("span", {}, element("i", { class: "dot", style: `background:${colour}` }), name));
  return made;
}

function ticks(low, high, count = 5) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(+at.toPrecision(10));
  return found;
}

// Axes for points in [x0, x1] x [y0, y1]; returns the drawing and the two scales.
function axes({ x0, x1, y0, y1, xName, yName, xTicks, xText = short, yText = short, yTicks }) {
  const width = 560, height = 250, left = 54, right = 14, top = 26, bottom = 38;
  const x = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (width - left - right);
  const y = (v) => height - bottom - ((v - y0) / (y1 - y0 || 1)) * (height - top - bottom);
  const made = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${yName} over ${xName}` });
  for (const v of yTicks || ticks(y0, y1)) {
    made.append(svg("line", { class: "gridline", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
    made.append(svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, yText(v)));
  }
  for (const v of xTicks || ticks(x0, x1, 8))
    made.append(svg("text", { x: x(v), y: height - bottom + 15, "text-anchor": "middle" }, xText(v)));
  made.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(y0), y2: y(y0) }));
  made.append(svg("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, xName));
  made.append(svg("text", { x: 12, y: 10 }, yName));
  return { made, x, y, top, bottom: height - bottom };
}

// series: [{name, points: [[x, y, label, whether it is hollow]]}]
function lines(series, options) {
  const points = series.flatMap((s) => s.points);
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const pad = (Math.max(...ys) - Math.min(...ys)) * 0.08 || 1;
  const whole = Math.max(...xs) - Math.min(...xs) < 9 ? [...new Set(xs)].sort((a, b) => a - b) : undefined;
  const frame = axes({
    x0: Math.min(...xs), x1: Math.max(...xs), y0: options.y0 ?? Math.min(...ys) - pad, y1: Math.max(...ys) + pad,
    xTicks: whole, ...options,
  });
  series.forEach((s, i) => {
    const colour = LINES[i % LINES.length];
    const path = s.points.map((p, j) => `${j ? "L" : "M"}${frame.x(p[0]).toFixed(1)} ${frame.y(p[1]).toFixed(1)}`).join("");
    frame.made.append(svg("path", { d: path, fill: "none", stroke: colour, "stroke-width": 1.6 }));
    for (const p of s.points)
      frame.made.append(svg("circle", { cx: frame.x(p[0]), cy: frame.y(p[1]), r: p[3] ? 3.6 : 2.6, fill: p[3] ? "none" : colour, stroke: colour },
        svg("title", {}, p[2] || `${s.name}: ${short(p[1])}`)));
  });
  return [frame.made, legend(series.map((s, i) => [s.name, LINES[i % LINES.length]]))];
}

// rows: [{name, parts: [[label, value, colour]], text}]
function stacked(rows, text) {
  const made = svg("svg", { viewBox: `0 0 560 ${rows.length * 46}`, role: "img", "aria-label": "shares by precision" });
  rows.forEach((row, i) => {
    const total = row.whole || row.parts.reduce((sum, p) => sum + p[1], 0) || 1;
    made.append(svg("text", { x: 0, y: i * 46 + 13 }, row.name));
    let at = 0;
    for (const [label, value, colour] of row.parts) {
      const width = (value / total) * 560;
      made.append(svg("rect", { x: at, y: i * 46 + 18, width: Math.max(0, width - 1), height: 16, fill: colour, rx: 2 },
        svg("title", {}, `${label}: ${text[i](value)} (${((100 * value) / total).toFixed(1)} %)`)));
      at += width;
    }
    made.append(svg("text", { x: 560, y: i * 46 + 13, "text-anchor": "end" },
      row.text || row.parts.filter((p) => p[1]).map((p) => `${p[0]} ${text[i](p[1])}`).join(" · ")));
  });
  return made;
}

// A histogram of |x| with four buckets an octave, and where percentile and maximum lie.
function distribution(activation) {
  const { counts, low, high } = activation;
  const first = Math.log2(low);
  const edge = (i) => first + (Math.floor((i - 1) / 4) + Math.log2(1 + ((i - 1) % 4) / 4));
  const total = counts.reduce((a, b) => a + b, 0) || 1;
  const used = counts.map((c, i) => (c ? i : -1)).filter((i) => i > 0);
  const x0 = used.length ? Math.max(first, edge(Math.min(...used)) - 0.5) : first;
  const x1 = Math.max(used.length ? edge(Math.max(...used)) + 0.75 : x0 + 1, Math.log2(activation.max || 1) + 0.5);
  const floor = -6;
  const frame = axes({
    x0, x1, y0: floor, y1: 0, xName: "|x|", yName: "share of values", yTicks: [-6, -4, -2, 0],
    yText: (v) => (v ? `1e${v}` : "1"), xText: (v) => short(2 ** v),
    xTicks: ticks(x0, x1, 8).filter(Number.isInteger),
  });
  counts.forEach((count, i) => {
    if (!count || i === 0 || i === counts.length - 1) return;
    const share = Math.log10(count / total), left = frame.x(edge(i)), width = frame.x(edge(i + 1)) - left;
    if (share <= floor) return;
    frame.made.append(svg("rect", { x: left, y: frame.y(share), width: Math.max(0.5, width - 0.5), fill: "var(--bf16)",
      height: frame.bottom - frame.y(share) }, svg("title", {}, `${short(2 ** edge(i))} to ${short(2 ** edge(i + 1))}: ${short(count)} values`)));
  });
  const marks = [[activation.percentile, `p${activation.percent}`, "var(--hif4)", 36], [activation.max, "max", "var(--bad)", 50]];
  for (const [value, name, colour, y] of marks) {
    if (!(value > 0)) continue;
    const at = frame.x(Math.log2(value));
    frame.made.append(svg("line", { x1: at, x2: at, y1: y - 8, y2: frame.bottom, stroke: colour, "stroke-width": 1.8, "stroke-dasharray": "4 3" }));
    frame.made.append(svg("text", { x: at - 4, y, "text-anchor": "end" }, `${name} ${short(value)}`));
  }
  return [frame.made, legend([["values of all channels", "var(--bf16)"],
    [`percentile ${activation.percent} of the largest channel`, "var(--hif4)"], ["maximum", "var(--bad)"]])];
}
