// The page's panels: each draws itself from DATA and what is picked.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const PHASE_TINT = { "Exploration": "#56b4e9", "Symmetry breaking": "#e69f00", "Stabilisation": "#009e73" };
const STATES = ["I consensus", "II ambiguity", "III stubborn bias", "IV vacuum"];
const STATE_TINT = ["var(--q0)", "var(--q1)", "var(--q2)", "var(--q3)"];
const state = { run: 0, layer: null, step: null };
const panels = [];

const current = () => RUNS[state.run];
const unit = (name) => DATA.metrics[name][1];
const column = (table, place) => table.map((row) => row[place]);
const there = (row) => row.filter((v) => v !== null && v !== undefined);
const average = (row) => { const kept = there(row); return kept.length ? kept.reduce((a, b) => a + b, 0) / kept.length : null; };
const least = (row) => there(row).reduce((a, b) => a === null || b < a ? b : a, null);
const most = (row) => there(row).reduce((a, b) => a === null || b > a ? b : a, null);
const layerName = () => state.layer === null ? "mean over layers" : `layer ${state.layer}`;

// A card with a plot that a pointer and the arrow keys move over, a readout below it (its height
// changes with its text: above, the plot would move under the pointer), and a table.
function card(grid, { title, caption, wide, controls, draw, table }) {
  const readout = node("p", { class: "readout" });
  const legend = node("ul", { class: "legend" });
  const plot = node("div", { class: "plot" });
  const rows = node("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${title}, values` });
  const details = node("details", {}, node("summary", {}, "Values as a table"), rows);
  const head = node("div", { class: "head" }, node("h3", {}, title), ...(controls ? [controls] : []));
  const figure = node("figure", { class: wide ? "card wide" : "card" }, head, legend, plot, readout,
    ...(caption ? [node("figcaption", {}, caption)] : []), ...(table ? [details] : []));
  document.getElementById(grid).append(figure);
  const fill = () => { if (table && details.open) rows.replaceChildren(tableOf(title, ...table())); };
  details.addEventListener("toggle", fill);
  const redraw = () => { draw({ plot, readout, legend, figure }); fill(); };
  panels.push(redraw);
  return { plot, readout };
}

function tableOf(title, columns, rows) {
  const step = Math.max(1, Math.ceil(rows.length / 40));
  const kept = rows.filter((_, i) => i % step === 0 || i === rows.length - 1);
  return node("table", {}, node("caption", {}, step > 1 ? `${title}, every ${step}th value drawn` : title),
    node("thead", {}, node("tr", {}, ...columns.map((name) => node("th", { scope: "col" }, name)))),
    node("tbody", {}, ...kept.map((row) => node("tr", {}, ...row.map((v) => node("td", {}, typeof v === "string" ? v : number(v)))))));
}

function legendOf(holder, entries) {
  holder.replaceChildren(...entries.map(([name, tint, dash]) => node("li", {}, node("span", { class: "key",
    style: dash ? `border-top:3px dashed ${tint};height:0;vertical-align:4px` : `background:${tint}` }), name)));
}

// What a line says at x: nothing beyond its ends, and where it has no point there the nearest one's
// value, with its place.
function valueAt(line, x, xname) {
  if (!(line.x[0] <= x && x <= line.x.at(-1))) return `${line.name} –`;
  const i = nearest(line.x, x), of = line.x[i] === x ? "" : ` (${xname} ${number(line.x[i])})`;
  return `${line.name} ${number(line.y[i])}${of}`;
}

// Move a cursor over the points of a line chart, from what is picked (else the last); a click or
// Enter picks a point for all panels.
function follow(plot, readout, made, lines, title, xname, picked, pick) {
  const all = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  if (!all.length) return;
  let place = picked === null ? all.length - 1 : nearest(all, picked);
  const cursor = node("svg:line", { class: "cursor", y1: made.box.top, y2: made.box.bottom, visibility: "hidden" });
  made.svg.append(cursor);
  const say = (show) => {
    const x = all[place];
    const values = lines.slice(0, 8).map((line) => valueAt(line, x, xname));
    const text = `${xname} ${number(x)}: ${values.join(" · ")}`;
    readout.textContent = text;
    plot.setAttribute("aria-valuenow", String(place));
    plot.setAttribute("aria-valuetext", text);
    cursor.setAttribute("x1", made.sx(x)); cursor.setAttribute("x2", made.sx(x));
    cursor.setAttribute("visibility", show ? "visible" : "hidden");
  };
  Object.entries({ role: "slider", tabindex: "0", "aria-label": `${title}, ${xname}`, "aria-valuemin": "0",
    "aria-valuemax": String(all.length - 1) }).forEach(([key, value]) => plot.setAttribute(key, value));
  made.svg.setAttribute("aria-hidden", "true");
  const at = (event) => {
    const bounds = made.svg.getBoundingClientRect();
    return nearest(all, made.inverseX((event.clientX - bounds.left) * made.width / bounds.width));
  };
  plot.onpointermove = (event) => { place = at(event); say(true); };
  plot.onpointerleave = () => say(false);
  plot.onclick = (event) => { place = at(event); pick(all[place]); };
  plot.onkeydown = (event) => {
    const jump = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10,
      Home: -Infinity, End: Infinity }[event.key];
    if (jump !== undefined) {
      place = Math.min(Math.max(place + jump, 0), all.length - 1);
      say(true);
      event.preventDefault();
    } else if (event.key === "Enter") pick(all[place]);
  };
  say(false);
}

function curveCard(grid, title, ylabel, linesOf, options = {}) {
  card(grid, {
    title, caption: options.caption,
    table: () => {
      const lines = linesOf();
      const xs = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
      return [["step", ...lines.map((line) => line.name)], xs.map((x) => [x, ...lines.map((line) => {
        const i = line.x.indexOf(x); return i < 0 ? null : line.y[i]; })])];
    },
    draw: ({ plot, readout, legend }) => {
      const lines = linesOf();
      // A plot without lines is hidden: the keys would still read those that it had before.
      plot.hidden = !lines.length;
      if (plot.hidden) { readout.textContent = "not in the log"; legend.replaceChildren(); return; }
      const alone = RUNS.length === 1 ? current() : null;
      const made = lineChart(plot, { title, lines, xlabel: "optimizer step", ylabel, y: options.y, picked: state.step,
        spans: alone && !options.plain ? alone.phases.map(([name, from, to]) => [from, to, PHASE_TINT[name]]) : [],
        resumed: alone ? alone.resumed : [] });
      legendOf(legend, lines.map((line) => [line.name, line.color, line.dash]));
      follow(plot, readout, made, lines, title, "step", state.step, pickStep);
    },
  });
}

function metricLines(name) {
  return RUNS.flatMap((run, i) => {
    const table = run.metrics[name];
    if (!table) return [];
    const place = state.layer === null ? -1 : run.layers.indexOf(state.layer);
    if (state.layer !== null && place < 0) return [];
    const line = { name: RUNS.length > 1 ? run.label : layerName(), color: SERIES[i % 7], x: run.steps };
    if (place >= 0) return [{ ...line, y: column(table, place) }];
    return [{ ...line, y: table.map(average), low: table.map(least), high: table.map(most) }];
  });
}

function lossLines() {
  return RUNS.flatMap((run, i) => {
    const prefix = RUNS.length > 1 ? `${run.label}: ` : "";
    const lines = there(run.loss).length ? [{ name: `${prefix}training`, color: SERIES[i % 7], x: run.steps, y: run.loss }] : [];
    Object.entries(run.validations).forEach(([name, points], j) => lines.push({ name: prefix + name, dash: j ? "2 3" : "6 3",
      color: RUNS.length > 1 ? SERIES[i % 7] : SERIES[(j + 1) % 7], dots: true, x: column(points, 0), y: column(points, 1) }));
    return lines;
  });
}

function stateLines() {
  const run = current();
  if (!run.states.length) return [];
  const place = state.layer === null ? -1 : run.layers.indexOf(state.layer);
  const shares = run.states.map((layers) => STATES.map((_, s) => place >= 0 ? layers[place][s] : average(column(layers, s))));
  let low = shares.map(() => 0);
  return STATES.map((name, s) => {
    const high = low.map((v, i) => shares[i][s] === null ? null : v + shares[i][s]);
    const line = { name, color: STATE_TINT[s], x: run.steps, y: column(shares, s), low, high, fill: 0.8 };
    low = high;
    return line;
  });
}

function select(label, entries, change) {
  const made = node("select", { "aria-label": label }, ...entries.map(([value, name]) => node("option", { value }, name)));
  made.addEventListener("change", () => change(made.value));
  return made;
}

const known = Object.keys(DATA.metrics).filter((name) => RUNS.some((run) => run.metrics[name]));
const entries = known.map((name) => [name, DATA.metrics[name][0]]);

function landscape() {
  let name = known[0];
  const maker = select("Quantity of the heat map", entries, (value) => { name = value; redraw(); });
  let made = null;
  const { plot, readout } = card("layer-grid", {
    title: "Landscape: layer by step", wide: true, controls: maker,
    caption: "Click or tap a cell to pick its layer and step. Paper: Figure 2.",
    table: () => [["step", ...current().layers.map((n) => `layer ${n}`)],
      (current().metrics[name] || []).map((row, i) => [current().steps[i], ...row])],
    draw: ({ plot: holder, readout: line, legend }) => {
      const run = current(), table = run.metrics[name];
      if (!table) { holder.replaceChildren(); line.textContent = "not in the log of this run"; return; }
      const values = run.layers.map((_, place) => column(table, place));
      const scale = range(values.flat(), 0);
      const at = state.step === null ? null : nearest(run.steps, state.step);
      const row = state.layer === null ? null : run.layers.indexOf(state.layer);
      made = heatMap(holder, { title: `${DATA.metrics[name][0]} by layer and step`, values, rowNames: run.layers,
        columnNames: run.steps, xlabel: "optimizer step", ylabel: "layer", scale,
        height: Math.min(90 + 26 * run.layers.length, 420), mark: at === null ? null : [row, at] });
      legend.replaceChildren(node("li", {}, scaleBar(scale, unit(name))));
      const value = at === null ? null : row === null ? average(table[at]) : table[at][row];
      line.textContent = at === null ? "" : `step ${run.steps[at]}, ${layerName()}: ${number(value)} ${unit(name)}`;
    },
  });
  plot.onpointermove = (event) => {
    const run = current(), table = run.metrics[name];
    if (!table) return;
    const [i, j] = cellAt(made, event, run.layers.length, run.steps.length);
    readout.textContent = `step ${run.steps[j]}, layer ${run.layers[i]}: ${number(table[j][i])} ${unit(name)}`;
  };
  plot.onclick = (event) => {
    const run = current();
    if (!run.metrics[name]) return;
    const [i, j] = cellAt(made, event, run.layers.length, run.steps.length);
    pick(run.layers[i], run.steps[j]);
  };
}

function depthProfile() {
  let name = known[0];
  const maker = select("Quantity of the depth profile", entries, (value) => { name = value; redraw(); });
  const lines = () => RUNS.flatMap((run, i) => {
    const table = run.metrics[name];
    if (!table) return [];
    const tint = SERIES[i % 7], prefix = RUNS.length > 1 ? `${run.label}, ` : "";
    const at = nearest(run.steps, state.step);
    const line = (row, more) => ({ name: `${prefix}step ${run.steps[row]}`, color: tint, x: run.layers, y: table[row], ...more });
    const others = RUNS.length > 1 ? [] : [line(0, { dash: "2 4", color: SERIES[1] }), line(table.length - 1, { dash: "7 4", color: SERIES[2] })];
    return [line(at, { dots: true, width: 2.4 }), ...others.filter((other) => other.y !== table[at])];
  });
  card("layer-grid", {
    title: "Depth profile", controls: maker, caption: "Across layers at the picked step; the first and the last step beside it. Paper: Figures 4, 8 and 9.",
    table: () => { const found = lines(); return [["layer", ...found.map((l) => l.name)], current().layers.map((n) => [n,
      ...found.map((l) => l.y[l.x.indexOf(n)] ?? null)])]; },
    draw: ({ plot, readout, legend }) => {
      const found = lines();
      if (!found.length) return;
      const layers = current().layers;
      const made = lineChart(plot, { title: `${DATA.metrics[name][0]} by layer`, lines: found, xlabel: "layer", ylabel: unit(name),
        xticks: layers.filter((_, i) => i % Math.ceil(layers.length / 12) === 0) });
      legendOf(legend, found.map((l) => [l.name, l.color, l.dash]));
      follow(plot, readout, made, found, "Depth profile", "layer", state.layer, pickLayer);
    },
  });
}

function plane() {
  card("layer-grid", {
    title: "H–F plane with the four states",
    caption: "Tokens of the picked layer and step by entropy and energy where the run observed them, else each layer's mean ± std. Lines: H* and F*. Paper: Figure 3.",
    table: () => {
      const run = current(), [, i] = planeAt(run);
      const { entropy_mean: entropies, energy_mean: energies } = run.metrics;
      return [[`layer (step ${run.steps[i]})`, "H", "F", ...STATES],
        run.layers.map((n, k) => [n, entropies[i][k], energies[i][k], ...run.states[i][k]])];
    },
    draw: ({ plot, readout }) => drawPlane(plot, readout),
  });
}

// The observation nearest to the picked step, if its tokens have energies, and the place of the
// logged step nearest to what is drawn: the shares are of the same step as the tokens.
function planeAt(run) {
  const seen = run.observations.histograms;
  const near = seen.length ? seen[nearest(column(seen, "step"), state.step)] : null;
  const h = near?.energy ? near : null;
  return [h, nearest(run.steps, h ? h.step : state.step)];
}

function drawPlane(plot, readout) {
  const run = current(), energies = run.metrics.energy_mean, entropies = run.metrics.entropy_mean;
  if (!energies || !entropies) { plot.replaceChildren(); readout.textContent = "not in the log of this run"; return; }
  const place = state.layer === null ? -1 : run.layers.indexOf(state.layer);
  const [h, i] = planeAt(run), at = h ? h.step : run.steps[i];
  const tops = Math.log(Math.max(run.experts, 2));
  const spread = (name) => run.metrics[name.replace("mean", "std")] || [];
  const wide = (table, name) => table.flatMap((row, s) => row.flatMap((v, k) => v === null ? [] : [v - ((spread(name)[s] || [])[k] || 0), v + ((spread(name)[s] || [])[k] || 0)]));
  const reached = h ? heldEnergies(run.observations.histograms) : wide(energies, "energy_mean");
  const x = range([...reached, run.energy_threshold], 0.08);
  const y = [0, tops * 1.02];
  const made = frame(plot, { x, y, xlabel: "free energy F", ylabel: "entropy H (nats)", height: 340,
    label: `H–F plane of ${run.label} at step ${at}, ${layerName()}` });
  const { svg, sx, sy, box } = made;
  const fx = Math.min(Math.max(sx(run.energy_threshold), box.left), box.right), hy = Math.min(Math.max(sy(run.entropy_threshold), box.top), box.bottom);
  const shares = run.states.length ? STATES.map((_, s) => place >= 0 ? run.states[i][place][s] : average(column(run.states[i], s))) : [];
  const corners = [[box.left, fx, hy, box.bottom], [box.left, fx, box.top, hy], [fx, box.right, hy, box.bottom], [fx, box.right, box.top, hy]];
  corners.forEach(([left, right, top, bottom], s) => svg.append(node("svg:rect", { x: left, y: top, width: right - left, height: bottom - top, fill: STATE_TINT[s], opacity: 0.13 })));
  if (h) drawTokens(svg, h, place < 0 ? null : place, made);
  else drawMeans(svg, run, i, place, made);
  svg.append(node("svg:line", { class: "picked", x1: fx, x2: fx, y1: box.top, y2: box.bottom }), node("svg:line", { class: "picked", x1: box.left, x2: box.right, y1: hy, y2: hy }));
  corners.forEach(([left, right, top, bottom], s) => {
    if (right - left < 30 || bottom - top < 20) return;
    const label = right - left < 130 ? STATES[s].split(" ")[0] : STATES[s];
    svg.append(node("svg:text", { class: "strong", x: s < 2 ? left + 6 : right - 6, "text-anchor": s < 2 ? "start" : "end",
      y: s % 2 ? top + 15 : bottom - 7 }, shares.length ? `${label} ${number(100 * shares[s], 2)} %` : label));
  });
  plot.replaceChildren(svg);
  const of = run.steps[i] === at ? "" : `, shares of step ${run.steps[i]}`;
  const texts = shares.map((v, s) => `${STATES[s]} ${number(100 * v, 3)} %`).join(" · ");
  readout.textContent = `step ${at}, ${layerName()}` + (texts ? `${of}: ${texts}` : "");
}

// The lowest and highest energy that a cell of any observation reaches: one scale for all steps.
function heldEnergies(seen) {
  const [low, high, bins] = seen[0].energy;
  const held = seen.flatMap((h) => h.layers.flatMap((cells) => (cells || []).filter((_, n) => n % 3 === 1)));
  const at = (bin) => low + bin * (high - low) / bins;
  return held.length ? [at(least(held)), at(most(held) + 1)] : [low, high];
}

function drawTokens(svg, h, place, { sx, sy }) {
  const [elow, ehigh, ebins] = h.energy, [hlow, hhigh, hbins] = h.entropy, total = new Map();
  h.layers.forEach((cells, k) => {
    if (!cells || (place !== null && k !== place)) return;
    for (let n = 0; n < cells.length; n += 3) { const key = cells[n] * ebins + cells[n + 1]; total.set(key, (total.get(key) || 0) + cells[n + 2]); }
  });
  const top = Math.max(...total.values(), 1), ew = (ehigh - elow) / ebins, hw = (hhigh - hlow) / hbins;
  for (const [key, count] of total) {
    const row = Math.floor(key / ebins), col = key % ebins, left = sx(elow + col * ew), up = sy(hlow + (row + 1) * hw);
    svg.append(node("svg:rect", { x: left, y: up, width: sx(elow + (col + 1) * ew) - left, height: sy(hlow + row * hw) - up,
      fill: "var(--s0)", opacity: (0.08 + 0.87 * Math.sqrt(count / top)).toFixed(3) },
      node("svg:title", {}, `${number(count)} tokens, F ${number(elow + (col + 0.5) * ew, 3)}, H ${number(hlow + (row + 0.5) * hw, 3)}`)));
  }
}

function drawMeans(svg, run, i, picked, { sx, sy }) {
  run.layers.forEach((layer, k) => {
    const f = run.metrics.energy_mean[i][k], e = run.metrics.entropy_mean[i][k];
    if (f === null || e === null || (picked >= 0 && k !== picked)) return;
    const fs = run.metrics.energy_std?.[i]?.[k] || 0, es = run.metrics.entropy_std?.[i]?.[k] || 0, tint = SERIES[0];
    svg.append(node("svg:line", { x1: sx(f - fs), x2: sx(f + fs), y1: sy(e), y2: sy(e), stroke: tint, opacity: 0.4 }),
      node("svg:line", { x1: sx(f), x2: sx(f), y1: sy(e - es), y2: sy(e + es), stroke: tint, opacity: 0.4 }),
      node("svg:circle", { cx: sx(f), cy: sy(e), r: 4, fill: tint }), node("svg:text", { x: sx(f) + 6, y: sy(e) - 5 }, String(layer)));
  });
}

function loads() {
  let made = null;
  const { plot: panel, readout: line } = card("layer-grid", {
    title: "Load by expert", caption: "Slots of an expert over those of a balanced one, at the logged step nearest to the picked one. Paper: Figure 9.",
    table: () => { const [values, at] = loadsAt(); return [[`layer (step ${at})`, ...(values[0] || []).map((_, e) => `expert ${e}`)], values.map((row, k) => [current().layers[k], ...row])]; },
    draw: ({ plot, readout, legend }) => {
      const [values, at] = loadsAt();
      if (!values.length) { plot.replaceChildren(); readout.textContent = "not in the log of this run"; return; }
      const scale = [0, Math.max(2, most(values.flat()) || 0)];
      made = heatMap(plot, { title: `Load by layer and expert at step ${at}`, values, rowNames: current().layers, columnNames: values[0].map((_, e) => e),
        xlabel: "expert", ylabel: "layer", scale, height: Math.min(90 + 26 * values.length, 420) });
      legend.replaceChildren(node("li", {}, scaleBar(scale, "× mean load")));
      const peak = most(values.flat()), worst = values.findIndex((row) => row.includes(peak));
      readout.textContent = `step ${at}: highest ${number(peak, 3)} × mean, layer ${current().layers[worst]}`;
    },
  });
  panel.onpointermove = (event) => {
    const [values, at] = loadsAt();
    if (!values.length) return;
    const [i, j] = cellAt(made, event, values.length, values[0].length);
    line.textContent = `step ${at}, layer ${current().layers[i]}, expert ${j}: ${number(values[i][j], 3)} × mean`;
  };
}

function loadsAt() {
  const { steps, values } = current().loads;
  if (!steps.length) return [[], null];
  const i = nearest(steps, state.step);
  return [values[i].map((row) => row.map((v) => v === null ? null : Number((v * there(row).length).toPrecision(3)))), steps[i]];
}

function signalLines(name) {
  return RUNS.flatMap((run, i) => {
    const table = run.observations.signals[name], place = state.layer === null ? -1 : run.layers.indexOf(state.layer);
    if (!table || (state.layer !== null && place < 0)) return [];
    const line = { name: RUNS.length > 1 ? run.label : layerName(), color: SERIES[i % 7], x: run.observations.steps, dots: table.length < 40 };
    return place >= 0 ? [{ ...line, y: column(table, place) }] : [{ ...line, y: table.map(average), low: table.map(least), high: table.map(most) }];
  });
}

function barTable(grid, title, caption, columns, rows) {
  document.getElementById(grid).append(node("figure", { class: "card" }, node("h3", {}, title),
    node("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, tableOf(caption, columns, rows))));
}

function build() {
  curveCard("curve-grid", "Loss", "nats per token", lossLines);
  const shown = { k_eff: "Paper: Figure 9, left.", energy_mean: "Paper: Figures 2, 4 and 5.", entropy_mean: "Paper: Figure 2.",
    max_vio: "", utilisation_entropy: "ln E where all experts are used alike.", balancing_loss: "Paper: Figures 7 and 8.", bias_mean: "Paper: Figure 7, right.", bias_max_abs: "", zscore_mean: "How far tokens lie above the ū they were normalised with." };
  for (const [name, caption] of Object.entries(shown)) if (known.includes(name)) curveCard("curve-grid", DATA.metrics[name][0], unit(name), () => metricLines(name), { caption });
  if (RUNS.some((run) => run.states.length)) curveCard("curve-grid", "Routing states", "share of tokens", stateLines, { y: [0, 1], plain: true, caption: "Of the picked run." });
  if (known.length) { landscape(); plane(); depthProfile(); loads(); }
  for (const [name, [title, measure]] of Object.entries(DATA.signals)) if (RUNS.some((run) => run.observations.signals[name])) curveCard("signal-grid", title, measure, () => signalLines(name));
  for (const run of RUNS) {
    const of = RUNS.length > 1 ? `, ${run.label}` : "", { classes, cache } = run.observations;
    if (classes) barTable("signal-grid", `Token classes at step ${classes.step}${of}`, "decile_1: the rarest token ids. Mean over layers.", ["class", "tokens", "F", "H", "k"], classes.rows);
    if (cache) barTable("signal-grid", `Local routing consistency at step ${cache.step}${of}`, `Part of the slots of ${cache.segment} tokens that the most used experts serve.`,
      ["layer", ...cache.sizes.map((s) => `${s} experts`)], cache.rates.map((row, k) => [run.layers[k], ...row]));
  }
  for (const grid of ["curve-grid", "layer-grid"]) if (!document.getElementById(grid).children.length) document.getElementById(grid).append(node("p", { class: "soft" }, "Nothing is logged yet."));
}

const layerPicker = document.getElementById("pick-layer"), stepPicker = document.getElementById("pick-step"), runPicker = document.getElementById("pick-run");
function redraw() { for (const panel of panels) panel(); }
function pick(layer, step) { state.layer = layer; state.step = step; sync(); redraw(); }
const pickStep = (step) => pick(state.layer, step), pickLayer = (layer) => pick(layer, state.step);
function sync() {
  const run = current();
  layerPicker.replaceChildren(node("option", { value: "" }, "all (mean)"), ...run.layers.map((n) => node("option", { value: n }, String(n))));
  if (!run.layers.includes(state.layer)) state.layer = null;
  layerPicker.value = state.layer === null ? "" : String(state.layer);
  stepPicker.max = Math.max(run.steps.length - 1, 0);
  if (run.steps.length) { const i = state.step === null ? run.steps.length - 1 : nearest(run.steps, state.step); state.step = run.steps[i]; stepPicker.value = i; }
  document.getElementById("picked-step").textContent = run.steps.length ? String(state.step) : "–";
  stepPicker.setAttribute("aria-valuetext", `step ${state.step}`);
}
stepPicker.addEventListener("input", () => pickStep(current().steps[Number(stepPicker.value)] ?? null));
layerPicker.addEventListener("change", () => pickLayer(layerPicker.value === "" ? null : Number(layerPicker.value)));
if (runPicker) runPicker.addEventListener("change", () => { state.run = Number(runPicker.value); sync(); redraw(); });
let width = window.innerWidth;
window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; redraw(); } });
build();
sync();
redraw();
