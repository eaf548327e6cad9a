// The table of weights: rows are built once for each run, then only moved and hidden.

const ACTIONS = ["folded", "kept", "unmatched"];
const collator = new Intl.Collator("en", { numeric: true });
const numbers = (one, other) => one - other;
const words = (one, other) => collator.compare(one, other);

const COLUMNS = [
  { title: "name", key: (weight) => weight.name, compare: words, code: true },
  { title: "shape", key: (weight) => weight.shape.reduce((product, n) => product * n, 1), compare: numbers, code: true },
  { title: "action", key: (weight) => ACTIONS.indexOf(weight.action), compare: numbers },
  { title: "reason", key: (weight) => weight.reason, compare: words },
  { title: "kernel", key: (weight) => weight.kernel, compare: words, code: true },
  { title: "bytes before", key: (weight) => weight.bytes_before, compare: numbers, number: true },
  { title: "bytes after", key: (weight) => weight.bytes_after, compare: numbers, number: true },
];

const table = byId("table");
const hiddenActions = new Set();

function buildTableHead() {
  for (const column of COLUMNS) {
    const button = element("button", { type: "button" }, column.title);
    const cell = element("th", { scope: "col", "aria-sort": "none" }, button);
    if (column.number) cell.className = "number";
    table.tHead.rows[0].append(cell);
    button.addEventListener("click", () => sortBy(column, cell));
  }
}

/** The body of the table for one run, made when the run is first shown. */
function tableBody(run) {
  run.body ??= element("tbody", {}, ...run.weights.map(weightRow));
  return run.body;
}

function weightRow(weight, position) {
  const row = element("tr", { tabindex: position === 0 ? 0 : -1, "aria-selected": "false" });
  const shape = weight.shape.join("x");
  row.append(
    element("td", { class: "code name" }, weight.name),
    element("td", { class: "code shape" }, shape),
    element("td", {}, chip(weight.action)),
    element("td", { class: "reason" }, weight.reason),
    element("td", { class: "code kernel" }, weight.kernel),
    element("td", { class: "number", title: exactBytes(weight.bytes_before) }, size(weight.bytes_before)),
    element("td", { class: "number", title: exactBytes(weight.bytes_after) }, size(weight.bytes_after)),
  );
  row.weight = weight;
  row.words = [weight.name, shape, weight.action, weight.reason, weight.kernel].join("\n").toLowerCase();
  weight.row = row;
  return row;
}

function showTable() {
  table.tBodies[0]?.remove();
  table.tHead.after(tableBody(chosen.run));
  for (const button of document.querySelectorAll(".toggle")) {
    const action = button.dataset.action;
    const count = chosen.run.weights.filter((weight) => weight.action === action).length;
    button.textContent = `${action} ${count}`;
  }
  const sorted = [...table.tHead.rows[0].cells].findIndex((cell) => cell.getAttribute("aria-sort") !== "none");
  if (sorted >= 0) orderRows(COLUMNS[sorted], table.tHead.rows[0].cells[sorted].getAttribute("aria-sort"));
  filterTable();
}

function sortBy(column, cell) {
  const direction = cell.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const each of table.tHead.rows[0].cells) each.setAttribute("aria-sort", "none");
  cell.setAttribute("aria-sort", direction);
  orderRows(column, direction);
}

function orderRows(column, direction) {
  const sign = direction === "ascending" ? 1 : -1;
  const keyed = chosen.run.weights.map((weight) => [column.key(weight), weight.row]);
  keyed.sort((one, other) => sign * column.compare(one[0], other[0]));
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

function filterTable() {
  const text = byId("filter").value.trim().toLowerCase();
  const shown = [];
  for (const weight of chosen.run.weights) {
    weight.row.hidden = hiddenActions.has(weight.action) || !weight.row.words.includes(text);
    if (!weight.row.hidden) shown.push(weight);
  }
  const reachable = table.tBodies[0].querySelector('[tabindex="0"]');
  if (reachable === null || reachable.hidden) rest(table.tBodies[0], table.tBodies[0].querySelector("tr:not([hidden])"));
  showTotals(shown);
}

function showTotals(shown) {
  const all = chosen.run.weights.length;
  const count = `${shown.length === all ? all : `${shown.length} of ${all}`} weight${all === 1 ? "" : "s"}`;
  const [before, after] = ["bytes_before", "bytes_after"].map((field) =>
    shown.reduce((sum, weight) => sum + weight[field], 0),
  );
  byId("table").tFoot.rows[0].replaceChildren(
    element("th", { scope: "row", colspan: 5 }, count),
    element("td", { class: "number", title: exactBytes(before) }, size(before)),
    element("td", { class: "number", title: exactBytes(after) }, size(after)),
  );
}

/** Marks the rows of the chosen weights. */
function markTable() {
  for (const row of table.querySelectorAll('tr[aria-selected="true"]')) row.setAttribute("aria-selected", "false");
  const selected = chosen.run.weights.filter((weight) => chosen.weights.has(weight.name)).map((weight) => weight.row);
  for (const row of selected) row.setAttribute("aria-selected", "true");
  const first = selected.find((row) => !row.hidden);
  if (first) {
    rest(table.tBodies[0], first);
    scrollWithin(table.closest(".box"), first, 40);
  }
}

function startTable() {
  buildTableHead();
  byId("filter").addEventListener("input", filterTable);
  for (const button of document.querySelectorAll(".toggle")) {
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(pressed));
      if (pressed) hiddenActions.delete(button.dataset.action);
      else hiddenActions.add(button.dataset.action);
      filterTable();
    });
  }
  const choose = (row) => chooseWeight(row.weight, row);
  table.addEventListener("click", (event) => {
    const row = event.target.closest("tbody tr");
    if (row !== null) choose(row);
  });
  rove(table, "tbody tr", (row) => enterDetails(row) || choose(row));
}
