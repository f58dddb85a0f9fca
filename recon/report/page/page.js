"use strict";
// Charts in the page's colours, and tables that sort by a click on a header.

const dark = matchMedia("(prefers-color-scheme: dark)");
const printing = matchMedia("print");

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line") };
  const all = Object.assign({}, layout, {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("--ink"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 60, r: 12, t: 12, b: 40 },
    legend: Object.assign({ orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0 }, layout.legend),
    hoverlabel: { bgcolor: color("--fill"), bordercolor: color("--line"), font: { color: color("--ink") }, align: "left" },
    xaxis: Object.assign({}, layout.xaxis, axis),
    yaxis: Object.assign({}, layout.yaxis, axis),
  });
  return all;
}

function inked(data) {
  // The reference model's dark grey would vanish on a dark page.
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--quiet").trim();
  return JSON.parse(JSON.stringify(data).replaceAll("#333333", ink));
}

const narrow = matchMedia("(max-width: 600px)");

const charts = [];
for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(place.querySelector("script").textContent);
  charts.push({ place, spec, height: parseInt(place.style.height) });
}

function draw() {
  for (const { place, spec, height } of charts) {
    // On a narrow page the legend has one name a line.
    const names = spec.data.filter((trace) => trace.showlegend !== false && trace.type !== "heatmap").length;
    place.style.height = `${height + (narrow.matches && names > 2 ? 18 * names : 0)}px`;
    const options = { responsive: true, displaylogo: false, displayModeBar: false };
    Plotly.react(place, inked(spec.data), themed(spec.layout), options);
  }
}

draw();
dark.addEventListener("change", draw);
printing.addEventListener("change", () => {
  draw();
  for (const { place } of charts) if (place.offsetWidth) Plotly.Plots.resize(place);
});
narrow.addEventListener("change", draw);
for (const details of document.querySelectorAll("details")) {
  details.addEventListener("toggle", () => {
    for (const place of details.querySelectorAll(".chart")) Plotly.Plots.resize(place);
  });
}

function valueOf(row, index) {
  const cell = row.cells[index];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const number = parseFloat(cell.textContent.replaceAll(",", ""));
  return Number.isNaN(number) ? cell.textContent.trim() : number;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number") return -1;
  if (typeof b === "number") return 1;
  return a.localeCompare(b);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, index) => {
    const button = document.createElement("button");
    button.textContent = header.textContent;
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      const rising = header.getAttribute("aria-sort") !== "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (rising ? 1 : -1) * compare(valueOf(a, index), valueOf(b, index)));
      table.tBodies[0].append(...rows);
    });
  });
}
document.documentElement.dataset.drawn = charts.length;
