"use strict";
(() => {
  const meta = JSON.parse(document.getElementById("meta").textContent);
  const root = document.documentElement;
  const scope = document.getElementById("scope");
  const boxes = [...document.querySelectorAll("#methods input")];
  const head = document.getElementById("head");
  const figures = [...document.querySelectorAll("figure")];
  const ofHead = figures.filter((f) => "perHead" in f.dataset);
  const map = document.querySelector("#figure-heads .plot");
  const chosen = {};  // variant by figure
  let generation = 0;

  const hidden = () => new Set(boxes.filter((b) => !b.checked).map((b) => b.value));

  async function show(figure, mine) {
    const name = figure.dataset.name;
    const content = await page.unpack(`${scope.value}/${name}`);
    if (mine !== generation) { return; }
    const plot = figure.querySelector(".plot");
    const absent = figure.querySelector(".absent");
    const choice = figure.querySelector(".variant");
    absent.hidden = !content.absent;
    plot.parentElement.hidden = Boolean(content.absent);
    figure.querySelector(".note").textContent = content.note ?? "";
    figure.querySelector(".data").replaceChildren();
    choice.hidden = true;
    if (content.absent) {
      absent.textContent = `Not drawn: ${content.absent}.`;
      return;
    }
    const names = Object.keys(content.variants);
    const variant = names.includes(chosen[name]) ? chosen[name] : names[0];
    choice.querySelector("select").replaceChildren(...names.map((n) => new Option(n, n, false, n === variant)));
    choice.hidden = names.length < 2;
    const out = hidden();
    const {data, layout} = content.variants[variant];
    await page.draw(plot, name, {data: data.filter((t) => !t.meta || !out.has(t.meta)), layout});
    for (const [part, csv] of Object.entries(content.csv)) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = `Data: ${part} (CSV)`;
      button.addEventListener("click", () => page.save(`${name}_${part}.csv`, csv));
      figure.querySelector(".data").append(button);
    }
    if (plot === map && !plot.dataset.linked) {
      plot.dataset.linked = "yes";
      plot.on("plotly_click", (event) => fromMap(event.points[0].customdata ?? []));
    }
  }

  async function showAll() {
    const mine = ++generation;
    root.dataset.ready = "";
    for (const figure of figures) {
      await show(figure, mine);
      if (mine !== generation) { return; }
    }
    offerHeads();
    root.dataset.ready = "yes";
  }

  function showScope() {
    for (const part of document.querySelectorAll(".scope")) { part.hidden = part.dataset.scope !== scope.value; }
  }

  function showMethods() {
    const out = hidden();
    for (const row of document.querySelectorAll("tr[data-label]")) { row.hidden = out.has(row.dataset.label); }
    document.getElementById("n-shown").textContent = `${boxes.length - out.size} of ${boxes.length}`;
  }

  // --- one head: one choice for all its figures -----------------------------------------------------------------------

  function offerHeads() {
    const names = [...ofHead[0].querySelectorAll(".variant option")].map((o) => o.value);
    const kept = names.includes(head.value) ? head.value : names[0];
    head.replaceChildren(...names.map((n) => new Option(n, n, false, n === kept)));
    head.closest("p").hidden = names.length < 2;
  }

  function choose(name) {
    head.value = name;
    for (const figure of ofHead) {
      chosen[figure.dataset.name] = name;
      show(figure, generation);
    }
  }

  function fromMap([layer, kvHead]) {
    const wanted = `layer ${layer}, KV head ${kvHead}`;
    const name = [...head.options].map((o) => o.value).find((v) => v === wanted || v.endsWith(`: ${wanted}`));
    if (name) {
      choose(name);
      head.scrollIntoView({block: "start"});
      head.focus();
    }
  }

  head.addEventListener("change", () => choose(head.value));
  scope.addEventListener("change", () => { showScope(); showAll(); });
  scope.parentElement.hidden = meta.scopes.length < 2;
  document.getElementById("methods").hidden = boxes.length < 2;
  document.getElementById("methods").addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.currentTarget.open = false; event.currentTarget.firstElementChild.focus(); }
  });
  for (const box of boxes) { box.addEventListener("change", () => { showMethods(); showAll(); }); }
  for (const figure of figures) {
    figure.querySelector(".variant select").addEventListener("change", (event) => {
      chosen[figure.dataset.name] = event.target.value;
      show(figure, generation);
    });
  }
  page.tables();
  page.theme(showAll);
  showScope();
  showMethods();
  showAll();
})();
