// One graph: before and after the lowering side by side, or one of its other texts.

const FOLD_FROM = 12; // unchanged lines in a row
const CONTEXT = 3; // of which so many stay at either end
const CHUNK = 100; // lines that the browser lays out, or skips, together

const ITEM = ".line:not(.none), .fold"; // what can be chosen in a pane
const DIFF = "before and after the lowering";
const view = { rows: [], panes: [], rowsOf: new Map(), marked: [] };

function showGraph() {
  const { graph } = chosen;
  const stage = byId("stage");
  const titles = graph === null ? [] : [DIFF, ...Object.keys(graph.listings)];
  const title = titles.includes(stage.value) ? stage.value : titles[0];
  stage.replaceChildren(...titles.map((each) => element("option", { value: each }, each)));
  if (title) stage.value = title;
  showStage();
}

function showStage() {
  const { graph } = chosen;
  const title = byId("stage").value;
  if (graph === null) {
    Object.assign(view, { rows: [], panes: [], rowsOf: new Map(), marked: [] });
    byId("panes").replaceChildren(element("p", { class: "empty" }, "No graph was compiled in this run."));
  } else if (title === DIFF) {
    showRows(diffRows(graph), ["before", "after"]);
  } else {
    const lines = graph.listings[title].split("\n");
    showRows(lines.map((text) => ({ sign: "=", lines: [{ text }] })), [title]);
  }
  search();
}

function diffRows(graph) {
  return graph.diff.map(([sign, before, after]) => ({ sign, lines: [graph.before[before], graph.after[after]] }));
}

function showRows(rows, titles) {
  Object.assign(view, { rows, rowsOf: new Map(), marked: [] });
  chosen.row = -1;
  rows.forEach((row, position) => {
    for (const name of weightsOf(row)) {
      if (!view.rowsOf.has(name)) view.rowsOf.set(name, []);
      view.rowsOf.get(name).push(position);
    }
  });
  view.panes = titles.map((title, side) => buildPane(title, side));
  const figures = view.panes.map((pane, side) =>
    element("figure", {}, element("figcaption", {}, `${titles[side]}, ${count(side)} lines`), pane),
  );
  byId("panes").replaceChildren(...figures);
  byId("panes").classList.toggle("single", titles.length === 1);
  markGraph();
}

const count = (side) => view.rows.filter((row) => row.lines[side]).length;

const weightsOf = (row) => new Set(row.lines.flatMap((line) => line?.weights ?? []));

/** Of both sides: panes of one size scroll alike. */
const longestLine = () =>
  view.rows.reduce((most, row) => Math.max(most, ...row.lines.map((line) => line?.text.length ?? 0)), 0);

// --- building ---------------------------------------------------------------------------------------------------

function buildPane(title, side) {
  const pane = element("div", { class: "pane", role: "listbox", "aria-label": `Graph ${title}` });
  const content = element("div", { class: "lines", style: `min-width: calc(${longestLine()}ch + 3.5rem)` });
  pane.side = side;
  pane.lines = []; // by row, as far as they are shown
  for (const { from, to, folded } of segments(view.rows)) {
    content.append(...(folded ? [foldButton(from, to)] : chunks(pane, from, to)));
  }
  pane.append(content);
  content.querySelector(ITEM)?.setAttribute("tabindex", "0");
  rove(pane, ITEM, (item) => enterDetails(item) || chooseItem(item));
  pane.addEventListener("scroll", () => {
    for (const other of view.panes) if (other.scrollTop !== pane.scrollTop) other.scrollTop = pane.scrollTop;
  });
  return pane;
}

/** Runs of rows, long ones without changes folded, unless nothing changed at all. */
function segments(rows) {
  const found = [];
  const add = (from, to, folded) => from < to && found.push({ from, to, folded });
  const plain = rows.map((row) => row.sign === "=" && weightsOf(row).size === 0);
  const anyChange = rows.some((row) => row.sign !== "=");
  let shown = 0;
  for (let from = 0; anyChange && from < rows.length; from += 1) {
    let to = from;
    while (to < rows.length && plain[to]) to += 1;
    if (to - from >= FOLD_FROM) {
      add(shown, from + CONTEXT, false);
      add(from + CONTEXT, to - CONTEXT, true);
      shown = to - CONTEXT;
    }
    from = to;
  }
  add(shown, rows.length, false);
  return found;
}

function chunks(pane, from, to) {
  const made = [];
  for (let start = from; start < to; start += CHUNK) {
    const end = Math.min(start + CHUNK, to);
    const chunk = element("div", { class: "chunk", style: `contain-intrinsic-height: calc(${end - start} * var(--row))` });
    for (let row = start; row < end; row += 1) chunk.append(buildLine(pane, row));
    made.push(chunk);
  }
  return made;
}

const SIGNS = {
  "=": [["", " "], ["", " "]],
  "~": [["changed", "~"], ["changed", "~"]],
  "-": [["removed", "−"], ["none", " "]],
  "+": [["none", " "], ["added", "+"]],
};

function buildLine(pane, position) {
  const row = view.rows[position];
  const line = row.lines[pane.side];
  const [kind, sign] = SIGNS[row.sign][pane.side];
  if (line === undefined) return element("div", { class: "line none" });
  const action = line.weights ? ` act-${chosen.run.actions.get(line.weights[0]) ?? "plain"}` : "";
  const made = element("div", {
    class: `line ${kind}${action}`,
    role: "option",
    tabindex: "-1",
    "aria-selected": "false",
    "data-sign": sign,
  });
  made.row = position;
  pane.lines[position] = made;
  made.append(line.text);
  return made;
}

function foldButton(from, to) {
  const button = element("button", { type: "button", class: "fold", tabindex: "-1" });
  button.textContent = `show ${to - from} unchanged lines`;
  Object.assign(button, { from, to });
  return button;
}

/** Shows the lines behind a fold, in both panes. */
function unfold(from) {
  for (const pane of view.panes) {
    const button = [...pane.querySelectorAll(".fold")].find((each) => each.from === from);
    const hadFocus = document.activeElement === button;
    button.replaceWith(...chunks(pane, button.from, button.to));
    const first = pane.lines[from];
    if (pane.querySelector('[tabindex="0"]') === null || hadFocus) rest(pane, first);
    if (hadFocus) first.focus();
  }
  markFound();
}

// --- what is chosen ---------------------------------------------------------------------------------------------

/** Marks the lines of the chosen weights, and the chosen row. */
function markGraph() {
  for (const line of view.marked) {
    line.classList.remove("linked");
    line.setAttribute("aria-selected", "false");
  }
  view.marked = [];
  const rows = new Set([...chosen.weights].flatMap((name) => view.rowsOf.get(name) ?? []));
  for (const pane of view.panes) {
    for (const row of rows) mark(pane, row, (line) => line.classList.add("linked"));
    if (chosen.row >= 0) mark(pane, chosen.row, (line) => line.setAttribute("aria-selected", "true"));
  }
}

function mark(pane, row, how) {
  const line = pane.lines[row];
  const names = view.rows[row].lines[pane.side]?.weights ?? [];
  if (line === undefined || (row !== chosen.row && !names.some((name) => chosen.weights.has(name)))) return;
  how(line);
  view.marked.push(line);
}

/** Scrolls all panes to a row, showing it if it is folded away. */
function scrollToRow(position) {
  if (!view.panes.some((pane) => pane.lines[position])) {
    const fold = [...view.panes[0].querySelectorAll(".fold")].find((each) => each.from <= position && position < each.to);
    unfold(fold.from);
  }
  for (const pane of view.panes) {
    const line = pane.lines[position];
    if (line === undefined) continue;
    scrollWithin(pane, line, pane.clientHeight / 2 - line.clientHeight);
    rest(pane, line);
  }
}

/** The row where a weight is read, else its first. */
function mainRow(name) {
  const rows = view.rowsOf.get(name) ?? [];
  const reads = (position) => view.rows[position].lines.some((line) => line?.reads && line.weights?.includes(name));
  return rows.find(reads) ?? rows[0] ?? -1;
}

function chooseItem(item) {
  if (item.matches(".fold")) unfold(item.from);
  else chooseRow(item.row, item);
}

function startGraph() {
  byId("panes").addEventListener("click", (event) => {
    const item = event.target.closest(ITEM);
    if (item !== null) chooseItem(item);
  });
  byId("stage").addEventListener("change", showStage);
  byId("graph").addEventListener("change", () => {
    chosen.graph = chosen.run.graphs[byId("graph").value];
    showGraph();
  });
}
