// Finding text in the lines of the graph, folded ones too.

const found = { text: "", rows: [], position: 0 };

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
  markFound();
  goTo(0);
}

/** Marks every place without touching the lines: thousands of them would take their time. */
function markFound() {
  if (!globalThis.Highlight) return;
  const lines = view.panes.flatMap((pane) => found.rows.map((position) => pane.lines[position]).filter(Boolean));
  const places = new Highlight();
  for (const line of lines) for (const place of placesIn(line)) places.add(place);
  CSS.highlights.set("found", places);
}

function placesIn(line) {
  const [text] = line.childNodes;
  const lower = text.data.toLowerCase();
  const places = [];
  for (let at = lower.indexOf(found.text); at >= 0; at = lower.indexOf(found.text, at + found.text.length)) {
    const end = Math.min(at + found.text.length, text.data.length);
    places.push(new StaticRange({ startContainer: text, startOffset: at, endContainer: text, endOffset: end }));
  }
  return places;
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
