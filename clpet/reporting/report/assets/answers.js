"use strict";
// The tasks of one run in detail: figures, confusion matrix, labels and mistakes.

const MAX_COLUMNS = 24; // of a confusion matrix: the task's labels and those of other tasks that were predicted

function figure(value, name) {
  return element("div", {}, element("b", {}, value), element("span", {}, name));
}

const percent = (part, whole) => (whole ? ((100 * part) / whole).toFixed(1) : "-");

function confusion(task, data) {
  const labels = task.labels.map(([label]) => label);
  const counts = new Map(task.pairs.map(([label, predicted, count]) => [`${label} ${predicted}`, count]));
  const others = new Map();
  for (const [label, predicted, count] of task.pairs) {
    if (labels.includes(predicted)) continue;
    const name = data.tasks_of_labels[predicted] || "other answers";
    if (!others.has(name)) others.set(name, new Map());
    const column = others.get(name);
    column.set(label, (column.get(label) || 0) + count);
  }
  const columns = [
    ...labels.map((label) => ({ name: data.words[label], count: (row) => counts.get(`${row} ${label}`) || 0 })),
    ...[...others].map(([name, column]) => ({ name: "→ " + name, count: (row) => column.get(row) || 0 })),
  ];
  if (columns.length > MAX_COLUMNS) return frequentPairs(task, data);
  const many = columns.length > 9;
  const table = element("table", { class: many ? "heat many" : "heat" });
  const names = columns.map(({ name }) => element("th", { title: name }, shorten(name, many ? 18 : 9)));
  table.append(element("thead", {}, element("tr", {}, element("th", {}, "label \\ answer"), ...names)));
  const body = element("tbody");
  for (const [label, support] of task.labels) {
    const line = element("tr", {}, element("th", { title: data.words[label] }, shorten(data.words[label], 20)));
    columns.forEach(({ name, count }, index) => {
      const value = count(label);
      const right = labels[index] === label;
      const cell = element("td", { title: `${data.words[label]} answered with ${name}: ${value} of ${support}` }, value ? String(value) : "");
      const share = support ? value / support : 0;
      const colour = right ? [31, 95, 153] : [190, 40, 40];
      cell.style.background = `rgb(${colour.map((channel) => Math.round(255 - share * (255 - channel))).join()})`;
      cell.style.color = share > 0.55 ? "#fff" : "inherit";
      line.append(cell);
    });
    body.append(line);
  }
  table.append(body);
  const hint = "Rows are correct labels, blue is right, red is wrong; → collects the labels of another task.";
  return element("div", {}, element("h3", {}, "Confusion matrix"), element("p", { class: "hint" }, hint), element("div", { class: "scroll" }, table));
}

function frequentPairs(task, data) {
  const wrong = task.pairs.filter(([label, predicted]) => label !== predicted).sort((a, b) => b[2] - a[2]).slice(0, 15);
  const rows = wrong.map(([label, predicted, count]) => element("tr", {},
    element("td", { class: "name" }, data.words[label]), element("td", { class: "name" }, data.words[predicted]),
    element("td", { class: "number" }, String(count))));
  const head = element("thead", {}, element("tr", {}, ...["label", "answer", "times"].map((name) => element("th", {}, name))));
  const table = element("table", { class: "labels" }, head, element("tbody", {}, ...rows));
  return element("div", {}, element("h3", {}, "Most frequent confusions"), element("div", { class: "scroll" }, table));
}

function labelTable(task, data) {
  const most = Math.max(...task.labels.map(([, support, predicted]) => Math.max(support, predicted)), 1);
  const bar = (count, kind) => {
    const span = element("span", { class: `bar ${kind}` });
    span.style.width = `${(100 * count) / most}%`;
    return span;
  };
  const rows = task.labels.map(([label, support, predicted, correct]) => {
    const cells = [support, predicted, percent(correct, predicted), percent(correct, support), percent(2 * correct, support + predicted)];
    return element("tr", {}, element("td", { class: "name", title: data.words[label] }, data.words[label]),
      element("td", { class: "bars" }, bar(support, "support"), bar(predicted, "predicted")),
      ...cells.map((value) => element("td", { class: "number" }, String(value))));
  });
  const names = ["label", "", "examples", "answers", "precision", "recall", "F1"];
  const head = element("thead", {}, element("tr", {}, ...names.map((name, index) => element("th", index > 1 ? { class: "number" } : {}, name))));
  const legend = element("p", { class: "hint legend" });
  for (const [colour, name] of [["#9db8d2", "examples of the label "], ["#e8a36b", "answers with the label"]]) {
    const square = element("i");
    square.style.background = colour;
    legend.append(square, name);
  }
  const table = element("table", { class: "labels" }, head, element("tbody", {}, ...rows));
  return element("div", {}, element("h3", {}, "Labels"), legend, element("div", { class: "scroll" }, table));
}

function mistakeList(task, data) {
  if (!task.mistakes.length) return element("p", { class: "hint" }, "No mistakes.");
  const certain = task.mistakes.some(([, , , probability]) => probability !== null);
  const items = task.mistakes.map(([example, label, predicted, probability, text]) => {
    return element("li", {}, element("q", {}, text === null ? `test example ${example}` : data.texts[text]),
      element("span", { class: "wrong" }, data.words[predicted]), probability === null ? "" : ` (${(100 * probability).toFixed(1)} %)`,
      " instead of ", element("span", { class: "right" }, data.words[label]));
  });
  const title = certain ? "Most confident mistakes" : "Mistakes of the most frequent kinds";
  return element("div", {}, element("h3", {}, title), element("ul", { class: "mistakes" }, ...items));
}

function showTask(place, task, data) {
  const figures = [figure(percent(task.correct, task.examples), "right, in %"), figure(String(task.examples), "test examples")];
  if (task.f1 !== null) figures.splice(1, 0, figure(task.f1.toFixed(1), "macro-F1, in %"));
  const parts = [element("div", { class: "figures" }, ...figures)];
  if (task.labels && task.labels.length) parts.push(element("div", { class: "columns" }, confusion(task, data), labelTable(task, data)));
  parts.push(mistakeList(task, data));
  place.replaceChildren(...parts);
}

function setUpAnswers(part) {
  const data = dataOf(part);
  const [rows, seeds, tabs, place] = ["select.row", "select.seed", "[data-tabs=tasks]", ".task"].map((name) => part.querySelector(name));
  const option = (value) => element("option", { value }, String(value));
  rows.append(...[...new Set(data.runs.map((run) => run.row))].map(option));
  let position = 0;
  const showRun = () => {
    const run = data.runs.find((candidate) => candidate.row === rows.value && String(candidate.seed) === seeds.value);
    tabs.replaceChildren(...run.tasks.map(({ task }) => tab(task)));
    const choose = setUpTabs(tabs, (index) => { position = index; showTask(place, run.tasks[index], data); });
    choose(Math.min(position, run.tasks.length - 1));
  };
  const showRow = () => {
    seeds.replaceChildren(...data.runs.filter((run) => run.row === rows.value).map((run) => option(run.seed)));
    showRun();
  };
  rows.addEventListener("change", showRow);
  seeds.addEventListener("change", showRun);
  showRow();
}
