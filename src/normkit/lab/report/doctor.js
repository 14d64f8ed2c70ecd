"use strict";
for (const figure of document.querySelectorAll("figure")) {
  const output = figure.querySelector("output");
  for (const chart of figure.querySelectorAll("svg.chart")) follow(chart, output);
}

function follow(chart, output) {
  const marks = [...chart.querySelectorAll(".mark")];
  let current = -1;
  const show = (index) => {
    marks[current]?.classList.remove("current");
    current = Math.max(0, Math.min(marks.length - 1, index));
    marks[current]?.classList.add("current");
    output.textContent = marks[current]?.querySelector("title").textContent ?? "";
  };
  const keys = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  chart.tabIndex = 0;
  chart.addEventListener("focus", () => show(Math.max(current, 0)));
  chart.addEventListener("keydown", (event) => {
    if (!(event.key in keys)) return;
    event.preventDefault();
    show(current + keys[event.key]);
  });
  marks.forEach((mark, index) => mark.addEventListener("mouseenter", () => show(index)));
}
