"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(table, headings, column));
  });
}

for (const box of document.querySelectorAll(".scroll")) {
  const cue = document.createElement("p");
  cue.className = "cue";
  cue.textContent = "more to the right: scroll the table →";
  box.before(cue);
  const look = () => {
    const left = box.scrollWidth - box.clientWidth;
    cue.hidden = left < 2;
    cue.style.visibility = box.scrollLeft < left - 1 ? "visible" : "hidden";
    box.classList.toggle("more", box.scrollLeft < left - 1);
  };
  box.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(box);
}

function sort(table, headings, column) {
  const heading = headings[column];
  const numeric = heading.dataset.sort === "number";
  const before = heading.getAttribute("aria-sort");
  const first = numeric ? "descending" : "ascending";
  const other = numeric ? "ascending" : "descending";
  const order = before === first ? other : first;
  headings.forEach((each) => each.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", order);
  for (const body of table.tBodies) {
    const rows = [...body.rows];
    rows.sort((a, b) => compare(a.cells[column], b.cells[column], numeric, order));
    body.append(...rows);
  }
}

function compare(a, b, numeric, order) {
  const sign = order === "ascending" ? 1 : -1;
  if (!numeric) return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
  const [x, y] = [a, b].map((cell) => (cell.dataset.value === "" ? null : Number(cell.dataset.value)));
  if (x === null || y === null) return (x === null) - (y === null);  // no value: always last
  return sign * (x - y);
}
