"use strict";
// Conveniences only: without this script everything is there and can be reached.
for (const table of document.querySelectorAll("table.sortable")) {
  const first = table.querySelector("tbody tr:not(.group)");
  table.querySelectorAll("thead th").forEach((head, column) => {
    if (first.cells[column].querySelector("svg")) return; // the figures beside a picture sort
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(table, head, column));
  });
}
function sort(table, head, column) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
  };
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
    rows.sort((one, other) => {
      const [a, b] = [key(one), key(other)];
      // Figures before texts ("n/a"), in either direction.
      if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
      const order = typeof a === "number" ? a - b : a.localeCompare(b);
      return down ? -order : order;
    });
    body.append(...rows);
  }
}
for (const series of document.querySelectorAll("section.series")) {
  const tools = series.querySelector(".tools");
  const cells = [...series.querySelectorAll("details.cell")];
  tools.hidden = false;
  tools.querySelector(".open").addEventListener("click", () => cells.forEach((cell) => (cell.open = !cell.hidden)));
  tools.querySelector(".close").addEventListener("click", () => cells.forEach((cell) => (cell.open = false)));
  tools.querySelector(".filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    for (const cell of cells) cell.hidden = !words.every((word) => cell.dataset.name.toLowerCase().includes(word));
  });
}
// Browsers that do not open a closed <details> for a link into it.
function reveal() {
  let element = location.hash.length > 1 ? document.getElementById(location.hash.slice(1)) : null;
  for (let at = element; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (element) element.scrollIntoView();
}
addEventListener("hashchange", reveal);
if (location.hash) reveal();
// Browsers whose print styles cannot reach into a closed <details>.
const closed = [];
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details:not([open])")) {
    closed.push(one);
    one.open = true;
  }
});
addEventListener("afterprint", () => {
  for (const one of closed.splice(0)) one.open = false;
});
