"use strict";
// Draws each figure of the page from its specification, and moves the range of steps of all of them together.
(async () => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const ink = { labelColor: "currentColor", titleColor: "currentColor" };
  const config = {
    background: null,
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: {
      ...ink, domainColor: "currentColor", tickColor: "currentColor", gridColor: "currentColor", gridOpacity: 0.15,
      labelOverlap: true, labelSeparation: 4, labelLimit: 140, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal",
    },
    legend: { ...ink, orient: "top", labelFontSize: 12, labelLimit: 220, titleLimit: 320, columns: { expr: "width < 220 ? 1 : width < 480 ? 2 : 6" }, gradientLength: 160 },
    text: { color: "currentColor" },
  };
  const views = [];
  const charts = document.querySelectorAll(".chart");
  for (const chart of charts) {
    const options = { actions: false, renderer: "svg", ast: true, config };
    const spec = { autosize: { type: "fit-x", contains: "padding" }, ...specs[chart.dataset.figure] };
    const { view } = await vegaEmbed(chart, spec, options);
    const signals = view.getState({ signals: (name) => name === "from" || name === "to", data: () => false }).signals;
    // A range of steps in which there is nothing to draw is no mistake: only errors are told from here on.
    if ("from" in signals) views.push(view.logLevel(1));
    chart.querySelectorAll("select").forEach((select) => select.setAttribute("aria-label", "layer"));
  }
  const form = document.getElementById("range");
  if (form) {
    const show = (from, to) => views.forEach((view) => view.signal("from", from).signal("to", to).runAsync());
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => show(Number(form.from.defaultValue), Number(form.to.defaultValue)));
    form.addEventListener("change", () => {
      const from = Number(form.from.value), to = Number(form.to.value);
      if (form.checkValidity() && from < to) show(from, to);
    });
  }
  document.body.dataset.drawn = String(charts.length);
})();
