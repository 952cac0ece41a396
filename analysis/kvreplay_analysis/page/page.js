"use strict";
// What pages share: packed data, figures in the page's colours, tables that sort and download, light and dark.
const page = (() => {
  const root = document.documentElement;
  const blobs = new Map([...document.querySelectorAll("script[data-key]")].map((e) => [e.dataset.key, e]));
  const unpacked = new Map();
  let loading = null;

  // The JSON value that stands packed under a key.
  function unpack(key) {
    if (!unpacked.has(key)) {
      const bytes = Uint8Array.from(atob(blobs.get(key).textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      unpacked.set(key, new Response(stream).json());
    }
    return unpacked.get(key);
  }

  // Whether the page holds something under a key, or under one that begins so.
  const has = (key, begins = false) => (begins ? [...blobs.keys()].some((k) => k.startsWith(key)) : blobs.has(key));

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function plotly() {
    loading ??= unpack("plotly").then((source) => {
      const script = document.createElement("script");
      script.textContent = source;
      document.head.append(script);
    });
    return loading;
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
    const out = structuredClone(layout);
    const plain = {gridcolor: css("--grid"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true};
    for (const key of Object.keys(out)) {
      if (/^[xy]axis/.test(key)) { out[key] = {...plain, ...out[key]}; }
    }
    return {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: 440 + 21 * Math.ceil(nEntries / 5),
      ...out, margin: {l: 64, r: 16, t: 58, b: 60, ...out.margin},
      font: {color: css("--text"), size: 12, family: "system-ui, 'DejaVu Sans', sans-serif"},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: css("--dim"), activecolor: css("--text")},
      hoverlabel: {bgcolor: css("--raised"), bordercolor: css("--line"), font: {color: css("--text")}, align: "left",
        namelength: -1},
      legend: {...out.legend, yanchor: "top"}};
  }

  // Draws one figure, a plotly figure as {data, layout}.
  async function draw(plot, name, {data, layout}) {
    await plotly();
    const nEntries = data.filter((t) => t.showlegend !== false && t.type !== "heatmap").length;
    await Plotly.react(plot, structuredClone(data), themed(layout, nEntries),
      {responsive: true, displaylogo: false, plotlyServerURL: "", showSendToCloud: false,
       modeBarButtonsToRemove: ["lasso2d", "select2d", "sendDataToCloud"],
       toImageButtonOptions: {format: "svg", filename: `kvreplay_${name}`}});
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
    const quote = (v) => (/[",\r\n]/.test(v) ? `"${v.replaceAll('"', '""')}"` : v);
    const head = [...table.tHead.querySelectorAll("button")].map((b) => quote(b.dataset.column));
    const lines = [...table.tBodies[0].rows].filter((r) => !r.hidden)
      .map((r) => [...r.children].map((c) => quote(c.dataset.v)).join(","));
    return [head.join(","), ...lines].join("\r\n") + "\r\n";
  }

  function tables() {
    for (const button of document.querySelectorAll("table.sortable thead button")) {
      button.addEventListener("click", () => sortBy(button));
    }
    for (const button of document.querySelectorAll("button.csv")) {
      button.addEventListener("click", () => save(`table_${button.dataset.group}.csv`,
        tableText(button.closest(".files").previousElementSibling.querySelector("table"))));
    }
  }

  // The button that switches; `redraw` follows it. ?theme=dark in the address comes before what the system prefers.
  function theme(redraw) {
    const button = document.getElementById("theme");
    const set = (name) => {
      root.dataset.theme = name;
      button.textContent = name === "dark" ? "Light" : "Dark";
      button.setAttribute("aria-pressed", String(name === "dark"));
    };
    button.addEventListener("click", () => {
      set(root.dataset.theme === "dark" ? "light" : "dark");
      redraw();
    });
    const asked = new URLSearchParams(location.search).get("theme");
    set(asked || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  }

  return {unpack, has, css, save, draw, tables, theme};
})();
