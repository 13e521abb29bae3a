// Texts reach the page only as text nodes and attributes, never as markup.

const all = (selector, parent = document) => [...parent.querySelectorAll(selector)];
const dataOf = (parent) => JSON.parse(parent.querySelector("script[type='application/json']").textContent);

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

const shorten = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);

// Tables: a click on a header sorts, a second one reverses; the filter hides rows without all of its words.

function sortBy(table, column) {
  const header = table.tHead.rows[0].cells[column];
  const numeric = header.classList.contains("number");
  const before = header.getAttribute("aria-sort");
  const descending = before === null ? numeric : before === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const key = (row) => {
    const cell = row.cells[column];
    return cell.dataset.number === undefined ? cell.textContent : Number(cell.dataset.number);
  };
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; // values that were not measured come last
    const order = typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true });
    return descending ? -order : order;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

function setUpTables() {
  for (const table of all("table.sortable")) {
    all("th button", table).forEach((button, column) => button.addEventListener("click", () => sortBy(table, column)));
  }
  for (const input of all("input.filter")) {
    const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    });
  }
}

// Tabs: one button of a list is selected; the arrow keys move between them.

function setUpTabs(list, choose) {
  const buttons = all("[role=tab]", list);
  const select = (button) => {
    for (const other of buttons) {
      other.setAttribute("aria-selected", String(other === button));
      other.tabIndex = other === button ? 0 : -1;
    }
    choose(buttons.indexOf(button));
  };
  buttons.forEach((button, index) => {
    button.addEventListener("click", () => select(button));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = buttons[(index + step + buttons.length) % buttons.length];
      next.focus();
      select(next);
    });
  });
  return (index) => select(buttons[index]);
}

const tab = (text) => element("button", { type: "button", role: "tab", "aria-selected": "false", title: text }, text);

// Charts are drawn when their section is shown: a hidden one has no width.

function drawCharts(section) {
  for (const figure of all("figure", section)) {
    const place = figure.querySelector(".chart");
    if (place.dataset.drawn) continue;
    place.dataset.drawn = "yes";
    const spec = JSON.parse(figure.querySelector(".spec").textContent);
    const rows = spec.encoding.color.scale.domain;
    const widest = 40 + 7 * Math.min(24, Math.max(...rows.map((row) => row.length)));
    const columns = Math.max(1, Math.floor((place.clientWidth - 60) / widest));
    const font = getComputedStyle(document.body).fontFamily;
    spec.autosize = { type: "fit-x", contains: "padding" };
    spec.config = {
      font, background: null, view: { stroke: null },
      axis: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, gridColor: "#e8edf2", domainColor: "#9aa7b4", tickColor: "#9aa7b4" },
      legend: { orient: "bottom", columns, labelFontSize: 12, symbolSize: 90, labelLimit: 160 },
      range: { category: { scheme: rows.length > 10 ? "tableau20" : "tableau10" } },
    };
    const actions = { export: true, source: false, compiled: false, editor: false };
    vegaEmbed(place, spec, { renderer: "svg", actions, downloadFileName: figure.querySelector("h3").textContent }).catch((error) => place.append(String(error)));
  }
}

const DENSE = 12; // matrices of more tasks have small cells without numbers

// Transfer matrices. Views: R, R among each task's labels, B and F, as clpet/metrics/transfer_matrix.py defines them.

const minus = (a, b) => (a === null || b === null || b === undefined ? null : a - b);
const backward = (rows) => rows.map((row, i) => row.map((value, j) => (j < i - 1 ? minus(value, rows[j + 1][j]) : null)));
const forward = (rows) => rows.map((row, i) => row.map((value, j) => (i > 0 && j >= i ? minus(value, rows[0][j]) : null)));
const same = (rows) => rows;

function views(data) {
  const unit = data.lower ? "perplexity" : "score in %";
  const list = [{ name: "R: " + (data.lower ? "perplexity" : "score"), formula: `R[i, j]: ${unit} on task j after task i.`, key: "scores", of: same }];
  if (data.views) {
    list.push({ name: "R, each task's labels", formula: "R[i, j] where only the labels of task j compete (task-incremental view).", key: "task_scores", of: same });
  }
  list.push({ name: "B: backward", formula: "B[i, j] = R[i, j] - R[j, j]: what later tasks did to task j.", key: "scores", of: backward, difference: true });
  list.push({
    name: "F: forward", key: data.views ? "task_scores" : "scores", of: forward, difference: true,
    formula: "F[i, j] = R[i, j] - R[0, j]: what earlier tasks gave to task j before it was learned" + (data.views ? ", among each task's labels." : "."),
  });
  return list;
}

function meanMatrix(matrices) {
  return matrices[0].map((row, i) => row.map((_, j) => {
    const values = matrices.map((matrix) => matrix[i][j]);
    return values.includes(null) ? null : values.reduce((a, b) => a + b, 0) / values.length;
  }));
}

// White to blue for scores; for differences and perplexities red where worse, blue where better.
function shade(value, view, lower, scale) {
  let [amount, colour] = [value / 100, [31, 95, 153]];
  if (view.difference || lower) {
    const worse = (view.difference ? value : scale.of(value)) > 0 === lower;
    amount = Math.abs(view.difference ? value : scale.of(value)) / (scale.limit || 1);
    if (worse) colour = [190, 40, 40];
  }
  amount = Math.min(1, Math.max(0, amount));
  const channels = colour.map((channel) => Math.round(255 - amount * (255 - channel)));
  return { background: `rgb(${channels.join()})`, ink: amount > 0.55 ? "#fff" : "inherit" };
}

const digits = (value, view, lower) => {
  const size = Math.abs(value);
  const text = value.toFixed(lower && size < 100 ? (size < 10 ? 2 : 1) : size >= 99.95 || lower ? 0 : 1);
  return view.difference && value > 0 ? "+" + text : text;
};

function heatMap(matrix, tasks, view, lower, limit) {
  const dense = tasks.length > DENSE;
  const table = element("table", { class: dense ? "heat dense" : "heat" });
  const names = ["", ...tasks].map((name) => element("th", { title: name }, dense ? "" : shorten(name, 9)));
  table.append(element("thead", {}, element("tr", {}, ...names)));
  const body = element("tbody");
  matrix.forEach((row, i) => {
    if (row.every((value) => value === null)) return;
    const after = i ? tasks[i - 1] : "(before)";
    const line = element("tr", {}, element("th", { title: after }, shorten(after, 11)));
    row.forEach((value, j) => {
      const cell = element("td", { class: j === i - 1 && !view.difference ? "learned" : "" });
      if (value === null) cell.className = "empty";
      else {
        const base = matrix[0][j] || 1;
        const scale = { limit, of: (number) => Math.log2(number / base) };
        const { background, ink } = shade(value, view, lower, scale);
        cell.style.background = background;
        cell.style.color = ink;
        cell.textContent = digits(value, view, lower);
        cell.title = `${tasks[j]} after ${after}: ${value.toFixed(2)}`;
      }
      line.append(cell);
    });
    body.append(line);
  });
  table.append(body);
  return element("div", { class: "scroll" }, table);
}

function setUpMatrices(part) {
  const data = dataOf(part);
  const list = views(data);
  const [grid, slider, output] = [".grid", "input[type=range]", "output"].map((name) => part.querySelector(name));
  const seeds = [...new Set(data.rows.flatMap((row) => row.runs.map((run) => run.seed)))].sort((a, b) => a - b);
  let view = list[0];
  slider.max = String(seeds.length);
  slider.closest("label").hidden = seeds.length < 2;
  const draw = () => {
    const seed = seeds[Number(slider.value) - 1];
    output.textContent = seed === undefined ? "mean of all" : `seed ${seed}`;
    part.querySelector(".formula").textContent = view.formula;
    const shown = data.rows.map((row) => {
      const runs = row.runs.filter((run) => (seed === undefined || run.seed === seed) && run[view.key]);
      const order = runs.length ? JSON.stringify(runs[0].tasks) : "";
      if (!runs.length || runs.some((run) => JSON.stringify(run.tasks) !== order)) return { row, matrix: null, runs };
      return { row, runs, tasks: runs[0].tasks, matrix: view.of(meanMatrix(runs.map((run) => run[view.key]))) };
    });
    const sizes = shown.flatMap(({ matrix }) => (matrix || []).flatMap((row) => row.map((value, j) => {
      if (value === null) return 0;
      return view.difference ? Math.abs(value) : data.lower ? Math.abs(Math.log2(value / (matrix[0][j] || 1))) : 0;
    })));
    const limit = Math.max(...sizes, data.lower ? 0.1 : 1);
    const tasks = Math.max(...data.rows.flatMap((row) => row.runs.map((run) => run.tasks.length)));
    grid.style.setProperty("--matrix", `${tasks > DENSE ? 100 + 17 * tasks : 80 + 54 * tasks}px`);
    grid.replaceChildren(...shown.map(({ row, matrix, tasks, runs }) => {
      const note = runs.length > 1 ? ` mean of ${runs.length} seeds` : runs.length ? ` seed ${runs[0].seed}` : "";
      const reason = runs.length ? "the orders of the tasks differ between the seeds" : "no run with this seed";
      const content = matrix ? heatMap(matrix, tasks, view, data.lower, limit) : element("p", { class: "hint" }, reason);
      return element("div", {}, element("h3", {}, row.name, element("small", {}, note)), content);
    }));
  };
  const tabs = part.querySelector("[data-tabs=views]");
  tabs.append(...list.map(({ name }) => tab(name)));
  const choose = setUpTabs(tabs, (index) => { view = list[index]; draw(); });
  slider.addEventListener("input", draw);
  choose(0);
}

setUpTables();
all(".matrices").forEach(setUpMatrices);
all(".answers").forEach(setUpAnswers);
const sections = all("section.panel");
const sectionTabs = document.querySelector("[data-tabs=sections]");
if (sectionTabs) {
  setUpTabs(sectionTabs, (index) => {
    sections.forEach((section, other) => { section.hidden = other !== index; });
    drawCharts(sections[index]);
  });
}
if (sections.length) drawCharts(sections[0]);
window.addEventListener("beforeprint", () => sections.forEach(drawCharts));
