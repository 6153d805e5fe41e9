// node look.mjs BROWSER PAGE FOLDER: opens a page as a phone and as a desk, in both schemes.
// Prints JSON: per view console errors, requests that left the file, axe violations, the layout, and
// what using the page does. Screenshots go to FOLDER: VIEW.png, and VIEW-plots.png without text.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";

const [browserPath, page, folder] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const browser = await puppeteer.launch({
  executablePath: browserPath, headless: true, args: ["--no-sandbox", "--disable-gpu"], protocolTimeout: 300000,
});

// Where things are, whatever the fonts: cards by column, and text of plots that is cut or hides other text.
function layout() {
  const bad = [];
  for (const svg of document.querySelectorAll(".plot svg")) {
    const outer = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter((t) => t.textContent).map((t) => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([name, a], i) => {
      if (a.left < outer.left - 1 || a.right > outer.right + 1 || a.bottom > outer.bottom + 2) bad.push(`${name} is cut`);
      for (const [other, b] of texts.slice(i + 1)) {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left), tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && tall > 3) bad.push(`${name} and ${other} overlap in ${svg.getAttribute("aria-label")}`);
      }
    });
  }
  for (const part of document.querySelectorAll(".card, .tile, .notes, .picker")) {
    if (part.scrollWidth > part.clientWidth + 1 && getComputedStyle(part).overflowX === "visible") bad.push(`${part.className} is too narrow: ${part.textContent.slice(0, 40)}`);
  }
  const grids = [...document.querySelectorAll(".grid")].filter((grid) => grid.children.length > 2);
  const columns = grids.map((grid) => new Set([...grid.children].map((c) => Math.round(c.getBoundingClientRect().left))).size);
  const plots = [...document.querySelectorAll(".plot svg")].map((svg) => {
    const r = svg.getBoundingClientRect();
    return { name: svg.getAttribute("aria-label"), box: [r.left, r.top + scrollY, r.right, r.bottom + scrollY].map(Math.round) };
  });
  const paper = getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number);
  return { bad, columns, plots, paper, widths: [document.documentElement.scrollWidth, window.innerWidth] };
}

// What each card says: its readout, the names in its legend, the first name in its table, and its
// plot's label unless hidden.
const cards = (tab) => tab.$$eval("figure:has(.readout)", (figures) => Object.fromEntries(
  figures.map((figure) => {
    const text = (of) => figure.querySelector(of).textContent;
    const label = figure.querySelector(".plot:not([hidden]) svg")?.getAttribute("aria-label");
    const head = figure.querySelector("th")?.textContent;
    return [text("h3"), { readout: text(".readout"), legend: text(".legend"), head, label }];
  })));

// Reads, picks with the keyboard, then with the pointer in the heat map.
async function use(tab) {
  const readout = (grid) => tab.$eval(`#${grid} .readout`, (p) => p.textContent);
  const picked = () => tab.evaluate(() => [document.getElementById("pick-layer").value, document.getElementById("picked-step").textContent]);
  const curve = await tab.$("#curve-grid .plot[role=slider]");
  if (!curve) return null;
  const said = { last: await readout("curve-grid") };
  await tab.$$eval("figure details", (all) => all.forEach((details) => { details.open = true; }));
  await curve.focus();
  await tab.keyboard.press("Home");
  said.first = await readout("curve-grid");
  await tab.keyboard.press("Enter");
  said.picked_by_key = await picked();
  said.cards_at_first = await cards(tab);
  const map = await tab.$("#layer-grid .plot svg");
  await map.evaluate((svg) => svg.scrollIntoView({ block: "center" }));
  const box = await map.boundingBox();
  // The middle of the second of six layers, at half of the run.
  const at = [box.x + 44 + (box.width - 60) / 2, box.y + 20 + (box.height - 54) / 4];
  await tab.mouse.move(...at);
  said.hovered = await readout("layer-grid");
  await tab.mouse.click(...at);
  said.picked_by_click = await picked();
  said.read_at_picked = await readout("curve-grid");
  said.cards_at_picked = await cards(tab);
  // The picker stays in sight beside the panels that it steers.
  said.picker_top = await tab.$eval(".picker", (p) => p.getBoundingClientRect().top);
  const last = await tab.$eval("#pick-layer", (picker) => picker.lastElementChild.value);
  await tab.select("#pick-layer", last);
  said.cards_at_last_layer = await cards(tab);
  return said;
}

const seen = {};
for (const width of [390, 1600]) {
  for (const scheme of ["light", "dark"]) {
    const name = `${width}-${scheme}`, tab = await browser.newPage();
    const errors = [], requests = [];
    tab.on("console", (message) => ["error", "warning", "warn"].includes(message.type()) && errors.push(message.text()));
    tab.on("pageerror", (error) => errors.push(String(error)));
    tab.on("request", (request) => /^(file|data|blob):/.test(request.url()) || requests.push(request.url()));
    await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    await tab.setViewport({ width, height: 900, deviceScaleFactor: 1, isMobile: width < 500, hasTouch: width < 500 });
    await tab.goto(pathToFileURL(page).href, { waitUntil: "load", timeout: 120000 });
    const found = await tab.evaluate(layout);
    await tab.screenshot({ path: `${folder}/${name}.png`, fullPage: true });
    await tab.addStyleTag({ content: ".plot text { visibility: hidden }" });
    await tab.screenshot({ path: `${folder}/${name}-plots.png`, fullPage: true });
    const said = await use(tab);
    await tab.evaluate(() => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
    await tab.evaluate(axe);
    const violations = await tab.evaluate(async () => (await axe.run()).violations.map((v) => ({
      id: v.id, impact: v.impact, nodes: v.nodes.slice(0, 3).map((n) => `${n.html.slice(0, 160)} ${n.failureSummary}`) })));
    seen[name] = { errors, requests, violations, layout: found, said };
    await tab.close();
  }
}
await browser.close();
console.log(JSON.stringify(seen));
