// Choosing a run, a weight or a line, and the colours of the page.

function chooseRun(position) {
  chosen.run = runs[position];
  chosen.graph = chosen.run.graphs[0] ?? null;
  chosen.weights = new Set();
  for (const part of document.querySelectorAll("[data-run]")) part.hidden = Number(part.dataset.run) !== position;
  document.querySelectorAll('[role="tab"]').forEach((tab, each) => {
    tab.setAttribute("aria-selected", String(each === position));
    tab.tabIndex = each === position ? 0 : -1;
    if (each === position) byId("panel").setAttribute("aria-labelledby", tab.id);
  });
  closeDetails();
  showTable();
  showGraphs();
}

function showGraphs() {
  const { graphs } = chosen.run;
  const option = (_, position) => element("option", { value: position }, `${position + 1} of ${graphs.length}`);
  byId("graph").replaceChildren(...graphs.map(option));
  byId("graph-field").hidden = graphs.length < 2;
  showGraph();
}

function chooseWeight(weight, from) {
  chosen.weights = new Set([weight.name]);
  const { graphs } = chosen.run;
  if (graphs.length && byId("stage").value !== DIFF) {
    byId("stage").value = DIFF;
    showStage();
  }
  if (!chosen.graph || !hasWeight(chosen.graph, weight.name)) {
    const position = graphs.findIndex((graph) => hasWeight(graph, weight.name));
    if (position >= 0) {
      chosen.graph = graphs[position];
      byId("graph").value = String(position);
      showGraph();
    }
  }
  chosen.row = mainRow(weight.name);
  markTable();
  weightDetails(weight, from);
  if (chosen.row >= 0) {
    scrollToRow(chosen.row);
    markGraph();
    byId("graphs").scrollIntoView({ block: "nearest" });
  } else {
    markGraph();
  }
}

function chooseRow(position, from) {
  const row = view.rows[position];
  chosen.row = position;
  chosen.weights = weightsOf(row);
  markGraph();
  markTable();
  if (view.panes.length === 1) return; // a listing
  lineDetails(row, from);
  for (const pane of view.panes) if (pane.lines[position]) scrollWithin(pane, pane.lines[position], 40);
  from.scrollIntoView({ block: "nearest", inline: "nearest" });
}

// --- tabs and colours -------------------------------------------------------------------------------------------

function startTabs() {
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
  tabs.forEach((tab, position) => {
    tab.addEventListener("click", () => chooseRun(position));
    tab.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      const wanted = position + steps[event.key];
      const next = Number.isFinite(wanted) ? (wanted + tabs.length) % tabs.length : wanted < 0 ? 0 : tabs.length - 1;
      tabs[next].focus();
      chooseRun(next);
    });
  });
}

function startComparison() {
  byId("only-different")?.addEventListener("change", (event) => {
    for (const row of document.querySelectorAll("#comparison tr[data-same]")) row.hidden = event.target.checked;
  });
}

function startTheme() {
  const themes = ["system", "light", "dark"];
  const button = byId("theme");
  button.addEventListener("click", () => {
    const root = document.documentElement;
    const next = themes[(themes.indexOf(root.dataset.theme ?? "system") + 1) % themes.length];
    root.dataset.theme = next;
    button.textContent = `Theme: ${next}`;
  });
}

for (const run of runs) run.actions = new Map(run.weights.map((weight) => [weight.name, weight.action]));
startTable();
startGraph();
startSearch();
startDetails();
startTabs();
startComparison();
startTheme();
if (runs.length) chooseRun(0);
