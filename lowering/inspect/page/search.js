// Finding text in the lines of the graph, folded ones too.

const found = { text: "", rows: [], position: 0, marked: [] };

/** Looks for what the box says, and goes to the first place. */
function search() {
  found.text = byId("search").value.toLowerCase();
  const matches = (line) => line?.text.toLowerCase().includes(found.text);
  found.rows = [];
  if (found.text) {
    view.rows.forEach((row, position) => {
      if (row.lines.some(matches)) found.rows.push(position);
    });
  }
  rewrite(found.marked);
  const lines = view.panes.flatMap((pane) => found.rows.map((position) => pane.lines[position]));
  rewrite(lines.filter(Boolean));
  goTo(0);
}

function rewrite(lines) {
  for (const line of lines) {
    const pane = line.closest(".pane");
    if (pane !== null) writeLine(line, view.rows[line.row].lines[pane.side].text);
  }
}

/** Writes the text of a line, with what is searched for marked. */
function writeLine(line, text) {
  line.textContent = "";
  const lower = text.toLowerCase();
  let start = 0;
  let at = found.text ? lower.indexOf(found.text) : -1;
  if (at >= 0) found.marked.push(line);
  while (at >= 0) {
    line.append(text.slice(start, at), element("mark", {}, text.slice(at, at + found.text.length)));
    start = at + found.text.length;
    at = lower.indexOf(found.text, start);
  }
  line.append(text.slice(start));
}

function goTo(position) {
  for (const line of document.querySelectorAll(".line.current")) line.classList.remove("current");
  const total = found.rows.length;
  byId("search-count").textContent = found.text ? (total ? "" : "0 of 0") : "";
  if (!total) return;
  found.position = (position + total) % total;
  byId("search-count").textContent = `${found.position + 1} of ${total}`;
  const row = found.rows[found.position];
  scrollToRow(row);
  for (const pane of view.panes) pane.lines[row]?.classList.add("current");
}

function startSearch() {
  const box = byId("search");
  box.addEventListener("input", search);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      goTo(found.position + (event.shiftKey ? -1 : 1));
    } else if (event.key === "Escape") {
      event.preventDefault();
      box.value = "";
      search();
      box.blur();
    }
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      box.focus();
      box.select();
    }
  });
}
