"use strict";
// Shows the values of a chart at the pointer, or at the arrow keys' position where the chart has the focus.
const tip = document.getElementById("tip");
let told = null; // the chart whose values are shown, and what hides them
document.addEventListener("pointerdown", (event) => { if (told && !told.svg.contains(event.target)) told.hide(); });
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart);
  const cursor = svg.querySelector(".cursor");
  const view = svg.viewBox.baseVal;
  let index = chart.px.length - 1;
  const hide = () => {
    cursor.setAttribute("visibility", "hidden");
    if (told?.svg === svg) { tip.hidden = true; told = null; }
  };
  const show = (place) => {
    index = Math.min(chart.px.length - 1, Math.max(0, place));
    cursor.setAttribute("transform", `translate(${chart.px[index]} 0)`);
    cursor.setAttribute("visibility", "visible");
    const title = document.createElement("b");
    title.textContent = chart.labels[index];
    const rows = chart.rows.filter((row) => row.text[index]).map((row) => {
      const line = document.createElement("span");
      const mark = document.createElement("i");
      mark.className = row.colour;
      line.append(mark, `${row.name} ${row.text[index]}`);
      return line;
    });
    tip.replaceChildren(title, ...rows);
    tip.hidden = false;
    told = { svg, hide };
    const box = svg.getBoundingClientRect();
    const x = box.left + chart.px[index] / view.width * box.width;
    const left = x + 12 + tip.offsetWidth > innerWidth ? x - 12 - tip.offsetWidth : x + 12;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.min(innerHeight - tip.offsetHeight - 4, Math.max(4, box.top + 8))}px`;
  };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * view.width;
    let nearest = 0;
    chart.px.forEach((px, k) => { if (Math.abs(px - x) < Math.abs(chart.px[nearest] - x)) nearest = k; });
    show(nearest);
  };
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointermove", point);
  // What a finger has shown stays until it touches something else.
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hide(); });
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(index); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: chart.px.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
}
// Fills the table of a chart's values when it is opened for the first time.
for (const details of document.querySelectorAll("details.values")) {
  details.addEventListener("toggle", () => {
    if (details.childElementCount > 1) return;
    const chart = JSON.parse(details.parentElement.querySelector("svg").dataset.chart);
    const table = document.createElement("table");
    const row = (into, tag, texts) => {
      const line = into.insertRow();
      texts.forEach((text, k) => {
        const cell = document.createElement(tag === "th" || k === 0 ? "th" : "td");
        if (cell.tagName === "TH") cell.scope = tag === "th" ? "col" : "row";
        cell.textContent = text;
        line.append(cell);
      });
    };
    row(table.createTHead(), "th", ["", ...chart.rows.map((one) => one.name)]);
    const body = table.createTBody();
    chart.labels.forEach((label, k) => row(body, "td", [label, ...chart.rows.map((one) => one.text[k])]));
    const box = document.createElement("div");
    box.className = "scroll";
    box.tabIndex = 0;
    box.append(table);
    details.append(box);
  });
}
