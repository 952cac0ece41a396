"use strict";
(() => {
  const meta = JSON.parse(document.getElementById("meta").textContent);
  const scopeSelect = document.getElementById("scope");
  const budgetSelect = document.getElementById("budget");
  const boxes = [...document.querySelectorAll("#methods input")];
  const root = document.documentElement;
  const unpacked = new Map();
  const variantOf = {};
  let generation = 0;

  const hidden = () => new Set(boxes.filter((b) => !b.checked).map((b) => b.value));

  async function unpack(key) {
    if (!unpacked.has(key)) {
      const element = document.querySelector(`script[data-key="${CSS.escape(key)}"]`);
      const bytes = Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      unpacked.set(key, await new Response(stream).json());
    }
    return unpacked.get(key);
  }

  function save(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // The page's colours on a figure that brings only those of its data.
  function themed(layout, nEntries) {
    const css = getComputedStyle(root);
    const of = (name) => css.getPropertyValue(name).trim();
    const out = structuredClone(layout);
    const plain = {gridcolor: of("--grid"), zerolinecolor: of("--line"), linecolor: of("--line"), automargin: true};
    for (const key of Object.keys(out)) {
      if (/^[xy]axis/.test(key)) { out[key] = {...plain, ...out[key]}; }
    }
    const rows = Math.ceil(nEntries / 5);
    return {...out, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: 440 + 21 * rows,
      font: {color: of("--text"), size: 12, family: "system-ui, 'DejaVu Sans', sans-serif"},
      margin: {l: 64, r: 16, t: 58, b: 60}, modebar: {bgcolor: "rgba(0,0,0,0)", color: of("--dim"), activecolor: of("--text")}, hoverlabel: {bgcolor: of("--raised"), bordercolor: of("--line"),
      font: {color: of("--text")}, align: "left", namelength: -1}, legend: {...out.legend, yanchor: "top"}};
  }

  async function show(figure, mine) {
    const info = meta.figures.find((f) => f.name === figure.dataset.name);
    const key = `${scopeSelect.value}/${info.by_budget ? budgetSelect.value || 0 : 0}/${info.name}`;
    const content = await unpack(key);
    if (mine !== generation) { return; }
    const plot = figure.querySelector(".plot");
    const absent = figure.querySelector(".absent");
    const data = figure.querySelector(".data");
    const choice = figure.querySelector(".variant");
    absent.hidden = !content.absent;
    plot.hidden = Boolean(content.absent);
    data.replaceChildren();
    if (content.absent) {
      absent.textContent = `Not drawn: ${content.absent}.`;
      figure.querySelector(".note").textContent = "";
      choice.hidden = true;
      Plotly.purge(plot);
      return;
    }
    const out = hidden();
    const names = Object.keys(content.variants);
    const byMethod = names.length > 1 || names[0] !== "";
    let name = names[0];
    if (byMethod) {
      const shown = names.filter((n) => !out.has(n));
      name = shown.includes(variantOf[info.name]) ? variantOf[info.name] : (shown[0] || names[0]);
      const select = choice.querySelector("select");
      select.replaceChildren(...(shown.length ? shown : names).map((n) => new Option(n, n, false, n === name)));
    }
    choice.hidden = !byMethod;
    const variant = content.variants[name];
    const traces = variant.data.filter((t) => !t.meta || !out.has(t.meta));
    const nEntries = traces.filter((t) => t.showlegend !== false && t.type !== "heatmap").length;
    await Plotly.react(plot, structuredClone(traces), themed(variant.layout, nEntries),
      {responsive: true, displaylogo: false, plotlyServerURL: "", showSendToCloud: false,
       modeBarButtonsToRemove: ["lasso2d", "select2d", "sendDataToCloud"],
       toImageButtonOptions: {format: "svg", filename: `kvreplay_${info.name}`}});
    figure.querySelector(".note").textContent = content.note;
    for (const [part, csv] of Object.entries(content.csv)) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = `Data: ${part} (CSV)`;
      const scope = meta.scopes[scopeSelect.value];
      const budget = info.by_budget && scope.budgets.length ? `_${scope.budgets[budgetSelect.value]}` : "";
      button.addEventListener("click", () => save(`${info.name}_${part}${budget}.csv`, csv));
      data.append(button);
    }
  }

  async function showAll() {
    const mine = ++generation;
    root.dataset.ready = "";
    for (const figure of document.querySelectorAll("figure")) {
      await show(figure, mine);
      if (mine !== generation) { return; }
    }
    root.dataset.ready = "yes";
  }

  function fillBudgets() {
    const scope = meta.scopes[scopeSelect.value];
    const kept = budgetSelect.selectedOptions[0]?.textContent ?? scope.default_budget;
    const wanted = scope.budgets.includes(kept) ? kept : scope.default_budget;
    budgetSelect.replaceChildren(...scope.budgets.map((b, i) => new Option(b, i, b === wanted, b === wanted)));
    budgetSelect.parentElement.hidden = scope.budgets.length === 0;
    for (const tables of document.querySelectorAll(".scope")) {
      tables.hidden = tables.dataset.scope !== scopeSelect.value;
    }
  }

  function filterRows() {
    const out = hidden();
    for (const row of document.querySelectorAll("tr[data-label]")) { row.hidden = out.has(row.dataset.label); }
    document.getElementById("n-shown").textContent = `${boxes.length - out.size} of ${boxes.length}`;
  }

  function sortBy(button) {
    const header = button.closest("th");
    const table = button.closest("table");
    const column = [...header.parentElement.children].indexOf(header);
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const th of header.parentElement.children) { th.setAttribute("aria-sort", "none"); }
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.children[column].dataset.v;
    const rows = [...table.tBodies[0].rows];
    const numeric = rows.every((r) => value(r) === "" || !Number.isNaN(Number(value(r))));
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") { return (x === "") - (y === ""); }  // nothing measured comes last, both ways
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", {numeric: true});
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }

  function tableText(table) {
    const quote = (v) => (/[",\n]/.test(v) ? `"${v.replaceAll('"', '""')}"` : v);
    const head = [...table.tHead.querySelectorAll("button")].map((b) => b.dataset.column);
    const lines = [...table.tBodies[0].rows].filter((r) => !r.hidden)
      .map((r) => [...r.children].map((c) => quote(c.dataset.v)).join(","));
    return [head.join(","), ...lines].join("\r\n") + "\r\n";
  }

  function setTheme(theme) {
    root.dataset.theme = theme;
    const button = document.getElementById("theme");
    button.textContent = theme === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-pressed", String(theme === "dark"));
  }

  scopeSelect.addEventListener("change", () => { fillBudgets(); showAll(); });
  scopeSelect.parentElement.hidden = meta.scopes.length < 2;
  budgetSelect.addEventListener("change", showAll);
  for (const box of boxes) { box.addEventListener("change", () => { filterRows(); showAll(); }); }
  for (const [id, on] of [["all", true], ["none", false]]) {
    document.getElementById(id).addEventListener("click", () => {
      for (const box of boxes) { box.checked = on; }
      filterRows();
      showAll();
    });
  }
  document.getElementById("methods").addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.currentTarget.open = false; event.currentTarget.firstElementChild.focus(); }
  });
  for (const figure of document.querySelectorAll("figure")) {
    figure.querySelector(".variant select").addEventListener("change", (event) => {
      variantOf[figure.dataset.name] = event.target.value;
      show(figure, generation);
    });
  }
  for (const button of document.querySelectorAll("thead button")) { button.addEventListener("click", () => sortBy(button)); }
  for (const button of document.querySelectorAll("button.csv")) {
    button.addEventListener("click", () => save(`table_${button.dataset.group}.csv`,
      tableText(button.closest(".files").previousElementSibling.querySelector("table"))));
  }
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(root.dataset.theme === "dark" ? "light" : "dark");
    showAll();
  });
  const asked = new URLSearchParams(location.search).get("theme");
  setTheme(asked || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  fillBudgets();
  filterRows();
  showAll();
})();
