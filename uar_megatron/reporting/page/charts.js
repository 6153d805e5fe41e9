"use strict";
// Drawing on SVG: scales, line charts, heat maps. Nothing here knows what a run is.

const SVG = "http://www.w3.org/2000/svg";
const SERIES = ["--s0", "--s1", "--s2", "--s3", "--s4", "--s5", "--s6"].map((name) => `var(${name})`);
// Cividis: readable by colour-blind people, and monotonous in lightness.
const CIVIDIS = [[0, 34, 78], [26, 56, 111], [67, 78, 108], [96, 101, 112], [125, 124, 120],
  [155, 149, 119], [187, 174, 109], [221, 202, 90], [254, 232, 56]];

function node(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:")
    ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return String(value);
  const text = Number(value).toPrecision(digits);
  return String(Number(text));
}

function color(share) {
  const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1);
  const low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  return `rgb(${CIVIDIS[low].map((v, i) => Math.round(v + (CIVIDIS[low + 1][i] - v) * (at - low))).join(",")})`;
}

function ticks(low, high, count) {
  if (low === high) return [low];
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) || rough;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${number(value / 1e6, 3)}M`;
  if (size >= 1e4) return `${number(value / 1e3, 3)}k`;
  return number(value, 3);
}

function range(values, pad = 0.05) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (v !== null && v !== undefined) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low > high) return [0, 1];
  if (low === high) return [low - Math.max(Math.abs(low) * 0.1, 0.5), high + Math.max(Math.abs(high) * 0.1, 0.5)];
  const extra = (high - low) * pad;
  return [low - extra, high + extra];
}

// A frame with axes; returns the scales and the element to draw in.
function frame(holder, { x, y, xlabel, ylabel, height, xticks, yticks, left = 52, label }) {
  const width = Math.max(holder.clientWidth, 240);
  const box = { left, right: width - 16, top: 20, bottom: height - 34 };
  const sx = (v) => box.left + (v - x[0]) / (x[1] - x[0] || 1) * (box.right - box.left);
  const sy = (v) => box.bottom - (v - y[0]) / (y[1] - y[0] || 1) * (box.bottom - box.top);
  const svg = node("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const inverseX = (pixel) => x[0] + (pixel - box.left) / (box.right - box.left) * (x[1] - x[0]);
  const inverseY = (pixel) => y[0] + (box.bottom - pixel) / (box.bottom - box.top) * (y[1] - y[0]);
  for (const v of yticks || ticks(y[0], y[1], 5)) {
    svg.append(node("svg:line", { class: "gridline", x1: box.left, x2: box.right, y1: sy(v), y2: sy(v) }));
    svg.append(node("svg:text", { x: box.left - 6, y: sy(v) + 4, "text-anchor": "end" }, short(v)));
  }
  const every = xticks || ticks(x[0], x[1], width < 500 ? 4 : 7);
  for (const v of every) {
    svg.append(node("svg:text", { x: sx(v), y: box.bottom + 16, "text-anchor": "middle" }, short(v)));
  }
  svg.append(node("svg:line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  svg.append(node("svg:text", { x: box.right, y: height - 4, "text-anchor": "end" }, xlabel || ""));
  svg.append(node("svg:text", { x: 2, y: 12 }, ylabel || ""));
  return { svg, sx, sy, box, inverseX, inverseY, width, height };
}

function path(xs, ys, sx, sy) {
  let text = "", pen = false;
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] === null || ys[i] === undefined) { pen = false; continue; }
    text += `${pen ? "L" : "M"}${sx(xs[i]).toFixed(1)} ${sy(ys[i]).toFixed(1)}`;
    pen = true;
  }
  return text;
}

function area(xs, low, high, sx, sy) {
  const kept = xs.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null);
  if (!kept.length) return "";
  const up = kept.map((i) => `${sx(xs[i]).toFixed(1)} ${sy(high[i]).toFixed(1)}`);
  const down = kept.reverse().map((i) => `${sx(xs[i]).toFixed(1)} ${sy(low[i]).toFixed(1)}`);
  return `M${up.join("L")}L${down.join("L")}Z`;
}

// lines: [{name, color, x, y, dash, low, high, dots}]; stacked areas with `fill`.
function lineChart(holder, { title, lines, xlabel, ylabel, y, spans = [], resumed = [], picked, height = 250, xticks }) {
  const xs = lines.flatMap((line) => line.x);
  const x = range(xs, 0);
  const bands = lines.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])]);
  const made = frame(holder, { x, y: y || range(bands), xlabel, ylabel, height, xticks,
    label: `${title}: ${lines.map((line) => line.name).join(", ")}` });
  const { svg, sx, sy, box } = made;
  for (const [from, to, tint] of spans) {
    svg.prepend(node("svg:rect", { x: sx(from), width: Math.max(sx(to) - sx(from), 0), y: box.top,
      height: box.bottom - box.top, fill: tint, opacity: 0.16 }));
  }
  for (const at of resumed) svg.append(node("svg:line", { class: "resume", x1: sx(at), x2: sx(at), y1: box.top, y2: box.bottom }));
  for (const line of lines) {
    if (line.low) svg.append(node("svg:path", { d: area(line.x, line.low, line.high, sx, sy), fill: line.color, opacity: line.fill || 0.14 }));
    if (line.fill) continue;
    svg.append(node("svg:path", { d: path(line.x, line.y, sx, sy), fill: "none", stroke: line.color,
      "stroke-width": line.width || 1.8, "stroke-dasharray": line.dash, "stroke-linejoin": "round" }));
    if (line.dots) line.x.forEach((v, i) => line.y[i] !== null && svg.append(node("svg:circle", { cx: sx(v), cy: sy(line.y[i]), r: 3, fill: line.color })));
  }
  if (picked !== null && picked !== undefined && picked >= x[0] && picked <= x[1]) {
    svg.append(node("svg:line", { class: "picked", x1: sx(picked), x2: sx(picked), y1: box.top, y2: box.bottom }));
  }
  holder.replaceChildren(svg);
  return made;
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle; else high = middle;
  }
  return high >= 0 && Math.abs(sorted[high] - value) < Math.abs(sorted[low] - value) ? high : low;
}

// values: rows × columns, drawn as pixels; a canvas inside the SVG frame's area.
function heatMap(holder, { title, values, rowNames, columnNames, xlabel, ylabel, scale, height, mark }) {
  const rows = rowNames.length, columns = columnNames.length;
  const step = Math.max(1, Math.ceil(rows / 12));
  const made = frame(holder, { x: [-0.5, columns - 0.5], y: [rows - 0.5, -0.5], xlabel, ylabel, height, left: 44,
    xticks: [], yticks: [], label: title });
  const { svg, sx, sy, box } = made;
  rowNames.forEach((name, i) => i % step === 0 && svg.append(node("svg:text", { x: box.left - 6, y: sy(i) + 4, "text-anchor": "end" }, name)));
  const wide = Math.max(1, Math.ceil(columns / (made.width < 500 ? 4 : 8)));
  columnNames.forEach((name, i) => i % wide === 0 && svg.append(node("svg:text", { x: sx(i), y: box.bottom + 16, "text-anchor": "middle" }, short(name))));
  const canvas = document.createElement("canvas");
  canvas.width = columns; canvas.height = rows;
  const context = canvas.getContext("2d");
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) {
    const v = values[i][j];
    if (v === null || v === undefined) continue;
    context.fillStyle = color((v - scale[0]) / (scale[1] - scale[0] || 1));
    context.fillRect(j, i, 1, 1);
  }
  svg.append(node("svg:image", { href: canvas.toDataURL(), x: box.left, y: box.top, width: box.right - box.left,
    height: box.bottom - box.top, preserveAspectRatio: "none", style: "image-rendering:pixelated" }));
  if (mark) {
    const cell = (box.right - box.left) / columns, tall = (box.bottom - box.top) / rows;
    svg.append(node("svg:rect", { x: sx(mark[1]) - cell / 2, y: mark[0] === null ? box.top : sy(mark[0]) - tall / 2,
      width: cell, height: mark[0] === null ? box.bottom - box.top : tall, fill: "none", stroke: "#d55e00", "stroke-width": 2 }));
  }
  holder.replaceChildren(svg);
  return made;
}

// Row and column of a heat map that a pointer is over.
function cellAt(made, event, rows, columns) {
  const bounds = made.svg.getBoundingClientRect();
  const x = (event.clientX - bounds.left) * made.width / bounds.width, y = (event.clientY - bounds.top) * made.height / bounds.height;
  return [Math.min(Math.max(Math.round(made.inverseY(y)), 0), rows - 1), Math.min(Math.max(Math.round(made.inverseX(x)), 0), columns - 1)];
}

function scaleBar(scale, unit) {
  const stops = CIVIDIS.map((c) => `rgb(${c.join(",")})`).join(",");
  return node("p", { class: "soft" }, `${number(scale[0], 3)} `, node("span", { style:
    `display:inline-block;width:8em;height:.8em;border-radius:3px;vertical-align:-1px;background:linear-gradient(90deg,${stops})` }), ` ${number(scale[1], 3)} ${unit}`);
}
