"use strict";
/* Filters and sorts tables. Every control names its table; texts are compared as texts, numbers as numbers. */
for (const box of document.querySelectorAll("[data-table]")) {
  const table = document.getElementById(box.dataset.table);
  const rows = Array.from(table.tBodies[0].rows);
  const count = box.querySelector("output");
  const controls = Array.from(box.querySelectorAll("input, select"));
  const filter = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !controls.every((control) =>
        control.tagName === "SELECT"
          ? !control.value || row.dataset[control.name] === control.value
          : row.textContent.toLowerCase().includes(control.value.toLowerCase()));
      if (!row.hidden) shown += 1;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  for (const control of controls) control.addEventListener("input", filter);
  filter();
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const table = head.closest("table");
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[head.cellIndex].dataset.sort ?? row.cells[head.cellIndex].textContent.trim();
    const compare = (one, other) => {
      if (one === "" || other === "") return (one === "") - (other === "") || 0;
      const order = isNaN(one) || isNaN(other) ? one.localeCompare(other) : one - other;
      return down ? -order : order;
    };
    const body = table.tBodies[0];
    const rows = Array.from(body.rows).map((row) => [value(row), row]);
    rows.sort((one, other) => compare(one[0], other[0]));
    for (const [, row] of rows) body.append(row);
  });
}
/* Prompts are kept once, as data, and shown as text when their row is opened. */
const kept = document.getElementById("prompts");
const prompts = kept ? JSON.parse(kept.textContent) : [];
for (const details of document.querySelectorAll("details[data-prompt]")) {
  details.addEventListener("toggle", () => {
    details.querySelector("pre").textContent = prompts[Number(details.dataset.prompt)];
  }, { once: true });
}
