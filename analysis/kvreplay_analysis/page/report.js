"use strict";
(() => {
  const meta = JSON.parse(document.getElementById("meta").textContent);
  const scopeSelect = document.getElementById("scope");
  const budgetSelect = document.getElementById("budget");
  const boxes = [...document.querySelectorAll("#methods input")];
  const root = document.documentElement;
  const variantOf = {};
  const at = {label: null, trace: null, layer: null, head: null, step: null};  // the head that the panels show
  const cursor = {row: 0, column: 0};                                          // the square that the keyboard is on
  let generation = 0;

  const {css} = page;

  const hidden = () => new Set(boxes.filter((b) => !b.checked).map((b) => b.value));
  const scope = () => meta.scopes[scopeSelect.value];
  const budget = () => scope().budgets[budgetSelect.value] ?? "";

  // --- data ---------------------------------------------------------------------------------------------------------

  // Key of what the page holds of one kind of a method at the chosen budget, or without one; undefined where it holds none.
  const KINDS = ["head", "raster", "pca"];
  const keyOf = (kind, label = at.label, trace = at.trace) =>
    [budget(), ""].map((b) => [kind, trace, label, b].join("/")).find((key) => page.has(key));
  const held = async (kind) => (keyOf(kind) ? page.unpack(keyOf(kind)) : null);
  // The chosen budget, where the chosen method has one.
  const budgetOf = () => (KINDS.some((kind) => page.has([kind, at.trace, at.label, ""].join("/"))) ? "" : budget());

  const quote = (v) => (/[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : v);
  const csv = (rows) => rows.map((r) => r.map((v) => quote(v ?? "")).join(",")).join("\r\n") + "\r\n";

  function number(v, digits = 4) {
    if (v === null || v === undefined) { return "–"; }
    if (v !== 0 && Math.abs(v) < 1e-4) { return v.toExponential(2).replaceAll("-", "−"); }
    return String(Number(v.toPrecision(digits))).replace("-", "−");
  }

  const element = (name, content, attributes = {}) => {
    const out = document.createElement(name);
    out.textContent = content;
    for (const [key, value] of Object.entries(attributes)) { out.setAttribute(key, value); }
    return out;
  };

  function table(caption, head, rows) {
    const out = document.createElement("table");
    out.append(element("caption", caption));
    const line = out.createTHead().insertRow();
    head.forEach((name, i) => line.append(element("th", name, {scope: "col", class: i ? "num" : ""})));
    const body = out.createTBody();
    for (const row of rows) {
      const to = body.insertRow();
      row.forEach((v, i) => to.append(i ? element("td", v, {class: "num"}) : element("th", v, {scope: "row"})));
    }
    return out;
  }

  // --- figures ------------------------------------------------------------------------------------------------------

  function downloads(place, parts) {
    place.replaceChildren(...parts.map(([title, name, content]) => {
      const button = element("button", `Data: ${title} (CSV)`, {type: "button"});
      button.addEventListener("click", () => page.save(name, typeof content === "function" ? content() : content));
      return button;
    }));
  }

  // Shows why something is not there instead of the plot, or the plot again.
  function absent(box, reason) {
    const plot = box.querySelector(".plot");
    const place = box.querySelector(".absent");
    place.hidden = !reason;
    plot.parentElement.hidden = Boolean(reason);
    if (reason) {
      place.textContent = reason;
      box.querySelector(".data")?.replaceChildren();
      if (window.Plotly && plot._fullLayout) { Plotly.purge(plot); }
    }
  }

  async function show(figure, mine) {
    const info = meta.figures.find((f) => f.name === figure.dataset.name);
    const content = await page.unpack(`${scopeSelect.value}/${info.by_budget ? budgetSelect.value || 0 : 0}/${info.name}`);
    if (mine !== generation) { return; }
    const choice = figure.querySelector(".variant");
    figure.querySelector(".note").textContent = content.note ?? "";
    absent(figure, content.absent && `Not drawn: ${content.absent}.`);
    choice.hidden = true;
    if (content.absent) { return; }
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
    const plot = figure.querySelector(".plot");
    await page.draw(plot, info.name, {data: traces, layout: variant.layout});
    const suffix = info.by_budget && budget() ? `_${budget()}` : "";
    downloads(figure.querySelector(".data"),
      Object.entries(content.csv).map(([part, rows]) => [part, `${info.name}_${part}${suffix}.csv`, rows]));
    if (info.name === "heads") {
      variantOf.heads = name;
      followHeat(plot, name);
    }
  }

  // --- one head -----------------------------------------------------------------------------------------------------

  const panel = document.getElementById("panel");
  const plane = document.getElementById("plane");
  const heat = document.getElementById("heat");

  function heatPlot() {
    const plot = heat.querySelector(".plot");
    return plot.data?.length ? plot : null;
  }

  function followHeat(plot, label) {
    if (!plot.dataset.listens) {
      plot.dataset.listens = "yes";
      plot.on("plotly_click", (event) => choose(String(event.points[0].y), String(event.points[0].x)));
    }
    at.label = label;
    mark(false);
  }

  // The frame around the chosen square, and around the one the keyboard is on.
  function mark(withCursor) {
    const plot = heatPlot();
    if (!plot) { return; }
    const {x, y, z} = plot.data[0];
    const frame = (row, column, dash) => ({type: "rect", xref: "x", yref: "y", x0: column - 0.5, x1: column + 0.5,
      y0: row - 0.5, y1: row + 0.5, line: {color: dash ? "#ffffff" : "#ff5d73", width: 3, dash: dash ? "dot" : "solid"}});
    const shapes = [];
    const [row, column] = [y.indexOf(String(at.layer)), x.indexOf(String(at.head))];
    if (row >= 0 && column >= 0) { shapes.push(frame(row, column, false)); }
    if (withCursor) {
      cursor.row = Math.min(cursor.row, y.length - 1);
      cursor.column = Math.min(cursor.column, x.length - 1);
      shapes.push(frame(cursor.row, cursor.column, true));
      document.getElementById("heat-at").textContent = `Layer ${y[cursor.row]}, query head ${x[cursor.column]}: ` +
        `error_output ${number(z[cursor.row][cursor.column])}. Enter shows it below.`;
    }
    Plotly.relayout(plot, {shapes});
  }

  function choose(layer, head) {
    at.layer = Number(layer);
    at.head = Number(head);
    mark(document.activeElement === heat);
    showHead();
  }

  function options(select, values, value, name = String) {
    select.replaceChildren(...values.map((v) => new Option(name(v), v, false, String(v) === String(value))));
  }

  // Fills the choices of both panels from what the page holds, and keeps the chosen where it still exists.
  function choices(found) {
    const labels = meta.methods.map((m) => m.label).filter((label) => scope().traces.some((trace) =>
      KINDS.some((kind) => keyOf(kind, label, trace))));
    const shown = labels.includes(at.label) || at.label === null ? labels : [at.label, ...labels];
    for (const box of [panel, plane]) {
      const select = (part) => box.querySelector(`[data-part="${part}"]`);
      options(select("label"), shown, at.label);
      options(select("trace"), scope().traces, at.trace);
      select("trace").parentElement.hidden = scope().traces.length < 2;
      options(select("layer"), found ? found.layers : [], at.layer);
      options(select("head"), found ? found.heads : [], at.head);
    }
  }

  async function showHead() {
    const mine = generation;
    root.dataset.head = "";
    if (!scope().traces.includes(at.trace)) { at.trace = scope().traces[0]; }
    at.label ??= meta.methods.find((m) => keyOf("head", m.label))?.label ?? meta.methods[0].label;
    const [curves, kept, outputs] = await Promise.all([held("head"), held("raster"), held("pca")]);
    if (mine !== generation) { return; }
    const layers = (curves ?? outputs ?? kept)?.layers ?? [];
    const heads = curves ? curves.curves.error_output[0].length : (outputs?.error[0].length ?? kept?.sets[0].length ?? 0);
    if (!layers.includes(at.layer) || !(at.head < heads) || at.head === null) { [at.layer, at.head] = worstHead(curves, layers); }
    choices({layers, heads: [...Array(heads).keys()]});
    document.getElementById("held").textContent = meta.held;
    document.getElementById("h-panel").textContent = at.layer === null ? "One head" :
      `One head: layer ${at.layer}, query head ${at.head}, ${at.label}${budgetOf() ? `, budget ${budgetOf()}` : ""}`;
    mark(document.activeElement === heat);
    const layer = layers.indexOf(at.layer);
    await drawCurves(curves, layer);
    await drawKept(kept);
    await drawPlane(outputs);
    if (mine === generation) { root.dataset.head = `${at.label}/${at.layer}/${at.head}`; }
  }

  // [layer, head] of greatest mean error.
  function worstHead(curves, layers) {
    let best = [layers[0] ?? null, layers.length ? 0 : null];
    let worst = -1;
    for (const [i, heads] of (curves?.curves.error_output ?? []).entries()) {
      for (const [h, values] of heads.entries()) {
        const counted = values.filter((v) => v !== null);
        const mean = counted.reduce((a, b) => a + b, 0) / counted.length;
        if (mean > worst) { worst = mean; best = [layers[i], h]; }
      }
    }
    return best;
  }

  const fileName = (what) => `${what}_${at.label.replaceAll(/[^A-Za-z0-9._-]+/g, "_")}${budgetOf() ? `_${budgetOf()}` : ""}` +
    `_layer${at.layer}_head${at.head}.csv`;
  const notHeld = () => (meta.held ? "The page does not hold this configuration: see above."
    : "This configuration has no numbers for single heads.");

  async function drawCurves(found, layer) {
    const box = panel.querySelector('[data-name="head"]');
    const place = document.getElementById("worst");
    place.replaceChildren();
    absent(box, found ? "" : notHeld());
    if (!found) { return; }
    const names = Object.keys(found.curves).filter((n) => found.curves[n][layer]);
    const line = (name) => found.curves[name][layer][at.head];
    const isError = (name) => name === "error_output" || name.startsWith("error_corrected.");
    const looks = {error_output: [css("--text"), "circle", "error_output"], evicted_mass: ["#3a8fd0", "square", "evicted_mass"],
      cos_retained_evicted: ["#e8762d", "diamond", "cos_retained_evicted"]};
    const traces = names.map((name) => {
      const c = meta.compensators[name.slice("error_corrected.".length)];
      const [colour, symbol, title] = looks[name] ?? [c.colour, c.symbol, `with ${c.title}`];
      return {type: "scatter", mode: "lines+markers", name: title, x: found.step, y: line(name), yaxis: isError(name) ? "y" : "y2",
        line: {color: colour, width: 2, dash: name === "cos_retained_evicted" ? "dash" : "solid"},
        marker: {color: colour, symbol, size: 6}, hovertemplate: `<b>${title}</b><br>around step %{x:.0f}<br>%{y:.4g}<extra></extra>`};
    });
    // The worst steps that the run has, else the worst points of the curve.
    const single = Boolean(found.worst.step?.[layer]);
    const of = single ? Object.keys(found.worst).filter((n) => found.worst[n][layer]) : names;
    const worst = Object.fromEntries(of.map((n) => [n, single ? found.worst[n][layer][at.head] : line(n)]));
    const order = single ? [...worst.step.keys()].filter((i) => worst.step[i] >= 0)
      : [...found.begin.keys()].filter((i) => worst.error_output[i] !== null)
        .sort((a, b) => worst.error_output[b] - worst.error_output[a]).slice(0, 6);
    const rows = order.map((i) => [single ? worst.step[i] : found.begin[i], i]);
    if (single) {
      traces.push({type: "scatter", mode: "markers", name: "worst steps", x: rows.map(([s]) => s),
        y: rows.map(([, i]) => worst.error_output[i]), marker: {color: "#e0405a", symbol: "x", size: 8},
        hovertemplate: "step %{x}<br>error_output %{y:.4g}<extra></extra>"});
    }
    await page.draw(box.querySelector(".plot"), "head", {data: traces, layout: {height: 470, margin: {l: 58, r: 12, t: 34, b: 46},
      legend: {orientation: "h", y: -0.2}, hovermode: "closest",
      xaxis: {title: {text: "decode step"}, anchor: "y2", rangemode: "tozero"},
      yaxis: {domain: [0.48, 1], title: {text: "error"}, rangemode: "tozero"},
      yaxis2: {domain: [0, 0.4], title: {text: "mass, cosine"}, zeroline: true}}});
    const columns = Object.keys(worst).filter((n) => n !== "step");
    downloads(box.querySelector(".data"), [
      ["curves", fileName("head"), () => csv([["step", ...names], ...found.step.map((s, i) => [s, ...names.map((n) => line(n)[i])])])],
      ["worst", fileName("worst"), () => csv([["of", "step", ...columns],
        ...rows.map(([s, i]) => [single ? "steps" : `${found.block_steps} steps`, s, ...columns.map((c) => worst[c][i])])])]]);
    const wrap = element("div", "", {class: "scroll", tabindex: "0", role: "region", "aria-label": "Worst steps"});
    wrap.append(table(single ? "Worst steps of this head" : `Worst ${found.block_steps} steps on end of this head, by ` +
      "their first step; run with --detail steps for single steps", [single ? "step" : "from step", ...columns],
      rows.map(([s, i]) => [String(s), ...columns.map((c) => number(worst[c][i]))])));
    place.append(wrap);
  }

  async function drawKept(found) {
    const box = panel.querySelector('[data-name="raster"]');
    const layer = found ? found.layers.indexOf(at.layer) : -1;
    const some = page.has("raster/", true);
    absent(box, layer >= 0 ? "" : some ? notHeld()
      : "This run does not say which tokens were kept: run again with --detail retained.");
    if (layer < 0) { return; }
    const share = found.share[layer][found.sets[layer][at.head]];
    const dark = root.dataset.theme === "dark";
    await page.draw(box.querySelector(".plot"), "raster", {data: [{type: "heatmap", x: found.steps, y: found.tokens,
      z: share.map((row) => row.map((v) => (v < 0 ? null : v / 100))), zmin: 0, zmax: 1,
      colorscale: dark ? [[0, "#1b2530"], [1, "#7db7f2"]] : [[0, "#f3f8fd"], [1, "#08519c"]],
      colorbar: {title: {text: "kept"}, tickformat: ".0%", thickness: 12},
      hovertemplate: "around step %{x:.0f}, token %{y:.0f}<br>%{z:.0%} kept<extra></extra>"}],
    layout: {height: 430, margin: {l: 58, r: 12, t: 34, b: 46}, plot_bgcolor: css("--grid"),
        xaxis: {title: {text: "decode step"}, showgrid: false}, yaxis: {title: {text: "token position"}, showgrid: false}}});
    downloads(box.querySelector(".data"), [["retained", fileName("raster"), () => csv([
      ["token", "token_end", "step", "step_end", "retained"], ...share.flatMap((row, t) => row.map((v, s) =>
        [found.tokens[t], found.tokens[t + 1], found.steps[s], found.steps[s + 1], v < 0 ? "" : v / 100]))])]]);
  }

  async function drawPlane(found) {
    const place = document.getElementById("angles");
    const layer = found ? found.layers.indexOf(at.layer) : -1;
    const stepSelect = plane.querySelector('[data-part="step"]');
    const some = page.has("pca/", true);
    place.replaceChildren();
    let reason = layer >= 0 ? "" : some ? "There are no output vectors of this configuration and layer here: it evicted " +
      "nothing at the steps that were stored, or was left out of the page." :
      "This run has no output vectors: run again with --detail outputs --steps LIST.";
    if (layer >= 0) {
      const errors = found.error[layer][at.head];
      if (!found.steps.includes(at.step)) {
        at.step = found.steps[errors.reduce((best, v, i) => ((v ?? -1) > (errors[best] ?? -1) ? i : best), 0)];
      }
      options(stepSelect, found.steps, at.step);
      if (errors[found.steps.indexOf(at.step)] === null) {
        reason = `Nothing that this head had evicted counts at step ${at.step}, so there is no f_E.`;
      }
    } else {
      stepSelect.replaceChildren();
    }
    absent(plane, reason);
    if (reason) { return; }
    const i = found.steps.indexOf(at.step);
    const of = (part) => found[part][layer][at.head][i];
    const rows = found.names.map((name, v) => ({name, shown: found.shown[v], colour: name === "f" ? css("--dim") : found.looks[v],
      xy: of("xy")[v], length: of("length")[v], inPlane: of("in_plane")[v], angles: of("angle")[v]})).filter((r) => r.length !== null);
    const traces = rows.map((r, v) => ({type: "scatter", mode: "lines+markers", name: r.shown, x: [0, r.xy[0]], y: [0, r.xy[1]],
      line: {color: r.colour, width: v < 3 ? 3 : 2, dash: v < 3 ? "solid" : "dash"},
      marker: {color: r.colour, size: [0, v < 3 ? 10 : 11], symbol: ["circle", "square", "diamond", "square-open", "circle-open",
        "triangle-up-open", "cross-open", "star-open"][Math.min(v, 7)]},
      hovertemplate: `<b>${r.shown}</b><br>length ${number(r.length)}<extra></extra>`}));
    await page.draw(plane.querySelector(".plot"), "pca", {data: traces, layout: {height: 500, margin: {l: 58, r: 12, t: 34, b: 46},
      legend: {orientation: "h", y: -0.17}, hovermode: "closest", xaxis: {title: {text: "first principal axis"}, zeroline: true},
      yaxis: {title: {text: "second principal axis"}, scaleanchor: "x", zeroline: true}}});
    const angle = (v) => (v === null ? "–" : `${v.toFixed(v < 10 ? 1 : 0)}°`);
    place.append(table(`${at.label}, layer ${at.layer}, query head ${at.head}, step ${at.step}`,
      ["vector", "length", "to f_E", "to f_R", "in the plane"],
      rows.map((r) => [r.shown, number(r.length), angle(r.angles[1]), angle(r.angles[0]),
        r.inPlane === null ? "–" : `${(100 * r.inPlane).toFixed(1)} %`])));
    place.append(element("p", `The plane holds ${(100 * of("explained")).toFixed(1)} % of the squared length of these vectors. ` +
      `error ‖f − f_R‖ / ‖f‖ = ${number(of("error"))}, evicted mass ${number(of("evicted_mass"))}.`));
    downloads(plane.querySelector(".data"), [["vectors", fileName(`pca_step${at.step}`), () => csv([
      ["vector", "x", "y", "length", "in_plane", "degrees_f_R", "degrees_f_E"],
      ...rows.map((r) => [r.name, ...r.xy, r.length, r.inPlane, ...r.angles])])]]);
  }

  // --- what is shown ------------------------------------------------------------------------------------------------

  // Draws everything, what is nearest to the eye first.
  async function showAll() {
    const mine = ++generation;
    root.dataset.ready = "";
    const waiting = new Map([...document.querySelectorAll("figure")].map((f) => [f, () => show(f, mine)]));
    waiting.set(panel, showHead);
    const away = (box) => {
      const {top, bottom} = box.getBoundingClientRect();
      return Math.max(top - innerHeight, -bottom, 0);
    };
    while (waiting.size) {
      const [next, draw] = [...waiting].reduce((best, one) => (away(one[0]) < away(best[0]) ? one : best));
      waiting.delete(next);
      await draw();
      if (mine !== generation) { return; }
      await new Promise((resume) => setTimeout(resume));
      if (mine !== generation) { return; }
    }
    root.dataset.ready = "yes";
  }

  function fillBudgets() {
    const kept = budgetSelect.selectedOptions[0]?.textContent ?? scope().default_budget;
    const wanted = scope().budgets.includes(kept) ? kept : scope().default_budget;
    budgetSelect.replaceChildren(...scope().budgets.map((b, i) => new Option(b, i, b === wanted, b === wanted)));
    budgetSelect.parentElement.hidden = scope().budgets.length === 0;
    for (const part of document.querySelectorAll(".scope")) { part.hidden = part.dataset.scope !== scopeSelect.value; }
    const league = document.getElementById("league-budget");
    const before = league.value || wanted;
    options(league, ["all", ...scope().budgets], scope().budgets.includes(before) ? before : "all");
  }

  function filterRows() {
    const out = hidden();
    const [equal, near] = ["league-equal", "league-budget"].map((id) => document.getElementById(id).value);
    for (const row of document.querySelectorAll("tr[data-label]")) {
      const other = row.dataset.budget && near !== "all" && row.dataset.budget !== near;
      row.hidden = out.has(row.dataset.label) || Boolean(other);
    }
    for (const part of document.querySelectorAll(".league")) { part.hidden = part.dataset.equal !== equal; }
    document.getElementById("n-shown").textContent = `${boxes.length - out.size} of ${boxes.length}`;
  }

  // --- controls -----------------------------------------------------------------------------------------------------

  scopeSelect.addEventListener("change", () => { fillBudgets(); filterRows(); showAll(); });
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
  for (const id of ["league-equal", "league-budget"]) { document.getElementById(id).addEventListener("change", filterRows); }
  document.getElementById("methods").addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.currentTarget.open = false; event.currentTarget.firstElementChild.focus(); }
  });
  for (const figure of document.querySelectorAll("figure")) {
    figure.querySelector(".variant select").addEventListener("change", async (event) => {
      variantOf[figure.dataset.name] = event.target.value;
      await show(figure, generation);
      if (figure.dataset.name === "heads") { showHead(); }
    });
  }
  for (const box of [panel, plane]) {
    for (const select of box.querySelectorAll("select[data-part]")) {
      select.addEventListener("change", async () => {
        const part = select.dataset.part;
        at[part] = part === "label" || part === "trace" ? select.value : Number(select.value);
        if (part === "label") {
          variantOf.heads = at.label;
          await show(document.getElementById("figure-heads"), generation);
        }
        showHead();
      });
    }
  }
  heat.addEventListener("keydown", (event) => {
    const plot = heatPlot();
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (!plot || !(step || event.key === "Enter" || event.key === " ")) { return; }
    event.preventDefault();
    const {x, y} = plot.data[0];
    if (step) {
      cursor.row = Math.max(0, Math.min(y.length - 1, cursor.row + step[0]));
      cursor.column = Math.max(0, Math.min(x.length - 1, cursor.column + step[1]));
      mark(true);
    } else {
      choose(y[cursor.row], x[cursor.column]);
    }
  });
  heat.addEventListener("focus", () => mark(heat.matches(":focus-visible")));
  heat.addEventListener("blur", () => mark(false));
  page.tables();
  page.theme(showAll);
  fillBudgets();
  filterRows();
  root.dataset.opened = Math.round(performance.now());  // milliseconds until findings and tables can be read and used
  showAll();
})();
