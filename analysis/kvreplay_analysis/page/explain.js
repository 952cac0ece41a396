"use strict";
// One choice of a head for all figures of one head; report.js draws them.
(() => {
  const head = document.getElementById("head");
  const figures = [...document.querySelectorAll("figure[data-per-head]")];
  const map = document.querySelector("#figure-heads .plot");
  const root = document.documentElement;

  // Chooses a head in every figure that has it.
  function choose(name) {
    head.value = name;
    for (const figure of figures) {
      const select = figure.querySelector(".variant select");
      if (select.value !== name && [...select.options].some((o) => o.value === name)) {
        select.value = name;
        select.dispatchEvent(new Event("change"));
      }
    }
  }

  // After report.js has drawn everything, of whatever trace: the heads there are, and what a click on the map means.
  function drawn() {
    const names = [...figures[0].querySelectorAll(".variant select option")].map((o) => o.value);
    const kept = names.includes(head.value) ? head.value : names[0];
    head.replaceChildren(...names.map((n) => new Option(n, n, false, n === kept)));
    head.closest("p").hidden = names.length < 2;
    if (kept) { choose(kept); }
    if (map.on && !map.dataset.linked) {
      map.dataset.linked = "yes";
      map.on("plotly_click", (event) => {
        const [layer, kvHead] = event.points[0].customdata ?? [];
        const wanted = `layer ${layer}, KV head ${kvHead}`;
        const name = [...head.options].map((o) => o.value).find((v) => v === wanted || v.endsWith(`: ${wanted}`));
        if (name) {
          choose(name);
          head.scrollIntoView({block: "start"});
          head.focus();
        }
      });
    }
  }

  head.addEventListener("change", () => choose(head.value));
  new MutationObserver(() => { if (root.dataset.ready === "yes") { drawn(); } })
    .observe(root, {attributes: true, attributeFilter: ["data-ready"]});
  if (root.dataset.ready === "yes") { drawn(); }
})();
